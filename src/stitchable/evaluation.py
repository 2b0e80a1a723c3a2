"""Measure every stitch in one pass over the data, sharing the work of stitches that begin alike."""

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader
from transformers.utils import logging

from stitchable.batches import unpack_batch
from stitchable.model.chain import Flow
from stitchable.model.modeling_stitchable import Step, StitchableForImageClassification
from stitchable.model.routes import find_stitch

logger = logging.get_logger(__name__)


def evaluate(
    model: StitchableForImageClassification,
    batches: Iterable[Any],
    stitch_ids: Sequence[int] | None = None,
    *,
    accelerator: Accelerator | None = None,
) -> dict[int, dict[str, float]]:
    """Measure stitches, each on every image, and write the figures into the model's stitch table.

    Args:
        model: the model; it runs in evaluation mode, on its device.
        batches: of pixel values (N, C, H, W) and class numbers (N,): mappings with "pixel_values" and "labels" or
            "label", or pairs; read once. A sample with the label -100 counts in no figure.
        stitch_ids: which stitches to measure; all of them if None.
        accelerator: whose processes share the work; `batches` is then a `DataLoader` that it prepared. Samples that
            fill up the last batch are counted once. Every process gets the figures of all.

    Returns:
        For each stitch id {"accuracy": top-1 in 0..1, "top5_accuracy": 0..1, "loss": mean cross entropy}, as it is in
        the stitch table: a loss that is not finite is left out.

    Raises:
        ValueError: no stitch or an unknown one, no data, batches without images or class numbers, or labels that are
            none of the classes.
    """
    rows = [
        measure_batch(labels, logits, accelerator)
        for labels, logits in run_batches(model, batches, stitch_ids, accelerator=accelerator)
    ]
    return record_figures(model, rows, stitch_ids, batches)


@torch.no_grad()
def run_batches(
    model: StitchableForImageClassification,
    batches: Iterable[Any],
    stitch_ids: Sequence[int] | None = None,
    *,
    accelerator: Accelerator | None = None,
) -> Iterator[tuple[torch.Tensor, dict[int, torch.Tensor]]]:
    """Run stitches over data: for each batch its labels (N,) and the logits (N, num_labels) of each stitch by id.

    `evaluate` is made of this, `measure_batch` and `record_figures`; who needs the logits too calls them:

    ```python
    rows = []
    for labels, logits in run_batches(model, batches):
        rows.append(measure_batch(labels, logits))
        ...
    figures = record_figures(model, rows)
    ```

    The model is in evaluation mode until the iterator ends or is closed. The logits of one batch are held at a time, of
    all stitches: for 71 stitches, 64 images and 1,000 classes 18 MB.

    Args:
        model: as for `evaluate`, like the next three; logits lie on the device of their anchor, labels on the model's.
        batches: see there.
        stitch_ids: see there.
        accelerator: casts as it does in training; labels and logits are those of this process.

    Raises:
        ValueError: as `evaluate`, but for labels that are none of the classes.
    """
    ids = known_ids(model, stitch_ids)
    is_main = accelerator is None or accelerator.is_main_process
    with evaluation_mode(model):
        for batch in logging.tqdm(
            batches, total=_num_batches(batches), desc="evaluating", leave=False, disable=not is_main
        ):
            pixel_values, labels = unpack_batch(batch, labels="required")
            assert labels is not None
            with accelerator.autocast() if accelerator else nullcontext():
                logits = dict(run_stitches(model, pixel_values, ids))
            yield labels.to(model.device), {stitch_id: logits[stitch_id] for stitch_id in ids}


def measure_batch(
    labels: torch.Tensor, logits: Mapping[int, torch.Tensor], accelerator: Accelerator | None = None
) -> torch.Tensor:
    """What the figures need of one batch that `run_batches` gave.

    Returns:
        (N, S, 2) on the CPU, of the samples of all processes: `stitchable.metrics.rank_and_loss` for each stitch. A
        sample that does not count has the loss -inf, which no other has, and its label in the place of the rank.

    Raises:
        ValueError: a label that is none of the classes, on whichever process.
    """
    from stitchable.metrics import IGNORED, rank_and_loss  # here, because `evaluate` takes a second to import

    # The anchors may lie on several devices.
    rows = torch.stack([rank_and_loss(each, labels.to(each.device)).to(labels.device) for each in logits.values()], 1)
    num_labels = next(iter(logits.values())).shape[-1]
    outside = (labels < 0) | (labels >= num_labels)
    rows[outside] = torch.stack([labels, torch.full_like(labels, -torch.inf, dtype=rows.dtype)], dim=1)[outside, None]
    # One collective per batch, whatever the number of stitches.
    rows = (accelerator.gather_for_metrics(rows) if accelerator else rows).cpu()
    # Only now, so that every process raises and none waits for another.
    wrong = rows[rows[:, 0, 1].isneginf() & (rows[:, 0, 0] != IGNORED), 0, 0]
    if len(wrong):
        raise ValueError(f"label {int(wrong[0])} is none of the model's classes 0..{num_labels - 1}")
    return rows


def record_figures(
    model: StitchableForImageClassification,
    rows: Sequence[torch.Tensor],
    stitch_ids: Sequence[int] | None = None,
    batches: Iterable[Any] | None = None,
) -> dict[int, dict[str, float]]:
    """Turn the rows (N, S, 2) of all batches into figures and write them into the stitch table.

    Args:
        model: that was measured.
        rows: as `measure_batch` returned them, of these stitches.
        stitch_ids: as for `run_batches`.
        batches: what was run; of a `DataLoader`, no more samples count than its data set has.

    Returns:
        As `evaluate`.

    Raises:
        ValueError: no sample counts.
    """
    from stitchable.metrics import compute_figures

    measured = compute_figures(_counted(rows, batches), known_ids(model, stitch_ids))
    for stitch_id, metrics in measured.items():
        known = find_stitch(model.stitches, stitch_id).metrics
        recorded = model.record(stitch_id, metrics={**known, **metrics}).metrics
        measured[stitch_id] = {name: recorded[name] for name in metrics if name in recorded}
    return measured


@torch.no_grad()
def measure_agreement(
    model: StitchableForImageClassification, batches: Iterable[Any], stitch_ids: Sequence[int] | None = None
) -> dict[int, float]:
    """How often stitches give the class that the largest anchor gives; what can be told without labels.

    It goes into the stitch table as "agreement". It is no accuracy: nothing can agree with the anchor more than itself.

    Args:
        model: with its largest anchor; it runs in evaluation mode, on its device.
        batches: see `stitchable.batches`; read once.
        stitch_ids: which stitches to measure; all of them if None.

    Returns:
        The part of the images, in 0..1, for each stitch id.

    Raises:
        ValueError: no stitch or an unknown one, no images, or a model without anchors.
    """
    ids = known_ids(model, stitch_ids)
    anchors = [stitch for stitch in model.stitches if stitch.is_anchor]
    if not anchors:
        raise ValueError("agreement is with the largest anchor, and this model has none; load the checkpoint whole")
    largest = max(anchors, key=lambda stitch: (stitch.flops or 0, stitch.id)).id
    rows = []
    with evaluation_mode(model):
        for batch in logging.tqdm(batches, total=_num_batches(batches), desc="comparing", leave=False):
            pixel_values, _ = unpack_batch(batch, labels="optional")
            found = {
                i: logits.argmax(-1).cpu() for i, logits in run_stitches(model, pixel_values, list({*ids, largest}))
            }
            rows.append(torch.stack([found[i] == found[largest] for i in ids]))
    if not rows:
        raise ValueError("there are no images to compare stitches on: the batches are empty")
    agreement = {i: float(part) for i, part in zip(ids, torch.cat(rows, 1).double().mean(1), strict=True)}
    for i, part in agreement.items():
        model.record(i, metrics={**find_stitch(model.stitches, i).metrics, "agreement": part})
    return agreement


def known_ids(model: StitchableForImageClassification, stitch_ids: Sequence[int] | None) -> list[int]:
    """The ids of the stitches to run, each once; all if None.

    Raises:
        ValueError: no stitch, or one that the model does not have.
    """
    ids = list(dict.fromkeys([stitch.id for stitch in model.stitches] if stitch_ids is None else stitch_ids))
    for stitch_id in ids:
        model.steps(stitch_id)  # raises for an unknown one
    if not ids:
        raise ValueError("stitch_ids names no stitch; None measures all")
    return ids


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode, and each of its modules back afterwards (a frozen one may have been there)."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        model.eval()  # makes timm's LeViT forget what it kept while it was measured
        for module, training in modes.items():
            module.training = training


def run_stitches(
    model: StitchableForImageClassification, pixel_values: torch.Tensor, stitch_ids: Sequence[int]
) -> Iterator[tuple[int, torch.Tensor]]:
    """Logits (N, num_labels) of each stitch, in an order that lets common beginnings run once.

    At most one tensor of features per step of the deepest stitch is held at a time.
    """
    for stitch_id, anchor, features in run_to_heads(model, pixel_values, stitch_ids):
        yield stitch_id, model.run_head(anchor, features)


def run_to_heads(
    model: StitchableForImageClassification, pixel_values: torch.Tensor, stitch_ids: Sequence[int]
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """As `run_stitches`, but of each stitch the anchor whose head follows, and the features that this takes."""
    plans = {stitch_id: model.steps(stitch_id) for stitch_id in stitch_ids}
    yield from _descend(model, model.start(pixel_values), 0, plans)


def _descend(
    model: StitchableForImageClassification, flow: Flow, depth: int, plans: Mapping[int, tuple[Step, ...]]
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Run the stitches whose first `depth` steps led here: a walk over the tree of common beginnings."""
    branches: dict[Step, dict[int, tuple[Step, ...]]] = {}
    for stitch_id, steps in plans.items():
        if depth == len(steps):
            yield stitch_id, steps[-1].anchor, flow.features
        else:
            branches.setdefault(steps[depth], {})[stitch_id] = steps
    for step, members in branches.items():
        yield from _descend(model, model.run_step(step, flow), depth + 1, members)


def _counted(rows: Sequence[torch.Tensor], batches: Iterable[Any] | None) -> torch.Tensor:
    """The samples (N, S, 2) that count, of all batches."""
    samples = torch.cat(list(rows)) if rows else torch.empty(0, 1, 2)
    dataset = batches.dataset if isinstance(batches, DataLoader) else None
    if isinstance(dataset, Sized):
        # Accelerate forgets how many samples fill up the last batch once a loader has skipped its first ones.
        samples = samples[: len(dataset)]
    counted = samples[~samples[:, 0, 1].isneginf()]
    if len(counted) == 0:
        raise ValueError("there is no data to evaluate on: the batches are empty, or every label is -100")
    if len(counted) < len(samples):
        logger.warning(f"{len(samples) - len(counted)} of {len(samples)} samples have the label -100 and do not count")
    return counted


def _num_batches(batches: Any) -> int | None:
    try:
        return len(batches)
    except TypeError:  # a generator, or a loader of a stream
        return None
