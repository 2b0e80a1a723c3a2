"""Leave blocks out of one anchor of a finished run and measure what is left (appendix H of the paper, after LayerDrop).

    python benchmarks/reproduction/crop_anchor.py runs/deit_layer_drop --recipe ablations/layer_drop --anchor 2

The recipe says which data to measure on; key.path=value changes it, as for train.py.
"""

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator

from stitchable import StitchableForImageClassification
from stitchable.costs import profile_anchor
from stitchable.evaluation import evaluation_mode
from stitchable.training.data import load_data, make_processor, make_test_loader
from stitchable.training.recipe import Recipe, load_recipe


@dataclass(frozen=True)
class Crop:
    """An anchor without some of its blocks: FLOPs per image, top-1 accuracy in 0..1."""

    left_out: str
    flops: int
    accuracy: float


def main() -> None:
    """Print a Markdown table of an anchor whole and cropped."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", help="of a finished run")
    parser.add_argument("--recipe", required=True, help="of that run")
    parser.add_argument("--anchor", type=int, required=True, help="its number, smallest first, from 0")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="values to change in the recipe")
    given = parser.parse_intermixed_args()
    try:
        crops = crop_anchor(given.folder, load_recipe(given.recipe, given.overrides), given.anchor)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print("| blocks left out | FLOPs | top-1 |\n|:---|---:|---:|")
    for crop in crops:
        print(f"| {crop.left_out} | {crop.flops:,} | {100 * crop.accuracy:.2f} % |")


def crop_anchor(folder: str | Path, recipe: Recipe, anchor: int) -> list[Crop]:
    """An anchor of a finished run, whole and cropped, measured on the test data of `recipe`."""
    data, accelerator = recipe.data, Accelerator()
    model = StitchableForImageClassification.from_pretrained(folder)
    choices = plan_crops(model, anchor)
    processor, batch_size = make_processor(data, model.config), recipe.evaluation.batch_size
    names = [label for _, label in sorted(model.config.id2label.items())]
    loader = make_test_loader(load_data(data, names).test, data, processor, batch_size, accelerator)
    accuracies = measure(model.to(accelerator.device), anchor, list(choices.values()), loader)
    profile = profile_anchor(model.anchors[anchor], model.config.image_size, model.config.num_channels)
    ends = profile.stem.flops + profile.head.flops
    return [
        Crop(title, ends + sum(profile.blocks[index].flops for index in kept), accuracy)
        for (title, kept), accuracy in zip(choices.items(), accuracies, strict=True)
    ]


def plan_crops(model: StitchableForImageClassification, anchor: int) -> dict[str, list[int]]:
    """Which blocks are kept: all, all but the first or the last half, every other one."""
    chain = model.chains.get(anchor)
    held = model.parts[anchor] if chain else set()
    if (
        chain is None
        or len(model.config.anchors[anchor]["stages"]) > 1
        or not {"stem", "head", *range(chain.depth)} <= held
    ):
        raise ValueError(f"this model has no anchor {anchor} that is whole and of a single stage")
    blocks, half = list(range(chain.depth)), chain.depth // 2
    return {"none": blocks, "the first half": blocks[half:], "the last half": blocks[:half], "every other": blocks[::2]}


@torch.no_grad()
def measure(
    model: StitchableForImageClassification, anchor: int, crops: Sequence[Sequence[int]], batches: Iterable[Mapping]
) -> list[float]:
    """Top-1 accuracy, in 0..1, of an anchor with only some of its blocks, for each choice of blocks."""
    chain, timm_model = model.chains[anchor], model.anchors[anchor]
    correct, count = [0] * len(crops), 0
    with evaluation_mode(model):
        for batch in batches:
            labels = batch["labels"].to(model.device)
            count += int((labels >= 0).sum())  # -100 stands for an image that could not be read
            stem = chain.run_stem(timm_model, batch["pixel_values"].to(model.device))
            for number, kept in enumerate(crops):
                flow = stem
                for index in kept:
                    flow = chain.run_block(timm_model, index, flow)
                logits = model.run_head(anchor, chain.run_neck(timm_model, flow).features)
                correct[number] += int((logits.argmax(-1) == labels).sum())
    return [number / count for number in correct]


if __name__ == "__main__":
    main()
