"""Claim: with the anchors alone timed, all 71 latencies of DeiT-Ti/S/B are predicted to a median error under 5 %.

    python benchmarks/latency.py

Every stitch is measured as well, which is what the calibration saves. The two take turns, and medians over the turns
are compared: a shared machine is faster in one minute than in the next, which is no error of the prediction.
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
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--num-runs", type=int, default=3, help="timed rounds of either in a turn")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model = StitchableForImageClassification.from_anchors(ANCHORS, pretrained=False)
    ids = [stitch.id for stitch in model.stitches]
    predicted: dict[int, list[float]] = {stitch_id: [] for stitch_id in ids}
    measured: dict[int, list[float]] = {stitch_id: [] for stitch_id in ids}
    seconds: dict[str, float] = {"calibrating": 0.0, "measuring": 0.0}
    for _ in range(given.turns):
        started = time.perf_counter()
        calibrate(model, num_runs=given.num_runs, num_verified=0)
        calibrated = time.perf_counter()
        for stitch_id, value in measure_latencies(model, ids, num_runs=given.num_runs).items():
            measured[stitch_id].append(1e3 * value)
        seconds["calibrating"] += calibrated - started
        seconds["measuring"] += time.perf_counter() - calibrated
        for stitch in model.stitches:
            predicted[stitch.id].append(stitch.latency_ms or 0.0)
    rows = {
        stitch_id: [round(statistics.median(values), 3) for values in (predicted[stitch_id], measured[stitch_id])]
        for stitch_id in ids
    }
    errors = [abs(prediction / actual - 1) for prediction, actual in rows.values()]
    result = {
        "median_error": round(statistics.median(errors), 4),
        "max_error": round(max(errors), 4),
        "target_median_error": TARGET,
        "median_errors_of_single_turns": [
            round(statistics.median(abs(predicted[i][turn] / measured[i][turn] - 1) for i in ids), 4)
            for turn in range(given.turns)
        ],
        "seconds_of_calibration_against_measuring_all": round(seconds["calibrating"] / seconds["measuring"], 3),
        "predicted_and_measured_ms": rows,
    }
    print(f"median error {100 * result['median_error']:.1f} %, largest {100 * result['max_error']:.1f} %")
    print(f"wrote {write_report('latency', result)}")


if __name__ == "__main__":
    main()
