"""Measure the published anchors through a stitchable model, then every stitch after least squares alone.

    python examples/cifar10_resnets/reproduce_anchors.py --weights FOLDER --data FOLDER

FOLDER of the weights holds resnet20-*.th, resnet32-*.th, resnet44-*.th and resnet56-*.th, that of the data the CIFAR-10
parquet files train-*.parquet and test-*.parquet with columns "img" and "label".
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import register_cifar_resnet  # noqa: F401  # registers the family
import torch
from datasets import Dataset

import stitchable
from stitchable import Stitch, StitchableConfig, evaluate, initialize_stitches

LAYERS = (20, 32, 44, 56)
PUBLISHED = {20: 91.73, 32: 92.63, 44: 93.10, 56: 93.39}
"""Top-1 in percent of the published weights on the 10,000 test images."""


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--weights", type=Path, required=True, help="folder of the published checkpoints")
    parser.add_argument("--data", type=Path, required=True, help="folder of the parquet files")
    parser.add_argument("--num-samples", type=int, default=100, help="training images for least squares")
    parser.add_argument("--num-images", type=int, default=10_000, help="test images, of all classes")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of images")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    try:
        run(arguments)
    except ValueError as error:
        sys.exit(f"error: {error}")


def published(weights: Path) -> list[dict[str, Any]]:
    """The four published networks, as `from_anchors` takes them, of the folder of their checkpoints."""
    return [
        {"architecture": f"cifar_resnet{layers}", "weights": find(weights, f"resnet{layers}-*.th")[0]}
        for layers in LAYERS
    ]


def run(arguments: argparse.Namespace) -> None:
    """Everything, printed as it is measured."""
    anchors = published(arguments.weights)
    print_spaces([anchor["architecture"] for anchor in anchors])
    model = stitchable.from_anchors(anchors, stages=[0, 1, 2]).to(arguments.device)
    test_files, train_files = (find(arguments.data, f"{split}-*.parquet") for split in ("test", "train"))
    test_set = Dataset.from_parquet([str(file) for file in test_files])
    shuffled = test_set.shuffle(arguments.seed, keep_in_memory=True)
    test = batches(shuffled.select(range(min(arguments.num_images, len(test_set)))), model.config)

    measured = evaluate(model, test, range(len(LAYERS)))
    for index, layers in enumerate(LAYERS):
        accuracy = 100 * measured[index]["accuracy"]
        print(f"anchor {index}, ResNet-{layers}: {accuracy:.2f} %, published {PUBLISHED[layers]:.2f} %")

    train = Dataset.from_parquet([str(file) for file in train_files])
    chosen = np.random.default_rng(arguments.seed).choice(len(train), arguments.num_samples, replace=False)
    residuals = initialize_stitches(model, batches(train.select(chosen), model.config), num_samples=len(chosen))
    print(f"least squares: {len(residuals)} stitching layers fitted on {len(chosen)} training images")

    start = time.perf_counter()
    stitches = [stitch for stitch in model.stitches if not stitch.is_anchor]
    accuracies = {i: metrics["accuracy"] for i, metrics in evaluate(model, test, [s.id for s in stitches]).items()}
    num_images = sum(len(batch["labels"]) for batch in test)
    print(f"{len(stitches)} stitches on {num_images} test images, {time.perf_counter() - start:.1f} s")
    print_stitches(stitches, accuracies, [100 * measured[index]["accuracy"] for index in range(len(LAYERS))])


def find(folder: Path, pattern: str) -> list[Path]:
    """The files of a folder that match.

    Raises:
        ValueError: there is none.
    """
    files = sorted(folder.glob(pattern))
    if not files:
        raise ValueError(f"there is no {pattern} in {folder}")
    return files


def batches(dataset: Dataset, config: StitchableConfig, batch_size: int = 100) -> list[dict[str, torch.Tensor]]:
    """All images, decoded once: pixel values (N, 3, 32, 32), normalised as the config says, and labels (N,)."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (config.image_mean, config.image_std))
    prepared = []
    for rows in dataset.iter(batch_size=batch_size):
        pixels = np.stack([np.asarray(image.convert("RGB")) for image in rows["img"]])
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
        prepared.append({"pixel_values": (images - mean) / std, "labels": torch.tensor(rows["label"])})
    return prepared


def print_spaces(architectures: list[str]) -> None:
    """How many stitches, anchors left out, each choice of the space gives."""
    print("stages     pairs    nearest  stitches")
    for stages in ([0, 1], [0, 1, 2]):
        for pairs in ("forward", "all"):
            for nearest in (True, False):
                config = stitchable.make_config(architectures, stages=stages, pairs=pairs, nearest=nearest)
                print(f"{stages!s:10} {pairs:8} {nearest!s:7} {len(config.stitches) - len(architectures):9}")


def print_stitches(stitches: list[Stitch], accuracies: dict[int, float], anchors: list[float]) -> None:
    """Every stitch, then a line per pair of anchors; `accuracies` are parts of one, `anchors` percent."""
    print("  id  route                      MFLOPs  accuracy")
    pairs: dict[tuple[int, ...], list[float]] = {}
    for stitch in stitches:
        percent = 100 * accuracies[stitch.id]
        route = " ".join(f"{LAYERS[anchor]}[{start}:{stop}]" for anchor, start, stop in stitch.route)
        print(f"{stitch.id:4}  {route:25} {stitch.flops / 1e6:7.2f}  {percent:7.2f} %")
        pairs.setdefault(tuple(segment.anchor for segment in stitch.route), []).append(percent)
    for pair, values in pairs.items():
        low, high = min(anchors[a] for a in pair), max(anchors[a] for a in pair)
        between = sum(low <= value <= high for value in values)
        print(
            f"{'-'.join(str(LAYERS[a]) for a in pair)}: {len(values)} stitches, lowest {min(values):.2f} %, "
            f"mean {statistics.mean(values):.2f} %, highest {max(values):.2f} %, between their anchors {between}"
        )


if __name__ == "__main__":
    main()
