"""What a server can choose between: each measured stitch and cascade of a model, with its latency on this device."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from transformers.utils import logging

from stitchable.cascade_latency import mean_latency
from stitchable.latency import calibrate
from stitchable.model.modeling_stitchable import StitchableForImageClassification
from stitchable.model.routes import Cascade
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
    lines, stages = measure_latencies(model)
    stitches = [
        Choice("stitch", stitch.id, stitch.metrics["accuracy"], stitch.flops or 0, *lines[stitch.id])
        for stitch in measured
    ]
    cascades = [cascade for cascade in model.cascades if "accuracy" in cascade.metrics]
    return stitches + [_cascade(cascade, stages[cascade.id]) for cascade in cascades]


def measure_latencies(model: StitchableForImageClassification) -> tuple[dict[int, Line], dict[int, list[Line]]]:
    """Of every stitch, and of the stages of every cascade by the images that reach them.

    Those of the checkpoint where they are of this device, or else predicted from the blocks, timed here.
    """
    here, there = describe_device(model), getattr(model.config, "latency", None) or {}
    is_here = all(there.get(name) == known for name, known in here.items())
    if there and not is_here:
        logger.warning(
            f"the checkpoint's latencies are of {there.get('device')}, {there.get('threads')} threads, "
            f"{there.get('dtype')}; measuring those of {here['device']}, {here['threads']} threads, {here['dtype']}"
        )
    lines, stages = _lines_of(there) if is_here else ({}, {})
    if not ({x.id for x in model.stitches} <= set(lines) and {x.id for x in model.cascades} <= set(stages)):
        lines, stages = _lines_of(calibrate(model, batch_sizes=_SIZES, num_runs=_RUNS, num_verified=0))
    return lines, stages


def front_of(choices: Sequence[Choice], size: int = 1) -> list[Choice]:
    """Those that no other beats in both latency and accuracy, quickest first."""
    return front_by(choices, lambda choice: choice.seconds(size))


def _lines_of(latency: Mapping[str, Any]) -> tuple[dict[int, Line], dict[int, list[Line]]]:
    """What a calibration at several batch sizes has left in the config, in seconds."""
    stitches = latency.get("by_batch", {}).get("milliseconds", {})
    stages = latency.get("cascades", {}).get("stages", {}) if stitches else {}
    return (
        {int(i): _line(*milliseconds) for i, milliseconds in stitches.items()},
        {int(i): [_line(*milliseconds) for _, *milliseconds in of_cascade] for i, of_cascade in stages.items()},
    )


def _line(fixed: float, per_image: float) -> Line:
    return Line(max(fixed, 1e-3) / 1e3, max(per_image, 1e-3) / 1e3)


def _cascade(cascade: Cascade, stages: Sequence[Line]) -> Choice:
    """The line through the mean of one image and that of a batch: in this, most stages run for some image."""
    one, many = (mean_latency(cascade, stages, size) for size in _SIZES)
    per_image = (many - one) / (_SIZES[1] - _SIZES[0])
    whole = sum(map(sum, stages))
    return Choice(
        "cascade",
        cascade.id,
        cascade.metrics["accuracy"],
        cascade.flops,
        one - per_image * _SIZES[0],
        per_image,
        worst=whole / one,
    )
