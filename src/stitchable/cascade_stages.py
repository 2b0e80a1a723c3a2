"""Cascades: stitches of growing cost, of which an image runs the next one while it is undecided.

A cascade is a list of stages. An image goes on while the score of its stage is below the stage's threshold; the score
is the largest probability, or its margin over the second largest, of softmax(logits / temperature). What a cascade
answers is the logits of the last stage that ran ("last", as they are), or the mean over all stages that ran of
logits / temperature ("mean"), whichever the last stage that ran says. It costs

    F(a) + p (F(b) - F(what a and b begin with alike))

FLOPs per image on average, p being the part of the images that go on; a third stage starts from the longest beginning
that it shares with any earlier one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

SCORES = ("max_probability", "margin")
COMBINE = ("last", "mean")

_IMAGES_OF_A_TEMPERATURE = 4000
_TEMPERATURES = (0.1, 10.0)

Floats = npt.NDArray[np.floating[Any]]
Bools = npt.NDArray[np.bool_]


class Logits(Protocol):
    """The logits (N, num_labels) of each stitch, by its place among those searched."""

    def __getitem__(self, stitch: int) -> npt.NDArray[Any]: ...

    def __len__(self) -> int: ...


class Stage(NamedTuple):
    """One stage of a cascade.

    Attributes:
        stitch: which stitch; in a search, its place among those searched.
        temperature: what its logits are divided by, for the score and for a mean.
        score: "max_probability" or "margin"; None for the last stage.
        threshold: an image goes on while its score is below; None for the last stage.
        combine: "last" or "mean".
    """

    stitch: int
    temperature: float = 1.0
    score: str | None = None
    threshold: float | None = None
    combine: str = "last"


@dataclass(frozen=True)
class Costs:
    """FLOPs per image of each stitch, (S,), and of what each two begin with alike, (S, S)."""

    flops: npt.NDArray[Any]
    shared: npt.NDArray[Any]

    def added(self, stitch: int, earlier: Sequence[int]) -> float:
        """What a stitch costs after others have run."""
        return float(self.flops[stitch] - max((self.shared[stitch, other] for other in earlier), default=0))


@dataclass(frozen=True)
class Run:
    """What a cascade does with each image (N,): the class it answers, the place of the stage that does, the FLOPs."""

    predictions: npt.NDArray[np.integer[Any]]
    stages: npt.NDArray[np.integer[Any]]
    flops: Floats


def run_cascade(stages: Sequence[Stage], logits: Logits, costs: Costs) -> Run:
    """Run a cascade over logits that are known, as a model would run it over images.

    Raises:
        ValueError: see `check_stages`; logits that are not finite.
    """
    check_stages(stages, costs.flops)
    num_images = len(logits[stages[0].stitch])
    predictions, stopped = np.zeros(num_images, dtype=np.int64), np.zeros(num_images, dtype=np.int64)
    flops, undecided = np.zeros(num_images), np.arange(num_images)
    total: Any = 0.0
    for place, stage in enumerate(stages):
        logits_NC = finite(logits[stage.stitch][undecided], stage.stitch)
        scaled_NC = logits_NC / stage.temperature
        total = total + scaled_NC
        answer = logits_NC if stage.combine == "last" else total
        predictions[undecided] = answer.argmax(1).numpy()
        stopped[undecided] = place
        flops[undecided] += costs.added(stage.stitch, [earlier.stitch for earlier in stages[:place]])
        if stage.score is not None and stage.threshold is not None:
            goes_on = scores_of(scaled_NC)[SCORES.index(stage.score)].double() < stage.threshold
            undecided, total = undecided[goes_on.numpy()], total[goes_on]
    return Run(predictions, stopped, flops)


def check_reached(stages: Sequence[Stage], run: Run) -> None:
    """Refuse a cascade that is a shorter one on these images.

    Raises:
        ValueError: no image reaches a stage.
    """
    last = int(run.stages.max())
    if last < len(stages) - 1:
        raise ValueError(
            f"no image reaches stage {last + 1} (stitch {stages[last + 1].stitch}): every score is at least the "
            f"threshold {stages[last].threshold}; raise it, or leave the stage out"
        )


def check_stages(stages: Sequence[Stage], flops: npt.ArrayLike) -> None:
    """Refuse what is no cascade of these stitches.

    Args:
        stages: first to last.
        flops: (S,) of the stitches that the stages name.

    Raises:
        ValueError: no stage, an unknown stitch, stages whose cost does not grow, a score, threshold or temperature that
            is none, or one that is missing.
    """
    flops_S = np.asarray(flops, dtype=float)
    if not stages:
        raise ValueError("a cascade needs at least one stage")
    for place, stage in enumerate(stages):
        where = f"stage {place} of a cascade (stitch {stage.stitch})"
        if not 0 <= stage.stitch < len(flops_S):
            raise ValueError(f"{where}: there is no such stitch among {len(flops_S)}")
        if place and flops_S[stage.stitch] <= flops_S[stages[place - 1].stitch]:
            raise ValueError(
                f"{where} has {flops_S[stage.stitch]:g} FLOPs, and the stage before "
                f"{flops_S[stages[place - 1].stitch]:g}: each stage must cost more than the one before; order them"
            )
        if not (math.isfinite(stage.temperature) and stage.temperature > 0):
            raise ValueError(f"{where}: the temperature must be positive and finite, got {stage.temperature}")
        if stage.combine not in COMBINE:
            raise ValueError(f"{where}: combine is one of {', '.join(COMBINE)}, got {stage.combine!r}")
        if place == len(stages) - 1:
            if (stage.score, stage.threshold) != (None, None):
                raise ValueError(f"{where} is the last and decides for every image: it has no score and no threshold")
        elif stage.score not in SCORES:
            raise ValueError(f"{where}: the score is one of {', '.join(SCORES)}, got {stage.score!r}")
        elif stage.threshold is None or not (math.isfinite(stage.threshold) and 0 <= stage.threshold <= 1):
            raise ValueError(f"{where}: the threshold must be a number in 0..1, got {stage.threshold}")


def scores_of(scaled_NC: torch.Tensor) -> torch.Tensor:
    """How sure softmax(logits / temperature) is of each image: both `SCORES` (2, N), in 0..1."""
    largest, place = scaled_NC.max(1, keepdim=True)
    exponentials = (scaled_NC - largest).exp_()
    first = 1 / exponentials.sum(1)
    second = exponentials.scatter_(1, place, 0).amax(1)  # several times faster than topk
    return torch.stack([first, first * (1 - second)])


def fit_temperature(logits_NC: torch.Tensor, labels_N: torch.Tensor) -> float:
    """The temperature in 0.1..10 with the least cross entropy of softmax(logits / temperature).

    Newton's method on 1 / temperature, in which the cross entropy is convex.
    """
    z, labels = logits_NC.float(), labels_N[:, None]
    own = z.gather(1, labels)[:, 0]
    low, high = 1 / _TEMPERATURES[1], 1 / _TEMPERATURES[0]
    beta = 1.0
    for _ in range(30):
        p = (z * beta).softmax(1)
        mean = (p * z).sum(1)
        slope = float((mean - own).mean())
        low, high = (low, beta) if slope > 0 else (beta, high)
        curvature = float(((p * z * z).sum(1) - mean**2).mean())
        nearer = beta - slope / curvature if curvature > 1e-12 else math.inf
        nearer = nearer if low < nearer < high else (low + high) / 2
        if abs(nearer - beta) < 1e-4 * beta:
            break
        beta = nearer
    return round(1 / beta, 4)


def evenly(images: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """At most 4,000 of these images, evenly spread: one number, such as a temperature, needs no more."""
    return images[:: max(1, -(-len(images) // _IMAGES_OF_A_TEMPERATURE))]


def finite(logits: npt.NDArray[Any], stitch: int, start: int = 0) -> torch.Tensor:
    """Logits (n, num_labels) of a stitch, of the images from `start` on, in float32.

    Raises:
        ValueError: one is infinite or no number.
    """
    logits_NC = torch.from_numpy(np.ascontiguousarray(logits)).float()
    wrong = ~logits_NC.sum(1).isfinite()
    if wrong.any():
        raise ValueError(
            f"the logits of stitch {stitch} (counted from 0 among those searched) are not finite, first for image "
            f"{start + int(wrong.nonzero()[0])}"
        )
    return logits_NC
