"""What a server can choose between: each measured stitch and cascade of a model, with its latency on this device."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from transformers.utils import logging

from stitchable.latency import calibrate
from stitchable.model.modeling_stitchable import StitchableForImageClassification
from stitchable.model.routes import Stitch
from stitchable.serving.policy import Choice
from stitchable.throughput import describe_device

logger = logging.get_logger(__name__)
_SECOND_SIZE = 8  # images of the larger of the two batches that a line is drawn through
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
    cascades = getattr(model, "cascades", ())  # of models that have some
    return stitches + [_cascade(cascade, model.stitches, lines) for cascade in cascades]


def measure_latencies(model: StitchableForImageClassification) -> dict[int, Line]:
    """Of every stitch, predicted from the anchors' blocks timed at two batch sizes, as the model will run."""
    here, there = describe_device(model), getattr(model.config, "latency", None) or {}
    if there and any(there.get(name) != here[name] for name in ("device", "threads", "dtype")):
        logger.warning(
            f"the checkpoint's latencies are of {there.get('device')}, {there.get('threads')} threads, "
            f"{there.get('dtype')}; measuring those of {here['device']}, {here['threads']} threads, {here['dtype']}"
        )
    seconds = []
    for size in (_SECOND_SIZE, 1):  # the table keeps those of one image
        calibrate(model, batch_size=size, num_runs=_RUNS, num_verified=0)
        seconds.append({stitch.id: (stitch.latency_ms or 0.0) / 1e3 for stitch in model.stitches})
    many, one = seconds
    slopes = {stitch_id: max(many[stitch_id] - one[stitch_id], 1e-6) / (_SECOND_SIZE - 1) for stitch_id in one}
    return {stitch_id: Line(max(one[stitch_id] - slope, 0.0), slope) for stitch_id, slope in slopes.items()}


def front_of(choices: Sequence[Choice], size: int = 1) -> list[Choice]:
    """Those that no other beats in both latency and accuracy, quickest first."""
    front: list[Choice] = []
    for choice in sorted(choices, key=lambda choice: (choice.seconds(size), -choice.accuracy)):
        if not front or choice.accuracy > front[-1].accuracy:
            front.append(choice)
    return front


def _cascade(cascade: Any, stitches: Sequence[Stitch], lines: dict[int, Line]) -> Choice:
    """A cascade takes as long as its stages, less what they share, as often as its FLOPs say they run."""
    flops = {stitch.id: stitch.flops or 0 for stitch in stitches}
    ids = [stage.stitch for stage in cascade.stages]
    first = lines[ids[0]]
    shared = cascade.max_flops / sum(flops[i] for i in ids)
    full = Line(shared * sum(lines[i].fixed for i in ids), shared * sum(lines[i].per_image for i in ids))
    further = (cascade.flops - flops[ids[0]]) / (cascade.max_flops - flops[ids[0]])
    mean = Line(*(a + further * (b - a) for a, b in zip(first, full, strict=True)))
    return Choice("cascade", cascade.id, cascade.metrics["accuracy"], cascade.flops, *mean, worst=sum(full) / sum(mean))
