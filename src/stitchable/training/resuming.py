"""An evaluation that can be killed: what it has measured so far is on disk, and it goes on where it was."""

import hashlib
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader

from stitchable.batches import unpack_batch
from stitchable.evaluation import known_ids, measure_batch, record_figures, run_batches
from stitchable.model.modeling_stitchable import StitchableForImageClassification

_SECONDS_BETWEEN_SAVES = 30.0


def evaluate_resumably(
    model: StitchableForImageClassification,
    batches: Iterable[Any],
    checkpoint: str | Path,
    stitch_ids: Sequence[int] | None = None,
    *,
    accelerator: Accelerator | None = None,
) -> dict[int, dict[str, float]]:
    """`stitchable.evaluate`, which goes on where a killed one was.

    Args:
        model: as for `evaluate`, like the others.
        batches: see there.
        checkpoint: a file for what is measured so far; written every half minute, and removed at the end.
        stitch_ids: see there.
        accelerator: see there.

    Raises:
        ValueError: as `evaluate`, or a checkpoint of another evaluation: of other stitches, weights, precision, batch
            size or number of processes.
    """
    partial = _Partial(Path(checkpoint), model, known_ids(model, stitch_ids), batches, accelerator)
    rows = partial.load()
    for labels, logits in run_batches(model, _skip(batches, rows), stitch_ids, accelerator=accelerator):
        rows.append(measure_batch(labels, logits, accelerator))
        if partial.is_main:
            partial.save(rows)
    measured = record_figures(model, rows, stitch_ids, batches)
    if partial.is_main:
        partial.path.unlink(missing_ok=True)
    return measured


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
