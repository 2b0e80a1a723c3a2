"""A front made better with images alone: each stitch is taught by its back anchor, and keeps that where it helps."""

import hashlib
import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from stitchable.batches import unpack_batch
from stitchable.evaluation import measure_agreement, run_batches
from stitchable.fingerprints import fingerprints, remember
from stitchable.model.modeling_stitchable import StitchableForImageClassification
from stitchable.model.routes import find_stitch
from stitchable.own import forget, ids_to_teach, recalibrate_batch_norms, remember_own, teacher_of
from stitchable.training.own import Teaching, augmented, teach_stitches

HELD_OUT = 1000
"""Images at most, and a fifth of them, that no stitch is taught on: they say whether it got better."""

STATISTICS_ON = 2500
"""Images at most that statistics of batch norms are of, and judged on."""


def tune(
    model: StitchableForImageClassification,
    pixel_values: torch.Tensor,
    labels: torch.Tensor | None = None,
    stitch_ids: Sequence[int] | None = None,
    teaching: Teaching | None = None,
    *,
    batch_size: int = 128,
    folder: str | Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[int, tuple[float, float]]:
    """Teach stitches by their back anchors, and keep of each what helps on images held out.

    The first fifth of the images, at most 1,000, is held out. A stitch that got better loses the metrics that were
    measured before, and the cascades that run it are dropped; all stitches get their "agreement" with the largest
    anchor on these images. The model remembers what it was taught on. The anchors stay as they are, to the bit.

    Args:
        model: with its anchors whole; it runs on its device.
        pixel_values: (N, C, H, W), normalised, shuffled.
        labels: (N,) class numbers, to teach and judge by these too.
        stitch_ids: which stitches; all but the anchors if None.
        teaching: how.
        batch_size: images of an update.
        folder: where finished stitches are kept meanwhile, so that an interrupted run goes on behind them.
        say: told of each stitch, and of the time left.

    Returns:
        For each of the stitches, before and after, the part of the images held out on which it is right, or without
        labels agrees with the largest anchor.

    Raises:
        ValueError: images of another size than the model's, or too few for a batch beside those held out; or as
            `teach_stitches`.
    """
    ids, number = ids_to_teach(model, stitch_ids), min(HELD_OUT, len(pixel_values) // 5)
    if not number:
        raise ValueError(f"a fifth of the images is held out, so at least 5 are needed, got {len(pixel_values)}")
    for stitch_id in ids:
        teacher_of(model, find_stitch(model.stitches, stitch_id))  # refuses what cannot be taught
    taught_on, known = pixel_values[number:], None if labels is None else labels[number:]
    batches = augmented(taught_on, known, model.config, batch_size)
    held_out = in_batches(pixel_values[:number], None if labels is None else labels[:number])
    before, give_back = _measure(model, held_out, ids), {i: remember_own(model, i) for i in ids}
    started, numbers = time.monotonic(), itertools.count(1)

    def after(stitch_id: int) -> None:
        done = next(numbers)
        minutes = (time.monotonic() - started) / done * (len(ids) - done) / 60
        say(f"stitch {stitch_id} is taught, {done} of {len(ids)}; about {minutes:.0f} minutes left")

    data = "" if folder is None else describe(taught_on, known, batch_size)
    teach_stitches(model, batches, ids, teaching, folder=folder, data=data, after=after)
    normed = [i for i in ids if any(isinstance(module, _BatchNorm) for module in model.own[str(i)].modules())]
    if normed and len(taught_on) > batch_size:
        statistics_on = in_batches(taught_on[:STATISTICS_ON], known, batch_size)
        recalibrate_batch_norms(model, statistics_on, normed)
    scores = _measure(model, held_out, ids)
    better = [stitch_id for stitch_id in ids if scores[stitch_id] > before[stitch_id]]
    for stitch_id in set(ids) - set(better):
        give_back[stitch_id]()
    forget(model, better)
    remember(model.config, in_batches(pixel_values, None))
    measure_agreement(model, held_out)
    return {i: (before[i], max(scores[i], before[i])) for i in ids}


def describe(pixel_values: torch.Tensor, labels: torch.Tensor | None, batch_size: int) -> str:
    """What identifies images that teach, and how: as `teach_stitches` takes it."""
    known = hashlib.sha256("".join(fingerprints(pixel_values)).encode())
    known.update(b"" if labels is None else labels.cpu().numpy().tobytes())
    return f"{len(pixel_values)} images, {known.hexdigest()[:16]}, {batch_size} a batch"


def first_images(batches: Iterable[Any], number: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Pixel values of the first so many images of batches, and their labels where all have some.

    Raises:
        ValueError: there are none.
    """
    read: list[tuple[torch.Tensor, torch.Tensor | None]] = []
    for batch in batches:
        read.append(unpack_batch(batch, labels="optional"))
        if sum(len(pixel_values) for pixel_values, _ in read) >= number:
            break
    if not read:
        raise ValueError("there are no images")
    known = [labels for _, labels in read if labels is not None]
    labels = torch.cat(known)[:number] if len(known) == len(read) else None
    return torch.cat([pixel_values for pixel_values, _ in read])[:number], labels


def in_batches(pixel_values: Any, labels: torch.Tensor | None, size: int = 100) -> list[dict[str, torch.Tensor]]:
    """Images in order, as `stitchable.batches` describes batches."""
    starts = range(0, len(pixel_values), size)
    if labels is None:
        return [{"pixel_values": pixel_values[start : start + size]} for start in starts]
    return [{"pixel_values": pixel_values[i : i + size], "labels": labels[i : i + size]} for i in starts]


def _measure(
    model: StitchableForImageClassification, held_out: Sequence[dict[str, torch.Tensor]], ids: Sequence[int]
) -> dict[int, float]:
    """The part of the images on which stitches are right, or without labels agree with the largest anchor."""
    if "labels" not in held_out[0]:
        return measure_agreement(model, held_out, ids)
    right = [
        torch.stack([logits[i].argmax(-1).cpu() == labels.cpu() for i in ids])
        for labels, logits in run_batches(model, held_out, ids)
    ]
    return dict(zip(ids, torch.cat(right, 1).double().mean(1).tolist(), strict=True))
