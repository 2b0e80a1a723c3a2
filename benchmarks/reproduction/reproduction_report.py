"""Tables and figures of docs/reproduction.md, from the results that `benchmarks/reproduction/reproduce.py` left.

    python benchmarks/reproduction/reproduction_report.py

Writes the tables between the marks of the page anew and draws docs/reproduction/STUDY.png. Figures after ± are standard
deviations over the seeds.
"""

import argparse
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from scipy.stats import spearmanr

from stitchable.front import Judgement, judge

RESULTS = Path(__file__).parents[2] / "docs" / "reproduction"
PAGE = RESULTS.with_suffix(".md")
Run = dict[str, Any]
"""One run: "stitches" {id: {"route", "flops"}} and, by stage, {id: accuracy}."""


def main() -> None:
    """Bring the page and its figures up to date."""
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    text = PAGE.read_text(encoding="utf-8")
    for path in sorted(RESULTS.glob("*.json")):
        text = fill(text, path.stem)
        draw(path.stem, read_runs(path.stem))
    PAGE.write_text(text, encoding="utf-8")


def fill(text: str, study: str) -> str:
    """The page with the tables of a study between its marks, as far as it has marks for them.

    Raises:
        ValueError: a mark has no end.
    """
    runs = read_runs(study)
    for name, make in TABLES.items():
        mark, end = f"<!-- {study}: {name} -->", "<!-- end -->"
        before, found, after = text.partition(mark)
        if not found:
            continue
        if end not in after:
            raise ValueError(f"{mark} has no {end}")
        text = f"{before}{mark}\n{make(runs)}\n{end}{after.partition(end)[2]}"
    return text


def read_runs(study: str) -> dict[str, dict[str, Run]]:
    """Runs of a study: variant -> seed -> run."""
    return json.loads((RESULTS / f"{study}.json").read_text(encoding="utf-8"))["runs"]


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
    anchors = [i for i, entry in _entries(base).items() if len(entry["route"]) == 1]
    flops = {i: _entries(base)[i]["flops"] for i in anchors}
    rows = [
        [
            i,
            f"{flops[i] / 1e6:.3f}",
            *(_percent(run[stage][i] for run in base.values()) for stage in ("before", "trained")),
        ]
        for i in anchors
    ]
    return _table(["anchor", "MFLOPs", "before the joint training", "after"], rows)


def _interpolation(runs: dict[str, dict[str, Run]]) -> str:
    base, rows = runs["base"], []
    for pair in rank_correlations(next(iter(base.values())), "trained"):
        members = [i for i, entry in _entries(base).items() if pair_of(entry["route"]) == pair]
        row = ["-".join(map(str, pair)), str(len(members))]
        for stage in ("initialized", "trained"):
            row.append(_percent(statistics.mean(run[stage][i] for i in members) for run in base.values()))
            row.append(_spread([rank_correlations(run, stage)[pair] for run in base.values()], "{:.2f}"))
        inside = []
        for run in base.values():
            low, high = (run["trained"][str(anchor)] for anchor in pair)
            inside.append(statistics.mean(low <= run["trained"][i] <= high for i in members))
        rows.append([*row, _percent(inside)])
    head = ["pair", "stitches", "mean, initialised", "rank correlation", "mean, trained", "rank correlation"]
    return _table([*head, "between their anchors"], rows)


def _front(runs: dict[str, dict[str, Run]]) -> str:
    """What a variant's front is worth against the anchors as they were before the joint training."""
    rows = []
    for name, seeds in runs.items():
        if not _is_compared(name):
            continue
        judged = [judge_run(run, runs["base"][seed]["before"]) for seed, run in seeds.items()]
        shares = [found.share for found in judged if found.share is not None]
        rows.append(
            [
                name,
                _percent(found.null_line for found in judged),
                _percent(found.area for found in judged),
                _percent(found.straight_line for found in judged),
                _spread(shares, "{:.2f}") if len(shares) == len(judged) else "the lines are too near",
            ]
        )
    return _table(["variant", "null line", "area of the front", "straight line", "share"], rows)


def _seeds(runs: dict[str, dict[str, Run]]) -> str:
    """What the base reaches, seed by seed, and in the mean."""
    rows = []
    for seed, run in sorted(runs["base"].items()):
        judged, stitches = judge_run(run, run["before"]), stitches_of(run, "trained").values()
        losses = [run["before"][i] - run["trained"][i] for i in run["before"]]
        share = math.nan if judged.share is None else judged.share
        rows.append((seed, judged.null_line, judged.area, share, statistics.mean(stitches), min(stitches), max(losses)))
    rows.append(("mean", *(statistics.mean(column) for column in list(zip(*rows, strict=True))[1:])))
    cells = [
        [seed, *(f"{100 * x:.2f} %" for x in (null_line, area)), f"{share:.2f}"]
        + [f"{100 * x:.2f} %" for x in (mean, worst)]
        + [f"{100 * loss:.2f}"]
        for seed, null_line, area, share, mean, worst, loss in rows
    ]
    head = ["seed", "null line", "area", "share", "mean of the stitches", "worst", "largest loss of an anchor, points"]
    return _table(head, cells)


def judge_run(run: Run, untouched: dict[str, float]) -> Judgement:
    """The front of all stitches of a run, its trained anchors included, against anchors as they were."""
    trained = run["trained"]
    anchors = [i for i, entry in run["stitches"].items() if len(entry["route"]) == 1]
    return judge(
        [run["stitches"][i]["flops"] for i in trained],
        list(trained.values()),
        [run["stitches"][i]["flops"] for i in anchors],
        [untouched[i] for i in anchors],
    )


def _variants(runs: dict[str, dict[str, Run]]) -> str:
    rows = []
    for name, seeds in runs.items():
        if not _is_compared(name):
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
        order = _spread(
            [statistics.mean(rank_correlations(run, "trained").values()) for run in seeds.values()], "{:.2f}"
        )
        delta = "" if name == "base" else _spread([100 * d for d in differences], "{:+.2f}") + f" ({len(common)} seeds)"
        rows.append([name, str(num), *columns, delta, worst, order])
    head = ["variant", "stitches", "mean, initialised", "mean, trained", "against base", "worst", "rank correlation"]
    return _table(head, rows)


def _nearest(runs: dict[str, dict[str, Run]]) -> str:
    """Figure 9 (b): what stitches that are no neighbours add, by the anchors they go through."""
    seeds = runs["not-nearest"]
    groups: dict[tuple[int, ...], list[str]] = {}
    for i, entry in _entries(seeds).items():
        groups.setdefault(pair_of(entry["route"]), []).append(i)
    rows = []
    for group, members in sorted(groups.items(), key=lambda item: (len(item[0]), item[0])):
        means, ahead = [], []
        for seed, run in seeds.items():
            base = runs["base"][seed]
            means.append(statistics.mean(run["trained"][i] for i in members))
            ahead.append(statistics.mean(_beats(run, i, base) for i in members))
        names = "-".join(map(str, group)) + (" (anchor)" if len(group) == 1 else "")
        rows.append([names, str(len(members)), _percent(means), _percent(ahead)])
    return _table(["anchors", "stitches", "mean accuracy", "better than all of base that cost no more"], rows)


def _beats(run: Run, i: str, base: Run) -> bool:
    flops = run["stitches"][i]["flops"]
    return all(
        run["trained"][i] > base["trained"][j] for j, entry in base["stitches"].items() if entry["flops"] <= flops
    )


def _alone(runs: dict[str, dict[str, Run]]) -> str:
    rows = []
    for name, seeds in runs.items():
        if not name.startswith("alone-"):
            continue
        i = name.removeprefix("alone-")
        together = [run["trained"][i] for run in runs["base"].values()]
        entry = _entries(seeds)[i]
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


def _crops(runs: dict[str, dict[str, Run]]) -> str:
    """Appendix H: an anchor without some of its blocks, and the stitches that cost no more."""
    rows = []
    for name, seeds in runs.items():
        for place, crop in enumerate(next(iter(seeds.values())).get("crops", ())):
            accuracies = [run["crops"][place]["accuracy"] for run in seeds.values()]
            rows.append([name, crop["left_out"], f"{crop['flops'] / 1e6:.3f}", _percent(accuracies)])
            if name == "base" and crop["left_out"] != "none":
                affordable = [i for i, entry in _entries(seeds).items() if entry["flops"] <= crop["flops"]]
                best = [max((run["trained"][i] for i in affordable), default=0.0) for run in seeds.values()]
                rows[-1] += [_percent(best)]
            else:
                rows[-1] += [""]
    return _table(["variant", "blocks left out", "MFLOPs", "accuracy", "best stitch of base that costs no more"], rows)


def _statistics(runs: dict[str, dict[str, Run]]) -> str:
    """Means over anchors and pairs, with batch norms' statistics of all stitches and of each alone."""
    rows = []
    for name, seeds in runs.items():
        if "own_statistics" not in next(iter(seeds.values())):
            continue
        groups: dict[tuple[int, ...], list[str]] = {}
        for i, entry in _entries(seeds).items():
            groups.setdefault(tuple(sorted(pair_of(entry["route"]))), []).append(i)
        for group, members in sorted(groups.items(), key=lambda item: (len(item[0]), item[0])):
            row = [name, "-".join(map(str, group)) + (" (anchor)" if len(group) == 1 else "")]
            for stage in ("before", "trained", "own_statistics"):
                known = all(i in run[stage] for run in seeds.values() for i in members)
                means = [statistics.mean(run[stage][i] for i in members) for run in seeds.values()] if known else []
                row.append(_percent(means) if known else "")
            rows.append(row)
    head = ["variant", "stitches of", "before the joint training", "after", "with statistics of their own"]
    return _table(head, rows)


def _is_compared(name: str) -> bool:
    """Whether a variant trains all stitches, so that it stands beside the base."""
    return not name.startswith("alone-") and name != "drop-path"


def _entries(seeds: dict[str, Run]) -> dict[str, Any]:
    return next(iter(seeds.values()))["stitches"]


TABLES = {
    "anchors": _anchors,
    "interpolation": _interpolation,
    "front": _front,
    "seeds": _seeds,
    "variants": _variants,
    "nearest": _nearest,
    "alone": _alone,
    "crops": _crops,
    "statistics": _statistics,
}
"""What a mark of the page can ask for."""


def draw(study: str, runs: dict[str, dict[str, Run]]) -> None:
    """Accuracy against FLOPs, means over the seeds: the base alone, and one panel per variant beside it."""
    others = [name for name in runs if name != "base" and _is_compared(name)]
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
