"""Measure every stitch in one pass over the data, sharing the work of stitches that begin alike."""

import hashlib
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader
from transformers.utils import logging

from stitchable.batches import unpack_batch
from stitchable.model.chain import Flow
from stitchable.model.modeling_stitchable import Step, StitchableForImageClassification
from stitchable.model.routes import find_stitch

logger = logging.get_logger(__name__)

_SECONDS_BETWEEN_SAVES = 30.0


@torch.no_grad()
def evaluate(
    model: StitchableForImageClassification,
    batches: Iterable[Any],
    stitch_ids: Sequence[int] | None = None,
    *,
    accelerator: Accelerator | None = None,
    checkpoint: str | Path | None = None,
) -> dict[int, dict[str, float]]:
    """Measure stitches, each on every image, and write the figures into the model's stitch table.

    Args:
        model: the model; it runs in evaluation mode, on its device.
        batches: of pixel values (N, C, H, W) and class numbers (N,): mappings with "pixel_values" and "labels" or
            "label", or pairs; read once. A sample with the label -100 counts in no figure.
        stitch_ids: which stitches to measure; all of them if None.
        accelerator: whose processes share the work; `batches` is then a `DataLoader` that it prepared. Samples that
            fill up the last batch are counted once. Every process gets the figures of all.
        checkpoint: a file for what is measured so far, so that a killed evaluation goes on where it was. It is written
            every half minute and removed at the end.

    Returns:
        For each stitch id {"accuracy": top-1 in 0..1, "top5_accuracy": 0..1, "loss": mean cross entropy}, as it is in
        the stitch table: a loss that is not finite is left out.

    Raises:
        ValueError: no stitch or an unknown one, no data, batches without images or class numbers, labels that are none
            of the classes, or a checkpoint of another evaluation: of other stitches, weights, precision, batch size or
            number of processes.
    """
    from stitchable.metrics import compute_figures  # here, because `evaluate` and `datasets` take a second to import

    wanted = [stitch.id for stitch in model.stitches] if stitch_ids is None else stitch_ids
    ids = list(dict.fromkeys(wanted))
    for stitch_id in ids:
        model.steps(stitch_id)  # raises for an unknown one before anything is run
    if not ids:
        raise ValueError("stitch_ids names no stitch; None measures all")
    partial = _Partial(Path(checkpoint), model, ids, batches, accelerator) if checkpoint else None
    rows = partial.load() if partial else []
    is_main = accelerator is None or accelerator.is_main_process
    with evaluation_mode(model):
        remaining = _skip(batches, rows)
        total = _num_batches(batches)
        total = total and total - len(rows)
        for batch in logging.tqdm(remaining, total=total, desc="evaluating", leave=False, disable=not is_main):
            rows.append(_measure(model, batch, ids, accelerator))
            if partial and is_main:
                partial.save(rows)
    measured = compute_figures(_counted(rows, batches), ids)
    for stitch_id, metrics in measured.items():
        known = find_stitch(model.stitches, stitch_id).metrics
        recorded = model.record(stitch_id, metrics={**known, **metrics}).metrics
        measured[stitch_id] = {name: recorded[name] for name in metrics if name in recorded}
    if partial and is_main:
        partial.path.unlink(missing_ok=True)
    return measured


def _measure(
    model: StitchableForImageClassification,
    batch: Any,
    ids: Sequence[int],
    accelerator: Accelerator | None,
) -> torch.Tensor:
    """Rank and loss (N, S, 2) of each sample for each stitch, of all processes.

    A sample that does not count has the loss -inf, which no other has, and its label in the place of the rank.
    """
    from stitchable.metrics import IGNORED, rank_and_loss

    num_labels: Any = model.config.num_labels  # transformers types it as optional
    pixel_values, numbers = unpack_batch(batch, labels="required")
    assert numbers is not None
    labels = numbers.to(model.device)
    figures: dict[int, torch.Tensor] = {}
    with accelerator.autocast() if accelerator else nullcontext():
        for stitch_id, logits in run_stitches(model, pixel_values, ids):
            # The anchors may lie on several devices.
            figures[stitch_id] = rank_and_loss(logits, labels.to(logits.device)).to(labels.device)
    rows = torch.stack([figures[stitch_id] for stitch_id in ids], dim=1)
    outside = (labels < 0) | (labels >= num_labels)
    rows[outside] = torch.stack([labels, torch.full_like(labels, -torch.inf, dtype=rows.dtype)], dim=1)[outside, None]
    # One collective per batch, whatever the number of stitches.
    rows = (accelerator.gather_for_metrics(rows) if accelerator else rows).cpu()
    # Only now, so that every process raises and none waits for another.
    wrong = rows[rows[:, 0, 1].isneginf() & (rows[:, 0, 0] != IGNORED), 0, 0]
    if len(wrong):
        raise ValueError(f"label {int(wrong[0])} is none of the model's classes 0..{num_labels - 1}")
    return rows


def _counted(rows: Sequence[torch.Tensor], batches: Iterable[Any]) -> torch.Tensor:
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


class _Partial:
    """What an evaluation has measured so far, on disk: the rows of each batch, and what they belong to."""

    def __init__(
        self,
        path: Path,
        model: StitchableForImageClassification,
        ids: Sequence[int],
        batches: Iterable[Any],
        accelerator: Accelerator | None,
    ) -> None:
        self.path = path
        self.accelerator = accelerator
        self.is_main = accelerator is None or accelerator.is_main_process
        size = getattr(batches, "total_batch_size", getattr(batches, "batch_size", None))
        self.fingerprint = {
            "stitches": str([(stitch_id, model.steps(stitch_id)) for stitch_id in ids]),
            "batch size": str(size),
            "number of processes": str(accelerator.num_processes if accelerator else 1),
            "precision": str(accelerator.mixed_precision if accelerator else "no"),
            "weights": weights_digest(model) if self.is_main else "",
        }
        self._saved_at = time.monotonic()

    def load(self) -> list[torch.Tensor]:
        """The rows of each batch that is done, as the main process finds them: the others may not see its disk."""
        found: list[Any] = [self._read() if self.is_main else None]
        if self.accelerator:
            broadcast_object_list(found)
        if isinstance(found[0], str):
            raise ValueError(f"{self.path} is {found[0]}; remove it, or name another checkpoint")
        return found[0]

    def _read(self) -> list[torch.Tensor] | str:
        """The rows, or what is wrong with them."""
        if not self.path.exists():
            return []
        try:
            with safe_open(self.path, framework="pt") as file:
                theirs = file.metadata() or {}
                rows = [file.get_tensor(name) for name in sorted(file.keys())]
        except (SafetensorError, OSError) as error:
            return f"no checkpoint of an evaluation ({error})"
        differing = [name for name, value in self.fingerprint.items() if theirs.get(name) != value]
        return f"a checkpoint of another evaluation, with other {', '.join(differing)}" if differing else rows

    def save(self, rows: Sequence[torch.Tensor]) -> None:
        """Write the rows, now and then, complete or not at all."""
        if time.monotonic() - self._saved_at < _SECONDS_BETWEEN_SAVES:
            return
        unfinished = self.path.with_name(f"{self.path.name}.partial")
        save_file({f"{number:08d}": row.contiguous() for number, row in enumerate(rows)}, unfinished, self.fingerprint)
        os.replace(unfinished, self.path)
        self._saved_at = time.monotonic()


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of all weights and buffers."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _num_batches(batches: Any) -> int | None:
    try:
        return len(batches)
    except TypeError:  # a generator, or a loader of a stream
        return None


def _skip(batches: Iterable[Any], rows: Sequence[torch.Tensor]) -> Iterable[Any]:
    """The batches after those whose rows are known."""
    if not rows:
        return batches
    return skip_first_batches(batches, len(rows)) if isinstance(batches, DataLoader) else _skip_reading(batches, rows)


def _skip_reading(batches: Iterable[Any], rows: Sequence[torch.Tensor]) -> Iterator[Any]:
    # The checkpoint could not know the batch size of what is no DataLoader.
    iterator = iter(batches)
    for done in rows:
        batch = next(iterator, None)
        num_samples = 0 if batch is None else len(unpack_batch(batch, labels="optional")[0])
        if num_samples != len(done):
            raise ValueError(
                f"the checkpoint is of another evaluation, with other batch size: a batch has {num_samples} "
                f"samples, there it had {len(done)}; remove it, or name another checkpoint"
            )
    yield from iterator


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
    plans = {stitch_id: model.steps(stitch_id) for stitch_id in stitch_ids}
    yield from _descend(model, model.start(pixel_values), 0, plans)


def _descend(
    model: StitchableForImageClassification, flow: Flow, depth: int, plans: Mapping[int, tuple[Step, ...]]
) -> Iterator[tuple[int, torch.Tensor]]:
    """Run the stitches whose first `depth` steps led here: a walk over the tree of common beginnings."""
    branches: dict[Step, dict[int, tuple[Step, ...]]] = {}
    for stitch_id, steps in plans.items():
        if depth == len(steps):
            yield stitch_id, model.run_head(steps[-1].anchor, flow.features)
        else:
            branches.setdefault(steps[depth], {})[stitch_id] = steps
    for step, members in branches.items():
        yield from _descend(model, model.run_step(step, flow), depth + 1, members)
