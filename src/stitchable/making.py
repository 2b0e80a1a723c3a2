"""From anchors to an elastic model in one go, for those who have two models and a folder of images.

Each step is a function that takes the run and returns a line on what it did. The model is saved after each, and with it
what was done, in OUTPUT/unfinished: a run that was interrupted goes on behind the last finished step, the teaching
behind the last finished stitch.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from stitchable.anchors import AnchorLike
from stitchable.building import from_anchors
from stitchable.card import Card
from stitchable.cascades import find_and_judge, stages_in_words
from stitchable.evaluation import evaluation_mode
from stitchable.families.registry import run_modules
from stitchable.front import Judgement
from stitchable.images import read_batches, why_no_labels
from stitchable.initialization import initialize_stitches
from stitchable.latency import calibrate
from stitchable.model.modeling_stitchable import StitchableForImageClassification
from stitchable.model.schema import write
from stitchable.plots import flops_unit
from stitchable.processing import image_processor
from stitchable.publishing import save_repository
from stitchable.selection import keep_stitches, promising, select

UNFINISHED = "unfinished"
"""The folder in the output that an interrupted run goes on from."""

_FIT_ON, _SCORE_ON = 100, 300  # images
_MOST_BYTES = 2_000_000_000  # of pixel values that are held in memory
_FEWEST_IMAGES = 24
_BATCH = 64
_STITCHES, _STEPS, _FEWEST_STEPS = 8, 600, 300  # taught at most; updates of each, and from which on it is worth it
_BACKWARD = 3.0  # a step of teaching costs so many forward passes, and one of the teacher


@dataclass(frozen=True)
class Plan:
    """What is asked for.

    Attributes:
        anchors: as for `make_config`, in JSON types.
        images: a folder, or the id of a data set on the Hub.
        split: of the data set.
        image_column: of a data set of the Hub.
        label_column: of a data set of the Hub.
        modules: Python files that register models of the user's own.
        image_size: pixels; None for the anchors' own.
    """

    anchors: Sequence[str | Mapping[str, Any]]
    images: str
    split: str | None = None
    image_column: str = "image"
    label_column: str = "label"
    modules: Sequence[str] = ()
    image_size: int | None = None


def make(
    plan: Plan,
    output: str | Path,
    *,
    minutes: float = 30.0,
    device: str = "cpu",
    say: Callable[[str], None] = lambda line: None,
) -> StitchableForImageClassification:
    """Make an elastic model of anchors: fit, select, teach, measure, find cascades, calibrate, write.

    A third of the images measures the model, the others make it. Where they have labels that are the model's classes,
    what is measured is accuracy; without, agreement with the largest anchor, and the model says so.

    Args:
        plan: what of what.
        output: a new folder, or one where a run with the same plan was interrupted.
        minutes: how long the whole may take; what is left after the other steps goes into teaching.
        device: where to run.
        say: is told what is done, line by line.

    Returns:
        The model, in evaluation mode, as it is in the folder.

    Raises:
        ValueError: a folder that holds something else, a run of another plan, anchors that cannot be stitched, images
            that cannot be read or are too few, or that are all the same to the largest anchor.
    """
    if not 0 < minutes < float("inf"):
        raise ValueError(f"minutes must be a positive number, got {minutes!r}")
    run_modules(list(plan.modules))
    run = Run(plan, Path(output), minutes, device)
    for number, (name, step) in enumerate(STEPS.items(), start=1):
        if name in run.done:
            continue
        start = time.monotonic()
        line = step(run)
        run.finish(name, time.monotonic() - start)
        left = f"; about {_in_words(run.seconds_left())} left" if number < len(STEPS) else ""
        say(f"{number}/{len(STEPS)} {name}: {line}{left}")
    for line in run.facts["summary"]:
        say(line)
    run.publish()
    return run.model.eval()


class Run:
    """A run and what it has so far; all but the images and the model is in `state.json`.

    Attributes:
        plan: what is asked for.
        folder: the output.
        minutes: how long the whole may take.
        device: where to run.
        model: as the last finished step left it.
        done: names of the finished steps.
        seconds: that they took, in all runs together.
        facts: what steps tell later ones, in JSON types.
    """

    model: StitchableForImageClassification

    def __init__(self, plan: Plan, folder: Path, minutes: float, device: str) -> None:
        self.plan, self.folder, self.minutes, self.device = plan, folder, minutes, device
        self.work = folder / UNFINISHED
        self.done: list[str] = []
        self.seconds = 0.0
        self.facts: dict[str, Any] = {}
        state = self.work / "state.json"
        if state.exists():
            self._go_on(json.loads(state.read_text(encoding="utf-8")))
        elif folder.exists() and any(path.name != UNFINISHED for path in folder.iterdir()):
            raise ValueError(f"{folder} already holds something; choose a new folder, or remove it")
        self.work.mkdir(parents=True, exist_ok=True)

    def _go_on(self, state: dict[str, Any]) -> None:
        asked = json.loads(json.dumps(asdict(self.plan)))
        for key, value in asked.items():
            if state["plan"].get(key) != value:
                raise ValueError(
                    f"an interrupted run in {self.folder} has {key}={state['plan'].get(key)!r}, now it is {value!r}; "
                    f"go on with the same, choose another folder, or remove {self.work}"
                )
        self.done, self.seconds, self.facts = state["done"], state["seconds"], state["facts"]
        loaded: Any = StitchableForImageClassification.from_pretrained(self.work / self.done[-1])
        self.model = loaded.to(self.device)

    def finish(self, name: str, seconds: float) -> None:
        """Save the model, then that the step is finished, then drop the model of the step before."""
        before = self.done[-1:]
        shutil.rmtree(self.work / name, ignore_errors=True)  # of a run that was interrupted while it saved
        self.model.save_pretrained(self.work / name)
        self.done.append(name)
        self.seconds += seconds
        state = {"plan": asdict(self.plan), "done": self.done, "seconds": self.seconds, "facts": self.facts}
        scratch = self.work / "state.json.new"
        scratch.write_text(json.dumps(state, indent=1), encoding="utf-8")
        os.replace(scratch, self.work / "state.json")
        for old in before:
            shutil.rmtree(self.work / old)

    def publish(self) -> None:
        """Write the repository, and when it is whole, put it in the place of what is unfinished."""
        repository = self.work / "repository"
        shutil.rmtree(repository, ignore_errors=True)
        model: Any = self.model.cpu()
        card = Card(self.folder.resolve().name, dataset=self.facts["dataset"], split=self.plan.split or "")
        save_repository(model, repository, image_processor(model.config), card)
        for path in repository.iterdir():
            shutil.rmtree(self.folder / path.name, ignore_errors=True)  # of a run that was interrupted here
            os.replace(path, self.folder / path.name)
        shutil.rmtree(self.work)

    @cached_property
    def images(self) -> "Images":
        """Read once per process, always in the same order."""
        return read_images(self.plan, self.model, self.facts["without_labels"])

    @property
    def metric(self) -> Literal["accuracy", "agreement"]:
        """What is measured."""
        return "agreement" if self.facts["without_labels"] else "accuracy"

    def seconds_for(self, name: str) -> float:
        """What the next step may take, so that there is time for those behind it."""
        return 60 * self.minutes - self.seconds - sum(self.estimate(x) for x in STEPS if x not in (*self.done, name))

    def seconds_left(self) -> float:
        """What the steps that are not finished are going to take, by the time of one image through all anchors."""
        return sum(self.estimate(name) for name in STEPS if name not in self.done)

    def estimate(self, name: str) -> float:
        """Seconds of one step."""
        if "seconds_per_image" not in self.facts:
            return 0.0
        each, taught = self.facts["seconds_per_image"], self.facts.get("to_teach") or []
        if name == "select":
            return each * _SCORE_ON * len(promising(self.model))
        if name == "teach":
            updates = len(taught) * self.facts.get("steps", 0)
            return each * updates * _BATCH * (1 + _BACKWARD)
        if name == "measure":
            return each * sum(map(len, (batch["labels"] for batch in self.images.held_out))) * (3 + len(taught))
        return each * 60  # to calibrate: rounds of single images


@dataclass(frozen=True)
class Images:
    """All images in memory: those that make the model, and those held out, which measure it.

    Attributes:
        pixel_values: (N, C, H, W), normalised.
        labels: (N,) class numbers; None without labels.
        held_out: batches of "pixel_values" and "labels"; without labels, these are the answers of the largest anchor.
    """

    pixel_values: torch.Tensor
    labels: torch.Tensor | None
    held_out: list[dict[str, torch.Tensor]]

    def batches(self, number: int) -> list[torch.Tensor]:
        """The first so many images that make the model, for what takes batches of images alone."""
        return list(self.pixel_values[:number].split(_BATCH))


def read_images(plan: Plan, model: StitchableForImageClassification, without_labels: str | None) -> Images:
    """Read as many images as memory is meant for, in a random order, and hold a third of them out.

    Args:
        plan: says where they are.
        model: that they are for.
        without_labels: why their labels are of no use; None where they are.

    Raises:
        ValueError: too few of them, or all of one class.
    """
    columns: Any = {"split": plan.split, "image_column": plan.image_column, "label_column": plan.label_column}
    config = None if without_labels else model.config
    batches, num_bytes = [], 0
    for batch in read_batches(plan.images, image_processor(model.config), config=config, batch_size=_BATCH, **columns):
        batches.append(batch)
        num_bytes += batch["pixel_values"].nbytes
        if num_bytes >= _MOST_BYTES:
            break
    pixel_values = torch.cat([batch["pixel_values"] for batch in batches])
    if len(pixel_values) < _FEWEST_IMAGES:
        raise ValueError(
            f"{plan.images} has {len(pixel_values)} images, and at least {_FEWEST_IMAGES} are needed: two thirds make "
            "the model, a third measures it. A few hundred are few, a few thousand are well"
        )
    labels = largest_anchor(model, pixel_values) if without_labels else torch.cat([b["labels"] for b in batches])
    first = len(pixel_values) - len(pixel_values) // 3
    if len(labels[first:].unique()) < 2:
        whose = "the largest anchor says that all images are" if without_labels else "all images are"
        raise ValueError(f"{whose} of one class, {int(labels[first])}; are these the images that the anchors are for?")
    parts = zip(pixel_values[first:].split(_BATCH), labels[first:].split(_BATCH), strict=True)
    held_out = [{"pixel_values": x, "labels": y} for x, y in parts]
    return Images(pixel_values[:first], None if without_labels else labels[:first], held_out)


@torch.no_grad()
def largest_anchor(model: StitchableForImageClassification, pixel_values: torch.Tensor) -> torch.Tensor:
    """The classes (N,) that the largest anchor gives images."""
    largest = max((s for s in model.stitches if s.is_anchor), key=lambda stitch: stitch.flops or 0)
    with evaluation_mode(model):
        parts = pixel_values.split(_BATCH)
        answers = [model(x.to(model.device), stitch_id=largest.id).logits.argmax(1).cpu() for x in parts]
    return torch.cat(answers)


# ---------------------------------------------------------------- the steps


def build(run: Run) -> str:
    """Anchors with their weights, and every stitch between them."""
    plan = run.plan
    anchors: list[AnchorLike] = list(plan.anchors)
    model: Any = from_anchors(anchors, image_size=plan.image_size)
    run.model = model.to(run.device)
    run.facts["without_labels"] = why_no_labels(
        plan.images, model.config, split=plan.split, label_column=plan.label_column
    )
    run.facts["dataset"] = Path(plan.images).name if Path(plan.images).is_dir() else plan.images
    names = ", ".join(anchor["architecture"] for anchor in model.config.anchors)
    return f"{len(model.stitches)} stitches of {names}"


def fit(run: Run) -> str:
    """Stitching layers by least squares."""
    images = run.images
    first = images.batches(_FIT_ON)
    residuals = initialize_stitches(run.model, first, num_samples=sum(map(len, first)))
    run.facts["seconds_per_image"] = _seconds_per_image(run.model, images.pixel_values[: _BATCH // 4])
    counted = f"{len(images.pixel_values)} images make the model, {sum(len(b['labels']) for b in images.held_out)} "
    without = run.facts["without_labels"]
    said = f"; no labels ({without}), so what is measured is agreement with the largest anchor" if without else ""
    return f"{len(residuals)} stitching layers by least squares; {counted}measure it{said}"


def select_stitches(run: Run) -> str:
    """As many of the promising stitches as there is time to teach."""
    anchors = [stitch.id for stitch in run.model.stitches if stitch.is_anchor]
    among = promising(run.model)
    run.facts |= {"to_teach": [], "steps": 0}
    if not among:
        run.model = keep_stitches(run.model, anchors)
        return "no stitch is cheaper than the dearer of its anchors; the anchors stay"
    pairs = {tuple(segment.anchor for segment in stitch.route) for stitch in among}
    each = run.facts["seconds_per_image"] * _BATCH * (1 + _BACKWARD)
    steps = max(0.0, 60 * run.minutes - run.seconds - run.seconds_left()) / each  # the teaching is none of these yet
    number = max(len(pairs), min(_STITCHES, int(steps / _FEWEST_STEPS)))
    all_of_them = len(run.model.stitches)
    run.model = select(run.model, run.images.batches(_SCORE_ON), number=number)
    kept = [stitch.id for stitch in run.model.stitches if not stitch.is_anchor]
    run.facts |= {"to_teach": kept, "steps": min(_STEPS, int(steps / len(kept)))}
    return f"{len(kept)} of {all_of_them - len(anchors)} stitches, nearest to the anchor at their end: {kept}"


def teach(run: Run) -> str:
    """Each stitch, by the anchor at its end, what is its own, where that helps; the anchors stay as they are."""
    if not run.facts["steps"]:
        return "nothing, the stitches stay as least squares made them"
    from stitchable.training.own import Teaching
    from stitchable.training.tuning import tune

    images, teaching, wanted = run.images, Teaching(steps=run.facts["steps"]), run.facts["to_teach"]
    size = min(_BATCH, len(images.pixel_values) - len(images.pixel_values) // 5)
    end, slowest = time.monotonic() + run.seconds_for("teach"), 0.0
    scores: dict[int, tuple[float, float]] = {}
    for stitch_id in wanted:
        start = time.monotonic()
        if start + slowest > end:
            break
        arguments = images.pixel_values, images.labels, [stitch_id], teaching
        scores |= tune(run.model, *arguments, batch_size=size, folder=run.work / "taught")
        slowest = max(slowest, time.monotonic() - start)
    late = len(wanted) - len(scores)
    helped = sum(after > before for before, after in scores.values())
    said = f"; no time for the other {late}, which stay as least squares made them" if late else ""
    return f"{len(scores)} stitches, {teaching.steps} updates each, better on other images: {helped}{said}"


def measure(run: Run) -> str:
    """Every stitch on the images held out, and cascades of them; what the front is worth against the null line."""
    dataset, split = run.facts["dataset"], run.plan.split or ""
    for stitch in run.model.stitches:  # what the teaching measured to see what helps
        run.model.record(stitch.id, metrics={})
    found = find_and_judge(run.model, run.images.held_out, dataset=dataset, split=split, metric=run.metric)
    cascades, *judged = found
    run.facts["summary"] = summary(run, *judged)
    return f"{run.metric} of {len(run.model.stitches)} stitches, {len(cascades)} cascades"


def predict_latency(run: Run) -> str:
    """Milliseconds and megabytes on this device."""
    found = calibrate(run.model)
    return f"latency and memory on {found['device']}"


STEPS: dict[str, Callable[[Run], str]] = {
    "build": build,
    "fit": fit,
    "select": select_stitches,
    "teach": teach,
    "measure": measure,
    "calibrate": predict_latency,
}


# ---------------------------------------------------------------- what it comes to


def summary(run: Run, stitches: Judgement | None, cascades: Judgement | None) -> list[str]:
    """The front against the null line in a few lines, and what to do."""
    metric, lines = run.metric, []
    for name, judged in (("stitches", stitches), ("stitches and cascades", cascades)):
        if judged is not None and judged.interval is not None:
            low, high = (f"{100 * bound:+.2f}" for bound in judged.interval)
            lines.append(
                f"{name}: mean {metric} over log FLOPs {100 * judged.area:.2f} %, of the untouched anchors "
                f"{100 * judged.null_line:.2f} %: {100 * judged.gain:+.2f} points, by chance {low} to {high}"
            )
    if not lines:
        return [f"the dearer anchors have no higher {metric} than the cheapest: keep that one alone"]
    if metric == "agreement":
        lines.append("agreement with the largest anchor is no accuracy: only labels can tell whether anything beats it")
    anchors = {stitch.id for stitch in run.model.stitches if stitch.is_anchor}
    best = _best_cascade(run, {stitch.id for stitch in run.model.stitches})
    of_anchors = _best_cascade(run, anchors)
    if stitches is not None and stitches.interval is not None and stitches.interval[0] > 0:
        lines.append("stitches are worth having" + (f"; so is this cascade: {best}" if best else ""))
    elif of_anchors:
        keep = f"keep the {len(anchors)} anchors with this cascade: {of_anchors}"
        lines.append(f"stitches bring nothing that is beyond doubt: {keep}")
    elif best:
        lines.append(f"alone, stitches bring nothing that is beyond doubt; in this cascade they do: {best}")
    else:
        lines.append(f"neither stitches nor cascades bring anything beyond doubt: keep the {len(anchors)} anchors")
    return lines


def _best_cascade(run: Run, stitch_ids: Collection[int]) -> str | None:
    """The cascade of these stitches that surely gains over a stitch of its cost, and the most, in words."""
    sure = [
        cascade
        for cascade in run.model.cascades
        if (cascade.interval or (0.0,))[0] > 0 and cascade.stitch_ids <= set(stitch_ids)
    ]
    if not sure:
        return None
    best = max(sure, key=lambda cascade: cascade.metrics["gain"])
    unit, divisor = flops_unit(best.max_flops)
    return (
        f"{best.id} ({stages_in_words(write(best.stages))}), {best.flops / divisor:.2f} {unit} on average, "
        f"{run.metric} {100 * best.metrics[run.metric]:.2f} %"
    )


@torch.no_grad()
def _seconds_per_image(model: StitchableForImageClassification, pixel_values: torch.Tensor) -> float:
    """Of the dearest stitch, the better of two runs."""
    dearest = max(model.stitches, key=lambda stitch: stitch.flops or 0).id
    seconds = []
    with evaluation_mode(model):
        for _ in range(2):
            start = time.perf_counter()
            model(pixel_values.to(model.device), stitch_id=dearest).logits.cpu()
            seconds.append(time.perf_counter() - start)
    return min(seconds) / len(pixel_values)


def _in_words(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 90 else f"{seconds / 60:.0f} minutes"
