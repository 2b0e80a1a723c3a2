"""Claim: with the anchors alone timed, all 71 latencies of DeiT-Ti/S/B are predicted to a median error under 5 %.

    python benchmarks/latency.py

Every stitch is measured as well, which is what the calibration saves.
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
    """Calibrate, measure every stitch, compare, and write benchmarks/results/latency.json."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--num-runs", type=int, default=10, help="timed rounds of either")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model = StitchableForImageClassification.from_anchors(ANCHORS, pretrained=False)
    started = time.perf_counter()
    calibrate(model, num_runs=given.num_runs, num_verified=0)
    calibrated = time.perf_counter()
    measured = measure_latencies(model, [stitch.id for stitch in model.stitches], num_runs=given.num_runs)
    finished = time.perf_counter()
    rows = {stitch.id: [stitch.latency_ms, round(1e3 * measured[stitch.id], 3)] for stitch in model.stitches}
    errors = {i: abs(predicted / actual - 1) for i, (predicted, actual) in rows.items()}
    result = {
        "median_error": round(statistics.median(errors.values()), 4),
        "max_error": round(max(errors.values()), 4),
        "target_median_error": TARGET,
        "seconds_of_calibration_against_measuring_all": round((calibrated - started) / (finished - calibrated), 3),
        "predicted_and_measured_ms": rows,
    }
    print(f"median error {100 * result['median_error']:.1f} %, largest {100 * result['max_error']:.1f} %")
    print(f"wrote {write_report('latency', result)}")


if __name__ == "__main__":
    main()
