"""Recipes and the training loop, on a recipe of seconds."""

import json
import os
import re
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BitImageProcessor

from data import load_data, make_loader, preprocess, random_affine, random_subset
from recipe import load_recipe
from sampling import UniformSampler
from train import run

ROOT = Path(__file__).parents[1]
DIGITS = ROOT / "training" / "recipes" / "digits.yaml"
QUICK = ["pretraining.epochs=1", "training.epochs=1", "initialization.num_samples=20"]


LAUNCH = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1"]
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no"]


def train(*overrides: str, launcher: list[str] | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, *(launcher or []), "training/train.py", "--recipe", str(DIGITS), *overrides]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_the_main_job_from_anchors_to_predictions(tmp_path, capsys) -> None:
    output = tmp_path / "run"
    result = train(f"output={output}", *QUICK, launcher=LAUNCH)
    assert result.returncode == 0, result.stderr
    table = json.loads((output / "stitches.json").read_text())["stitches"]
    assert len(table) == 35
    assert all(set(stitch["metrics"]) == {"accuracy", "loss"} for stitch in table)
    assert result.stdout.count("budget") == 2
    assert result.stdout.count(".png: ") == 8
    assert "all stitches: 100%" in result.stderr.replace("\r", "\n")

    # The block that README.md opens with runs on what the demo leaves.
    block = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block
    exec(block[1].replace("runs/digits", str(output)))
    assert "MFLOPs: stitch" in capsys.readouterr().out

    again = train(f"output={output}", *QUICK)
    assert again.returncode == 1
    assert "already holds another run" in again.stderr
    assert "Traceback" not in again.stderr
    assert json.loads((output / "stitches.json").read_text())["stitches"] == table


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.batch_size=2000"], "training.batch_size=2000, but there are only 1198 training images"),
        (["initialization.num_samples=5000"], "initialization.num_samples=5000, but there are only 1198"),
        (["space.stages=[5]"], "stages must be distinct numbers"),
        (["output=/dev/null/run"], "/dev/null/run cannot be made"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_trained(overrides: list[str], message: str, tmp_path) -> None:
    recipe = load_recipe(DIGITS, [f"output={tmp_path / 'run'}", *overrides])
    with pytest.raises(ValueError, match=re.escape(message)):
        run(recipe)


@pytest.mark.slow
def test_the_digits_curve_is_real(tmp_path) -> None:
    """Most Ti-S stitches lie between their anchors, and the joint training does not ruin the anchors."""
    result = train(f"output={tmp_path / 'run'}", launcher=LAUNCH)
    assert result.returncode == 0, result.stderr
    table = json.loads((tmp_path / "run" / "stitches.json").read_text())["stitches"]
    accuracy = {stitch["id"]: stitch["metrics"]["accuracy"] for stitch in table}
    between = [accuracy[0] <= accuracy[stitch["id"]] <= accuracy[1] for stitch in table if _anchors(stitch) == [0, 1]]
    assert sum(between) > len(between) / 2
    (line,) = [line for line in result.stdout.splitlines() if line.strip().startswith("anchor 0") and "." in line][:1]
    before = [float(percent) / 100 for percent in re.findall(r"(\d+\.\d+) %", line)]
    assert all(accuracy[anchor] > before[anchor] - 0.06 for anchor in range(3))


def _anchors(stitch: dict) -> list[int]:
    return [segment[0] for segment in stitch["route"]]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.epoch=3"], "training.epoch: unknown key, did you mean epochs?"),
        (["trainning.epochs=3"], "trainning: unknown key, did you mean training?"),
        (["training.epochs=many"], "training.epochs: Input should be a valid integer, got 'many'"),
        (["training.epochs=-1"], "training.epochs: Input should be greater than or equal to 0, got -1"),
        (["anchors=[{architecture: resnet18}]"], "anchors: List should have at least 2 items"),
        (["space.direction=up"], "space.direction: Input should be 'fast_to_slow'"),
        (["anchors=[{name: a}, {architecture: b}]"], "anchors.0.name: unknown key"),
        (["seed"], "an override is key.path=value, got 'seed'"),
        (["name.first=x"], "name is a value, not a section"),
    ],
)
def test_a_recipe_is_checked_before_anything_is_built(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        load_recipe(DIGITS, overrides)


def test_a_file_that_is_no_recipe_is_named(tmp_path) -> None:
    with pytest.raises(ValueError, match="there is no recipe"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- a\n- b\n")
    with pytest.raises(ValueError, match="must hold a mapping, not list"):
        load_recipe(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(ValueError, match="is not YAML"):
        load_recipe(tmp_path / "broken.yaml")


def test_overrides_are_yaml() -> None:
    recipe = load_recipe(DIGITS, ["training.learning_rate=0.5", "pretraining=null", "space.stages=[0]"])
    assert recipe.training.learning_rate == 0.5
    assert recipe.pretraining is None
    assert recipe.space.stages == [0]


def test_digits_are_real_scans_split_with_a_fixed_seed() -> None:
    recipe = load_recipe(DIGITS)
    first, second = load_data(recipe.data), load_data(recipe.data)
    assert {name: len(split) for name, split in first.items()} == {"train": 1198, "test": 599}
    assert first["test"]["label"] == second["test"]["label"]
    processor = BitImageProcessor(size={"shortest_edge": 8}, crop_size=8, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    test_set = preprocess(first["test"].select(range(9)), processor)
    assert test_set.tensors[0].shape == (9, 3, 8, 8)
    scan = torch.tensor(np.array(first["test"][3]["image"])) / 255
    torch.testing.assert_close(test_set.tensors[0][3], ((scan - 0.5) / 0.5).expand(3, 8, 8), rtol=0, atol=1e-6)


def test_a_training_loader_shuffles_the_same_way_for_a_seed() -> None:
    dataset = torch.utils.data.TensorDataset(torch.arange(10.0).view(10, 1, 1, 1), torch.arange(10))
    labels = [[batch["labels"].tolist() for batch in make_loader(dataset, 4, affine=0, seed=s)] for s in (0, 0, 1)]
    assert labels[0] == labels[1] != labels[2]
    assert [len(batch) for batch in labels[0]] == [4, 4]
    assert [len(batch["labels"]) for batch in make_loader(dataset, 4)] == [4, 4, 2]


def test_a_random_subset_has_different_images() -> None:
    dataset = torch.utils.data.TensorDataset(torch.arange(50.0).view(50, 1, 1, 1), torch.arange(50))
    first, second, other = (random_subset(dataset, 20, seed).tensors[1].tolist() for seed in (0, 0, 1))
    assert first == second != other
    assert len(set(first)) == 20


def test_random_affine_moves_a_little_and_zero_strength_nothing() -> None:
    x = torch.rand(6, 3, 8, 8)
    torch.testing.assert_close(random_affine(x, 0.0), x)
    moved = random_affine(x, 0.1)
    assert not torch.allclose(moved, x)
    assert (moved - x).abs().mean() < (x.flip(0) - x).abs().mean()


def test_the_sampler_is_uniform_and_replays() -> None:
    draws = [list(islice(UniformSampler(range(5), seed), 5000)) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    counts = torch.bincount(torch.tensor(draws[0]))
    assert counts.min() > 900
    assert counts.max() < 1100
    with pytest.raises(ValueError, match="no stitch to draw"):
        UniformSampler([], 0)
