"""Every stitch over one pass of the data."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from families import NUM_LABELS, images, make
from stitchable import evaluate
from stitchable.evaluation import measure_batch, record_figures, run_batches, run_stitches

TESTS = Path(__file__).parent


def batches(name: str, sizes: tuple[int, ...] = (5, 3)) -> list[dict[str, torch.Tensor]]:
    x = images(name, sum(sizes))
    labels = torch.arange(sum(sizes)) % NUM_LABELS
    return [{"pixel_values": p, "labels": y} for p, y in zip(x.split(sizes), labels.split(sizes), strict=True)]


@pytest.mark.parametrize("name", ["vit", "swin", "resnet-swin"])
def test_it_equals_running_each_stitch_alone(name: str) -> None:
    model, data = make(name), batches(name)
    model.train()
    model.anchors[0].eval()  # frozen, say
    measured = evaluate(model, data)
    assert model.training
    assert not any(module.training for module in model.anchors[0].modules())
    model.eval()
    x, labels = torch.cat([b["pixel_values"] for b in data]), torch.cat([b["labels"] for b in data])
    assert list(measured) == [stitch.id for stitch in model.stitches]
    for stitch in model.stitches:
        output = model(x, labels=labels, stitch_id=stitch.id)
        assert measured[stitch.id]["accuracy"] == float((output.logits.argmax(-1) == labels).double().mean())
        assert measured[stitch.id]["top5_accuracy"] == 1  # of five classes
        assert measured[stitch.id]["loss"] == pytest.approx(float(output.loss.detach()), rel=1e-4)
        assert stitch.metrics == measured[stitch.id]


@torch.no_grad()
def test_sharing_changes_no_bit_and_runs_common_beginnings_once() -> None:
    model, x = make("vit", nearest=False), images("vit")
    ran: list[tuple] = []
    run_step = model.run_step
    model.run_step = lambda step, features: ran.append(step) or run_step(step, features)
    shared = dict(run_stitches(model, x, [stitch.id for stitch in model.stitches]))
    num_shared = len(ran)
    prefixes = {model.steps(s.id)[:n] for s in model.stitches for n in range(1, len(model.steps(s.id)) + 1)}
    assert num_shared == len(prefixes)
    for stitch in model.stitches:
        assert torch.equal(shared[stitch.id], model(x, stitch_id=stitch.id).logits)
    assert num_shared < len(ran) - num_shared


def test_some_stitches_only_and_other_figures_stay() -> None:
    model = make("vit")
    model.record(4, metrics={"images_per_second": 7.0, "accuracy": 2.0})
    measured = evaluate(model, batches("vit"), [0, 4])
    assert set(measured) == {0, 4}
    assert model.stitches[5].metrics == {}
    assert model.stitches[4].metrics == {"images_per_second": 7.0, **measured[4]}


def test_ignored_samples_count_in_no_figure() -> None:
    model, data = make("vit"), batches("vit", (5,))
    expected = evaluate(model, [{name: tensor[[0, 1, 3]] for name, tensor in data[0].items()}])
    data[0]["labels"][[2, 4]] = -100
    measured = evaluate(model, data)
    for stitch_id, metrics in measured.items():
        assert metrics == pytest.approx(expected[stitch_id], rel=1e-5)


def test_bad_input_is_named() -> None:
    model = make("vit")
    with pytest.raises(ValueError, match="the batches are empty"):
        evaluate(model, [])
    with pytest.raises(ValueError, match="the batches are empty"):
        evaluate(model, [{"pixel_values": images("vit"), "labels": torch.full((2,), -100)}])
    with pytest.raises(ValueError, match="stitch_id 99"):
        evaluate(model, batches("vit"), [0, 99])
    with pytest.raises(ValueError, match="names no stitch"):
        evaluate(model, batches("vit"), [])
    for label in (5, -1):
        with pytest.raises(ValueError, match=rf"label {label} is none of the model's classes 0\.\.4"):
            evaluate(model, [{"pixel_values": images("vit"), "labels": torch.tensor([0, label])}])


def test_the_forward_pass_is_in_the_precision_of_the_accelerator() -> None:
    model, data = make("vit"), batches("vit")
    seen = set()
    run_head = model.run_head
    model.run_head = lambda *arguments: (logits := run_head(*arguments), seen.add(logits.dtype))[0]
    evaluate(
        model,
        data,
        [0],
        accelerator=SimpleNamespace(
            autocast=lambda: torch.autocast("cpu", torch.bfloat16),
            gather_for_metrics=lambda rows: rows,
            is_main_process=True,
        ),
    )
    assert seen == {torch.bfloat16}


def test_two_processes_count_every_sample_once(tmp_path) -> None:
    batch_sizes = {11: 2, 3: 4}  # by number of images: a last batch to fill up, and less than one batch in all
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(TESTS / "distributed_evaluation.py"), str(tmp_path / "partial")]
    command += [f"{number}x{size}" for number, size in batch_sizes.items()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=240)
    assert result.returncode == 0, result.stderr
    printed = [json.loads(line) for line in re.findall(r"RESULT (.*?) END", result.stdout)]
    assert sorted(process["num_images"] for process in printed) == [3, 3, 11, 11]
    for process in printed:
        num_images = process["num_images"]
        model, x = make("vit"), images("vit", num_images)
        labels = torch.arange(num_images) % NUM_LABELS
        labels[2] = -100
        expected = evaluate(model, [{"pixel_values": x, "labels": labels}], [0, 4, 2])
        num_batches = math.ceil(num_images / (2 * batch_sizes[num_images]))
        assert process["samples"] > num_images  # the processes did fill up their last batches
        assert process["collectives"] == num_batches
        assert process["resumed"] == process["figures"]
        assert process["measured_again"] == num_batches - process["measured_before"]
        assert "label 7 is none" in process["error"]  # though only one process had it
        for stitch_id, metrics in process["figures"].items():
            assert metrics == pytest.approx(expected[int(stitch_id)], rel=1e-5)


def test_one_pass_gives_logits_and_figures() -> None:
    model, data = make("vit").train(), batches("vit")
    rows, kept = [], []
    for labels, logits in run_batches(model, iter(data)):
        assert not model.training
        assert torch.is_grad_enabled()  # the caller's own affair
        assert not any(each.requires_grad for each in logits.values())
        rows.append(measure_batch(labels, logits))
        kept.append((labels, logits))
    assert model.training
    assert [list(logits) for _, logits in kept] == [[stitch.id for stitch in model.stitches]] * 2
    model.eval()
    for batch, (labels, logits) in zip(data, kept, strict=True):
        assert torch.equal(labels, batch["labels"])
        for stitch_id, each in logits.items():
            assert torch.equal(each, model(batch["pixel_values"], stitch_id=stitch_id).logits)
    figures = record_figures(model, rows)
    assert figures == {stitch.id: stitch.metrics for stitch in model.stitches}
    assert figures == evaluate(model, data)


def test_a_pass_that_is_left_puts_the_mode_back() -> None:
    model = make("vit").train()
    passing = run_batches(model, batches("vit"), [4, 0])
    assert list(next(passing)[1]) == [4, 0]
    assert not model.training
    passing.close()
    assert model.training
