"""Claim: the figures of all stitches take no more than twice the time of the arithmetic, three lines on tensors.

    python benchmarks/metrics.py [--rounds 9]

10,000 samples and 71 stitches, in one thread. "before" is how `compute_figures` fed the metric until now: in batches
through Arrow, where every number becomes a Python object. All three ways take turns and give the same figures.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from report import write_report
from tqdm import tqdm

from stitchable.metrics import StitchMetric, compute_figures

NUM_SAMPLES, NUM_STITCHES, LIMIT = 10_000, 71, 2.0
Figures = dict[int, dict[str, float]]


def main() -> None:
    """Time the three ways in turn, print and store the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rank = torch.randint(0, 20, (NUM_SAMPLES, NUM_STITCHES))
    rows = torch.stack([rank, 5 * torch.rand(NUM_SAMPLES, NUM_STITCHES)], dim=-1)
    ways: dict[str, Callable[[torch.Tensor], Figures]] = {
        "tensors": with_tensors,
        "before": through_arrow,
        "compute_figures": lambda rows: compute_figures(rows, range(NUM_STITCHES)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    results: dict[str, Figures] = {}
    for number in tqdm(range(-1, rounds), desc="rounds", leave=False):
        for name, way in ways.items():
            started = time.perf_counter()
            results[name] = way(rows)
            taken = time.perf_counter() - started
            if number >= 0:  # round -1 warms up
                seconds[name].append(taken)
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    ratios = {name: round(median / medians["tensors"], 2) for name, median in medians.items()}
    ours = results["compute_figures"]
    figures = {
        "samples": NUM_SAMPLES,
        "stitches": NUM_STITCHES,
        "rounds": rounds,
        "seconds": {name: round(median, 5) for name, median in medians.items()},
        "ratio_to_tensors": ratios,
        "limit": LIMIT,
        "within_limit": ratios["compute_figures"] <= LIMIT,
        "same_as_before": ours == results["before"],
        "largest_difference_to_tensors": max(
            abs(ours[i][name] - value) for i, row in results["tensors"].items() for name, value in row.items()
        ),
        "rounds_seconds": seconds,
    }
    print({key: value for key, value in figures.items() if key != "rounds_seconds"})
    print(f"wrote {write_report('metrics', figures)}")


def with_tensors(rows: torch.Tensor) -> Figures:
    """The arithmetic."""
    rank, loss = rows.unbind(-1)
    figures = torch.stack([(rank < 1).double().mean(0), (rank < 5).double().mean(0), loss.double().mean(0)], dim=1)
    return {
        i: dict(zip(("accuracy", "top5_accuracy", "loss"), row, strict=True)) for i, row in enumerate(figures.tolist())
    }


def through_arrow(rows: torch.Tensor) -> Figures:
    """What `compute_figures` did."""
    metric = StitchMetric(keep_in_memory=True)
    for part in rows.split(1024):
        rank, loss = part.unbind(-1)
        metric.add_batch(rank=rank.int().numpy(), loss=loss.numpy())
    return metric.compute(stitch_ids=range(NUM_STITCHES))


if __name__ == "__main__":
    main()
