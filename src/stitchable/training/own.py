"""Teaching one stitch at a time what is its own: the anchors stay as they are, to the bit, and so do other stitches.

A stitch learns from its back anchor, so it needs no labels: the anchor's logits, and its features at the last layer
("Revisiting Model Stitching", https://arxiv.org/abs/2603.12433). Since no two stitches share what is taught, they can
be taught in any number and order, on as many machines as there are, and later.
"""

import json
import math
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
from stitchable.model.chain import Flow
from stitchable.model.modeling_stitchable import Step, StitchableForImageClassification
from stitchable.model.routes import check_integer, find_stitch
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
        batch_statistics: whether batch norms normalise by the batch meanwhile, and take up its statistics; else by the
            statistics of the anchor. Batches of few images, or of another size, say little of what the norms will see.
    """

    steps: int = 600
    rank: int = 16
    learning_rate: float = 3e-3
    temperature: float = 2.0
    features: float = 1.0
    labels: float = 0.0
    batch_statistics: bool = True

    def __post_init__(self) -> None:
        """Refuse what teaches nothing."""
        above = min(self.steps, self.rank) >= 1 and min(self.learning_rate, self.temperature) > 0
        weights = self.learning_rate, self.temperature, self.features, self.labels
        if not above or min(weights) < 0 or not all(map(math.isfinite, weights)):
            problem = "steps and rank must be at least 1, learning_rate and temperature above 0"
            raise ValueError(f"{problem}, the weights of features and labels not below 0, all finite, got {self}")


def teach_stitches(
    model: StitchableForImageClassification,
    batches: Batches,
    stitch_ids: Sequence[int] | None = None,
    teaching: Teaching | None = None,
    *,
    folder: str | Path | None = None,
    data: str = "",
    after: Callable[[int], None] | None = None,
    together: int = 1,
) -> None:
    """Teach stitches one after the other, going on behind those that an interrupted run has finished.

    Args:
        model: with its anchors whole; in evaluation mode meanwhile, on its device.
        batches: see `Batches`; of the normalised images that the model takes, augmented.
        stitch_ids: which stitches; all but the anchors if None.
        teaching: how.
        folder: where each finished stitch is kept, so that a run can be interrupted between stitches; nowhere if None.
        data: what identifies the images and the size of batches; stitches that others taught are not taken from folder.
        after: called with the id of each stitch once it is taught, or was by an earlier run.
        together: so many stitches learn from the same batches, those of the first of them. They share what runs
            without gradients, the teacher and the front, which is about half of the work; where a run is interrupted,
            all of them begin anew.

    Raises:
        ValueError: an anchor, which would teach itself; a model without the back anchor; a stitch without norms behind
            its joint; a loss that is not finite; `together` below 1; or a folder of another run. Stitches that are
            finished stay taught.
    """
    if check_integer(together, "together") < 1:
        raise ValueError(f"together must be at least 1, got {together}")
    teaching = teaching or Teaching()
    ids = ids_to_teach(model, stitch_ids)
    for stitch_id in ids:
        teacher_of(model, find_stitch(model.stitches, stitch_id))
    kept = None if folder is None else _Kept(Path(folder), model, teaching, data)
    group: list[int] = []
    for stitch_id in logging.tqdm(ids, desc="teaching", leave=False):
        if kept is not None and kept.load(stitch_id):
            if after is not None:
                after(stitch_id)
        else:
            group.append(stitch_id)
        if group and (len(group) == together or stitch_id == ids[-1]):
            teach_together(model, group, batches(group[0]), teaching)
            for taught in group:
                if kept is not None:
                    kept.save(taught)
                if after is not None:
                    after(taught)
            group = []


def teach_stitch(
    model: StitchableForImageClassification, stitch_id: int, batches: Iterator[Any], teaching: Teaching
) -> float:
    """Teach one stitch; the mean loss of the last tenth of its steps.

    Where it is interrupted, the stitch is left as it was. Arguments and errors are those of `teach_stitches`.
    """
    return teach_together(model, [stitch_id], batches, teaching)[stitch_id]


def teach_together(
    model: StitchableForImageClassification, stitch_ids: Sequence[int], batches: Iterator[Any], teaching: Teaching
) -> dict[int, float]:
    """Teach stitches on the same batches; for each, the mean loss of the last tenth of its steps.

    Each learns as it would alone on these batches. Where it is interrupted, all are left as they were. Arguments and
    errors are those of `teach_stitches`.
    """
    give_back = [remember_own(model, stitch_id) for stitch_id in stitch_ids]
    try:
        for stitch_id in stitch_ids:
            own = find_stitch(model.stitches, stitch_id).own
            with seeded("own", stitch_id):  # so that the order of stitches does not matter
                model.give_own(stitch_id, own.rank if own else teaching.rank)
        last = _teach(model, [_Pupil(model, stitch_id, teaching) for stitch_id in stitch_ids], batches, teaching)
        for stitch_id, loss in last.items():
            if not loss < float("inf"):
                raise ValueError(f"the loss of stitch {stitch_id} is {loss}; try a smaller learning_rate")
    except BaseException:
        for undo in give_back:
            undo()
        raise
    return last


class _Pupil:
    """A stitch that is taught: what it runs, who teaches it, and what is trained."""

    def __init__(self, model: StitchableForImageClassification, stitch_id: int, teaching: Teaching) -> None:
        steps = model.steps(stitch_id)
        joint = next(place for place, step in enumerate(steps) if step.kind == "layer")
        self.stitch_id, self.front, self.back = stitch_id, steps[:joint], steps[joint:]
        self.teacher = teacher_of(model, find_stitch(model.stitches, stitch_id))
        self.own = model.own[str(stitch_id)]
        self.parameters = list(self.own.parameters())
        self.optimizer = torch.optim.Adam(self.parameters)
        self.scheduler = OneCycleLR(self.optimizer, teaching.learning_rate, total_steps=teaching.steps + 1)
        self.losses: list[torch.Tensor] = []

    def learn(self, loss: torch.Tensor) -> None:
        """One update."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        self.losses.append(loss.detach())


def _teach(
    model: StitchableForImageClassification, pupils: Sequence[_Pupil], batches: Iterator[Any], teaching: Teaching
) -> dict[int, float]:
    pupils = sorted(pupils, key=lambda pupil: len(pupil.front))  # so that each front goes on behind the one before
    with evaluation_mode(model), _trainable(model, [each for pupil in pupils for each in pupil.parameters]):
        for pupil in pupils:
            pupil.own.train(teaching.batch_statistics)
        for step in range(teaching.steps):
            batch = next(batches, None)
            if batch is None:
                raise ValueError(f"the batches end after {step} of {teaching.steps} steps; they have to go on for ever")
            pixel_values, labels = unpack_batch(batch, labels="optional")
            shared = _Shared(model, pixel_values.to(model.device))
            for pupil in pupils:
                pupil.learn(_loss(model, pupil, shared, labels, teaching))
    tenth = max(1, teaching.steps // 10)
    return {pupil.stitch_id: float(torch.stack(pupil.losses[-tenth:]).mean()) for pupil in pupils}


class _Shared:
    """What runs without gradients on a batch, for all pupils: none goes a part of the way that another has gone."""

    def __init__(self, model: StitchableForImageClassification, pixel_values: torch.Tensor) -> None:
        self.model = model
        self.flows: dict[tuple[Step, ...], Flow] = {(): model.start(pixel_values)}

    @torch.no_grad()
    def behind(self, steps: tuple[Step, ...]) -> Flow:
        """What flows behind the last of these steps."""
        known = next(place for place in range(len(steps), -1, -1) if steps[:place] in self.flows)
        self.flows[steps] = run_steps(self.model, steps[known:], self.flows[steps[:known]])
        return self.flows[steps]


def _loss(
    model: StitchableForImageClassification,
    pupil: _Pupil,
    shared: _Shared,
    labels: torch.Tensor | None,
    teaching: Teaching,
) -> torch.Tensor:
    wanted = shared.behind(pupil.teacher).features
    with torch.no_grad():
        target = model.run_head(pupil.teacher[-1].anchor, wanted)
    features = run_steps(model, pupil.back, shared.behind(pupil.front)).features
    logits = model.run_head(pupil.back[-1].anchor, features)
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
    if check_integer(batch_size, "batch_size") < 1 or len(pixel_values) < batch_size:
        raise ValueError(
            f"{len(pixel_values)} images are fewer than a batch of {batch_size}; give more, or a batch_size from 1 on"
        )
    if labels is not None and len(labels) != len(pixel_values):
        raise ValueError(f"there are {len(pixel_values)} images and {len(labels)} labels")
    if labels is not None and not 0 <= int(labels.min()) <= int(labels.max()) < config.num_labels:
        found = f"{int(labels.min())} to {int(labels.max())}"
        raise ValueError(f"labels are class numbers from 0 to {config.num_labels - 1}, these are {found}")
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

    def __init__(self, folder: Path, model: StitchableForImageClassification, teaching: Teaching, data: str) -> None:
        self.folder, self.model = folder, model
        # Without what is a stitch's own, so that the others do not matter.
        weights = weights_digest(model.anchors) + weights_digest(model.stitching_layers)
        self.run = {"teaching": json.dumps(asdict(teaching)), "weights": weights, "data": data}
        self.rank = teaching.rank
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
                f"{path} is of another run, of other weights, settings or images; remove {self.folder} to begin anew"
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
