"""Claim: which score of a stitch, taken before training, predicts its accuracy after training best.

    python benchmarks/selection.py --digits FOLDER --weights FOLDER --data FOLDER

Spearman's rank correlation per pair of anchors, of each score of `stitchable.selection.score_stitches` after least
squares on 100 images with the accuracies that the studies in docs/reproduction/ measured after joint training. Beside
them, with batch norms: the same scores with statistics of the stitch's own; and as the best that labels can do, the
accuracy after least squares alone, as the studies measured it. The folder of the digits holds anchors-SEED, as
`reproduce.py digits` leaves them; those of the CIFAR-10 ResNets are as in examples/cifar10_resnets/README.md.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from report import write_report
from scipy.stats import spearmanr

import stitchable
from stitchable import StitchableForImageClassification
from stitchable.selection import SCORES, distances, score_stitches

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT / "benchmarks" / "reproduction"), str(ROOT / "examples" / "cifar10_resnets")]
LAYERS = (20, 32, 44, 56)


def main() -> None:
    """Measure, print and store the correlations."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--digits", type=Path, required=True, help="folder of anchors-0, anchors-1, anchors-2")
    parser.add_argument("--weights", type=Path, required=True, help="folder of the published CIFAR-10 ResNets")
    parser.add_argument("--data", type=Path, required=True, help="folder of CIFAR-10's parquet files")
    parser.add_argument("--images", type=int, default=500, help="unlabelled training images that score the stitches")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    for seed in (0, 1, 2):
        rows += correlations("digits", seed, *digits(arguments.digits, seed, arguments.images))
    model, images = resnets(arguments.weights, arguments.data, arguments.images)
    rows += correlations("cifar10_resnets", 0, model, images)
    for row in rows:
        print(row)
    names = [name for name in rows[0] if name not in ("study", "seed", "pair", "stitches")]
    own = [f"own statistics: {name}" for name in SCORES]
    means = {
        study: {
            name: round(statistics.mean(row[name] for row in rows if row["study"] == study), 3)
            for name in (*names, *(own if study == "cifar10_resnets" else ()))
        }
        for study in ("digits", "cifar10_resnets")
    }
    print(means)
    print(f"wrote {write_report('selection', {'images': arguments.images, 'mean': means, 'pairs': rows})}")


def digits(folder: Path, seed: int, num_images: int) -> tuple[StitchableForImageClassification, list[torch.Tensor]]:
    """The anchors of a seed with their stitches fitted by least squares, and training images."""
    from stitchable.training.data import load_data, make_processor, sample_images
    from stitchable.training.recipe import load_recipe

    model = StitchableForImageClassification.from_pretrained(folder / f"anchors-{seed}")
    recipe = load_recipe(ROOT / "training" / "recipes" / "digits.yaml", [f"seed={seed}"])
    splits, processor = load_data(recipe.data), make_processor(recipe.data, model.config)
    stitchable.initialize_stitches(model, sample_images(splits.train, recipe.data, processor, 100, seed))
    return model, list(sample_images(splits.train, recipe.data, processor, num_images, seed))


def resnets(weights: Path, data: Path, num_images: int) -> tuple[StitchableForImageClassification, list[torch.Tensor]]:
    """The published ResNets with their stitches fitted by least squares, and training images."""
    from reproduce_anchors import batches, find

    anchors = [
        {"architecture": f"cifar_resnet{layers}", "weights": find(weights, f"resnet{layers}-*.th")[0]}
        for layers in LAYERS
    ]
    model = stitchable.from_anchors(anchors, stages=[0, 1, 2])
    train = Dataset.from_parquet([str(file) for file in find(data, "train-*.parquet")], keep_in_memory=True)
    images = [batch["pixel_values"] for batch in batches(train.select(range(100 + num_images)), model.config)]
    stitchable.initialize_stitches(model, images[:1])
    return model, images[1:]


def correlations(
    study: str, seed: int, model: StitchableForImageClassification, images: Sequence[torch.Tensor]
) -> list[dict[str, Any]]:
    """A row for each pair of anchors: Spearman's correlation of each score with the accuracy after training.

    Those of distances are turned round, so that higher is better throughout.
    """
    run = json.loads((ROOT / "docs" / "reproduction" / f"{study}.json").read_text(encoding="utf-8"))["runs"]["base"]
    # The published anchors are the same for every seed.
    runs = [run[str(seed)]] if study == "digits" else list(run.values())
    trained, initialized = (
        {int(i): statistics.mean(each[stage][i] for each in runs) for i in runs[0][stage]}
        for stage in ("trained", "initialized")
    )
    scores = signed(score_stitches(model, images))
    for stitch_id, figures in scores.items():
        figures["accuracy after least squares"] = initialized[stitch_id]
    if study == "cifar10_resnets":
        for stitch_id, figures in own_statistics(model, images).items():
            scores[stitch_id] |= {f"own statistics: {name}": value for name, value in figures.items()}
    pairs: dict[tuple[int, ...], list[int]] = {}
    for stitch in model.stitches:
        if not stitch.is_anchor:
            pairs.setdefault(tuple(segment.anchor for segment in stitch.route), []).append(stitch.id)
    return [
        {
            "study": study,
            "seed": seed,
            "pair": "-".join(map(str, pair)),
            "stitches": len(ids),
            **{
                name: round(float(spearmanr([scores[i][name] for i in ids], [trained[i] for i in ids]).statistic), 3)
                for name in scores[ids[0]]
            },
        }
        for pair, ids in pairs.items()
    ]


def signed(scores: Mapping[int, Mapping[str, float]]) -> dict[int, dict[str, float]]:
    """Scores of which higher is better."""
    return {i: {name: x if name == "agreement" else -x for name, x in each.items()} for i, each in scores.items()}


def own_statistics(
    model: StitchableForImageClassification, images: Sequence[torch.Tensor]
) -> dict[int, dict[str, float]]:
    """The scores of each stitch with statistics of its own of these images in its batch norms; anchors keep theirs."""
    from own_statistics import collect_statistics

    found = {}
    for stitch in model.stitches:
        if not stitch.is_anchor:
            alone = model.extract(stitch.id)
            collect_statistics(alone, images)
            found[stitch.id] = score_against(model, alone, stitch.id, images)
    return signed(found)


def score_against(
    model: StitchableForImageClassification,
    alone: StitchableForImageClassification,
    stitch_id: int,
    images: Sequence[torch.Tensor],
) -> dict[str, float]:
    """As `score_stitches`, of a stitch on its own against the untouched anchor at its end."""
    back = alone.stitch.route[-1].anchor  # also the id of that anchor
    sums = torch.zeros(len(SCORES), dtype=torch.float64)
    with torch.no_grad():
        for pixel_values in images:
            outputs = []
            for each, number in ((alone.eval(), stitch_id), (model.eval(), back)):
                features, anchor = each.run_features(pixel_values, number)
                outputs.append((features, each.run_head(anchor, features)))
            sums += distances(*outputs)
    return dict(zip(SCORES, (sums / sum(map(len, images))).tolist(), strict=True))


if __name__ == "__main__":
    main()
