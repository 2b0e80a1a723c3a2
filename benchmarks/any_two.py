"""Claim: the space and the costs of any two architectures of timm are known in a second or two, without a forward pass.

    python benchmarks/any_two.py

For every pair of tests/timm_modules.py at its image size: the seconds of `stitchable.make_config`, which builds
both on the meta device, beside the seconds that timm needs to build both with random weights, in the same run.
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
from report import write_report
from tqdm import tqdm

import stitchable

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from timm_modules import PAIRS, VARIANTS

PIXELS = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "num_labels": 1000}


def main() -> None:
    """Print the median and the largest of the seconds, and of their ratios, and store all."""
    timm.create_model("resnet18")  # what only the first model costs
    seconds = {}
    for name, pair in tqdm({**PAIRS, **VARIANTS}.items(), desc="pairs", leave=False):
        names = [pair.small, pair.large]

        def configure(names: list[str] = names, size: int = pair.image_size) -> Any:
            return stitchable.make_config(names, image_size=size, **PIXELS)

        config, taken = timed(configure)
        sizes = [entry["kwargs"] for entry in config.anchors]
        kinds = [entry["architecture"] for entry in config.anchors]
        _, built = timed(lambda: [timm.create_model(n, **k) for n, k in zip(kinds, sizes, strict=True)])  # noqa: B023
        seconds[name] = {"anchors": names, "config": round(taken, 3), "timm": round(built, 3)}
    taken = [entry["config"] for entry in seconds.values()]
    ratios = [entry["config"] / entry["timm"] for entry in seconds.values()]
    slowest = max(seconds, key=lambda name: seconds[name]["config"])
    print(f"{len(seconds)} pairs: median {statistics.median(taken):.2f} s, largest {max(taken):.2f} s ({slowest})")
    print(f"of the time that timm needs to build them: median {statistics.median(ratios):.2f}")
    print(f"wrote {write_report('any_two', seconds)}")


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """What a function returns, and the seconds it takes."""
    started = time.perf_counter()
    result = function()
    return result, time.perf_counter() - started


if __name__ == "__main__":
    main()
