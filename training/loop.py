"""The training loop: a schedule over a part of the model's stitches, on any number of processes, resumable."""

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend, broadcast
from timm.utils import ModelEmaV3
from torch import nn
from tqdm.auto import tqdm

from agreement import RunStopped, all_or_none
from checkpoints import Checkpoints
from data import TrainingLoader
from losses import StitchLoss
from optimization import clip_gradients, make_optimizer, make_scheduler, parameter_groups
from plan import is_sharded
from recipe import Schedule
from sampling import StitchSampler
from sources import DataError
from stitchable import StitchableForImageClassification


class Stitches(nn.Module):
    """Several stitches in one forward pass, which is what data-parallel wrappers allow per backward pass."""

    def __init__(self, model: StitchableForImageClassification) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor, stitch_ids: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
        """Logits (N, num_labels) of each stitch."""
        return tuple(self.model(pixel_values, stitch_id=stitch_id).logits for stitch_id in stitch_ids)


@dataclass
class Phase:
    """One training of a run: "anchor 0", ..., "stitches".

    Attributes:
        number: its place among the phases of the run, from 0.
        title: for progress bars and logs.
        schedule: of the recipe.
        sampler: which stitches each step runs.
        loss: of a step.
    """

    number: int
    title: str
    schedule: Schedule
    sampler: StitchSampler
    loss: StitchLoss


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


class Loop:
    """Trains the model of a run, phase by phase, in place.

    Args:
        accelerator: what carries it; its processes share every step.
        model: whose stitches are trained.
        checkpoints: where they are written.
        state: registered with the accelerator.
        save_every: optimiser steps between checkpoints; None for the ends of epochs, at most once a minute. The end of
            a phase is always written.
        folder: of the run; the draws of all steps are logged there.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: StitchableForImageClassification,
        checkpoints: Checkpoints,
        state: PhaseState,
        save_every: int | None,
        folder: Path,
    ) -> None:
        self.accelerator, self.model, self.checkpoints = accelerator, model, checkpoints
        self.state, self.save_every, self.folder = state, save_every, folder
        self.results: dict[str, Any] = {}
        self._interrupted = False
        self._logged_steps = 0
        self._saved_at = time.monotonic()

    def fit(
        self,
        phase: Phase,
        loader: TrainingLoader,
        resume_from: Path | None = None,
        first_step: int = 0,
        after_epoch: Callable[[int], dict[str, float]] | None = None,
    ) -> None:
        """Run a phase.

        Args:
            phase: what to train.
            loader: micro-batches of this process.
            resume_from: a checkpoint of this phase.
            first_step: how many steps it has done.
            after_epoch: called with the number of finished epochs; what it returns joins the line of figures.

        Raises:
            RunStopped: a non-finite loss, Ctrl-C, or a checkpoint that cannot be written.
        """
        schedule, accelerator = phase.schedule, self.accelerator
        steps_per_epoch = loader.batches_per_epoch // accelerator.gradient_accumulation_steps
        compile_blocks(accelerator, self.model)
        freeze(self.model, schedule.trainable)
        optimizer = make_optimizer(parameter_groups(self.model, schedule), schedule)
        scheduler = make_scheduler(optimizer, schedule, steps_per_epoch)
        wrapped, optimizer = accelerator.prepare(Stitches(self.model), optimizer)
        average = ModelEmaV3(self.model, decay=schedule.ema_decay) if schedule.ema_decay else None
        self.state.parts = {"scheduler": scheduler, "images": loader} | ({"average": average} if average else {})
        if resume_from:
            accelerator.load_state(str(resume_from))
            # A checkpoint lies between two optimiser steps, however many backward passes each has now; Accelerate would
            # go on counting those of before, and make a step of halves of two batches.
            accelerator.step = 0
        training = Training(self, phase, wrapped, optimizer, scheduler, average, steps_per_epoch)
        with self._catch_interrupts(), self._draws(phase, first_step) as log:
            try:
                training.run(loader, first_step, log, after_epoch)
            except DataError as error:
                raise RunStopped(f"{error}. {self.checkpoints.how_to_resume()}") from error
        self.save(phase, schedule.epochs * steps_per_epoch)
        self.model = finished(accelerator, wrapped, self.model, average)
        freeze(self.model, "all")
        self.state.parts = {}
        self._logged_steps += schedule.epochs * steps_per_epoch
        accelerator.free_memory()

    def save(self, phase: Phase, step: int) -> None:
        """Write a checkpoint.

        Raises:
            RunStopped: it cannot be written, or a weight is not finite.
        """
        with all_or_none():  # of sharded weights, each process sees a part
            if not all(bool(parameter.isfinite().all()) for parameter in self.model.parameters()):
                raise RunStopped(f"{phase.title}: weights are not finite. {self.checkpoints.how_to_resume()}")
        self.checkpoints.save(self.accelerator, phase.number, step, self.results)
        self._saved_at = time.monotonic()

    def agree(self, loss: torch.Tensor, step: int, epoch_ends: bool) -> _Signals:
        """The mean loss of all processes, whether one was interrupted, and whether the main one wants a checkpoint."""
        if self.save_every:
            save = (step + 1) % self.save_every == 0
        else:
            save = epoch_ends and self.accelerator.is_main_process and time.monotonic() - self._saved_at > 60
        flags = torch.stack([loss, loss.new_tensor(float(self._interrupted)), loss.new_tensor(float(save))])
        total, interrupted, saving = self.accelerator.reduce(flags, "sum").tolist()
        return _Signals(total / self.accelerator.num_processes, interrupted > 0, saving > 0)

    def log(self, figures: dict[str, float], step: int) -> None:
        """Give figures to the trackers, by optimiser steps of the whole run."""
        self.accelerator.log(figures, step=self._logged_steps + step)

    def skip(self, steps: int) -> None:
        """Count the steps of a phase that an earlier part of the run has finished."""
        self._logged_steps += steps

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
    def _draws(self, phase: Phase, first_step: int) -> Iterator[Callable[[int], None]]:
        """Log which stitches each process runs at each step, as lines "phase, step, ids" in `draws.tsv`."""
        if not self.accelerator.is_main_process:
            yield lambda step: None
            return
        path = self.folder / "draws.tsv"
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        # What came after the checkpoint that the run is resumed from is drawn again.
        kept = [line for line in lines if _place(line) < (phase.number, first_step)]
        path.write_text("".join(kept), encoding="utf-8")
        with path.open("a", buffering=1, encoding="utf-8") as file:
            yield lambda step: print(
                phase.number,
                step,
                *(",".join(map(str, ids)) for ids in phase.sampler.draw_all(step)),
                sep="\t",
                file=file,
            )


@dataclass
class Training:
    """The steps of one phase."""

    loop: Loop
    phase: Phase
    wrapped: nn.Module
    optimizer: Any
    scheduler: Any
    average: ModelEmaV3 | None
    steps_per_epoch: int

    def __post_init__(self) -> None:
        # Once: to walk through the modules takes a tenth of a small model's step.
        self.parameters = list(self.wrapped.parameters())

    def run(self, loader: TrainingLoader, first_step: int, log_draw: Callable, after_epoch: Callable | None) -> None:
        """All epochs from a step on: logged, checked, saved as the loop asks."""
        accelerator, epochs = self.loop.accelerator, self.phase.schedule.epochs
        accumulation = accelerator.gradient_accumulation_steps
        progress = tqdm(
            total=epochs * self.steps_per_epoch,
            initial=first_step,
            desc=self.phase.title,
            disable=not accelerator.is_main_process,
        )
        for epoch in range(first_step // self.steps_per_epoch, epochs):
            self.train_mode()
            start, started = max(first_step, epoch * self.steps_per_epoch), time.perf_counter()
            batches = loader.epoch(epoch, (start - epoch * self.steps_per_epoch) * accumulation)
            total = 0.0
            stop = (epoch + 1) * self.steps_per_epoch
            for step in range(start, stop):
                log_draw(step)
                signals = self.loop.agree(self.step(step, batches, accumulation), step, step + 1 == stop)
                self._check(step, signals)
                total += signals.loss
                progress.update()
            seconds = time.perf_counter() - started
            figures = {
                "loss": total / (stop - start),
                "learning_rate": max(group["lr"] for group in self.optimizer.param_groups),
                "images_per_second": (stop - start) * self.phase.schedule.batch_size / seconds,
            }
            num_corrupt = accelerator.reduce(torch.tensor(loader.num_corrupt, device=accelerator.device), "sum")
            figures |= {"replaced_images": int(num_corrupt)} if num_corrupt else {}
            figures |= after_epoch(epoch + 1) if after_epoch else {}
            self.loop.log({f"{self.phase.title}/{name}": value for name, value in figures.items()}, stop)
            if accelerator.is_main_process:
                line = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
                progress.write(f"{self.phase.title}, epoch {epoch + 1}/{epochs}: {line}")
        progress.close()

    def train_mode(self) -> None:
        """Drop path, and batch statistics of what is trained."""
        self.wrapped.train()
        if self.phase.schedule.trainable == "stitching_layers":
            self.loop.model.anchors.eval()  # frozen, statistics of batch norms too

    def step(self, step: int, batches: Iterator[dict[str, torch.Tensor]], accumulation: int) -> torch.Tensor:
        """One optimiser step; returns its loss on this process."""
        accelerator = self.loop.accelerator
        self.scheduler.step_update(step)
        stitch_ids = self.phase.sampler.draw(step, accelerator.process_index)
        losses = []
        for _ in range(accumulation):
            batch = next(batches)
            with accelerator.accumulate(self.wrapped):
                logits = self.wrapped(batch["pixel_values"], stitch_ids)
                with accelerator.autocast():
                    loss = self.phase.loss(logits, batch["labels"], batch["pixel_values"])
                losses.append(loss.detach())
                accelerator.backward(loss)
                clip_gradients(accelerator, self.parameters, self.phase.schedule)
                self.optimizer.step()
                # Gradients become None, so that the optimiser leaves alone what the next step does not use.
                self.optimizer.zero_grad(set_to_none=True)
        if self.average:
            self.average.update(self.loop.model)
        return torch.stack(losses).mean()

    def _check(self, step: int, signals: _Signals) -> None:
        loop = self.loop
        if not math.isfinite(signals.loss):
            stitches = sorted({i for ids in self.phase.sampler.draw_all(step) for i in ids})
            raise RunStopped(
                f"{self.phase.title}: the loss of step {step}, stitch {', '.join(map(str, stitches))}, is "
                f"{signals.loss}. {loop.checkpoints.how_to_resume()}"
            )
        if signals.save or signals.interrupted:
            loop.save(self.phase, step + 1)
        if signals.interrupted:
            raise RunStopped(f"interrupted after step {step} of {self.phase.title}. {loop.checkpoints.how_to_resume()}")


def freeze(model: StitchableForImageClassification, trainable: str) -> None:
    """Let gradients reach everything ("all"), or the stitching layers alone ("stitching_layers")."""
    model.requires_grad_(trainable == "all")
    model.stitching_layers.requires_grad_(True)


def compile_blocks(accelerator: Accelerator, model: StitchableForImageClassification) -> None:
    """Compile the blocks where `accelerate launch` asks for torch.compile."""
    plugin = accelerator.state.dynamo_plugin
    if plugin.backend == DynamoBackend.NO:
        return
    model.compile_blocks(**plugin.to_kwargs())
    plugin.backend = DynamoBackend.NO  # done; prepare() shall not compile the whole as well


@torch.no_grad()
def finished(
    accelerator: Accelerator,
    wrapped: nn.Module,
    model: StitchableForImageClassification,
    average: ModelEmaV3 | None,
) -> StitchableForImageClassification:
    """The trained model, whole and equal on every process: its average if there is one."""
    if is_sharded(accelerator):
        whole = accelerator.get_state_dict(wrapped)
        model = type(model)(model.config)
        if accelerator.is_main_process:
            model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in whole.items()})
        model.to(accelerator.device)
    elif average:
        model.load_state_dict(average.module.state_dict())
    share(model)  # batch statistics are each process's own until here
    return model


@torch.no_grad()
def share(model: nn.Module) -> None:
    """Give every process the weights and statistics of the main one."""
    for tensor in model.state_dict().values():
        tensor.copy_(broadcast(tensor))


def _place(line: str) -> tuple[int, int]:
    phase, step, *_ = line.split("\t")
    return int(phase), int(step)
