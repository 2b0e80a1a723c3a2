"""What a server can choose between: each measured stitch and cascade of a model, with its latency on this device."""

from collections.abc import Sequence
from typing import NamedTuple

from transformers.utils import logging

from stitchable.latency import calibrate
from stitchable.model.modeling_stitchable import StitchableForImageClassification
from stitchable.model.routes import Cascade, Stitch
from stitchable.serving.policy import Choice, front_by
from stitchable.timing import describe_device

logger = logging.get_logger(__name__)
_SIZES = (1, 8)  # images of the batches that a line is drawn through
_RUNS = 8


class Line(NamedTuple):
    """Seconds of a batch of n: fixed + per_image * n."""

    fixed: float
    per_image: float


def choices_of(model: StitchableForImageClassification) -> list[Choice]:
    """Every stitch and cascade with a measured accuracy.

    Raises:
        ValueError: there is none, so that no choice is better than another.
    """
    measured = [stitch for stitch in model.stitches if "accuracy" in stitch.metrics]
    if not measured:
        raise ValueError(
            f"no stitch of {model.name_or_path or 'this model'} has a measured accuracy, so none can be preferred to "
            "another; stitchable eval FOLDER DATA measures them"
        )
    lines = measure_latencies(model)
    stitches = [
        Choice("stitch", stitch.id, stitch.metrics["accuracy"], stitch.flops or 0, *lines[stitch.id])
        for stitch in measured
    ]
    cascades = [cascade for cascade in model.cascades if "accuracy" in cascade.metrics]
    return stitches + [_cascade(cascade, model.stitches, lines) for cascade in cascades]


def measure_latencies(model: StitchableForImageClassification) -> dict[int, Line]:
    """Of every stitch: what the checkpoint has for this device, or else predicted from its blocks timed here."""
    here, there = describe_device(model), getattr(model.config, "latency", None) or {}
    is_here = all(there.get(name) == known for name, known in here.items())
    if there and not is_here:
        logger.warning(
            f"the checkpoint's latencies are of {there.get('device')}, {there.get('threads')} threads, "
            f"{there.get('dtype')}; measuring those of {here['device']}, {here['threads']} threads, {here['dtype']}"
        )
    lines = there.get("by_batch", {}).get("milliseconds", {}) if is_here else {}
    if not all(str(stitch.id) in lines for stitch in model.stitches):
        lines = calibrate(model, batch_sizes=_SIZES, num_runs=_RUNS, num_verified=0)["by_batch"]["milliseconds"]
    return {stitch.id: Line(*(max(ms, 1e-3) / 1e3 for ms in lines[str(stitch.id)])) for stitch in model.stitches}


def front_of(choices: Sequence[Choice], size: int = 1) -> list[Choice]:
    """Those that no other beats in both latency and accuracy, quickest first."""
    return front_by(choices, lambda choice: choice.seconds(size))


def _cascade(cascade: Cascade, stitches: Sequence[Stitch], lines: dict[int, Line]) -> Choice:
    """A cascade takes as long as its stages, less what they share, as often as its FLOPs say they run."""
    flops = {stitch.id: stitch.flops or 0 for stitch in stitches}
    ids = [stage.stitch for stage in cascade.stages]
    first = lines[ids[0]]
    shared = cascade.max_flops / sum(flops[i] for i in ids)
    full = Line(shared * sum(lines[i].fixed for i in ids), shared * sum(lines[i].per_image for i in ids))
    further = (cascade.flops - flops[ids[0]]) / (cascade.max_flops - flops[ids[0]])
    mean = Line(*(a + further * (b - a) for a, b in zip(first, full, strict=True)))
    return Choice("cascade", cascade.id, cascade.metrics["accuracy"], cascade.flops, *mean, worst=sum(full) / sum(mean))
