"""Batch norms with statistics of one stitch: what is collected, against a closed form, and the script on a folder."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import own_statistics
from families import images, make
from own_statistics import collect_statistics
from stitchable.training.plan import make_model
from stitchable.training.recipe import load_recipe

RECIPES = Path(__file__).parents[1] / "training" / "recipes"
ON_DIGITS = ["data.dataset=digits", "data.image_column=image", "data.test_fraction=0.1"]


def test_statistics_are_the_means_over_the_batches_and_nothing_else_changes() -> None:
    model = make("resnet").extract(3).train()
    model.anchors[1].drop_rate = 0.9  # training mode of anything else would be noticed
    before = copy.deepcopy(model.state_dict())
    batches = [images("resnet", 6, seed) for seed in (1, 2, 3)]
    collect_statistics(model, batches)
    assert model.training
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {name.rsplit(".", 1)[-1] for name in changed} == {"running_mean", "running_var", "num_batches_tracked"}
    # The norm behind the first convolution sees what no other statistics have touched.
    first = model.anchors[0]
    with torch.no_grad():
        features = [first.conv1(batch) for batch in batches]
    mean = torch.stack([x.mean((0, 2, 3)) for x in features]).mean(0)
    var = torch.stack([x.var((0, 2, 3)) for x in features]).mean(0)
    torch.testing.assert_close(first.bn1.running_mean, mean)
    torch.testing.assert_close(first.bn1.running_var, var)


def test_the_script_measures_a_finished_run(tmp_path, monkeypatch, capsys) -> None:
    recipe = load_recipe(RECIPES / "cifar10.yaml", [*ON_DIGITS, "evaluation.batch_size=180"])
    model = make_model(recipe, [str(digit) for digit in range(10)])
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.fill_(3.0)  # far from what the features are
    model.extract(3).save_pretrained(tmp_path / "run")
    arguments = [str(tmp_path / "run"), "--recipe", str(RECIPES / "cifar10.yaml"), "--num-samples", "100", *ON_DIGITS]
    monkeypatch.setattr(sys, "argv", ["own_statistics.py", *arguments])
    own_statistics.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| stitch | top-1 with shared statistics | with its own |"
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]
    assert [row[0] for row in rows] == ["3"]
    assert rows[0][1] != rows[0][2]

    monkeypatch.setattr(sys, "argv", ["own_statistics.py", str(tmp_path / "none"), *arguments[1:]])
    with pytest.raises(SystemExit, match="error: "):
        own_statistics.main()


def test_a_model_without_batch_norms_is_refused(tmp_path) -> None:
    recipe = load_recipe(RECIPES / "digits.yaml")
    make_model(recipe, [str(digit) for digit in range(10)]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no batch norm"):
        own_statistics.own_statistics(tmp_path, recipe)
