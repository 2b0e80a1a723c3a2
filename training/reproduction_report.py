"""Tables and figures of docs/reproduction.md, from the results that `training/reproduce.py` left.

    python training/reproduction_report.py digits > tables.md

Prints Markdown tables and writes docs/reproduction/STUDY-*.png. Figures after ± are standard deviations over the seeds.
"""

import argparse
import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from scipy.stats import spearmanr

RESULTS = Path(__file__).parents[1] / "docs" / "reproduction"
Run = dict[str, Any]
"""One run: "stitches" {id: {"route", "flops"}} and, by stage, {id: accuracy}."""


def main() -> None:
    """Print the tables of a study and draw its figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("study")
    study = parser.parse_args().study
    results = json.loads((RESULTS / f"{study}.json").read_text())
    runs: dict[str, dict[str, Run]] = results["runs"]
    print(f"## {study}\n\n{_anchors(runs)}\n\n{_interpolation(runs['base'])}\n\n{_variants(runs)}\n")
    if any(name.startswith("alone-") for name in runs):
        print(f"{_alone(runs)}\n")
    draw(study, runs)


def pair_of(route: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The anchors of a route, in order."""
    return tuple(segment[0] for segment in route)


def stitches_of(run: Run, stage: str) -> dict[str, float]:
    """Accuracies of the stitches that are no anchors, by id."""
    return {i: accuracy for i, accuracy in run[stage].items() if len(run["stitches"][i]["route"]) > 1}


def rank_correlations(run: Run, stage: str) -> dict[tuple[int, ...], float]:
    """Spearman's correlation of FLOPs and accuracy, per pair of anchors, these included."""
    pairs = sorted({pair_of(entry["route"]) for entry in run["stitches"].values() if len(entry["route"]) == 2})
    correlations = {}
    for pair in pairs:
        members = [
            (entry["flops"], run[stage][i])
            for i, entry in run["stitches"].items()
            if i in run[stage] and (pair_of(entry["route"]) == pair or pair_of(entry["route"]) in {(a,) for a in pair})
        ]
        correlations[pair] = float(spearmanr(*zip(*members, strict=True)).statistic)
    return correlations


def _anchors(runs: dict[str, dict[str, Run]]) -> str:
    base = runs["base"]
    anchors = [i for i, entry in next(iter(base.values()))["stitches"].items() if len(entry["route"]) == 1]
    flops = {i: next(iter(base.values()))["stitches"][i]["flops"] for i in anchors}
    rows = [
        [
            i,
            f"{flops[i] / 1e6:.3f}",
            *(_percent(run[stage][i] for run in base.values()) for stage in ("before", "trained")),
        ]
        for i in anchors
    ]
    return _table(["anchor", "MFLOPs", "before the joint training", "after"], rows)


def _interpolation(base: dict[str, Run]) -> str:
    rows = []
    for pair in rank_correlations(next(iter(base.values())), "trained"):
        inside, all_stages = [], {stage: [] for stage in ("initialized", "trained")}
        for run in base.values():
            for stage, values in all_stages.items():
                values.append(rank_correlations(run, stage)[pair])
            low, high = (run["trained"][str(anchor)] for anchor in pair)
            members = [
                a for i, a in stitches_of(run, "trained").items() if pair_of(run["stitches"][i]["route"]) == pair
            ]
            inside.append(sum(low <= accuracy <= high for accuracy in members) / len(members))
        number = len(members)
        rows.append(
            ["-".join(map(str, pair)), str(number)]
            + [_spread(values, "{:.2f}") for values in all_stages.values()]
            + [_percent(inside)]
        )
    head = ["pair", "stitches", "rank correlation, least squares alone", "after training", "between their anchors"]
    return _table(head, rows)


def _variants(runs: dict[str, dict[str, Run]]) -> str:
    rows = []
    for name, seeds in runs.items():
        if name.startswith("alone-") or name == "drop-path":
            continue
        num = len(stitches_of(next(iter(seeds.values())), "trained"))
        columns = []
        for stage in ("initialized", "trained"):
            columns.append(_percent(statistics.mean(stitches_of(run, stage).values()) for run in seeds.values()))
        common = [s for s in seeds if s in runs["base"]]
        differences = [
            statistics.mean(stitches_of(seeds[s], "trained").values())
            - statistics.mean(stitches_of(runs["base"][s], "trained").values())
            for s in common
        ]
        worst = _percent(min(stitches_of(run, "trained").values()) for run in seeds.values())
        delta = "" if name == "base" else _spread([100 * d for d in differences], "{:+.2f}") + f" ({len(common)} seeds)"
        rows.append([name, str(num), *columns, worst, delta])
    head = ["variant", "stitches", "mean, initialised", "mean, trained", "worst, trained", "points against base"]
    return _table(head, rows)


def _alone(runs: dict[str, dict[str, Run]]) -> str:
    rows = []
    for name, seeds in runs.items():
        if not name.startswith("alone-"):
            continue
        i = name.removeprefix("alone-")
        together = [run["trained"][i] for run in runs["base"].values()]
        entry = next(iter(seeds.values()))["stitches"][i]
        rows.append(
            [
                i,
                str(entry["route"]),
                f"{entry['flops'] / 1e6:.3f}",
                _percent(run["trained"][i] for run in seeds.values()),
                _percent(together),
            ]
        )
    return _table(["stitch", "route", "MFLOPs", "trained alone", "in the stitchable model"], rows)


def draw(study: str, runs: dict[str, dict[str, Run]]) -> None:
    """Accuracy against FLOPs, means over the seeds: the base alone, and one panel per variant beside it."""
    others = [name for name in runs if name != "base" and not name.startswith("alone-") and name != "drop-path"]
    panels: list[tuple[str, list[tuple[str, str]]]] = [
        ("least squares, before and after the joint training", [("base", "initialized"), ("base", "trained")])
    ]
    panels += [(name, [("base", "trained"), (name, "trained")]) for name in others]
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5 * columns, 3.6 * rows), dpi=110, layout="constrained")
    for number, (title, series) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, number + 1)
        for name, stage in series:
            _scatter(axes, runs[name], stage, f"{name}, {stage}")
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel("MFLOPs per image (multiply-adds plus normalisation terms)", fontsize="small")
        axes.set_ylabel("accuracy (%)", fontsize="small")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small")
    figure.savefig(RESULTS / f"{study}.png")


def _scatter(axes: Any, seeds: dict[str, Run], stage: str, label: str) -> None:
    first = next(iter(seeds.values()))
    ids = [i for i in first[stage] if all(i in run[stage] for run in seeds.values())]
    flops = [first["stitches"][i]["flops"] / 1e6 for i in ids]
    means = [100 * statistics.mean(run[stage][i] for run in seeds.values()) for i in ids]
    sizes = [60 if len(first["stitches"][i]["route"]) == 1 else 14 for i in ids]
    axes.scatter(flops, means, s=sizes, label=label, alpha=0.8)


def _percent(values: Iterable[float]) -> str:
    return _spread([100 * value for value in values], "{:.2f}") + " %"


def _spread(values: Sequence[float], form: str) -> str:
    mean = form.format(statistics.mean(values))
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.2f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, [":---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    main()
