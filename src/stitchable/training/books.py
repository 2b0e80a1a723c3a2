"""What a run leaves on disk and says while it trains, so that it can be stopped at any time and resumed."""

import json
import math
import os
import shutil
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from omegaconf import OmegaConf
from safetensors import SafetensorError
from torch import nn
from tqdm.auto import tqdm

from stitchable.training.data import DataError, TrainingLoader
from stitchable.training.processes import RunStopped, all_or_none
from stitchable.training.recipe import Recipe

if TYPE_CHECKING:
    from stitchable.training.fit import Phase, Prepared


class Books:
    """The books of a run, phase by phase: checkpoints, draws, figures; and what stops it.

    Args:
        accelerator: its processes share every step, and agree here after each.
        checkpoints: where they are written.
        save_every: optimiser steps between checkpoints; None for the ends of epochs, at most once a minute. The end of
            a phase is always written.
        folder: of the run; the draws of all steps are logged there.
    """

    def __init__(
        self, accelerator: Accelerator, checkpoints: "Checkpoints", save_every: int | None, folder: Path
    ) -> None:
        self.accelerator, self.checkpoints = accelerator, checkpoints
        self.save_every, self.folder = save_every, folder
        self.results: dict[str, Any] = {}
        self._loader: TrainingLoader | None = None
        self._interrupted = False
        self._logged_steps = 0
        self._saved_at = time.monotonic()

    @contextmanager
    def open(
        self, phase: "Phase", parts: "Prepared", loader: TrainingLoader, resume_from: Path | None, first_step: int
    ) -> Iterator[None]:
        """Keep the books of a phase, from a checkpoint of it or from its beginning, and write the end of it down."""
        self._phase, self.parts, self._loader, self._first_step = phase, parts, loader, first_step
        is_main = self.accelerator.is_main_process
        if resume_from:
            self.accelerator.load_state(str(resume_from))
            # A checkpoint lies between two optimiser steps, however many backward passes each has now; Accelerate would
            # go on counting those of before, and make a step of halves of two batches.
            self.accelerator.step = 0
            loader.num_corrupt = read_progress(resume_from)["num_corrupt"] if is_main else 0
        num_steps = phase.schedule.epochs * parts.steps_per_epoch
        self._progress = tqdm(total=num_steps, initial=first_step, desc=phase.title, disable=not is_main)
        if is_main and first_step < num_steps:
            for partial in self.folder.glob("evaluation-*"):
                partial.unlink()  # of weights that are about to change
        with self._catch_interrupts(), self._draws():
            try:
                yield
            except DataError as error:
                raise RunStopped(f"{error}. {self.checkpoints.how_to_resume()}") from error
        self._progress.close()
        self.save(phase, parts.wrapped, num_steps)
        self.skip(num_steps)

    def steps(self, epoch: int) -> range:
        """The steps that are left of an epoch, counted from the beginning of the phase."""
        begin, stop = (number * self.parts.steps_per_epoch for number in (epoch, epoch + 1))
        self._steps = range(max(begin, self._first_step), stop)
        self._total, self._started = 0.0, time.perf_counter()
        return self._steps

    def note(self, step: int, loss: torch.Tensor) -> None:
        """Write down what a step drew and its loss on this process; save where it is time, and stop where one must."""
        phase, draws = self._phase, self._phase.sampler.draw_all(step)
        if self._draws_file is not None:
            print(phase.number, step, *(",".join(map(str, ids)) for ids in draws), sep="\t", file=self._draws_file)
        flags = torch.stack([loss, *loss.new_tensor([self._interrupted, self._is_time_to_save(step)])])
        total, interrupted, save = self.accelerator.reduce(flags, "sum").tolist()
        if not math.isfinite(total):
            stitches = ", ".join(map(str, sorted({i for ids in draws for i in ids})))
            raise RunStopped(
                f"{phase.title}: the loss of step {step}, stitch {stitches}, is {total}. "
                f"{self.checkpoints.how_to_resume()}"
            )
        if save or interrupted:
            self.save(phase, self.parts.wrapped, step + 1)
        if interrupted:
            raise RunStopped(f"interrupted after step {step} of {phase.title}. {self.checkpoints.how_to_resume()}")
        self._total += total / self.accelerator.num_processes
        self._progress.update()

    def close_epoch(self, epoch: int) -> None:
        """Give the figures of an epoch to the trackers, by optimiser steps of the whole run, and print them."""
        phase, accelerator, num_steps = self._phase, self.accelerator, len(self._steps)
        seconds = time.perf_counter() - self._started
        figures = {
            "loss": self._total / num_steps,
            "learning_rate": max(group["lr"] for group in self.parts.optimizer.param_groups),
            "images_per_second": num_steps * phase.schedule.batch_size / seconds,
        }
        assert self._loader is not None
        num_corrupt = accelerator.reduce(torch.tensor(self._loader.num_corrupt, device=accelerator.device), "sum")
        figures |= {"replaced_images": int(num_corrupt)} if num_corrupt else {}
        figures |= phase.after_epoch(epoch + 1) if phase.after_epoch else {}
        named = {f"{phase.title}/{name}": value for name, value in figures.items()}
        accelerator.log(named, step=self._logged_steps + self._steps.stop)
        if accelerator.is_main_process:
            line = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
            self._progress.write(f"{phase.title}, epoch {epoch + 1}/{phase.schedule.epochs}: {line}")

    def save(self, phase: "Phase", model: nn.Module, step: int) -> None:
        """Write a checkpoint, if all weights are finite."""
        with all_or_none():  # of sharded weights, each process sees a part
            if not all(bool(parameter.isfinite().all()) for parameter in model.parameters()):
                raise RunStopped(f"{phase.title}: weights are not finite. {self.checkpoints.how_to_resume()}")
        num_corrupt = self._loader.num_corrupt if self._loader else 0
        self.checkpoints.save(self.accelerator, phase.number, step, self.results, num_corrupt)
        self._saved_at = time.monotonic()

    def skip(self, steps: int) -> None:
        """Count the steps of a phase that is finished."""
        self._logged_steps += steps

    def _is_time_to_save(self, step: int) -> bool:
        if self.save_every:
            return self.accelerator.is_main_process and (step + 1) % self.save_every == 0
        epoch_ends = step + 1 == self._steps.stop
        return epoch_ends and self.accelerator.is_main_process and time.monotonic() - self._saved_at > 60

    @contextmanager
    def _catch_interrupts(self) -> Iterator[None]:
        """Let Ctrl-C end the run after the current step; a second one ends it at once."""

        def handle(number: int, frame: Any) -> None:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True

        previous = signal.signal(signal.SIGINT, handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)

    @contextmanager
    def _draws(self) -> Iterator[None]:
        """Log which stitches each process runs at each step, as lines "phase, step, ids" in `draws.tsv`."""
        self._draws_file = None
        if not self.accelerator.is_main_process:
            yield
            return
        path = self.folder / "draws.tsv"
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        # What came after the checkpoint that the run is resumed from is drawn again.
        here = (self._phase.number, self._first_step)
        kept = [line for line in lines if tuple(map(int, line.split("\t")[:2])) < here]
        path.write_text("".join(kept), encoding="utf-8")
        with path.open("a", buffering=1, encoding="utf-8") as self._draws_file:
            yield


class Checkpoints:
    """Numbered folders written by Accelerate: model, optimiser, scaler, random states.

    A checkpoint is written beside its place and renamed when it is complete, and older ones are removed only then: a
    crash at any moment leaves the last good one.

    Args:
        folder: where they are.
        keep: how many of the last to keep.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def latest(self) -> Path | None:
        """The newest complete checkpoint."""
        return max(self.folder.glob("checkpoint-*[0-9]"), default=None)

    def save(
        self, accelerator: Accelerator, phase: int, step: int, results: Mapping[str, Any], num_corrupt: int = 0
    ) -> Path:
        """Write the state of everything that Accelerate knows, on all processes, if the main one has not done so.

        Raises:
            RunStopped: it cannot be written, by one of the processes; on all of them.
        """
        target = self.folder / f"checkpoint-{phase:02d}-{step:08d}"
        partial = self.folder / f"{target.name}.partial"
        (is_there,) = broadcast_object_list([target.exists()])  # as the main process sees it
        if is_there:
            return target
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        accelerator.wait_for_everyone()
        progress = {"phase": phase, "step": step, "num_processes": accelerator.num_processes}
        progress |= {"results": results, "num_corrupt": num_corrupt}
        try:
            with all_or_none():
                accelerator.save_state(str(partial))
                if accelerator.is_main_process:
                    (partial / "progress.json").write_text(json.dumps(progress, allow_nan=False), encoding="utf-8")
            with all_or_none():
                if accelerator.is_main_process:
                    os.replace(partial, target)
                    for old in sorted(self.folder.glob("checkpoint-*[0-9]"))[: -self.keep]:
                        shutil.rmtree(old)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise RunStopped(f"{target} cannot be written: {error}. {self.how_to_resume()}") from error
        return target

    def how_to_resume(self) -> str:
        """A sentence on the last good checkpoint."""
        latest = self.latest()
        return f"The last good checkpoint is {latest}; --resume goes on from it" if latest else "There is no checkpoint"


def read_progress(checkpoint: Path) -> dict[str, Any]:
    """Phase, step, number of processes, results and replaced images of a checkpoint."""
    return json.loads((checkpoint / "progress.json").read_text(encoding="utf-8"))


# What may change between the parts of a run, for the same stitches go on with the same images.
_FREE = {
    *("name", "output", "trackers", "checkpoints", "evaluation", "gradient_accumulation_steps"),
    *("data.num_workers", "data.on_corrupt_image"),
}
# Not of a stream, which is dealt out to the workers: some images would come twice and others never.
_NOT_OF_STREAMS = {"data.num_workers"}


def check_same_recipe(recipe: Recipe) -> None:
    """Refuse to resume the run of another recipe; each setting that differs is named."""
    path = recipe.run_folder / "recipe.yaml"
    if not path.exists():
        raise ValueError(f"there is no run to resume in {recipe.run_folder}")
    free = _FREE - (_NOT_OF_STREAMS if recipe.data.streaming else set())
    theirs, ours = flatten(OmegaConf.to_container(OmegaConf.load(path))), flatten(recipe.model_dump())
    differing = [
        f"{key} is {ours.get(key)!r}, was {theirs.get(key)!r}"
        for key in sorted({*ours, *theirs})
        if ours.get(key) != theirs.get(key) and not any(f"{key}.".startswith(f"{name}.") for name in free)
    ]
    if differing:
        raise ValueError(f"{recipe.run_folder} is a run of another recipe: {'; '.join(differing)}")


def check_same_processes(progress: Mapping[str, Any], num_processes: int) -> None:
    """Refuse to resume the run of a stream, which is dealt out to the processes, on another number of them."""
    if progress["num_processes"] != num_processes:
        raise ValueError(
            f"the stream was dealt out to {progress['num_processes']} processes, so that with {num_processes} some "
            "images would come twice and others never; resume with as many as before"
        )


def check_no_run(recipe: Recipe) -> None:
    """Refuse to begin where another run is."""
    folder = recipe.run_folder
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds an unfinished or finished run; go on with --resume, or choose another output")


def write_recipe(recipe: Recipe) -> None:
    """Leave the recipe in the run folder, for `check_same_recipe`."""
    recipe.run_folder.mkdir(parents=True, exist_ok=True)
    text = OmegaConf.to_yaml(OmegaConf.create(recipe.model_dump()))
    (recipe.run_folder / "recipe.yaml").write_text(text, encoding="utf-8")


def flatten(content: Any, prefix: str = "") -> dict[str, Any]:
    """Settings by their path, "training.epochs"."""
    if not isinstance(content, dict) or not content:
        return {prefix: content}
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat
