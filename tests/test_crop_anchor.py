"""Cropping one anchor: what is left out, against timm's own model written out, and the script on a run's folder."""

import sys
from pathlib import Path

import pytest
import torch

import crop_anchor
from crop_anchor import measure, plan_crops
from families import images, make
from stitchable.training.plan import make_model
from stitchable.training.recipe import load_recipe

DIGITS = Path(__file__).parents[1] / "training" / "recipes" / "digits.yaml"


def test_blocks_are_left_out_by_halves_and_by_turns() -> None:
    recipe = load_recipe(DIGITS)
    crops = plan_crops(make_model(recipe, list("0123456789")), 2)
    assert crops == {
        "none": [0, 1, 2, 3, 4, 5],
        "the first half": [3, 4, 5],
        "the last half": [0, 1, 2],
        "every other": [0, 2, 4],
    }


def test_a_cropped_anchor_is_timms_model_without_these_blocks() -> None:
    model = make("vit").train()
    x, crops = images("vit", 40), [[0, 1, 2], [2], [0, 2], []]
    twin = model.anchors[1]
    twin.pos_drop.p = 0.9  # training mode would be noticed
    expected = []
    with torch.no_grad():
        whole, twin.blocks = twin.eval().blocks, twin.blocks
        for kept in crops:
            twin.blocks = torch.nn.Sequential(*(whole[index] for index in kept))
            expected.append(twin(x).argmax(-1))
        twin.blocks = whole
    model.train()
    for number, classes in enumerate(expected):
        batches = [
            {"pixel_values": x[:25], "labels": classes[:25]},
            {"pixel_values": x[25:], "labels": torch.cat([classes[25:-1], torch.tensor([-100])])},
        ]
        accuracies = measure(model, 1, crops, batches)
        assert accuracies[number] == 1.0  # of 39: -100 stands for an image that could not be read
        agreeing = [float((other[:-1] == classes[:-1]).float().mean()) for other in expected]
        assert accuracies == pytest.approx(agreeing)
    assert model.training
    assert len({tuple(classes.tolist()) for classes in expected}) > 1


def test_only_whole_anchors_of_one_stage_can_be_cropped() -> None:
    for model, anchor in ((make("vit"), 7), (make("vit").extract(2), 0), (make("resnet"), 0)):
        with pytest.raises(ValueError, match=f"no anchor {anchor} that is whole and of a single stage"):
            plan_crops(model, anchor)


def test_the_script_measures_a_finished_run(tmp_path, monkeypatch, capsys) -> None:
    model = make_model(load_recipe(DIGITS), [str(digit) for digit in range(10)])
    model.save_pretrained(tmp_path / "run")
    arguments = [str(tmp_path / "run"), "--recipe", str(DIGITS), "--anchor", "1", "data.test_fraction=0.1"]
    monkeypatch.setattr(sys, "argv", ["crop_anchor.py", *arguments])
    crop_anchor.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith(f"| none | {model.stitches[1].flops:,} | ")
    assert len(lines) == 6
    flops = [int(line.split("|")[2].replace(",", "")) for line in lines[2:]]
    assert flops[0] > flops[1] == flops[2] == flops[3]
    assert all(line.endswith(" % |") for line in lines[2:])

    monkeypatch.setattr(sys, "argv", ["crop_anchor.py", str(tmp_path / "none"), *arguments[1:]])
    with pytest.raises(SystemExit, match="error: "):
        crop_anchor.main()
