"""Predicted latency and memory: sums over routes, of whole and partial models, as budgets, beside what is measured."""

import time

import pytest
import torch
from torch import nn

from families import images, make
from stitchable import StitchableForImageClassification, calibrate


class Slow(nn.Module):
    """A module that takes its time: so much longer than everything else that sums of it are exact."""

    def __init__(self, module: nn.Module, seconds: float) -> None:
        super().__init__()
        self.module, self.seconds = module, seconds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(self.seconds)
        return self.module(x)


def slow_blocks(model: StitchableForImageClassification, seconds: tuple[float, float]) -> None:
    for number, chain in model.chains.items():
        for index, (name,) in enumerate(chain.blocks):
            parent, _, child = name.rpartition(".")
            block = model.anchors[number].get_submodule(name)
            model.anchors[number].get_submodule(parent).register_module(
                child, Slow(block, seconds[number] * (1 + index))
            )


def test_latency_is_the_sum_over_the_route(tmp_path) -> None:
    model = make("vit")
    slow_blocks(model, (0.004, 0.008))
    result = calibrate(model, num_runs=2, num_warmup_runs=0, num_verified=2)
    for stitch in model.stitches:
        blocks = [(s.anchor, block) for s in stitch.route for block in range(s.start, s.stop)]
        expected = sum((4, 8)[anchor] * (1 + block) for anchor, block in blocks)
        assert expected <= stitch.latency_ms <= 1.4 * expected + 3, stitch
    assert result == model.config.latency
    assert (result["batch_size"], result["dtype"], result["compiled"]) == (1, "float32", False)
    assert result["threads"] == torch.get_num_threads()
    assert len(result["verified"]) == 2
    assert not {0, 1} & {int(i) for i in result["verified"]}  # anchors were timed as they are
    errors = [abs(predicted / measured - 1) for predicted, measured in result["verified"].values()]
    assert result["max_error"] == pytest.approx(max(errors), abs=1e-4)
    assert result["median_error"] == pytest.approx(sum(errors) / 2, abs=1e-4)


@pytest.mark.parametrize("name", ["vit", "swin", "resnet", "levit", "convnext"])
def test_memory_is_the_weights_of_the_stitch_and_what_lives_beside_them(name: str) -> None:
    model = make(name)
    calibrate(model, batch_size=2, num_runs=1, num_warmup_runs=0, num_verified=0)
    for stitch in model.stitches:
        alone = model.extract(stitch.id)
        weights = sum(tensor.nbytes for tensor in [*alone.parameters(), *alone.buffers()])
        beside = 1e6 * stitch.memory_mb - weights
        with torch.inference_mode():
            assert beside >= images(name).nbytes - 501  # memory_mb is rounded to 1000 bytes
        assert beside < 60 * images(name).nbytes
    larger = {stitch.id: stitch.memory_mb for stitch in model.stitches}
    calibrate(model, batch_size=8, num_runs=1, num_warmup_runs=0, num_verified=0)
    assert all(stitch.memory_mb > larger[stitch.id] for stitch in model.stitches)


def test_the_peak_of_a_block_counts_what_is_alive_at_once(monkeypatch) -> None:
    def forward(x: torch.Tensor) -> torch.Tensor:
        wide = torch.cat([x] * 60, -1)  # alive beside the input: 60 times its size, more than the stem needs
        first = wide[..., : x.shape[-1]] + 1  # a view is nothing, the sum once more
        del wide
        return first * 2

    model = make("vit")
    monkeypatch.setattr(model.anchors[0].blocks[1], "forward", forward)
    calibrate(model, batch_size=4, num_runs=1, num_warmup_runs=0, num_verified=0)
    alone = model.extract(0)
    weights = sum(tensor.nbytes for tensor in [*alone.parameters(), *alone.buffers()])
    features = 4 * 17 * 8 * 4  # batch, tokens, width, bytes
    assert 1e6 * model.stitches[0].memory_mb == pytest.approx(weights + 62 * features, abs=501)


def test_models_of_a_part_are_calibrated_too(tmp_path) -> None:
    model = make("vit")
    model.save_pretrained(tmp_path)
    alone = StitchableForImageClassification.from_pretrained(tmp_path, stitch_id=4)  # no anchor is whole
    result = calibrate(alone, num_runs=1, num_warmup_runs=0)
    assert list(result["verified"]) == ["4"]
    assert alone.stitch.latency_ms > 0
    calibrate(model, num_runs=1, num_warmup_runs=0, num_verified=0)
    assert alone.stitch.memory_mb == model.stitches[4].memory_mb


def test_calibrated_figures_are_budgets_and_are_saved(tmp_path) -> None:
    model = make("vit")
    with pytest.raises(ValueError, match=r"carries latency_ms, .*; stitchable\.calibrate\(model\) predicts"):
        model.for_budget(latency_ms=5)
    slow_blocks(model, (0.001, 0.005))
    calibrate(model, num_runs=1, num_warmup_runs=0, num_verified=0)
    for stitch in model.stitches:
        model.record(stitch.id, metrics={"accuracy": 1 - 0.01 * stitch.id})
    cheapest = min(model.stitches, key=lambda stitch: stitch.latency_ms)
    assert model.for_budget(latency_ms=cheapest.latency_ms) == cheapest
    smallest = min(model.stitches, key=lambda stitch: stitch.memory_mb)
    assert model.for_budget(memory_mb=smallest.memory_mb) == smallest
    with pytest.raises(ValueError, match=r"no stitch is within memory_mb <= 0\.001"):
        model.for_budget(memory_mb=0.001)
    model.config.save_pretrained(tmp_path)
    saved = type(model.config).from_pretrained(tmp_path)
    assert saved.latency == model.config.latency
    assert saved.stitches == model.config.stitches


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"num_runs": 0}, {"num_warmup_runs": -1}, {"num_verified": -1}])
def test_numbers_that_are_too_small_are_refused(wrong) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        calibrate(make("vit"), **wrong)
