"""Make a stitchable model: anchors in, one checkpoint with every stitch trained and measured out.

    stitchable train digits key.path=value ... [--resume]
    accelerate launch -m stitchable.training --recipe digits key.path=value ... [--resume]

The stages of a run: data, anchors, algorithm 1 (which is `fit.fit`), evaluation, publication.
"""

import argparse
import itertools
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, set_seed
from PIL import Image
from safetensors import SafetensorError
from torch.utils.data import DataLoader

from stitchable import StitchableForImageClassification, evaluate, find_cascades, initialize_stitches
from stitchable.card import Card, what_it_prints
from stitchable.cascades import beside_stitches
from stitchable.fingerprints import NUM_STORED, remember
from stitchable.publishing import check_new_folder, save_repository
from stitchable.timing import measure_throughput
from stitchable.training.books import (
    Books,
    Checkpoints,
    check_no_run,
    check_same_processes,
    check_same_recipe,
    flatten,
    read_progress,
    write_recipe,
)
from stitchable.training.data import (
    DataError,
    Images,
    TrainingLoader,
    decode,
    load_data,
    make_processor,
    make_test_loader,
    sample_images,
)
from stitchable.training.fit import Phase, fit
from stitchable.training.losses import StitchLoss, load_teacher
from stitchable.training.own import Teaching, teach_stitches
from stitchable.training.plan import (
    check_plan,
    check_sizes,
    make_model,
    make_sampler,
    micro_batch_size,
    names_of_anchors,
)
from stitchable.training.processes import RunStopped, all_or_none, make_accelerator, share, start_processes
from stitchable.training.recipe import Recipe, Schedule, load_recipe
from stitchable.training.resuming import evaluate_resumably, weights_digest
from stitchable.training.sampling import StitchSampler

logger = logging.getLogger(__name__)

Metrics = dict[int, dict[str, float]]

MIN_UPDATES = 300  # of a stitch; the paper's schedule gives about 880


def main() -> None:
    """Run a recipe from a command line that `accelerate launch` can start too."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--recipe", required=True, help="a YAML file, or the name of a recipe of ours, such as digits")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run of this recipe and output")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="values to change in the recipe")
    arguments = parser.parse_intermixed_args()  # --resume may stand among the overrides
    try:
        train(arguments.recipe, arguments.overrides, resume=arguments.resume)
    except (ValueError, RunStopped, OSError, SafetensorError) as error:
        sys.exit(f"error: {error}")


def train(recipe: str | Path, overrides: Sequence[str] = (), resume: bool = False) -> None:
    """Run a recipe on the processes that a launcher asked for, and print what its card's snippet prints.

    Arguments and errors are those of `load_recipe` and `run`.
    """
    try:
        settings = load_recipe(recipe, overrides)
        start_processes()
        model = run(settings, resume)
        if PartialState().is_main_process:
            output = settings.output
            print(f"the snippet of {output}/README.md prints\n{what_it_prints(model, output)}", end="")
            if model.cascades:
                print(beside_stitches(model.config))
    except KeyboardInterrupt:
        raise RunStopped("interrupted; --resume goes on from the last checkpoint") from None


def run(recipe: Recipe, resume: bool = False) -> StitchableForImageClassification:
    """Everything a recipe asks for, from data to a folder that is a Hub repository.

    Args:
        recipe: as `load_recipe` returns it.
        resume: whether to go on from the last checkpoint in its run folder.

    Raises:
        ValueError: what cannot be done; as far as can be known, before anything is downloaded.
        RunStopped: the training was interrupted or its loss is not finite.
    """
    accelerator = make_accelerator(recipe.trackers, recipe.run_folder, recipe.gradient_accumulation_steps)
    with all_or_none():
        check_plan(recipe, accelerator)
        if accelerator.is_main_process:
            check_new_folder(Path(recipe.output))
            if resume:
                check_same_recipe(recipe)
            else:
                check_no_run(recipe)
    prepared = _Run(recipe, accelerator, resume)
    settings = flatten(recipe.model_dump())
    simple = {name: value if isinstance(value, int | float | str) else str(value) for name, value in settings.items()}
    with all_or_none():
        if accelerator.is_main_process:
            write_recipe(recipe)  # not before: a run that could not be prepared leaves nothing to resume
        accelerator.init_trackers(recipe.name, config=simple)
    model = prepared.finish()
    accelerator.end_training()
    return model


class _Run:
    """The stages of a run, and what they share."""

    def __init__(self, recipe: Recipe, accelerator: Accelerator, resume: bool) -> None:
        self.recipe, self.accelerator, self.say = recipe, accelerator, accelerator.print
        self.say(f"1/6 data: {recipe.data.dataset}")
        # One process of a machine downloads and prepares what all use, which may take hours; the others find it done.
        for is_turn_of_first in (True, False):
            with all_or_none(patiently=True):
                if accelerator.is_local_main_process == is_turn_of_first:
                    self._load()
        # From here on each process draws in its own way (drop path).
        set_seed(recipe.seed, device_specific=True)
        self.processor = make_processor(recipe.data, self.model.config)
        self.test_loader = self._test_loader()
        # The other processes may have working directories of their own.
        (folder,) = broadcast_object_list([recipe.run_folder.absolute()])
        checkpoints = Checkpoints(folder, recipe.checkpoints.keep)
        self.books = Books(accelerator, checkpoints, recipe.checkpoints.every, recipe.run_folder)
        self.results: dict[str, Metrics] = {}
        self.checkpoint, self.phase_of_checkpoint, self.step_of_checkpoint = None, -1, 0
        if resume:
            self._find_checkpoint(checkpoints)
        self.books.results = self.results
        self.anchors = [stitch.id for stitch in self.model.stitches if stitch.is_anchor]

    def _load(self) -> None:
        """Data, model and teacher."""
        recipe, device = self.recipe, self.accelerator.device
        self.data = load_data(recipe.data, names_of_anchors(recipe))
        self.num_images = recipe.data.num_train_images or len(self.data.train)
        check_sizes(recipe, self.num_images)
        set_seed(recipe.seed)  # the same weights on every process
        self.model = make_model(recipe, self.data.class_names).to(device)
        name = recipe.distillation.teacher if recipe.distillation else None
        self.teacher = load_teacher(name, self.model.config).to(device) if name else None

    def _test_loader(self, *, shared: bool = True) -> DataLoader:
        recipe = self.recipe
        return make_test_loader(
            self.data.test, recipe.data, self.processor, recipe.evaluation.batch_size, self.accelerator, shared=shared
        )

    def _find_checkpoint(self, checkpoints: Checkpoints) -> None:
        (self.checkpoint,) = broadcast_object_list([checkpoints.latest()])
        if self.checkpoint is None:
            return
        with all_or_none():
            if not self.checkpoint.exists():
                raise ValueError(
                    f"{self.checkpoint} is not there on every machine: to resume, they must share the run folder"
                )
        progress = read_progress(self.checkpoint)
        if self.recipe.data.streaming:
            check_same_processes(progress, self.accelerator.num_processes)
        self.phase_of_checkpoint, self.step_of_checkpoint = progress["phase"], progress["step"]
        self.results = {stage: _by_id(figures) for stage, figures in progress["results"].items()}

    def finish(self) -> StitchableForImageClassification:
        """Run what is left of the stages."""
        self.say(f"    {len(self.model.stitches)} stitches of {len(self.anchors)} anchors")
        self.pretrain()
        self.train_together()
        self.say("5/6 evaluating")
        trained = self.measure(self.recipe.evaluation.stitches, "trained")
        self.say(f"    {_summary(trained, self.anchors)}")
        with all_or_none(patiently=True):  # throughput takes seconds for each stitch
            if self.accelerator.is_main_process:
                self.remember_images()
                if self.recipe.evaluation.cascades:
                    self.find_cascades()
                self.publish()
        return self.model

    def pretrain(self) -> None:
        """Train each anchor alone, where the recipe says so, and measure them all."""
        schedule = self.recipe.pretraining
        if schedule:
            self.say(f"2/6 pretraining {len(self.anchors)} anchors")
            for number, anchor in enumerate(self.anchors):
                sampler = StitchSampler(self.model.stitches, [anchor])
                self.fit(Phase(number, f"anchor {anchor}", schedule, sampler, StitchLoss(schedule.label_smoothing)))
        if "before" not in self.results:
            self.say(f"    {_summary(self.measure(self.anchors, 'before'), self.anchors)}")

    def train_together(self) -> None:
        """Initialise the stitching layers and train stitches together."""
        recipe = self.recipe
        if recipe.training.trainable == "own":
            return self.teach()
        number = len(self.anchors) if recipe.pretraining else 0
        resumed = self.phase_of_checkpoint >= number
        if resumed:
            self.say("4/6 going on to train the stitches together")
        sampler = make_sampler(recipe, self.model.stitches, self.accelerator.num_processes)
        self.warn_of_few_updates(sampler)
        teaching = recipe.distillation.model_dump(exclude={"teacher"}) if recipe.distillation else {}
        loss = StitchLoss(recipe.training.label_smoothing, teacher=self.teacher, **teaching)
        initialize = None if resumed else self.initialize
        self.fit(Phase(number, "stitches", recipe.training, sampler, loss, initialize, self.after_epoch))

    def teach(self) -> None:
        """Teach each stitch what is its own; a run that is resumed goes on behind those that are finished."""
        recipe, schedule = self.recipe, self.recipe.training
        taught = recipe.run_folder / "taught"
        if taught.exists():
            self.say("4/6 going on to teach the stitches")
        self.initialize()
        steps_per_epoch = self.num_images // schedule.batch_size
        loader = self._loader(schedule, steps_per_epoch, recipe.seed)

        def batches(stitch_id: int) -> Iterator[dict[str, torch.Tensor]]:
            for epoch in itertools.count(stitch_id * schedule.epochs):
                yield from loader.epoch(epoch)

        asked = recipe.sampling.stitches or [stitch.id for stitch in self.model.stitches]
        ids = [i for i in asked if i not in self.anchors] if schedule.epochs else []
        teaching = Teaching(steps=max(1, schedule.epochs * steps_per_epoch), learning_rate=schedule.learning_rate)
        try:
            if ids:
                teach_stitches(self.model, batches, ids, teaching, folder=taught)
        except DataError as error:
            raise RunStopped(f"{error}; --resume goes on behind the stitches that are finished") from error

    def warn_of_few_updates(self, sampler: StitchSampler) -> None:
        """Warn where the schedule leaves stitches under-trained."""
        steps = self.recipe.training.epochs * (self.num_images // self.recipe.training.batch_size)
        fewest = min(sampler.updates(steps).values())
        if 0 < fewest < MIN_UPDATES and self.accelerator.is_main_process:
            logger.warning(
                "the schedule gives a stitch about %.0f updates, where %d are few: raise training.epochs or "
                "sampling.stitches_per_step, or draw from fewer with sampling.stitches",
                fewest,
                MIN_UPDATES,
            )

    def initialize(self) -> None:
        """Fit the stitching layers and measure every stitch before the joint training."""
        recipe, settings = self.recipe, self.recipe.initialization
        self.say(f"3/6 initialising the stitching layers: {settings.method}")
        samples: Iterable = ()
        if settings.method == "least_squares":
            samples = sample_images(self.data.train, recipe.data, self.processor, settings.num_samples, recipe.seed)
        initialize_stitches(self.model, samples, **settings.model_dump())
        share(self.model)  # random, or rounded in different ways, they are each process's own until here
        initialized = self.measure(recipe.evaluation.stitches, "initialized")
        self.say(f"    {_summary(initialized, self.anchors)}\n4/6 training the stitches together")

    def fit(self, phase: Phase) -> None:
        """Run a phase, from the checkpoint if it lies in there, or not at all if it lies behind."""
        schedule, accelerator = phase.schedule, self.accelerator
        steps_per_epoch = self.num_images // schedule.batch_size
        if schedule.epochs == 0:
            if phase.initialize:
                phase.initialize()
            return
        if phase.number < self.phase_of_checkpoint:
            self.books.skip(schedule.epochs * steps_per_epoch)
            return
        batches_per_epoch = steps_per_epoch * accelerator.gradient_accumulation_steps
        loader = self._loader(schedule, batches_per_epoch, self.recipe.seed + 1000 * phase.number)
        here = phase.number == self.phase_of_checkpoint
        checkpoint, first_step = (self.checkpoint, self.step_of_checkpoint) if here else (None, 0)
        self.model = fit(accelerator, self.model, loader, phase, self.books, checkpoint, first_step)

    def _loader(self, schedule: Schedule, batches_per_epoch: int, seed: int) -> TrainingLoader:
        return TrainingLoader(
            self.data.train,
            self.recipe.data,
            schedule,
            self.model.config,
            self.processor,
            batch_size=micro_batch_size(schedule.batch_size, self.accelerator),
            batches_per_epoch=batches_per_epoch,
            seed=seed,
            accelerator=self.accelerator,
        )

    def after_epoch(self, epoch: int) -> dict[str, float]:
        """What is measured during the joint training."""
        every = self.recipe.evaluation.every
        if not every or epoch % every or epoch == self.recipe.training.epochs:
            return {}
        measured = evaluate(self.model, self.test_loader, self.anchors, accelerator=self.accelerator)
        return {f"accuracy_of_{i}": metrics["accuracy"] for i, metrics in measured.items()}

    def measure(self, stitch_ids: list[int] | None, stage: str) -> Metrics:
        """Evaluate stitches, going on where an interrupted evaluation was, and note the figures."""
        for stitch in self.model.stitches:
            self.model.record(stitch.id, metrics={})  # what was measured before the weights changed
        partial = self.recipe.run_folder / f"evaluation-{stage}"
        known = partial.with_suffix(".json")
        weights = weights_digest(self.model) if self.accelerator.is_main_process else None
        measured = self._known_figures(known, weights)
        if measured is None:
            measured = evaluate_resumably(
                self.model, self.test_loader, partial, stitch_ids, accelerator=self.accelerator
            )
        else:
            for stitch_id, metrics in measured.items():
                self.model.record(stitch_id, metrics=metrics)
        self.results[stage] = measured
        with all_or_none():
            if self.accelerator.is_main_process:
                figures = json.dumps({"weights": weights, "figures": measured}, allow_nan=False)
                known.write_text(figures, encoding="utf-8")
                results = json.dumps(self.results, indent=1, allow_nan=False)
                (self.recipe.run_folder / "results.json").write_text(results + "\n", encoding="utf-8")
        return measured

    def _known_figures(self, path: Path, weights: str | None) -> Metrics | None:
        """What an earlier part of the run measured of the very same weights, as the main process finds it."""
        figures = None
        with all_or_none():
            if self.accelerator.is_main_process and path.exists():
                known = json.loads(path.read_text(encoding="utf-8"))
                if known["weights"] == weights:
                    figures = _by_id(known["figures"])
        (figures,) = broadcast_object_list([figures])
        return figures

    def remember_images(self) -> None:
        """Keep in the config what recognises images of the training, which no cascade should be chosen on."""
        recipe, number = self.recipe, max(1, min(NUM_STORED, self.num_images // 2))
        seen = sample_images(self.data.train, recipe.data, self.processor, number, recipe.seed)
        try:  # what fails here is not worth losing a trained model
            remember(self.model.config, seen)
        except ValueError as error:
            logger.warning("images of the training will not be recognised as such: %s", error)

    def find_cascades(self) -> None:
        """Find cascades of the measured stitches on the test images."""
        recipe = self.recipe
        measured = [stitch.id for stitch in self.model.stitches if "accuracy" in stitch.metrics]
        loader, dataset, split = self._test_loader(shared=False), recipe.data.name, recipe.data.test_split
        try:
            find_cascades(self.model, loader, measured, dataset=dataset, split=split, seed=recipe.seed)
        except ValueError as error:  # a stitch diverged, or only one was measured
            logger.warning("no cascades were searched: %s", error)

    def publish(self) -> None:
        """Leave the finished repository at the recipe's output, complete or not at all."""
        recipe, output = self.recipe, Path(self.recipe.output)
        if recipe.evaluation.throughput:
            measure_throughput(self.model, recipe.evaluation.stitches)
        self.say(f"6/6 saving {output}")
        card = Card(
            name=recipe.name,
            dataset=recipe.data.name,
            split=recipe.data.test_split,
            license=recipe.license,
            recipe=yaml.safe_dump(recipe.model_dump(exclude_defaults=True), sort_keys=False),
            accuracy_before={anchor: metrics["accuracy"] for anchor, metrics in self.results["before"].items()},
        )
        unfinished = recipe.run_folder / "repository"
        shutil.rmtree(unfinished, ignore_errors=True)
        save_repository(self.model, unfinished, self.processor, card, sample=_sample(self.data.test))
        os.replace(unfinished, output)


def _sample(test: Images) -> Image.Image | None:
    """The first test image that can be read."""
    for row in itertools.islice(test, 100):
        with suppress(DataError):  # which one cannot be read was said in the evaluation
            return decode(row)
    return None


def _by_id(figures: dict[str, dict[str, float]]) -> Metrics:
    """Figures as JSON, whose keys are strings, has kept them."""
    return {int(stitch_id): metrics for stitch_id, metrics in figures.items()}


def _mean_accuracy(measured: Metrics) -> float:
    return sum(metrics["accuracy"] for metrics in measured.values()) / len(measured)


def _summary(measured: Metrics, anchors: Sequence[int]) -> str:
    parts = [f"anchor {i}: {100 * measured[i]['accuracy']:.2f} %" for i in anchors if i in measured]
    if len(measured) > len(parts):
        parts.insert(0, f"mean accuracy of {len(measured)} stitches: {100 * _mean_accuracy(measured):.2f} %")
    return ", ".join(parts)
