"""Figures of a stitch table."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from stitchable.front import pareto_front
from stitchable.model.routes import Stitch

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_stitches(
    stitches: Sequence[Stitch],
    anchor_names: Sequence[str],
    metric: str = "accuracy",
    marked: Mapping[str, int | str] | None = None,
    untouched: Mapping[int, tuple[float, float]] | None = None,
    cascades: Sequence[Mapping[str, Any]] = (),
) -> "Figure":
    """The accuracy-FLOPs curve of figure 6 of the paper: one dot per stitch, coloured by its anchors, anchors starred.

    Args:
        stitches: measured stitches; those without the metric are left out.
        anchor_names: a short name per anchor, smallest first.
        metric: what to draw, a figure in 0..1.
        marked: ids of stitches, or "cascade ID", to draw a ring around, by what to write beside it.
        untouched: FLOPs and figure of the anchors as they were before they were trained with the others, by id; their
            front is the null line.
        cascades: as they are in the config, drawn over their mean FLOPs.

    Raises:
        ValueError: no stitch was measured.
    """
    # A figure of its own, without pyplot: no global state, no window, any thread.
    from matplotlib.figure import Figure

    measured = [stitch for stitch in stitches if metric in stitch.metrics and stitch.flops]
    if not measured:
        raise ValueError(f"no stitch has a measured {metric}; run stitchable.evaluate(model, batches) first")
    unit, divisor = flops_unit(max(stitch.flops or 0 for stitch in measured))
    figure = Figure(figsize=(7, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    dots = {stitch.id: ((stitch.flops or 0) / divisor, 100 * stitch.metrics[metric]) for stitch in measured}
    _draw_stitches(axes, measured, anchor_names, dots)
    front = pareto_front(measured, metric)
    axes.step(
        *zip(*(dots[stitch.id] for stitch in front), strict=True),
        where="post",
        color="grey",
        linewidth=1,
        zorder=1,
        label="Pareto front",
    )
    if untouched:
        _draw_null_line(axes, untouched, divisor)
    places: dict[Any, Any] = {**dots, **_draw_cascades(axes, cascades, metric, divisor)}
    for text, marking in (marked or {}).items():
        if marking in places:
            x, y = places[marking]
            axes.scatter(x, y, s=320, facecolors="none", edgecolors="black", linewidths=1.8, zorder=4)
            axes.annotate(text, (x, y), xytext=(-15, 9), textcoords="offset points", weight="bold", size="large")
    axes.set_xlabel(f"{unit} per image (multiply-adds plus normalisation terms)")
    axes.set_ylabel(f"{metric} (%)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure


def _draw_stitches(
    axes: Any, measured: Sequence[Stitch], anchor_names: Sequence[str], dots: Mapping[int, tuple[float, float]]
) -> None:
    groups: dict[str, list[Stitch]] = {}
    for stitch in measured:
        groups.setdefault("-".join(anchor_names[segment.anchor] for segment in stitch.route), []).append(stitch)
    for name, members in groups.items():
        is_anchor = members[0].is_anchor
        flops, figures = zip(*(dots[stitch.id] for stitch in members), strict=True)
        axes.scatter(
            flops,
            figures,
            marker="*" if is_anchor else "o",
            s=220 if is_anchor else 28,
            edgecolors="black" if is_anchor else "none",
            linewidths=0.8,
            zorder=3 if is_anchor else 2,
            label=f"{name} (anchor)" if is_anchor else name,
        )


def _draw_cascades(
    axes: Any, cascades: Sequence[Mapping[str, Any]], metric: str, divisor: float
) -> dict[str, tuple[float, float]]:
    """Draw those that were measured; returns where each is."""
    drawn = {
        f"cascade {cascade['id']}": (
            cascade["metrics"].get("mean_flops", cascade["flops"]) / divisor,
            100 * cascade["metrics"][metric],
        )
        for cascade in cascades
        if metric in cascade.get("metrics", {})
    }
    if drawn:
        points = zip(*drawn.values(), strict=True)
        axes.plot(*points, marker=".", color="black", linewidth=1, label="cascades, mean FLOPs")
    return drawn


def _draw_null_line(axes: Any, untouched: Mapping[int, tuple[float, float]], divisor: float) -> None:
    flops, figures = zip(*sorted(untouched.values()), strict=True)
    best = list(accumulate(figures, max))
    axes.step(
        [f / divisor for f in flops], [100 * b for b in best], where="post", color="grey", linestyle=":", zorder=1
    )
    axes.scatter(
        [f / divisor for f in flops],
        [100 * figure for figure in figures],
        marker="*",
        s=160,
        facecolors="none",
        edgecolors="grey",
        label="untouched anchors (null line)",
    )


def route_in_words(stitch: Stitch, anchor_names: Sequence[str]) -> str:
    """The blocks of each segment, first to last."""
    return " → ".join(f"{anchor_names[anchor]} {start}–{stop - 1}" for anchor, start, stop in stitch.route)


def flops_unit(largest: float) -> tuple[str, float]:
    """A unit that suits FLOPs up to `largest`, and what to divide by."""
    return ("GFLOPs", 1e9) if largest >= 1e9 else ("MFLOPs", 1e6) if largest >= 1e6 else ("kFLOPs", 1e3)
