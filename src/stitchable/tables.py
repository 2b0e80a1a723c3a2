"""The stitch table as people read it: in a notebook, on the command line and in a card, all from the same rows."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from stitchable.front import untouched_anchors
from stitchable.model.configuration_stitchable import StitchableConfig
from stitchable.model.modeling_stitchable import StitchablePreTrainedModel
from stitchable.model.routes import Stitch, measured_by
from stitchable.plots import plot_stitches, route_in_words

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


def table(model: StitchablePreTrainedModel) -> "pd.DataFrame":
    """The stitches of this model, one row each.

    Returns:
        By id: "route" (the blocks of each anchor), "flops" (per image, one multiply-add = 1, plus normalisation terms),
        "params", "latency_ms" (milliseconds per call), "memory_mb" (10^6 bytes), and the measured metrics ("accuracy"
        in 0..1, "images_per_second", ...); what is known of no stitch has no column.
    """
    return frame_of(model.stitches, short_names(model.config))


def plot(model: StitchablePreTrainedModel, metric: str | None = None) -> "Figure":
    """Draw a metric (in 0..1) over the FLOPs of all measured stitches of this model, anchors starred.

    The curve of the accuracy shows its cascades too, and the anchors as they were before training.

    Raises:
        ValueError: no stitch was measured.
    """
    from stitchable.card import Card  # which shows this table
    from stitchable.cascades import runnable

    names, metric = short_names(model.config), metric or measured_by(model.stitches)
    if metric == "agreement":
        return plot_stitches(model.stitches, names, metric, cascades=model.config.cascades)
    if metric != "accuracy":
        return plot_stitches(model.stitches, names, metric)
    untouched = untouched_anchors(model.stitches, Card.of(model.config, "").accuracy_before)
    return plot_stitches(model.stitches, names, untouched=untouched, cascades=runnable(model.config))


def in_short(model: StitchablePreTrainedModel) -> str:
    """One line on this model in the place of its hundreds of modules, which `print(model.anchors)` shows."""
    names = ", ".join(short_names(model.config))
    default = (
        f"stitch {model.config.stitch_id}" if model.config.cascade_id is None else f"cascade {model.config.cascade_id}"
    )
    return f"{type(model).__name__}({len(model.stitches)} stitches of {names}; {default} runs)"


def frame_of(stitches: Sequence[Stitch], anchor_names: Sequence[str]) -> "pd.DataFrame":
    """As `table`, of some stitches."""
    import pandas as pd  # here, because the most part of this package does without

    metrics = dict.fromkeys(name for stitch in stitches for name in stitch.metrics)
    columns = {
        "route": [route_in_words(stitch, anchor_names) for stitch in stitches],
        "flops": pd.array([stitch.flops for stitch in stitches], dtype="Int64"),
        "params": pd.array([stitch.params for stitch in stitches], dtype="Int64"),
        "latency_ms": pd.array([stitch.latency_ms for stitch in stitches], dtype="Float64"),
        "memory_mb": pd.array([stitch.memory_mb for stitch in stitches], dtype="Float64"),
        **{name: pd.array([stitch.metrics.get(name) for stitch in stitches], dtype="Float64") for name in metrics},
    }
    frame = pd.DataFrame(columns, index=pd.Index([stitch.id for stitch in stitches], name="id"))
    return frame.dropna(axis="columns", how="all")


def short_names(config: StitchableConfig) -> list[str]:
    """A name per anchor: its architecture, with its width or place where several share it."""
    architectures = [entry["architecture"] for entry in config.anchors]
    if len(set(architectures)) == len(architectures):
        return architectures
    widths = [entry["cuts"][-1][0] for entry in config.anchors]
    labels = widths if len(set(widths)) == len(widths) else range(len(widths))
    return [f"{architecture.split('_')[0]}-{label}" for architecture, label in zip(architectures, labels, strict=True)]
