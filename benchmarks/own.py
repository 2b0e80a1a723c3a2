"""Claim: what is a stitch's own, taught by its back anchor without labels, makes five stitches of the published
CIFAR-10 ResNets better than least squares alone, and leaves the anchors as they are.

    python benchmarks/own.py --weights FOLDER --data FOLDER [--steps 600]

The folders are those of examples/cifar10_resnets. Least squares, statistics and teaching see the first 10,000 training
images, flipped and shifted, and no label; the accuracies are those on test images.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples" / "cifar10_resnets"))

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from report import write_report  # noqa: E402
from reproduce_anchors import LAYERS, batches, find, published  # noqa: E402
from tqdm import tqdm  # noqa: E402

import stitchable  # noqa: E402
from stitchable import evaluate  # noqa: E402
from stitchable.own import recalibrate_batch_norms  # noqa: E402
from stitchable.training.own import Teaching, augmented, teach_stitch  # noqa: E402
from stitchable.training.resuming import weights_digest  # noqa: E402

ROUTES = ((0, 7, 1, 11), (0, 2, 1, 3), (1, 9, 2, 12), (2, 6, 3, 7), (2, 1, 3, 1))
"""Front anchor, the blocks it runs, back anchor, the block that it enters at: each in the table of the issue."""


def main() -> None:
    """Teach the five routes, print and store what they reach."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--weights", type=Path, required=True, help="folder of the published checkpoints")
    parser.add_argument("--data", type=Path, required=True, help="folder of the parquet files")
    parser.add_argument("--train-images", type=int, default=10_000, help="the first so many")
    parser.add_argument("--test-images", type=int, default=10_000, help="the first so many")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--routes", default="0,1,2,3,4", help="which of the five")
    parser.add_argument("--name", default="own", help="of the file of results")
    for name, default in vars(Teaching()).items():
        kind: Any = {"action": argparse.BooleanOptionalAction} if default is True else {"type": type(default)}
        parser.add_argument(f"--{name.replace('_', '-')}", default=default, **kind)
    arguments = parser.parse_args()
    teaching = Teaching(**{name: getattr(arguments, name) for name in vars(Teaching())})
    model = stitchable.from_anchors(published(arguments.weights), stages=[0, 1, 2])
    train, test = (
        Dataset.from_parquet([str(file) for file in find(arguments.data, f"{split}-*.parquet")])
        for split in ("train", "test")
    )
    train = batches(train.select(range(arguments.train_images)), model.config)
    test = batches(test.select(range(arguments.test_images)), model.config, 500)
    pixel_values = torch.cat([batch["pixel_values"] for batch in train])
    labels = torch.cat([batch["labels"] for batch in train])
    stitchable.initialize_stitches(model, pixel_values[:1000].split(100), num_samples=1000)
    before = weights_digest(model)
    batches_of = augmented(pixel_values, labels if teaching.labels else None, model.config, arguments.batch_size)
    rows = []
    for number in tqdm([int(number) for number in arguments.routes.split(",")]):
        rows.append(measure(model, ROUTES[number], pixel_values, batches_of, teaching, test))
        print(rows[-1], flush=True)
    for row in rows:
        model.give_own(row["stitch"], None)
    figures = {
        "routes": rows,
        "accuracy_of_anchors": [round(100 * evaluate(model, test, [i])[i]["accuracy"], 2) for i in range(len(LAYERS))],
        "anchors_equal_to_the_bit": weights_digest(model) == before,
        "teaching": vars(teaching),
        "train_images": arguments.train_images,
        "test_images": arguments.test_images,
        "batch_size": arguments.batch_size,
    }
    print(f"wrote {write_report(arguments.name, figures)}")


def measure(
    model: Any, route: tuple[int, ...], pixel_values: torch.Tensor, batches_of: Any, teaching: Teaching, test: Any
) -> dict[str, Any]:
    """One route, after each stage; accuracies in percent."""
    front, stop, back, start = route
    stitch = next(
        stitch
        for stitch in model.stitches
        if len(stitch.route) == 2 and (stitch.route[0][0], stitch.route[0].stop, *stitch.route[1][:2]) == route
    )
    fitted = evaluate(model, test, [stitch.id])[stitch.id]["accuracy"]
    model.give_own(stitch.id, teaching.rank)
    kept, given = model.stitches[stitch.id].own, pixel_values[:2000]
    scores = recalibrate_batch_norms(model, [*given.split(125), *pixel_values[2000:2500].split(125)], [stitch.id])
    recalibrated = evaluate(model, test, [stitch.id])[stitch.id]["accuracy"]
    model.give_own(stitch.id, None)
    assert kept is not None
    started = time.perf_counter()
    loss = teach_stitch(model, stitch.id, batches_of(stitch.id), teaching)
    seconds = time.perf_counter() - started
    taught = evaluate(model, test, [stitch.id])[stitch.id]["accuracy"]
    own = sum(parameter.numel() for parameter in model.own[str(stitch.id)].parameters())
    return {
        "stitch": stitch.id,
        "route": f"{LAYERS[front]}: 0-{stop - 1}, {LAYERS[back]}: {start}-{stitch.route[1].stop - 1}",
        "mflops": round(stitch.flops / 1e6, 1),
        "least_squares": round(100 * fitted, 2),
        "statistics_where_they_help": round(100 * recalibrated, 2),
        "held_out_agreement_before_and_after": [round(100 * score, 2) for score in scores[stitch.id]],
        "taught": round(100 * taught, 2),
        "loss": round(loss, 4),
        "seconds": round(seconds, 1),
        "own_parameters": own,
    }


if __name__ == "__main__":
    main()
