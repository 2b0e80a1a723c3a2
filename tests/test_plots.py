"""The figure of a stitch table: what is drawn, and where."""

import numpy as np

from stitchable import Segment, Stitch
from stitchable.plots import plot_stitches

STITCHES = [
    Stitch(0, (Segment(0, 0, 2),), flops=1_000_000, metrics={"accuracy": 0.4}),
    Stitch(1, (Segment(1, 0, 2),), flops=4_000_000, metrics={"accuracy": 0.7}),
    Stitch(2, (Segment(0, 0, 1), Segment(1, 1, 2)), ("0-1.0",), flops=2_000_000, metrics={"accuracy": 0.8}),
]


def test_the_null_line_and_the_cascades_are_drawn_beside_the_front() -> None:
    cascades = [
        {"id": 0, "flops": 1.5e6, "metrics": {"accuracy": 0.6, "gain": 0.2}},
        {"id": 1, "flops": 3e6, "metrics": {"accuracy": 0.85, "gain": 0.05}},
    ]
    untouched = {1: (4_000_000, 0.9), 0: (1_000_000, 0.5), 5: (2_000_000, 0.45)}
    (axes,) = plot_stitches(STITCHES, ["a", "b"], untouched=untouched, cascades=cascades).axes
    assert axes.get_legend_handles_labels()[1] == [
        "a (anchor)",
        "b (anchor)",
        "a-b",
        "Pareto front",
        "untouched anchors (null line)",
        "cascades, mean FLOPs",
    ]
    front, null_line, curve = (np.array(line.get_xydata()) for line in axes.get_lines())
    np.testing.assert_allclose(front, [[1, 40], [2, 80]])
    np.testing.assert_allclose(null_line, [[1, 50], [2, 50], [4, 90]])  # 0.45 for more FLOPs is no step down
    np.testing.assert_allclose(curve, [[1.5, 60], [3, 85]])


def test_a_figure_without_them_has_no_such_lines() -> None:
    (axes,) = plot_stitches(STITCHES, ["a", "b"]).axes
    assert len(axes.get_lines()) == 1
