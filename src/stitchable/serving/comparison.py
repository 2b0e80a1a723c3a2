"""The policy beside what one could do without it, on one trace: table and figure."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from stitchable.serving.choices import front_of
from stitchable.serving.oracle import best_schedule
from stitchable.serving.policy import Choice, Policy
from stitchable.serving.simulator import Outcome, Threshold, simulate
from stitchable.serving.traces import Arrivals

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_THRESHOLDS = (1, 2, 4, 8, 16, 32)


def compare(choices: Sequence[Choice], anchors: Sequence[int], arrivals: Arrivals, target: float) -> dict[str, Outcome]:
    """Outcomes by name: "policy", each anchor alone, each choice of the front alone, a load threshold, the oracle.

    All of them shed what they cannot answer in time. The threshold is the one that does best on this very trace.

    Args:
        choices: what can run.
        anchors: ids of the stitches that are anchors.
        arrivals: seconds, ascending.
        target: seconds from each arrival to its deadline.
    """
    front = front_of(choices)
    alone = [choice for choice in choices if choice.kind == "stitch" and choice.id in anchors]
    outcomes = {"policy": simulate(Policy(choices, target), arrivals, target)}
    for choice in alone + [choice for choice in front if choice not in alone]:
        name = f"{'anchor' if choice in alone else choice.kind} {choice.id}"
        outcomes[name] = simulate(Policy([choice], target), arrivals, target)
    thresholds = [simulate(Threshold(choices, target, number), arrivals, target) for number in _THRESHOLDS]
    outcomes["load threshold"] = max(thresholds, key=lambda outcome: (outcome.in_time * outcome.accuracy_or_0).sum())
    outcomes["oracle"] = best_schedule(front, arrivals, target)
    return outcomes


def to_text(outcomes: Mapping[str, Outcome]) -> str:
    """A table, one line per outcome."""
    lines = [f"{'':16} in time  accuracy   p50 ms   p95 ms   p99 ms    shed  busy"]
    for name, outcome in outcomes.items():
        s = {key: np.nan if value is None else value for key, value in outcome.summary().items()}
        lines.append(
            f"{name:16} {100 * s['attainment']:6.2f} %  {100 * s['accuracy']:6.2f} % {s['p50_ms']:8.2f} "
            f"{s['p95_ms']:8.2f} {s['p99_ms']:8.2f} {100 * s['shed']:5.1f} % {100 * s['utilisation']:3.0f} %"
        )
    return "\n".join(lines)


def plot(outcomes: Mapping[str, Outcome], names: Sequence[str], num_bins: int = 120) -> "Figure":
    """Load, attainment and accuracy over time, of some outcomes on the same trace."""
    # A figure of its own, without pyplot: no global state, no window, any thread.
    from matplotlib.figure import Figure

    arrivals = outcomes[names[0]].arrivals
    edges = np.linspace(0, max(arrivals[-1], 1e-9), num_bins + 1)
    middles, width = (edges[1:] + edges[:-1]) / 2, edges[1]
    bins = np.minimum(np.searchsorted(edges, arrivals, side="right") - 1, num_bins - 1)
    number = np.bincount(bins, minlength=num_bins)
    figure = Figure(figsize=(8, 6), dpi=150, layout="constrained")
    load, attainment, accuracy = figure.subplots(3, 1, sharex=True)
    load.fill_between(middles, number / width, step="mid", color="grey", alpha=0.5)
    for name in names:
        outcome = outcomes[name]
        in_time = np.bincount(bins, weights=outcome.in_time, minlength=num_bins)
        summed = np.bincount(bins, weights=outcome.in_time * outcome.accuracy_or_0, minlength=num_bins)
        with np.errstate(invalid="ignore"):  # no requests, no figure
            attainment.plot(middles, 100 * in_time / number, label=name)
            accuracy.plot(middles, 100 * summed / in_time, label=name)
    load.set_ylabel("requests / s")
    attainment.set_ylabel("in time (%)")
    accuracy.set_ylabel("accuracy of those (%)")
    accuracy.set_xlabel("seconds")
    attainment.legend(fontsize="small")
    for axes in (load, attainment, accuracy):
        axes.grid(alpha=0.3)
    return figure
