"""Algorithm 1 of Stitchable Neural Networks (Pan et al., CVPR 2023): `fit`, on any number of processes, resumable."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from stitchable import StitchableForImageClassification
from stitchable.training.books import Books
from stitchable.training.data import TrainingLoader
from stitchable.training.losses import StitchLoss
from stitchable.training.optimization import clip_gradients, make_optimizer, make_scheduler, parameter_groups
from stitchable.training.processes import is_sharded, share
from stitchable.training.recipe import Schedule
from stitchable.training.sampling import StitchSampler


@dataclass
class Phase:
    """One training of a run: "anchor 0", ..., "stitches".

    Attributes:
        number: its place among the phases of the run, from 0.
        title: for progress bars and logs.
        schedule: of the recipe.
        sampler: which stitches each step runs.
        loss: of a step.
        initialize: of the stitching layers, before the first step; None where that is done, or not wanted.
        after_epoch: called with the number of finished epochs; what it returns joins the line of figures.
    """

    number: int
    title: str
    schedule: Schedule
    sampler: StitchSampler
    loss: StitchLoss
    initialize: Callable[[], None] | None = None
    after_epoch: Callable[[int], dict[str, float]] | None = None


def fit(
    accelerator: Accelerator,
    model: StitchableForImageClassification,
    loader: TrainingLoader,
    phase: Phase,
    books: Books,
    resume_from: Path | None = None,
    first_step: int = 0,
) -> StitchableForImageClassification:
    """Algorithm 1 of the paper, its lines numbered as there; Accelerate carries it.

    Args:
        accelerator: its processes share every step.
        model: trained in place, as far as its weights are not sharded.
        loader: micro-batches of this process.
        phase: what to train, and how.
        books: where figures, draws and checkpoints go, and what says when to stop.
        resume_from: a checkpoint of this phase.
        first_step: how many steps it has done.

    Returns:
        The trained model, whole and equal on every process.

    Raises:
        RunStopped: a non-finite loss, Ctrl-C, an image that cannot be read, or a checkpoint that cannot be written.
    """
    # 1: Initialise all stitching layers, by least-squares matching if the recipe says nothing else.
    if phase.initialize:
        phase.initialize()
    parts = _prepare(accelerator, model, loader, phase)
    wrapped, optimizer, num_parts = parts.wrapped, parts.optimizer, accelerator.gradient_accumulation_steps
    parameters = list(wrapped.parameters())  # once: the walk through the modules takes a tenth of a small model's step
    with books.open(phase, parts, loader, resume_from, first_step):
        # 2: For each step (of each epoch, from where the run is resumed)
        for epoch in range(first_step // parts.steps_per_epoch, phase.schedule.epochs):
            train_mode(wrapped, model, phase.schedule)
            steps = books.steps(epoch)
            batches = loader.epoch(epoch, steps.start % parts.steps_per_epoch * num_parts)
            for step in steps:
                parts.scheduler.step_update(step)  # the learning rate
                losses = []
                # 3: Get the next mini-batch of images and labels, in as many parts as share an optimiser step.
                micro_batches = islice(batches, num_parts)
                # 4: Clear the gradients: to None, so that the optimiser leaves alone what this step does not use.
                optimizer.zero_grad(set_to_none=True)
                # 5: Draw a stitch (or several, of a sandwich, or each for a share of the images).
                stitch_ids = phase.sampler.draw(step, accelerator.process_index)
                for batch in micro_batches:
                    with accelerator.accumulate(wrapped):
                        # 6: Forward pass.
                        logits = wrapped(batch["pixel_values"], stitch_ids)
                        # 7: Compute the loss.
                        with accelerator.autocast():
                            loss = phase.loss(logits, batch["labels"], batch["pixel_values"])
                        # 8: Compute the gradients.
                        accelerator.backward(loss)
                        clip_gradients(accelerator, parameters, phase.schedule)
                        # 9: Update the weights; where gradients are accumulated, with the last part only.
                        optimizer.step()
                        losses.append(loss.detach())
                books.note(step, torch.stack(losses).mean())
            books.close_epoch(epoch)
    return _finish(accelerator, model, parts)


class Stitches(nn.Module):
    """Several stitches in one forward pass, which is what data-parallel wrappers allow per backward pass.

    Args:
        model: whose stitches they are.
        share: whether the stitches share the images, stitch j of k taking the positions i with i mod k = j, or each
            takes them all.
    """

    def __init__(self, model: StitchableForImageClassification, share: bool = False) -> None:
        super().__init__()
        self.model, self.share = model, share

    def forward(self, pixel_values: torch.Tensor, stitch_ids: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
        """Logits (N, num_labels) of each stitch; where they share the images, of all together, one row per image.

        The mean loss of those rows is the mean of the stitches' losses on their shares.

        Raises:
            ValueError: the stitches cannot share the images equally.
        """
        k = len(stitch_ids) if self.share else 1
        if len(pixel_values) % k:
            raise ValueError(f"{len(pixel_values)} images cannot be shared equally by {k} stitches of a step")
        logits = [
            self.model(pixel_values[j::k] if self.share else pixel_values, stitch_id=stitch_id).logits
            for j, stitch_id in enumerate(stitch_ids)
        ]
        return (torch.stack(logits, dim=1).flatten(0, 1),) if self.share else tuple(logits)


@dataclass
class Prepared:
    """What a phase trains with."""

    wrapped: nn.Module
    optimizer: Any
    scheduler: Any
    steps_per_epoch: int


def _prepare(
    accelerator: Accelerator, model: StitchableForImageClassification, loader: TrainingLoader, phase: Phase
) -> Prepared:
    schedule = phase.schedule
    steps_per_epoch = loader.batches_per_epoch // accelerator.gradient_accumulation_steps
    compile_blocks(accelerator, model)
    freeze(model, schedule.trainable)
    optimizer = make_optimizer(parameter_groups(model, schedule), schedule)
    scheduler = make_scheduler(optimizer, schedule, steps_per_epoch)
    stitches = Stitches(model, share=phase.sampler.stitches_per_step > 1)
    wrapped, optimizer = accelerator.prepare(stitches, optimizer)
    return Prepared(wrapped, optimizer, scheduler, steps_per_epoch)


def freeze(model: StitchableForImageClassification, trainable: str) -> None:
    """Let gradients reach everything ("all"), or the stitching layers alone ("stitching_layers")."""
    model.requires_grad_(trainable == "all")
    model.stitching_layers.requires_grad_(True)


def train_mode(wrapped: nn.Module, model: StitchableForImageClassification, schedule: Schedule) -> None:
    """Drop path, and batch statistics of what is trained, if they shall be."""
    wrapped.train()
    if schedule.trainable == "stitching_layers":
        model.anchors.eval()  # frozen, statistics of batch norms too
    elif schedule.batch_norms == "keep":
        keep_statistics(model)


def keep_statistics(model: nn.Module) -> None:
    """Let the batch norms of a model in training mode normalise by their running statistics, and leave these alone."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()


def compile_blocks(accelerator: Accelerator, model: StitchableForImageClassification) -> None:
    """Compile the blocks where `accelerate launch` asks for torch.compile."""
    plugin = accelerator.state.dynamo_plugin
    if plugin.backend == DynamoBackend.NO:
        return
    model.compile_blocks(**plugin.to_kwargs())
    plugin.backend = DynamoBackend.NO  # done; prepare() shall not compile the whole as well


@torch.no_grad()
def _finish(
    accelerator: Accelerator, model: StitchableForImageClassification, parts: Prepared
) -> StitchableForImageClassification:
    """The model whole and equal on every process."""
    if is_sharded(accelerator):
        whole = accelerator.get_state_dict(parts.wrapped)
        model = type(model)(model.config)
        if accelerator.is_main_process:
            model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in whole.items()})
        model.to(accelerator.device)
    share(model)  # batch statistics are each process's own until here
    parts.optimizer.zero_grad(set_to_none=True)
    freeze(model, "all")
    accelerator.free_memory()
    return model
