"""Claim: with the anchors alone timed, all 71 latencies of DeiT-Ti/S/B are predicted to a median error under 5 %.

    python benchmarks/latency.py

Every stitch is measured as well, which is what the calibration saves. Short calibrations and measurements take turns,
and medians over the turns are compared: a shared machine may be a fifth faster in one second than in the next, which is
no error of the sum. What it adds to a single turn is in the result too.
"""

import argparse
import statistics

import torch
from report import write_report

import stitchable
from stitchable import calibrate
from stitchable.timing import measure_latencies

ANCHORS = ["deit_tiny_patch16_224", "deit_small_patch16_224", "deit_base_patch16_224"]
TARGET = 0.05


def main() -> None:
    """Calibrate and measure every stitch in turn, compare, and write benchmarks/results/latency.json."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=12)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model = stitchable.from_anchors(ANCHORS, pretrained=False)
    ids = [stitch.id for stitch in model.stitches]
    predicted: dict[int, list[float]] = {i: [] for i in ids}
    measured: dict[int, list[float]] = {i: [] for i in ids}
    for _ in range(given.turns):
        calibrate(model, num_runs=2, num_warmup_runs=1, num_verified=0)
        seconds = measure_latencies(model, ids, num_runs=1)
        for stitch in model.stitches:
            predicted[stitch.id].append(stitch.latency_ms or 0.0)
            measured[stitch.id].append(1e3 * seconds[stitch.id])
    rows = {i: [round(statistics.median(values[i]), 3) for values in (predicted, measured)] for i in ids}
    errors = [abs(prediction / actual - 1) for prediction, actual in rows.values()]
    turns = [
        statistics.median(abs(predicted[i][turn] / measured[i][turn] - 1) for i in ids) for turn in range(given.turns)
    ]
    result = {
        "median_error": round(statistics.median(errors), 4),
        "max_error": round(max(errors), 4),
        "target_median_error": TARGET,
        "median_errors_of_single_turns": [round(error, 4) for error in turns],
        "predicted_and_measured_ms": rows,
    }
    print(f"median error {100 * result['median_error']:.1f} %, largest {100 * result['max_error']:.1f} %")
    print(f"of single turns, whose halves are seconds apart: {100 * statistics.median(turns):.1f} %")
    print(f"wrote {write_report('latency', result)}")


if __name__ == "__main__":
    main()
