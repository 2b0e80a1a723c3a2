"""Claim: with the anchors alone timed, all 71 latencies of DeiT-Ti/S/B are predicted to a median error under 5 %.

    python benchmarks/latency.py

Every stitch is measured as well, which is what the calibration saves. The two take turns, because a shared machine is
faster in one minute than in the next. The error is that of a turn: of one calibration, as `stitchable calibrate` makes.
"""

import argparse
import statistics
import time

import torch
from report import write_report

from stitchable import StitchableForImageClassification, calibrate
from stitchable.latency import measure_latencies

ANCHORS = ["deit_tiny_patch16_224", "deit_small_patch16_224", "deit_base_patch16_224"]
TARGET = 0.05


def main() -> None:
    """Calibrate and measure every stitch in turn, compare, and write benchmarks/results/latency.json."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--num-runs", type=int, default=3, help="rounds in which every stitch is measured in a turn")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model = StitchableForImageClassification.from_anchors(ANCHORS, pretrained=False)
    ids = [stitch.id for stitch in model.stitches]
    turns: list[dict[int, tuple[float, float]]] = []  # predicted and measured milliseconds
    ratios = []
    for _ in range(given.turns):
        started = time.perf_counter()
        calibrate(model, num_verified=0)
        calibrated = time.perf_counter()
        measured = measure_latencies(model, ids, num_runs=given.num_runs)
        ratios.append((calibrated - started) / (time.perf_counter() - calibrated))
        turns.append({stitch.id: (stitch.latency_ms or 0.0, 1e3 * measured[stitch.id]) for stitch in model.stitches})
    errors = [[abs(predicted / actual - 1) for predicted, actual in turn.values()] for turn in turns]
    result = {
        "median_error": round(statistics.median(statistics.median(turn) for turn in errors), 4),
        "median_errors_of_the_turns": [round(statistics.median(turn), 4) for turn in errors],
        "largest_errors_of_the_turns": [round(max(turn), 4) for turn in errors],
        "target_median_error": TARGET,
        "seconds_of_calibration_against_measuring_all": round(statistics.median(ratios), 3),
        "medians_of_predicted_and_measured_ms": {
            i: [round(statistics.median(turn[i][side] for turn in turns), 3) for side in (0, 1)] for i in ids
        },
    }
    print(f"median error {100 * result['median_error']:.1f} %, of the turns {result['median_errors_of_the_turns']}")
    print(f"wrote {write_report('latency', result)}")


if __name__ == "__main__":
    main()
