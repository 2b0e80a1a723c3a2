"""Claims: cascades of published, untouched CIFAR-10 ResNets take 0.6 of the time of ResNet-56 or less where they are at
half of its FLOPs; where every image goes through both stages, that takes 1.05 of the time of two calls or less.

    OMP_NUM_THREADS=1 python benchmarks/cascade_latency.py --data ../shared/data

`--data` is the folder that holds `cifar10` and `cifar10_resnets`. Each half of the 10,000 test images chooses for the
other the best cascade within half of ResNet-56's mean FLOPs, and that is timed on images of this other half, in turns
with ResNet-56: the ratio is that of the sums, since most images stop early and few take long. Then two stitches run
through a cascade that sends on every image, in turns with two calls by hand: the median of the ratios.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cascades import published_resnets, search_model
from report import write_report

from stitchable import StitchableForImageClassification
from stitchable.cascade_search import TwoFold
from stitchable.cascade_stages import Costs
from stitchable.cascades import stages_of
from stitchable.costs import shared_flops
from stitchable.front import halves

NUM_IMAGES = {1: 600, 64: 1280}
"""Of each half, by batch size: timed images."""
NUM_TURNS = {1: 200, 64: 24}
"""Of the overhead, by batch size."""
RESNET_20, RESNET_56 = 0, 3


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of cifar10 and cifar10_resnets")
    data = parser.parse_args().data
    model, batches = published_resnets(data)
    found, costs, labels, logits = search_model(model, batches, [0, 1, 2, 3])
    logits.__exit__()
    pixels = torch.cat([batch["pixel_values"] for batch in batches])
    with torch.inference_mode():
        against = against_resnet_56(model, found, costs, pixels, len(labels))
        overhead = [overhead_of(model, pair, pixels) for pair in (apart(), alike(model))]
    figures = {"against_resnet_56": against, "both_stages_against_two_calls": overhead}
    print(f"wrote {write_report('cascade_latency', figures)}")


def against_resnet_56(
    model: StitchableForImageClassification, found: TwoFold, costs: Costs, pixels: torch.Tensor, num_images: int
) -> dict[str, Any]:
    """Milliseconds per image of what each half chooses for the other, and of ResNet-56, at each batch size."""
    second = halves(num_images, 0)
    cascades, parts = [], [np.flatnonzero(~second), np.flatnonzero(second)]
    for place, (half, choices) in enumerate(zip(found.cascades, found.choices, strict=True)):
        index = half.within(0.5 * costs.flops[RESNET_56])
        flops, stages = float(half.flops[index]), stages_of(choices[index], range(4), costs)
        cascades.append({"id": place, "stages": stages, "flops": flops, "max_flops": choices[index].max_flops})
    model.cascades = cascades
    timed = {}
    for size, number in NUM_IMAGES.items():
        times = np.zeros(2)
        for place, part in enumerate(parts):
            for count, images in enumerate(pixels[part[:number]].split(size)):
                times += turn(
                    count,
                    lambda images=images, place=place: model(images, cascade=place),
                    lambda images=images: model(images, stitch_id=RESNET_56),
                )
        cascade_ms, resnet_ms = (1e3 * times / (2 * number)).tolist()
        timed[f"batch_{size}"] = {"cascade_ms": cascade_ms, "resnet_56_ms": resnet_ms, "ratio": cascade_ms / resnet_ms}
        print(f"batches of {size}: {cascade_ms:.3f} of {resnet_ms:.3f} ms per image, {cascade_ms / resnet_ms:.3f}")
    part = sum(entry["flops"] for entry in cascades) / 2 / costs.flops[RESNET_56]
    return {"cascades": cascades, "part_of_flops": float(part), **timed}


def apart() -> tuple[int, int]:
    """Two stitches that share nothing: ResNet-20 and ResNet-56."""
    return RESNET_20, RESNET_56


def alike(model: StitchableForImageClassification) -> tuple[int, int]:
    """ResNet-20 and the stitch that shares most FLOPs with it."""
    later = [stitch.id for stitch in model.stitches if stitch.flops > model.stitches[RESNET_20].flops]
    shared = {other: shared_flops(model, [RESNET_20, other])[0][1] for other in later}
    return RESNET_20, max(shared, key=lambda other: shared[other])


def overhead_of(model: StitchableForImageClassification, pair: tuple[int, int], pixels: torch.Tensor) -> dict[str, Any]:
    """The time of a cascade that sends on every image, as a part of that of two calls."""
    flops = [float(model.stitches[i].flops) for i in pair]
    added = float(flops[1] - shared_flops(model, pair)[0][1])
    stages = [
        # At this temperature no probability is near 1.
        {"stitch": pair[0], "flops": flops[0], "score": "max_probability", "threshold": 1.0, "temperature": 100.0},
        {"stitch": pair[1], "flops": added},
    ]
    model.cascades = [{"id": 0, "stages": stages, "flops": flops[0] + added, "max_flops": flops[0] + added}]
    ratios = {}
    for size, number in NUM_TURNS.items():
        times = []
        for count, images in enumerate(pixels[: number * size].split(size)):
            assert (model(images, cascade=0).stitch_ids == pair[1]).all()
            times.append(
                turn(
                    count,
                    lambda images=images: model(images, cascade=0),
                    lambda images=images: [model(images, stitch_id=i) for i in pair],
                )
            )
        ratios[f"batch_{size}"] = float(statistics.median(cascade / by_hand for cascade, by_hand in times))
    part = (flops[0] + added) / sum(flops)
    print(f"stitches {pair}, all images go on: {ratios}, {part:.3f} of the FLOPs of both")
    return {"stitches": list(pair), "part_of_flops": part, **ratios}


def turn(number: int, first: Callable[[], Any], second: Callable[[], Any]) -> np.ndarray:
    """Seconds of two calls, each after an untimed one of its own, the one or the other first by turns."""
    seconds = [0.0, 0.0]
    for place in (0, 1) if number % 2 else (1, 0):
        call = (first, second)[place]
        call()
        started = time.perf_counter()
        call()
        seconds[place] = time.perf_counter() - started
    return np.array(seconds)


if __name__ == "__main__":
    main()
