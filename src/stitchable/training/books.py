"""What is written down while a run trains: checkpoints, draws, figures; and what stops it."""

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import nn
from tqdm.auto import tqdm

from stitchable.training.agreement import RunStopped, all_or_none
from stitchable.training.checkpoints import Checkpoints
from stitchable.training.data import TrainingLoader
from stitchable.training.sources import DataError

if TYPE_CHECKING:
    from stitchable.training.fit import Phase, Prepared


class PhaseState:
    """What a checkpoint holds beyond model, optimiser, scaler and random states; registered with Accelerate once."""

    def __init__(self) -> None:
        self.parts: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        """The state of each part of the current phase."""
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore each part."""
        for name, part in self.parts.items():
            part.load_state_dict(state[name])


class _Signals(NamedTuple):
    """What processes agree on after each step."""

    loss: float
    interrupted: bool
    save: bool


class Books:
    """The books of a run, phase by phase.

    Args:
        accelerator: its processes share every step, and agree here after each.
        checkpoints: where they are written.
        save_every: optimiser steps between checkpoints; None for the ends of epochs, at most once a minute. The end of
            a phase is always written.
        folder: of the run; the draws of all steps are logged there.
    """

    def __init__(
        self, accelerator: Accelerator, checkpoints: Checkpoints, save_every: int | None, folder: Path
    ) -> None:
        self.accelerator, self.checkpoints = accelerator, checkpoints
        self.save_every, self.folder = save_every, folder
        self.results: dict[str, Any] = {}
        self._state = PhaseState()
        accelerator.register_for_checkpointing(self._state)
        self._interrupted = False
        self._logged_steps = 0
        self._saved_at = time.monotonic()

    @contextmanager
    def open(
        self, phase: "Phase", parts: "Prepared", loader: TrainingLoader, resume_from: Path | None, first_step: int
    ) -> Iterator[None]:
        """Keep the books of a phase, from a checkpoint of it or from its beginning, and write the end of it down.

        Raises:
            RunStopped: whatever stops the phase.
        """
        self._phase, self.parts, self._loader, self._first_step = phase, parts, loader, first_step
        self._state.parts = {"scheduler": parts.scheduler, "images": loader}
        self._state.parts |= {"average": parts.average} if parts.average else {}
        if resume_from:
            self.accelerator.load_state(str(resume_from))
            # A checkpoint lies between two optimiser steps, however many backward passes each has now; Accelerate would
            # go on counting those of before, and make a step of halves of two batches.
            self.accelerator.step = 0
        num_steps = phase.schedule.epochs * parts.steps_per_epoch
        self._progress = tqdm(
            total=num_steps, initial=first_step, desc=phase.title, disable=not self.accelerator.is_main_process
        )
        if self.accelerator.is_main_process and first_step < num_steps:
            for partial in self.folder.glob("evaluation-*"):
                partial.unlink()  # of weights that are about to change
        with self._catch_interrupts(), self._draws():
            try:
                yield
            except DataError as error:
                raise RunStopped(f"{error}. {self.checkpoints.how_to_resume()}") from error
        self._progress.close()
        self.save(phase, parts.wrapped, num_steps)
        self._state.parts = {}
        self._logged_steps += num_steps

    def steps(self, epoch: int) -> range:
        """The steps that are left of an epoch, counted from the beginning of the phase."""
        begin, stop = (number * self.parts.steps_per_epoch for number in (epoch, epoch + 1))
        self._steps = range(max(begin, self._first_step), stop)
        self._total, self._started = 0.0, time.perf_counter()
        return self._steps

    def note(self, step: int, loss: torch.Tensor) -> None:
        """Write down what a step drew and lost; save and stop where it is time.

        Args:
            step: which.
            loss: on this process.

        Raises:
            RunStopped: the loss of one of the processes is not finite, or one was interrupted.
        """
        phase = self._phase
        self._log_draw(step)
        signals = self._agree(loss, step)
        if not math.isfinite(signals.loss):
            stitches = sorted({i for ids in phase.sampler.draw_all(step) for i in ids})
            raise RunStopped(
                f"{phase.title}: the loss of step {step}, stitch {', '.join(map(str, stitches))}, is "
                f"{signals.loss}. {self.checkpoints.how_to_resume()}"
            )
        if signals.save or signals.interrupted:
            self.save(phase, self.parts.wrapped, step + 1)
        if signals.interrupted:
            raise RunStopped(f"interrupted after step {step} of {phase.title}. {self.checkpoints.how_to_resume()}")
        self._total += signals.loss
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
        num_corrupt = accelerator.reduce(torch.tensor(self._loader.num_corrupt, device=accelerator.device), "sum")
        figures |= {"replaced_images": int(num_corrupt)} if num_corrupt else {}
        figures |= phase.after_epoch(epoch + 1) if phase.after_epoch else {}
        named = {f"{phase.title}/{name}": value for name, value in figures.items()}
        accelerator.log(named, step=self._logged_steps + self._steps.stop)
        if accelerator.is_main_process:
            line = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
            self._progress.write(f"{phase.title}, epoch {epoch + 1}/{phase.schedule.epochs}: {line}")

    def save(self, phase: "Phase", model: nn.Module, step: int) -> None:
        """Write a checkpoint.

        Raises:
            RunStopped: it cannot be written, or a weight is not finite.
        """
        with all_or_none():  # of sharded weights, each process sees a part
            if not all(bool(parameter.isfinite().all()) for parameter in model.parameters()):
                raise RunStopped(f"{phase.title}: weights are not finite. {self.checkpoints.how_to_resume()}")
        self.checkpoints.save(self.accelerator, phase.number, step, self.results)
        self._saved_at = time.monotonic()

    def skip(self, steps: int) -> None:
        """Count the steps of a phase that an earlier part of the run has finished."""
        self._logged_steps += steps

    def _agree(self, loss: torch.Tensor, step: int) -> _Signals:
        """The mean loss of all processes, whether one was interrupted, and whether the main one wants a checkpoint."""
        if self.save_every:
            save = (step + 1) % self.save_every == 0
        else:
            epoch_ends = step + 1 == self._steps.stop
            save = epoch_ends and self.accelerator.is_main_process and time.monotonic() - self._saved_at > 60
        flags = torch.stack([loss, loss.new_tensor(float(self._interrupted)), loss.new_tensor(float(save))])
        total, interrupted, saving = self.accelerator.reduce(flags, "sum").tolist()
        return _Signals(total / self.accelerator.num_processes, interrupted > 0, saving > 0)

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
        kept = [line for line in lines if _place(line) < (self._phase.number, self._first_step)]
        path.write_text("".join(kept), encoding="utf-8")
        with path.open("a", buffering=1, encoding="utf-8") as self._draws_file:
            yield

    def _log_draw(self, step: int) -> None:
        if self._draws_file is not None:
            ids = (",".join(map(str, ids)) for ids in self._phase.sampler.draw_all(step))
            print(self._phase.number, step, *ids, sep="\t", file=self._draws_file)


def _place(line: str) -> tuple[int, int]:
    phase, step, *_ = line.split("\t")
    return int(phase), int(step)
