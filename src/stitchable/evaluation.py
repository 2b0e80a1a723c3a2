"""Measure every stitch in one pass over the data, sharing the work of stitches that begin alike."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from stitchable.model.modeling_stitchable import Step, StitchableForImageClassification


@torch.no_grad()
def evaluate(
    model: StitchableForImageClassification,
    batches: Iterable[Mapping[str, torch.Tensor]],
    stitch_ids: Sequence[int] | None = None,
) -> dict[int, dict[str, float]]:
    """Measure stitches, each on every image, and write the figures into the model's stitch table.

    Args:
        model: the model; it runs in evaluation mode, on its device.
        batches: mappings with "pixel_values" (N, C, H, W) and "labels" (N,) class numbers; read once.
        stitch_ids: which stitches to measure; all of them if None.

    Returns:
        For each stitch id {"accuracy": top-1 in 0..1, "loss": mean cross entropy}.

    Raises:
        ValueError: an unknown stitch, or no data.
    """
    ids = [stitch.id for stitch in model.stitches] if stitch_ids is None else list(stitch_ids)
    for stitch_id in ids:
        model.steps(stitch_id)  # raises for an unknown one before anything is run
    correct = dict.fromkeys(ids, 0)
    loss = dict.fromkeys(ids, 0.0)
    count = 0
    with evaluation_mode(model):
        for batch in batches:
            labels = batch["labels"].to(model.device)
            count += len(labels)
            for stitch_id, logits in run_stitches(model, batch["pixel_values"], ids):
                correct[stitch_id] += int((logits.argmax(-1) == labels).sum())
                loss[stitch_id] += float(F.cross_entropy(logits.float(), labels, reduction="sum"))
    if count == 0:
        raise ValueError("there is no data to evaluate on: the batches are empty")
    measured = {i: {"accuracy": correct[i] / count, "loss": loss[i] / count} for i in ids}
    for stitch_id, metrics in measured.items():
        model.record(stitch_id, metrics=metrics)
    return measured


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode, and each of its modules back afterwards (a frozen one may have been there)."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def run_stitches(
    model: StitchableForImageClassification, pixel_values: torch.Tensor, stitch_ids: Sequence[int]
) -> Iterator[tuple[int, torch.Tensor]]:
    """Logits (N, num_labels) of each stitch, in an order that lets common beginnings run once.

    At most one tensor of features per step of the deepest stitch is held at a time.
    """
    pixel_values = pixel_values.to(model.device, model.dtype)
    plans = {stitch_id: model.steps(stitch_id) for stitch_id in stitch_ids}
    yield from _descend(model, pixel_values, 0, plans)


def _descend(
    model: StitchableForImageClassification, features: torch.Tensor, depth: int, plans: Mapping[int, tuple[Step, ...]]
) -> Iterator[tuple[int, torch.Tensor]]:
    """Run the stitches whose first `depth` steps gave these features: a walk over the tree of common beginnings."""
    branches: dict[Step, dict[int, tuple[Step, ...]]] = {}
    for stitch_id, steps in plans.items():
        if depth == len(steps):
            yield stitch_id, model.run_head(steps[-1].anchor, features)
        else:
            branches.setdefault(steps[depth], {})[stitch_id] = steps
    for step, members in branches.items():
        yield from _descend(model, model.run_step(step, features), depth + 1, members)
