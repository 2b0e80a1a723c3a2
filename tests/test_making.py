"""From two files of weights and a folder of images to a repository: with and without labels, interrupted, refused."""

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import timm
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from families import randomise
from stitchable import StitchableForImageClassification, from_anchors, making
from stitchable.front import Judgement
from stitchable.making import STEPS, UNFINISHED, Plan, Run, make, summary
from stitchable_cli import app

KWARGS = {"img_size": 32, "patch_size": 8, "depth": 3, "num_heads": 2}


@pytest.fixture(autouse=True)
def _quiet(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.fixture
def anchors(tmp_path) -> list[dict[str, Any]]:
    """Two files of weights, with what their modules were made with."""
    found = []
    for width in (8, 12):
        kwargs = {**KWARGS, "embed_dim": width}
        module = randomise(timm.create_model("vit_tiny_patch16_224", num_classes=4, **kwargs), seed=width)
        save_file(module.state_dict(), tmp_path / f"{width}.safetensors")
        weights = str(tmp_path / f"{width}.safetensors")
        found.append({"architecture": "vit_tiny_patch16_224", "kwargs": kwargs, "weights": weights})
    return found


def pictures(folder: Path, number: int, size: int = 36, classes: int = 4) -> str:
    rng = np.random.default_rng(0)
    for index in range(number):
        path = folder / f"class {index % classes}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 255, (size, size, 3)) * rng.random((1, 1, 3))
        Image.fromarray(pixels.astype("uint8")).save(path)
    return str(folder)


def test_two_files_and_labelled_images_become_a_repository(anchors, tmp_path) -> None:
    lines: list[str] = []
    plan = Plan(anchors, pictures(tmp_path / "pictures", 90))
    model = make(plan, tmp_path / "elastic", minutes=0.5, say=lines.append)
    assert [line.split(":")[0] for line in lines[: len(STEPS)]] == [
        f"{i}/{len(STEPS)} {name}" for i, name in enumerate(STEPS, 1)
    ]
    assert "60 images make the model, 30 measure it" in lines[1]
    assert "no labels" not in lines[1]
    assert all("left" in line for line in lines[: len(STEPS) - 1])
    assert len(lines) > len(STEPS)
    assert not (tmp_path / "elastic" / UNFINISHED).exists()
    again = StitchableForImageClassification.from_pretrained(tmp_path / "elastic").eval()
    x = torch.randn(2, 3, 32, 32)
    for stitch in again.stitches:
        assert {"accuracy", "loss"} <= set(stitch.metrics)
        assert stitch.latency_ms > 0
        assert torch.equal(again(x, stitch_id=stitch.id).logits, model(x, stitch_id=stitch.id).logits)
    assert 2 < len(again.stitches) < 9
    assert len(ModelCard.load(tmp_path / "elastic" / "README.md").data.eval_results) == len(again.stitches)
    assert (tmp_path / "elastic" / "accuracy_flops.png").exists()


def test_the_anchors_are_those_of_the_files(anchors, tmp_path) -> None:
    model = make(Plan(anchors, pictures(tmp_path / "pictures", 30)), tmp_path / "elastic", minutes=0.1)
    x = torch.randn(2, 3, 32, 32)
    for index, anchor in enumerate(anchors):
        alone = timm.create_model(anchor["architecture"], num_classes=4, **anchor["kwargs"])
        timm.models.load_checkpoint(alone, anchor["weights"])
        assert torch.equal(model(x, stitch_id=index).logits, alone.eval()(x))


@pytest.mark.parametrize("classes", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_without_labels_nothing_is_called_accuracy(classes, anchors, tmp_path, caplog) -> None:
    """One folder says nothing, and three are not the model's four classes."""
    lines: list[str] = []
    plan = Plan(anchors, pictures(tmp_path / "pictures", 90, classes=classes))
    model = make(plan, tmp_path / "elastic", minutes=0.5, say=lines.append)
    assert "so what is measured is agreement with the largest anchor" in lines[1]
    assert model.stitches[1].metrics == {"agreement": 1.0}
    assert 0 <= model.stitches[0].metrics["agreement"] < 1
    assert "accuracy" not in json.dumps([*model.config.stitches, *model.config.cascades])
    assert not any("accuracy" in line and "no accuracy" not in line for line in lines)
    card = ModelCard.load(tmp_path / "elastic" / "README.md")
    assert card.data.eval_results is None
    assert "| accuracy |" not in card.text
    assert "| agreement |" in card.text
    assert "Agreement is how often a stitch gives the same\nanswer as the largest anchor" in card.text
    assert not any("are right" in message for message in caplog.messages)
    assert (tmp_path / "elastic" / "accuracy_flops.png").exists()
    # A budget goes by what there is.
    again = StitchableForImageClassification.from_pretrained(tmp_path / "elastic")
    assert again.find(flops=1e12).metrics["agreement"] == 1.0


def test_an_interrupted_run_goes_on_where_it_was(anchors, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(making, "_STEPS", 20)
    plan = Plan(anchors, pictures(tmp_path / "pictures", 90))
    whole = make(plan, tmp_path / "whole")
    for number in (0, 2, len(STEPS) - 2):
        lines: list[str] = []

        def interrupt(line: str, last: str = f"{number + 1}/") -> None:
            if line.startswith(last):
                raise KeyboardInterrupt

        output = tmp_path / f"interrupted-{number}"
        with pytest.raises(KeyboardInterrupt):
            make(plan, output, say=interrupt)
        assert not (output / "config.json").exists()
        assert len(list((output / UNFINISHED).glob("*/config.json"))) == 1
        model = make(plan, output, say=lines.append)
        assert [line[:2] for line in lines if line[1] == "/"] == [f"{i}/" for i in range(number + 2, len(STEPS) + 1)]
        assert [stitch.id for stitch in model.stitches] == [stitch.id for stitch in whole.stitches]
        assert [stitch.metrics for stitch in model.stitches] == [stitch.metrics for stitch in whole.stitches]
        for name, weight in whole.state_dict().items():
            assert torch.equal(model.state_dict()[name], weight), name


def test_what_would_go_on_with_something_else_is_refused(anchors, tmp_path) -> None:
    def interrupt(line: str) -> None:
        raise KeyboardInterrupt

    folder = pictures(tmp_path / "pictures", 30)
    with pytest.raises(KeyboardInterrupt):
        make(Plan(anchors, folder), tmp_path / "elastic", say=interrupt)
    with pytest.raises(ValueError, match=r"an interrupted run in .* has split=None, now it is 'train'"):
        make(Plan(anchors, folder, split="train"), tmp_path / "elastic")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years", encoding="utf-8")
    with pytest.raises(ValueError, match="already holds something"):
        make(Plan(anchors, folder), tmp_path / "full")


def test_images_that_cannot_make_a_model_are_refused(anchors, tmp_path) -> None:
    with pytest.raises(ValueError, match="has 10 images, and at least 24 are needed"):
        make(Plan(anchors, pictures(tmp_path / "few", 10)), tmp_path / "a")
    path = tmp_path / "same" / "1.png"
    path.parent.mkdir()
    for number in range(30):
        Image.new("RGB", (36, 36), "red").save(path.with_stem(str(number)))
    with pytest.raises(ValueError, match="the largest anchor says that all images are of one class"):
        make(Plan(anchors, str(path.parent)), tmp_path / "b")
    with pytest.raises(ValueError, match="minutes must be a positive number, got 0"):
        make(Plan(anchors, str(path.parent)), tmp_path / "c", minutes=0)
    assert not (tmp_path / "c").exists()


def cascade(stitches: list[int], gain: float, low: float) -> dict[str, Any]:
    first = {"stitch": stitches[0], "flops": 1e4, "score": "margin", "threshold": 0.5}
    stages = [first, {"stitch": stitches[1], "flops": 1e5}]
    figures = {"metrics": {"accuracy": 0.8, "gain": gain}, "interval": [low, gain + 0.1]}
    return {"id": stitches[1], "stages": stages, "flops": 5e4, "max_flops": 2e5, **figures}


@pytest.mark.parametrize(
    ("low", "cascades", "said"),
    [
        (0.01, [], "stitches are worth having"),
        (-0.01, [cascade([0, 3], 0.02, 0.01)], "in this cascade they do: 3 (0, where margin < 0.5 → 3)"),
        (0.01, [cascade([0, 3], 0.02, 0.01)], "stitches are worth having; so is this cascade: 3 (0, where margin"),
        (
            -0.01,
            [cascade([0, 3], 0.02, 0.01), cascade([0, 1], 0.01, 0.005)],
            "keep the 2 anchors with this cascade: 1 (0",
        ),
        (
            -0.01,
            [cascade([0, 1], 0.01, -0.005)],
            "neither stitches nor cascades bring anything beyond doubt: keep the 2 anchors",
        ),
    ],
)
def test_it_ends_with_the_front_against_the_null_line(low, cascades, said, anchors, tmp_path) -> None:
    run = Run(Plan(anchors, "x"), tmp_path / "elastic", 1.0, "cpu")
    run.model, run.facts = from_anchors(anchors), {"without_labels": None}
    run.model.cascades = cascades
    judged = Judgement(0.8, 0.79, 0.81, 0.5, (low, 0.03), 1000)
    lines = summary(run, judged, judged)
    assert lines[0] == (
        "stitches: mean accuracy over log FLOPs 80.00 %, of the untouched anchors 79.00 %: +1.00 points, "
        f"by chance {100 * low:+.2f} to +3.00"
    )
    assert lines[1].startswith("stitches and cascades: ")
    assert said in lines[2]
    assert summary(run, None, None) == [
        "the dearer anchors have no higher accuracy than the cheapest: keep that one alone"
    ]


def test_the_command_takes_files_and_names(tmp_path) -> None:
    for name in ("test_vit", "test_vit2"):
        save_file(randomise(timm.create_model(name, num_classes=4)).state_dict(), tmp_path / f"{name}.safetensors")
    files = [str(tmp_path / "test_vit.safetensors"), str(tmp_path / "test_vit2.safetensors")]
    arguments = ["--images", pictures(tmp_path / "pictures", 30), "-o", str(tmp_path / "elastic"), "--minutes", "0.2"]
    result = CliRunner().invoke(app, ["make", *files, "--architecture", "test_vit", *arguments])
    assert result.exit_code == 1
    assert "--architecture is given once for each file of weights: 2 files, 1 architectures" in result.stderr
    both = ["--architecture", "test_vit", "--architecture", "test_vit2"]
    result = CliRunner().invoke(app, ["make", *files, *both, *arguments])
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("1/6 build: ")
    assert "of test_vit, test_vit2" in result.stdout
    result = CliRunner().invoke(app, ["make", "test_vit", "someone/tiny", *both[:2], *arguments])
    assert "0 files, 1 architectures; timm names and ids on the Hub need none" in result.stderr
