"""Figures of the stitches of a model, written into its table: costs, latencies, metrics."""

from collections.abc import Mapping
from typing import Any

from transformers.utils import logging

from stitchable.model.modeling_stitchable import StitchablePreTrainedModel, plan_of
from stitchable.model.routes import Stitch, Stitches

logger = logging.get_logger(__name__)


def record(model: StitchablePreTrainedModel, stitch_id: int, **figures: Any) -> Stitch:
    """Write figures into the stitch table (`flops`, `params`, `latency_ms`, `memory_mb`, `metrics`); the new entry.

    A figure that is infinite or NaN, such as the loss of a diverged stitch, is left out with a warning.

    Raises:
        ValueError: an unknown stitch or figure, or a figure that is no number.
    """
    stitch, known = model._find(stitch_id), ("flops", "params", "latency_ms", "memory_mb", "metrics")
    if set(figures) - set(known):
        raise ValueError(f"a stitch has no figure {sorted(set(figures) - set(known))}; it has {', '.join(known)}")
    figures = {name: _plain(value) for name, value in figures.items()}
    recorded = Stitch.from_dict({**stitch.to_dict(), **figures}, f"stitch {stitch.id}")
    given = {**figures, **figures.get("metrics", {})}
    kept = {**recorded.to_dict(), **recorded.metrics, "metrics": {}}
    lost = [name for name, value in given.items() if value is not None and name not in kept]
    if lost:
        logger.warning(f"stitch {stitch.id}: {', '.join(lost)} is not finite and is not recorded")
    model.replace(recorded)
    return recorded


def replace(model: StitchablePreTrainedModel, stitch: Stitch) -> None:
    """Put a stitch, with other figures or parts of its own, in the place of the one with its id."""
    index = [known.id for known in model.stitches].index(stitch.id)
    if stitch.own != model.stitches[index].own:
        model._build_own(stitch)
    model._plans[stitch.id] = plan_of(stitch)
    model._stitches = Stitches((*model.stitches[:index], stitch, *model.stitches[index + 1 :]))
    model.config.stitches[index] = stitch.to_dict()


def _plain(figure: Any) -> Any:
    """A figure, or figures by name, as Python's own numbers."""
    if isinstance(figure, Mapping):
        return {name: _plain(value) for name, value in figure.items()}
    item = getattr(figure, "item", None)  # of a tensor or NumPy's number
    try:
        return item() if callable(item) else figure
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"a figure is one number, got {figure!r}") from error
