"""The timer of this project, and what it measures of whole stitches: images per second and seconds of a call."""

import platform
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers.utils import logging

from stitchable.evaluation import evaluation_mode
from stitchable.model.modeling_stitchable import StitchableForImageClassification, StitchablePreTrainedModel

T = TypeVar("T")


class Clock:
    """Seconds that work takes on a device; of a GPU by events in its stream, so that pieces in a row need not wait."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._moments: list[tuple[Any, Any]] = []

    def time(self, work: Callable[[], T]) -> T:
        """Do a piece of work and remember how long it took."""
        started = self._now()
        result = work()
        self._moments.append((started, self._now()))
        return result

    def seconds(self) -> list[float]:
        """Of each piece so far; waits for the device."""
        synchronize(self.device)
        if self.device.type != "cuda":
            return [end - started for started, end in self._moments]
        return [started.elapsed_time(end) / 1e3 for started, end in self._moments]

    def _now(self) -> Any:
        if self.device.type != "cuda":
            synchronize(self.device)
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one piece of work, alone on its device."""
    synchronize(device)
    clock = Clock(device)
    clock.time(work)
    return clock.seconds()[0]


@torch.inference_mode()
def measure_throughput(
    model: StitchableForImageClassification,
    stitch_ids: Sequence[int] | None = None,
    *,
    batch_size: int = 64,
    num_runs: int = 30,
    num_warmup_runs: int = 3,
) -> dict[int, float]:
    """Measure how many images per second each stitch classifies, as in table 1 of the paper.

    They go into the stitch table as "images_per_second", and what they were measured on into `config.throughput`. Rates
    of other stitches that were measured in other circumstances are removed.

    Args:
        model: runs in evaluation mode, on its device, in its data type.
        stitch_ids: which stitches to measure; all of them if None.
        batch_size: images per run; 64 in table 1.
        num_runs: timed runs, of which the mean is taken; 30 in table 1.
        num_warmup_runs: runs before them that are not timed; the authors' code takes 50 on a GPU.

    Returns:
        Images per second by stitch id.

    Raises:
        ValueError: an unknown stitch, or a number below 1.
    """
    if min(batch_size, num_runs) < 1 or num_warmup_runs < 0:
        raise ValueError(
            "batch_size and num_runs must be at least 1 and num_warmup_runs at least 0, "
            f"got {batch_size}, {num_runs} and {num_warmup_runs}"
        )
    ids = [stitch.id for stitch in model.stitches] if stitch_ids is None else list(stitch_ids)
    for stitch_id in ids:
        model.steps(stitch_id)  # raises for an unknown one before anything is run
    pixel_values = random_pixel_values(model, batch_size)
    rates = {}
    with evaluation_mode(model):
        for stitch_id in logging.tqdm(ids, desc="measuring throughput", leave=False):
            _call(model, pixel_values, stitch_id, num_warmup_runs)
            seconds = seconds_of(partial(_call, model, pixel_values, stitch_id, num_runs), model.device)
            rates[stitch_id] = num_runs * batch_size / seconds
    measured_on = {
        **describe_device(model),
        "batch_size": batch_size,
        "num_runs": num_runs,
        "num_warmup_runs": num_warmup_runs,
    }
    _record(model, rates, measured_on)
    return rates


@torch.inference_mode()
def measure_latencies(
    model: StitchablePreTrainedModel, stitch_ids: Collection[int], *, batch_size: int = 1, num_runs: int = 20
) -> dict[int, float]:
    """Median seconds of a call of each stitch, by id.

    Rounds go through all of them, so that a slow moment of the machine meets all alike. Each timed call follows one of
    the same stitch, as where a stitch is used again and again.
    """
    pixel_values = random_pixel_values(model, batch_size)
    seconds: dict[int, list[float]] = {stitch_id: [] for stitch_id in stitch_ids}
    with evaluation_mode(model):
        for _ in logging.tqdm(range(num_runs), desc="measuring stitches", leave=False):
            for stitch_id, measured in seconds.items():
                _call(model, pixel_values, stitch_id, 1)
                measured.append(seconds_of(partial(_call, model, pixel_values, stitch_id, 1), model.device))
    return {stitch_id: statistics.median(measured) for stitch_id, measured in seconds.items()}


def _call(model: StitchablePreTrainedModel, pixel_values: torch.Tensor, stitch_id: int, times: int) -> None:
    for _ in range(times):
        model(pixel_values, stitch_id=stitch_id)


def _record(
    model: StitchableForImageClassification, rates: Mapping[int, float], measured_on: Mapping[str, Any]
) -> None:
    comparable = getattr(model.config, "throughput", None) == measured_on
    for stitch in model.stitches:
        others = {name: value for name, value in stitch.metrics.items() if name != "images_per_second" or comparable}
        rate = {"images_per_second": rates[stitch.id]} if stitch.id in rates else {}
        model.record(stitch.id, metrics={**others, **rate})
    model.config.throughput = dict(measured_on)


def random_pixel_values(model: StitchablePreTrainedModel, batch_size: int) -> torch.Tensor:
    """Pixel values (N, C, H, W) to measure with, on the model's device, in its data type."""
    shape = (batch_size, model.config.num_channels, *model.config.image_size)
    # A generator of its own, so that measuring changes no random draw elsewhere.
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(model.device, model.dtype)


def describe_device(model: StitchablePreTrainedModel) -> dict[str, Any]:
    """What figures of speed hold for: "device", "threads" (of a CPU), "dtype", "torch"."""
    return {
        "device": _name(model.device),
        "threads": torch.get_num_threads() if model.device.type == "cpu" else None,
        "dtype": str(model.dtype).removeprefix("torch."),
        "torch": str(torch.__version__),
    }


def synchronize(device: torch.device) -> None:
    """Wait for the device to finish what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _name(device: torch.device) -> str:
    """The device as its maker calls it, as far as can be known."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return processor_name() if device.type == "cpu" else str(device)


def processor_name() -> str:
    """The CPU of this machine as its maker calls it, as far as can be known."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
