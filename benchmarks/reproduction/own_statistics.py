"""What sharing the statistics of batch norms costs: stitches of a finished run, measured with statistics of their own.

    python benchmarks/reproduction/own_statistics.py runs/cifar10 --recipe training/recipes/cifar10.yaml

A batch norm keeps one running mean and variance, of whatever stitches went through it in training, although each stitch
brings features of another kind. Here each gets those of its own features on training images; no weight changes. The
recipe says which data; key.path=value changes it, as for train.py.
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from stitchable import StitchableForImageClassification, evaluate
from stitchable.evaluation import evaluation_mode
from stitchable.training.data import load_data, make_processor, make_test_loader, sample_images
from stitchable.training.recipe import Recipe, load_recipe


def main() -> None:
    """Print a Markdown table of all stitches, with the statistics they share and with their own."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", help="of a finished run")
    parser.add_argument("--recipe", required=True, help="of that run")
    parser.add_argument("--num-samples", type=int, default=2000, help="training images that the statistics are of")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="values to change in the recipe")
    given = parser.parse_intermixed_args()
    try:
        shared, own = own_statistics(given.folder, load_recipe(given.recipe, given.overrides), given.num_samples)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print("| stitch | top-1 with shared statistics | with its own |\n|---:|---:|---:|")
    for stitch_id, accuracy in own.items():
        print(f"| {stitch_id} | {100 * shared[stitch_id]:.2f} % | {100 * accuracy:.2f} % |")


def own_statistics(
    folder: str | Path, recipe: Recipe, num_samples: int = 2000
) -> tuple[dict[int, float], dict[int, float]]:
    """Top-1 accuracy in 0..1 of every stitch, by id: as it is, and with statistics of its own.

    Args:
        folder: of a finished run.
        recipe: its data are measured on, its seed draws the training images.
        num_samples: training images that the statistics are of.

    Raises:
        ValueError: the model has no batch norm.
    """
    data, accelerator = recipe.data, Accelerator()
    model = StitchableForImageClassification.from_pretrained(folder).to(accelerator.device)
    if not any(isinstance(module, _BatchNorm) for module in model.modules()):
        raise ValueError(f"the model in {folder} has no batch norm")
    names = [label for _, label in sorted(model.config.id2label.items())]
    splits, processor = load_data(data, names), make_processor(data, model.config)
    tests = list(make_test_loader(splits.test, data, processor, recipe.evaluation.batch_size, accelerator))
    samples = list(sample_images(splits.train, data, processor, num_samples, recipe.seed))
    shared = {i: metrics["accuracy"] for i, metrics in evaluate(model, tests).items()}
    own = {}
    for stitch_id in shared:
        alone = model.extract(stitch_id)
        collect_statistics(alone, samples)
        own[stitch_id] = evaluate(alone, tests)[stitch_id]["accuracy"]
    return shared, own


@torch.no_grad()
def collect_statistics(model: nn.Module, samples: Iterable[torch.Tensor]) -> None:
    """Give the batch norms of a model of one stitch the mean of the statistics of these batches (N, C, H, W)."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    with evaluation_mode(model):  # of all else: nothing is dropped
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the plain mean over all batches
            norm.train()
        for pixel_values in samples:
            model(pixel_values)


if __name__ == "__main__":
    main()
