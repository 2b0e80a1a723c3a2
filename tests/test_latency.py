"""Predicted latency and memory: sums over routes, of whole and partial models, as budgets, beside what is measured."""

import time
from dataclasses import replace

import pytest
import torch
from torch import nn

from families import images, make
from stitchable import StitchableForImageClassification, calibrate
from stitchable.cascade_latency import latency_p95, mean_latency, send_on
from stitchable.latency import _fit_lines
from stitchable.model.cascades import run_cascade
from stitchable.model.routes import Cascade, Stage


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
    calibrate(model, batch_sizes=[2], num_runs=1, num_warmup_runs=0, num_verified=0)
    for stitch in model.stitches:
        alone = model.extract(stitch.id)
        weights = sum(tensor.nbytes for tensor in [*alone.parameters(), *alone.buffers()])
        beside = 1e6 * stitch.memory_mb - weights
        with torch.inference_mode():
            assert beside >= images(name).nbytes - 501  # memory_mb is rounded to 1000 bytes
        assert beside < 60 * images(name).nbytes
    larger = {stitch.id: stitch.memory_mb for stitch in model.stitches}
    calibrate(model, batch_sizes=[8], num_runs=1, num_warmup_runs=0, num_verified=0)
    assert all(stitch.memory_mb > larger[stitch.id] for stitch in model.stitches)


def test_the_peak_of_a_block_counts_what_is_alive_at_once(monkeypatch) -> None:
    def forward(x: torch.Tensor) -> torch.Tensor:
        wide = torch.cat([x] * 60, -1)  # alive beside the input: 60 times its size, more than the stem needs
        first = wide[..., : x.shape[-1]] + 1  # a view is nothing, the sum once more
        del wide
        return first * 2

    model = make("vit")
    monkeypatch.setattr(model.anchors[0].blocks[1], "forward", forward)
    calibrate(model, batch_sizes=[4], num_runs=1, num_warmup_runs=0, num_verified=0)
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


@pytest.mark.parametrize(
    "wrong", [{"batch_sizes": [0]}, {"num_runs": 0}, {"num_warmup_runs": -1}, {"num_verified": -1}]
)
def test_numbers_that_are_too_small_are_refused(wrong) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        calibrate(make("vit"), **wrong)


@pytest.mark.parametrize("sizes", [[], [2, 2]])
def test_batch_sizes_are_different(sizes) -> None:
    with pytest.raises(ValueError, match="batch_sizes must be different numbers of images, at least one"):
        calibrate(make("vit"), batch_sizes=sizes)


def test_latency_as_a_function_of_the_batch(tmp_path) -> None:
    class SlowByBatch(Slow):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            time.sleep(self.seconds * (1 + 0.5 * len(x)))
            return self.module(x)

    model = make("vit")
    block = model.anchors[1].blocks[2]  # the last one, which all stitches that end in this anchor run
    model.anchors[1].blocks[2] = SlowByBatch(block, 0.02)
    result = calibrate(model, batch_sizes=[2, 1, 6], num_runs=2, num_warmup_runs=0, num_verified=0)
    lines = result["by_batch"]["milliseconds"]
    assert result["by_batch"]["batch_sizes"] == [2, 1, 6]
    assert result["batch_size"] == 2
    assert list(lines) == [str(stitch.id) for stitch in model.stitches]
    for stitch in model.stitches:
        a, b = lines[str(stitch.id)]
        assert a >= 0
        assert b >= 0
        if stitch.route[-1].anchor == 1:
            # 20 and 10 by the sleep, and what the rest takes; a machine in a hurry makes both longer, not shorter.
            assert a + 2 * b == pytest.approx(stitch.latency_ms, rel=0.3)
            assert (a + 6 * b) / (a + b) == pytest.approx(80 / 30, rel=0.4)
    model.config.save_pretrained(tmp_path)
    assert type(model.config).from_pretrained(tmp_path).latency == result
    assert "by_batch" not in calibrate(model, num_runs=1, num_warmup_runs=0, num_verified=0)


def test_lines_are_those_of_weighted_least_squares() -> None:
    exact = {size: {7: 3 + 0.5 * size, 9: 2.0 * size} for size in (1, 4, 16)}
    assert _fit_lines(exact) == {
        "batch_sizes": [1, 4, 16],
        "milliseconds": {"7": [3.0, 0.5], "9": [0.0, 2.0]},
        "max_error": 0.0,
    }
    bent = _fit_lines({1: {0: 1.0}, 2: {0: 3.0}})  # the line through both would begin below zero
    a, b = bent["milliseconds"]["0"]
    # The relative error of b n at 1 and 2 is least where d/db ((b - 1)^2 + (2 b / 3 - 1)^2) = 0.
    assert (a, b) == (0.0, pytest.approx((1 + 2 / 3) / (1 + 4 / 9), abs=1e-4))
    assert bent["max_error"] == pytest.approx(max(b - 1, 1 - 2 * b / 3), abs=1e-3)
    falling = _fit_lines({1: {0: 3.0}, 2: {0: 1.0}})["milliseconds"]["0"]
    assert falling[1] == 0.0


def with_cascades(model: StitchableForImageClassification) -> None:
    """A pair of the anchors, and with the stitch between them that begins with all blocks of the first."""
    flops = [stitch.flops for stitch in model.stitches]
    decides = {"score": "max_probability", "threshold": 0.5}
    stages = [{"stitch": 0, "flops": flops[0], **decides}, {"stitch": 1, "flops": flops[1], "reached": 0.25}]
    middle = {"stitch": 8, "flops": flops[8], "reached": 0.5, **decides}
    model.cascades = [
        {"id": 0, "stages": stages, "flops": 1.0, "max_flops": flops[0] + flops[1]},
        {"id": 4, "stages": [stages[0], middle, stages[1]], "flops": 1.0, "max_flops": 3 * flops[1]},
    ]


def test_the_latency_of_a_cascade_is_that_of_its_stages_by_who_reaches_them(tmp_path) -> None:
    model = make("vit")
    slow_blocks(model, (0.004, 0.008))
    with_cascades(model)
    result = calibrate(model, num_runs=2, num_warmup_runs=0, num_verified=1)["cascades"]
    pair, triple = model.cascades
    (_, small), (_, middle), (_, large) = (line[1:] for line in result["stages"]["4"])
    for milliseconds, expected in ((small, 24), (middle, 24), (large, 48)):
        # The middle stage runs the last block of the second anchor, and none of the first, 24 that it begins with.
        assert expected <= milliseconds <= 1.6 * expected
    assert [line[0] for line in result["stages"]["4"]] == [1.0, 0.5, 0.25]
    assert pair.latency_ms == pytest.approx(small + 0.25 * large, abs=0.01)
    assert pair.latency_p95_ms == pytest.approx(small + large, abs=0.01)
    assert triple.latency_ms == pytest.approx(small + 0.5 * middle + 0.25 * large, abs=0.01)
    ((number, (predicted, measured)),) = result["verified"].items()
    assert int(number) in (0, 4)
    assert 24 <= measured <= 96
    assert result["max_error"] == result["median_error"] == pytest.approx(abs(predicted / measured - 1), abs=1e-4)
    assert model.find(latency_ms=1e6).latency_ms is not None
    model.config.save_pretrained(tmp_path)
    assert type(model.config).from_pretrained(tmp_path).cascades == model.config.cascades


def test_the_mean_of_a_batch_counts_whether_anyone_goes_on(tmp_path) -> None:
    model = make("vit")
    with_cascades(model)
    result = calibrate(model, batch_sizes=[8, 1, 4], num_runs=1, num_warmup_runs=0, num_verified=2)["cascades"]
    pair = model.cascades[0]
    (_, a, b), (_, c, d) = result["stages"]["0"]
    assert pair.latency_ms == pytest.approx(a + 8 * b + (1 - 0.75**8) * c + 8 * 0.25 * d, rel=1e-3)
    assert pair.latency_p95_ms is None
    # Two of eight images go on, and that is what is measured.
    assert result["verified"]["0"][0] == pytest.approx(a + 8 * b + c + 2 * d, rel=1e-3)
    assert result["verified"]["0"][1] > 0
    calibrate(model, num_runs=1, num_warmup_runs=0, num_verified=0)
    assert model.cascades[0].latency_p95_ms > model.cascades[0].latency_ms
    calibrate(model, batch_sizes=[2], num_runs=1, num_warmup_runs=0, num_verified=0)
    assert model.cascades[0].latency_p95_ms is None


@torch.no_grad()
def test_so_many_images_go_on_as_are_sent() -> None:
    model = make("vit")
    with_cascades(model)
    x = images("vit", 8)
    for counts in ([8, 3, 1], [8, 8, 0], [8, 8, 8], [8, 0, 0], [8, 5, 5]):
        ids = run_cascade(model, x, send_on(model, model.cascades[1], x, counts)).stitch_ids.tolist()
        assert [sum(i in later for i in ids) for later in ([0, 8, 1], [8, 1], [1])] == counts


def test_95_of_100_calls_by_hand() -> None:
    stages = tuple(
        Stage(i, 1.0, *(("margin", 0.5) if i < 2 else ()), reached=part) for i, part in enumerate((1.0, 0.2, 0.04))
    )
    lines = [[1.0, 2.0], [0.0, 4.0], [10.0, 0.0]]
    cascade = Cascade(0, stages, 1.0, 1.0)
    assert latency_p95(cascade, lines) == 3 + 4
    assert mean_latency(cascade, lines, 1) == pytest.approx(3 + 0.2 * 4 + 0.04 * 10)
    assert mean_latency(cascade, lines, 10) == pytest.approx(21 + 10 * 0.2 * 4 + (1 - 0.96**10) * 10)
    often = replace(stages[2], reached=0.06)
    assert latency_p95(replace(cascade, stages=(*stages[:2], often)), lines) == 3 + 4 + 10
