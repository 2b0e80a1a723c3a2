"""Teaching one stitch at a time what is its own: the anchors stay as they are, to the bit, and so do other stitches.

A stitch learns from its back anchor, so it needs no labels: the anchor's logits, and its features at the last layer
("Revisiting Model Stitching", https://arxiv.org/abs/2603.12433). Since no two stitches share what is taught, they can
be taught in any number and order, on as many machines as there are, and later.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.optim.lr_scheduler import OneCycleLR
from transformers.utils import logging

from stitchable.batches import unpack_batch
from stitchable.evaluation import evaluation_mode
from stitchable.model.modeling_stitchable import Step, StitchableForImageClassification
from stitchable.model.routes import find_stitch
from stitchable.own import ids_to_teach, remember_own, run_steps, teacher_of
from stitchable.training.augmentation import derive_seed, random_crop, seeded
from stitchable.training.losses import soften
from stitchable.training.resuming import weights_digest

logger = logging.get_logger(__name__)

Batches = Callable[[int], Iterator[Any]]
"""Given the id of a stitch, batches for it without end, as `stitchable.batches` describes them."""


@dataclass(frozen=True)
class Teaching:
    """How a stitch is taught.

    Attributes:
        steps: updates.
        rank: of the updates of its stitching layers; a stitch that has some already keeps their rank.
        learning_rate: of Adam, at the peak of its one cycle.
        temperature: of the logits that are compared.
        features: weight of the squared error of the features at the last layer, in parts of their variance.
        labels: weight of the cross entropy with labels, where the batches have them.
    """

    steps: int = 600
    rank: int = 16
    learning_rate: float = 3e-3
    temperature: float = 2.0
    features: float = 1.0
    labels: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what teaches nothing."""
        if min(self.steps, self.rank) < 1 or min(self.learning_rate, self.temperature) <= 0:
            raise ValueError(f"steps and rank must be at least 1, learning_rate and temperature above 0, got {self}")


def teach_stitches(
    model: StitchableForImageClassification,
    batches: Batches,
    stitch_ids: Sequence[int] | None = None,
    teaching: Teaching | None = None,
    *,
    folder: str | Path | None = None,
    after: Callable[[int], None] | None = None,
) -> None:
    """Teach stitches one after the other, going on behind those that an interrupted run has finished.

    Args:
        model: with its anchors whole; in evaluation mode meanwhile, on its device.
        batches: see `Batches`; of the normalised images that the model takes, augmented.
        stitch_ids: which stitches; all but the anchors if None.
        teaching: how.
        folder: where each finished stitch is kept, so that a run can be interrupted between stitches; nowhere if None.
        after: called with the id of each stitch once it is taught, or was by an earlier run.

    Raises:
        ValueError: an anchor, which would teach itself; a model without the back anchor; a stitch without norms behind
            its joint; a loss that is not finite; or a folder of another run. Stitches that are finished stay taught.
    """
    teaching = teaching or Teaching()
    ids = ids_to_teach(model, stitch_ids)
    for stitch_id in ids:
        teacher_of(model, find_stitch(model.stitches, stitch_id))
    kept = None if folder is None else _Kept(Path(folder), model, teaching)
    for stitch_id in logging.tqdm(ids, desc="teaching", leave=False):
        if kept is None or not kept.load(stitch_id):
            teach_stitch(model, stitch_id, batches(stitch_id), teaching)
            if kept is not None:
                kept.save(stitch_id)
        if after is not None:
            after(stitch_id)


def teach_stitch(
    model: StitchableForImageClassification, stitch_id: int, batches: Iterator[Any], teaching: Teaching
) -> float:
    """Teach one stitch; the mean loss of the last tenth of its steps.

    Where it is interrupted, the stitch is left as it was. Arguments and errors are those of `teach_stitches`.
    """
    stitch = find_stitch(model.stitches, stitch_id)
    teacher = teacher_of(model, stitch)
    give_back = remember_own(model, stitch_id)
    with seeded("own", stitch_id):  # so that the order of stitches does not matter
        model.give_own(stitch_id, stitch.own.rank if stitch.own else teaching.rank)
    try:
        last = _teach(model, stitch_id, teacher, batches, teaching)
        if not last < float("inf"):
            raise ValueError(f"the loss of stitch {stitch_id} is {last}; try a smaller learning_rate")
    except BaseException:
        give_back()
        raise
    return last


def _teach(
    model: StitchableForImageClassification,
    stitch_id: int,
    teacher: Sequence[Step],
    batches: Iterator[Any],
    teaching: Teaching,
) -> float:
    own, steps = model.own[str(stitch_id)], model.steps(stitch_id)
    parameters = list(own.parameters())
    optimizer = torch.optim.Adam(parameters)
    scheduler = OneCycleLR(optimizer, teaching.learning_rate, total_steps=teaching.steps + 1)
    losses: list[torch.Tensor] = []
    with evaluation_mode(model), _trainable(model, parameters):
        own.train()
        for _ in range(teaching.steps):
            pixel_values, labels = unpack_batch(next(batches), labels="optional")
            loss = _loss(model, steps, teacher, pixel_values.to(model.device), labels, teaching)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            scheduler.step()
            losses.append(loss.detach())
    return float(torch.stack(losses[-max(1, teaching.steps // 10) :]).mean())


def _loss(
    model: StitchableForImageClassification,
    steps: Sequence[Step],
    teacher: Sequence[Step],
    pixel_values: torch.Tensor,
    labels: torch.Tensor | None,
    teaching: Teaching,
) -> torch.Tensor:
    joint = next(place for place, step in enumerate(steps) if step.kind == "layer")
    with torch.no_grad():
        wanted = run_steps(model, teacher, model.start(pixel_values)).features
        target = model.run_head(teacher[-1].anchor, wanted)
        flow = run_steps(model, steps[:joint], model.start(pixel_values))
    features = run_steps(model, steps[joint:], flow).features
    logits = model.run_head(steps[-1].anchor, features)
    loss = soften(logits, target, teaching.temperature)
    if teaching.features:
        loss = loss + teaching.features * F.mse_loss(features.float(), wanted.float()) / wanted.float().var()
    if teaching.labels and labels is not None:
        loss = loss + teaching.labels * F.cross_entropy(logits.float(), labels.to(logits.device))
    return loss


def augmented(
    pixel_values: torch.Tensor,
    labels: torch.Tensor | None,
    config: Any,
    batch_size: int = 128,
    seed: int = 0,
) -> Batches:
    """Batches of images in memory, without end, flipped and shifted by up to an eighth, drawn anew for each stitch.

    Args:
        pixel_values: (N, C, H, W), normalised.
        labels: (N,) class numbers, or None.
        config: of the model, for what black is after normalisation.
        batch_size: images per batch.
        seed: of what is drawn.

    Raises:
        ValueError: images of another size than the model's, or fewer than a batch.
    """
    size = (config.num_channels, *config.image_size)
    if tuple(pixel_values.shape[1:]) != size:
        raise ValueError(
            f"the model takes images of {'x'.join(map(str, size))}, these are "
            f"{'x'.join(map(str, pixel_values.shape[1:]))}; its image processor makes them so"
        )
    if len(pixel_values) < batch_size:
        raise ValueError(
            f"{len(pixel_values)} images are fewer than a batch of {batch_size}; give more, or a batch_size"
        )
    black, padding = -torch.tensor(config.image_mean) / torch.tensor(config.image_std), min(config.image_size) // 8

    def batches(stitch_id: int) -> Iterator[dict[str, torch.Tensor]]:
        generator = torch.Generator().manual_seed(derive_seed(seed, stitch_id) >> 1)
        while True:
            order = torch.randperm(len(pixel_values), generator=generator)
            for rows in order[: len(order) // batch_size * batch_size].split(batch_size):
                x = random_crop(pixel_values[rows], padding, black, generator)
                flipped = torch.rand(len(x), generator=generator) < 0.5
                batch = {"pixel_values": torch.where(flipped.view(-1, 1, 1, 1), x.flip(-1), x)}
                yield batch if labels is None else {**batch, "labels": labels[rows]}

    return batches


@contextmanager
def _trainable(model: StitchableForImageClassification, parameters: Sequence[torch.nn.Parameter]) -> Iterator[None]:
    """Let gradients reach these parameters alone, of which none is left behind."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, required in before.items():
            parameter.requires_grad_(required)
        for parameter in parameters:
            parameter.grad = None


class _Kept:
    """The stitches that are finished, a file each."""

    def __init__(self, folder: Path, model: StitchableForImageClassification, teaching: Teaching) -> None:
        self.folder, self.model = folder, model
        # Without what is a stitch's own, so that the others do not matter.
        weights = weights_digest(model.anchors) + weights_digest(model.stitching_layers)
        self.run, self.rank = {"teaching": json.dumps(asdict(teaching)), "weights": weights}, teaching.rank
        folder.mkdir(parents=True, exist_ok=True)

    def load(self, stitch_id: int) -> bool:
        """Give a stitch what an earlier run has taught it, if that run finished it."""
        path = self._path(stitch_id)
        if not path.exists():
            return False
        try:
            with safe_open(path, framework="pt") as file:
                run = {name: (file.metadata() or {}).get(name) for name in self.run}
                state: Mapping[str, torch.Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is no finished stitch ({error}); remove it") from error
        if run != self.run:
            raise ValueError(
                f"{path} is of another run, of other weights or settings; remove {self.folder} to begin anew"
            )
        known = find_stitch(self.model.stitches, stitch_id).own
        self.model.give_own(stitch_id, known.rank if known else self.rank)
        self.model.own[str(stitch_id)].load_state_dict(state)
        return True

    def save(self, stitch_id: int) -> None:
        """Complete or not at all."""
        path = self._path(stitch_id)
        state = {name: tensor.contiguous() for name, tensor in self.model.own[str(stitch_id)].state_dict().items()}
        save_file(state, path.with_suffix(".partial"), self.run)
        os.replace(path.with_suffix(".partial"), path)

    def _path(self, stitch_id: int) -> Path:
        return self.folder / f"stitch-{stitch_id}.safetensors"
