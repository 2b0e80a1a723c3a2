"""Images per second of every stitch on the device at hand."""

import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from stitchable.evaluation import evaluation_mode
from stitchable.model.modeling_stitchable import StitchableForImageClassification, StitchablePreTrainedModel


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
            for _ in range(num_warmup_runs):
                model(pixel_values, stitch_id=stitch_id)
            synchronize(model.device)
            started = time.perf_counter()
            for _ in range(num_runs):
                model(pixel_values, stitch_id=stitch_id)
            synchronize(model.device)
            rates[stitch_id] = num_runs * batch_size / (time.perf_counter() - started)
    measured_on = {
        **describe_device(model),
        "batch_size": batch_size,
        "num_runs": num_runs,
        "num_warmup_runs": num_warmup_runs,
    }
    _record(model, rates, measured_on)
    return rates


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
