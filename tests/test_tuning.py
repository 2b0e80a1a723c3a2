"""`tune`: a front that images alone make better, and the command that does it to a folder."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from families import images, make
from stitchable import StitchableForImageClassification
from stitchable.card import Card
from stitchable.fingerprints import Watch
from stitchable.own import forget
from stitchable.processing import image_processor
from stitchable.publishing import save_repository
from stitchable.training.own import Teaching, teach_together
from stitchable.training.tuning import first_images, tune
from stitchable_cli import app


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_what_helps_is_kept_and_the_rest_taken_back(name: str) -> None:
    model, said = make(name), list[str]()
    for stitch in model.stitches:
        model.record(stitch.id, metrics={"accuracy": 0.5})
    before = copy.deepcopy(model.state_dict())
    x = images(name, 100)
    scores = tune(model, x, teaching=Teaching(steps=8, rank=2), batch_size=16, say=said.append)
    assert all(torch.equal(model.state_dict()[key], before[key]) for key in before)
    assert [line.split(",")[0] for line in said] == [f"stitch {i} is taught" for i in scores]
    assert set(scores) == {stitch.id for stitch in model.stitches if not stitch.is_anchor}
    with torch.no_grad():
        largest = model(x[:20], stitch_id=1).logits.argmax(-1)
        for stitch in model.stitches:
            agreed = float((model(x[:20], stitch_id=stitch.id).logits.argmax(-1) == largest).float().mean())
            assert stitch.metrics["agreement"] == pytest.approx(agreed)
            # What was measured before stands where the weights did not change, and nowhere else.
            assert ("accuracy" in stitch.metrics) == (stitch.own is None)
            if stitch.id in scores:
                first, then = scores[stitch.id]
                assert then == pytest.approx(agreed)
                assert (stitch.own is not None) == (then > first)
    assert any(stitch.own for stitch in model.stitches)


def test_what_was_known_of_a_stitch_that_got_better_is_forgotten(caplog: pytest.LogCaptureFixture) -> None:
    model = make("resnet")
    for stitch in model.stitches:
        model.record(stitch.id, metrics={"accuracy": 0.5})
    first = {"score": "margin", "threshold": 0.5}
    costs = [stitch.flops for stitch in model.stitches]
    model.cascades = [
        {"id": number, "stages": [{"stitch": a, "flops": costs[a], **first}, {"stitch": b, "flops": costs[b]}]}
        | {"flops": costs[a], "max_flops": costs[a] + costs[b], "metrics": {"accuracy": 0.5}}
        for number, (a, b) in enumerate(((0, 1), sorted((1, 2), key=costs.__getitem__)))
    ]
    forget(model, [2])
    assert [cascade.id for cascade in model.cascades] == [0]
    assert "1 of 2 cascades run a stitch that has changed and are dropped" in caplog.text
    assert [stitch.id for stitch in model.stitches if not stitch.metrics] == [2]


@pytest.mark.parametrize(
    ("number", "labels", "options", "message"),
    [
        (4, None, {"batch_size": 2}, "at least 5 are needed, got 4"),
        (20, None, {"batch_size": 0}, "a batch_size from 1 on"),
        (20, None, {"batch_size": 2.5}, "batch_size must be an integer"),
        (20, torch.zeros(12, dtype=torch.long), {"batch_size": 4}, "there are 16 images and 8 labels"),
        (20, torch.full((20,), 7), {"batch_size": 4}, "from 0 to 4, these are 7 to 7"),
    ],
)
def test_images_and_labels_that_do_not_fit_are_refused(
    number: int, labels: torch.Tensor | None, options: dict[str, Any], message: str
) -> None:
    model = make("vit")
    with pytest.raises(ValueError, match=message):
        tune(model, images("vit", number), labels, [2], Teaching(steps=1, rank=2), **options)
    assert not len(model.own)


def test_what_taught_is_remembered() -> None:
    model, x = make("vit"), images("vit", 40)
    tune(model, x, None, [2], Teaching(steps=1, rank=2), batch_size=16)
    watch = Watch([x], model.config)
    assert len(list(watch)) == 1
    assert watch.num_known == 40


def test_by_labels() -> None:
    model, x = make("vit"), images("vit", 60)
    with torch.no_grad():
        labels = model(x, stitch_id=0).logits.argmax(-1)  # not what the largest anchor says
        right = float((model(x[:12], stitch_id=3).logits.argmax(-1) == labels[:12]).float().mean())
    scores = tune(model, x, labels, [3], Teaching(steps=2, rank=2, labels=1.0), batch_size=16)
    assert scores[3][0] == pytest.approx(right)


def test_first_images() -> None:
    batches = [{"pixel_values": images("vit", 4, seed), "labels": torch.arange(4)} for seed in range(3)]
    pixel_values, labels = first_images(batches, 6)
    assert torch.equal(pixel_values, torch.cat([batch["pixel_values"] for batch in batches])[:6])
    assert labels is not None
    assert labels.tolist() == [0, 1, 2, 3, 0, 1]
    assert first_images([images("vit", 4)], 6)[1] is None
    with pytest.raises(ValueError, match="there are no images"):
        first_images([], 6)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = make("resnet", id2label={i: f"class {i}" for i in range(5)})
    for stitch in model.stitches:
        model.record(stitch.id, metrics={"accuracy": 0.5})
    save_repository(model, tmp_path / "model", image_processor(model.config, crop_pct=1.0), Card("tiny"))
    return tmp_path / "model"


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for number in range(40):
        path = tmp_path / "photographs" / f"class {number % 5}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype="uint8")).save(path)
    return tmp_path / "photographs"


def run(*arguments: object, fails: bool = False) -> str:
    result = CliRunner().invoke(app, ["tune", *map(str, arguments)])
    assert result.exit_code == (1 if fails else 0), result.output
    return result.stderr if fails else result.stdout


class Interrupted:
    """Teaches so many stitches, and then is interrupted."""

    def __init__(self, teach: Any, number: int = 1) -> None:
        self.teach, self.number, self.taught = teach, number, list[int]()

    def __call__(self, model: Any, stitch_ids: list[int], *given: Any) -> Any:
        if len(self.taught) == self.number:
            raise ValueError("interrupted")
        self.taught += stitch_ids
        return self.teach(model, stitch_ids, *given)


def test_the_command_makes_a_folder_better(folder: Path, photographs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = StitchableForImageClassification.from_pretrained(folder)
    options = ["--images", photographs, "--steps", 3, "--rank", 2, "--batch-size", 16, "--stitches", "2,3"]
    with monkeypatch.context() as patch:  # it is interrupted behind the first of them
        patch.setattr("stitchable.training.own.teach_together", interrupted := Interrupted(teach_together))
        run(folder, *options, fails=True)
    assert interrupted.taught == [2]
    taught = load_file(f"{folder}-tune/stitch-2.safetensors")
    assert "of other weights, settings or images" in run(folder, *options, "--num-images", 30, fails=True)
    monkeypatch.setattr("stitchable.training.own.teach_together", interrupted := Interrupted(teach_together, 9))
    scores = json.loads(run(folder, *options, "--json"))
    assert interrupted.taught == [3]
    assert set(scores) == {"2", "3"}
    assert not Path(f"{folder}-tune").exists()
    model = StitchableForImageClassification.from_pretrained(folder)
    for name, tensor in before.state_dict().items():
        assert name.startswith("own.") or torch.equal(model.state_dict()[name], tensor)
    kept = [stitch.id for stitch in model.stitches if stitch.own]
    assert kept
    if 2 in kept:
        key = next(name for name in taught if name.endswith(".up"))
        assert torch.equal(model.own.state_dict()[f"2.{key}"], taught[key])
    assert all("agreement" in stitch.metrics for stitch in model.stitches)
    assert all("accuracy" not in model.stitches[i].metrics for i in kept)
    assert "tiny" in str(ModelCard.load(folder / "README.md"))
    printed = run(folder, *options, "--labels")
    assert "stitch 2 is right on " in printed
    assert "agree" not in printed


def test_the_command_says_what_is_wrong(folder: Path, photographs: Path) -> None:
    options = ["--images", photographs, "--steps", 3]
    assert "32 images are fewer than a batch of 128" in run(folder, *options, fails=True)
    options += ["--batch-size", 16]
    assert "stitch 1 is anchor 1 itself" in run(folder, *options, "--stitches", "1", fails=True)
    settings = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    for key in ("size", "crop_size"):
        settings[key] = dict.fromkeys(settings[key], 24)
    (folder / "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")
    assert "takes images of 3x32x32, these are 3x24x24" in run(folder, *options, fails=True)
    assert not Path(f"{folder}-tune").exists()
    assert "there is no folder" in run(folder / "none", *options, fails=True)
