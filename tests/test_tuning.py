"""`tune`: a front that images alone make better, and the command that does it to a folder."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from typer.testing import CliRunner

from families import images, make
from stitchable import StitchableForImageClassification
from stitchable.card import Card
from stitchable.processing import image_processor
from stitchable.publishing import save_repository
from stitchable.training.own import Teaching, teach_stitches
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
                assert then > first or (stitch.own is None) or then == first
    assert any(stitch.own for stitch in model.stitches)


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


def test_the_command_makes_a_folder_better(folder: Path, photographs: Path) -> None:
    before = StitchableForImageClassification.from_pretrained(folder)
    options = ["--images", photographs, "--steps", 3, "--rank", 2, "--batch-size", 16, "--stitches", "2,3"]
    # As if it had been interrupted behind the first of them.
    teach_stitches(before, lambda _: iter([images("resnet", 8)] * 3), [2], Teaching(3, 2), folder=f"{folder}-tune")
    taught = {name: tensor.clone() for name, tensor in before.own.state_dict().items()}
    scores = json.loads(run(folder, *options, "--json"))
    assert set(scores) == {"2", "3"}
    assert not Path(f"{folder}-tune").exists()
    model = StitchableForImageClassification.from_pretrained(folder)
    for name, tensor in before.state_dict().items():
        assert name.startswith("own.") or torch.equal(model.state_dict()[name], tensor)
    kept = [stitch.id for stitch in model.stitches if stitch.own]
    assert kept
    if 2 in kept:
        assert torch.equal(model.own.state_dict()[key := next(k for k in taught if k.endswith(".up"))], taught[key])
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
