"""The measure of everything: the best accuracy within each budget, against the untouched anchors.

Every area is a mean over log FLOPs, from the cheapest to the dearest anchor. Two of them say what anchors alone give:

- the **null line**: within each budget the best untouched anchor, a staircase;
- the **straight line** through the untouched anchors, which is what interpolation promises.

The **share** of an area is (area - null line) / (straight line - null line): 0 is no better than the anchors, 1 is the
straight line. All three use the anchors that are on their own front, and the range between these.

A figure that was chosen on the images it is reported on is too good. So it is made **two-fold**: each half of the
images chooses for the other, the figure is over all of them, and a gain has a bootstrap interval, paired image by
image.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from stitchable.model.routes import Stitch

Floats = npt.NDArray[np.floating[Any]]

LEAST_DIFFERENCE = 0.005
"""Straight line minus null line from which a share is stated: the quotient of smaller ones says nothing."""
_NUM_RESAMPLES = 2000


@dataclass(frozen=True)
class Judgement:
    """How good a front is, in parts of one.

    Attributes:
        area: of the front.
        null_line: of the untouched anchors.
        straight_line: through the untouched anchors.
        share: None where straight line minus null line is less than `LEAST_DIFFERENCE`.
        interval: 95 % interval of area minus null line, from a bootstrap that is paired image by image; None where only
            accuracies are known, not which images were right.
        images: how many the two-fold figures are over; None where they are not two-fold.
    """

    area: float
    null_line: float
    straight_line: float
    share: float | None
    interval: tuple[float, float] | None = None
    images: int | None = None

    @property
    def gain(self) -> float:
        """Area minus null line."""
        return self.area - self.null_line

    def to_dict(self) -> dict[str, Any]:
        """JSON types only."""
        return {**asdict(self), "gain": self.gain, "interval": self.interval and list(self.interval)}


@dataclass(frozen=True)
class Half:
    """Networks as one half of the images measures them, whose labels chose nothing here.

    Attributes:
        flops: (M,) mean FLOPs per image of each network, on this half (they need no labels).
        chosen_by: (M,) accuracy of each network on the other half.
        correct: which images of this half the network of an index has right, (n,) booleans.
    """

    flops: Floats
    chosen_by: Floats
    correct: Callable[[int], npt.NDArray[np.bool_]]

    def of(self, networks: Sequence[int]) -> "Half":
        """The half with some of its networks."""
        return Half(
            self.flops[list(networks)],
            self.chosen_by[list(networks)],
            lambda index: self.correct(networks[index]),
        )

    def within(self, flops: float) -> int:
        """The network that the other half chooses within a budget, the cheapest among equals.

        Raises:
            ValueError: none is within the budget.
        """
        affordable = np.flatnonzero(self.flops <= flops)
        if len(affordable) == 0:
            raise ValueError(f"no network is within {flops:g} FLOPs; the cheapest has {self.flops.min():g}")
        return int(max(affordable, key=lambda index: (self.chosen_by[index], -self.flops[index])))

    def area(self, low: float, high: float) -> Floats:
        """What each image (n,) adds to the area of what the other half chooses: the part where it is right."""
        stairs = staircase(self.flops, self.chosen_by, low, high)
        return sum((width * self.correct(index) for index, width in stairs), np.zeros(()))


def staircase(flops: npt.ArrayLike, accuracies: npt.ArrayLike, low: float, high: float) -> list[tuple[int, float]]:
    """The networks that are best within some budget of a range, and the part of its log FLOPs in which each is.

    Args:
        flops: (M,) per image.
        accuracies: (M,).
        low: FLOPs at which the range begins.
        high: FLOPs at which it ends; equal to `low` for the one budget.

    Returns:
        (index, part) with the cheapest first; the parts sum to 1.

    Raises:
        ValueError: figures that are not finite or FLOPs that are not positive, an empty range, or no network within its
            beginning.
    """
    flops_M, accuracies_M = _checked(flops, accuracies)
    if not 0 < low <= high:
        raise ValueError(f"a range of FLOPs begins above 0 and ends no lower, got {low:g} to {high:g}")
    best = [index for index in on_own_front(flops_M, accuracies_M) if flops_M[index] <= high]
    if not best or flops_M[best[0]] > low:
        raise ValueError(
            f"no network is within {low:g} FLOPs, where the range begins: the cheapest has {flops_M.min():g}"
        )
    starts = [*(max(float(flops_M[index]), low) for index in best), high]
    whole = math.log(high / low)
    parts = [math.log(stop / start) / whole if whole else 0.0 for start, stop in pairwise(starts)]
    if not whole:
        parts[-1] = 1.0
    return [(index, part) for index, part in zip(best, parts, strict=True) if part > 0]


def area(flops: npt.ArrayLike, accuracies: npt.ArrayLike, low: float, high: float) -> float:
    """The mean over log FLOPs from `low` to `high` of the best accuracy within each budget (see `staircase`)."""
    values = np.asarray(accuracies, dtype=float)
    return float(sum(part * values[index] for index, part in staircase(flops, accuracies, low, high)))


def on_own_front(flops: npt.ArrayLike, accuracies: npt.ArrayLike) -> list[int]:
    """Indices of the networks that no other beats in both, the cheapest first."""
    flops_M, accuracies_M = _checked(flops, accuracies)
    order = np.lexsort((-accuracies_M, flops_M))
    highest = np.maximum.accumulate(accuracies_M[order])
    return [int(index) for index in order[np.diff(highest, prepend=-np.inf) > 0]]


def judge(
    flops: npt.ArrayLike, accuracies: npt.ArrayLike, anchor_flops: npt.ArrayLike, anchor_accuracies: npt.ArrayLike
) -> Judgement:
    """Judge networks by their accuracies alone; the same images chose them, so the area is a little too good.

    Args:
        flops: (M,) per image, of all networks that can be chosen.
        accuracies: (M,) in 0..1.
        anchor_flops: (A,) of the anchors.
        anchor_accuracies: (A,) of the anchors **untouched**, not of what training made of them.

    Raises:
        ValueError: fewer than two anchors on their own front, no network as cheap as the cheapest anchor, or figures
            that are not finite.
    """
    anchors_flops, anchors = _anchors(anchor_flops, anchor_accuracies)
    reached = area(flops, accuracies, anchors_flops[0], anchors_flops[-1])
    return _judgement(reached, anchors_flops, anchors)


def pareto_front(stitches: Sequence[Stitch], metric: str = "accuracy") -> list[Stitch]:
    """The measured stitches that no other beats in both FLOPs and metric, cheapest first."""
    front: list[Stitch] = []
    measured = [stitch for stitch in stitches if metric in stitch.metrics and stitch.flops is not None]
    for stitch in sorted(measured, key=lambda stitch: (stitch.flops, -stitch.metrics[metric])):
        if not front or stitch.metrics[metric] > front[-1].metrics[metric]:
            front.append(stitch)
    return front


def untouched_anchors(stitches: Sequence[Stitch], before: Mapping[int, float]) -> dict[int, tuple[float, float]]:
    """FLOPs and accuracy of each anchor as it was before it was trained with the others, by id.

    Args:
        stitches: the stitches of a model; of an anchor that nobody trained, the measured accuracy is the untouched one.
        before: accuracies by id of those that were trained.
    """
    known = {stitch.id: before.get(stitch.id, stitch.metrics.get("accuracy")) for stitch in stitches}
    return {
        stitch.id: (stitch.flops, accuracy)
        for stitch in stitches
        for accuracy in (known[stitch.id],)
        if stitch.is_anchor and stitch.flops and accuracy is not None
    }


def judge_stitches(stitches: Sequence[Stitch], before: Mapping[int, float]) -> Judgement | None:
    """Judge the measured stitches of a model against its untouched anchors (see `untouched_anchors`).

    None where that cannot be: fewer than two anchors on their own front, or nothing measured that is as cheap as the
    cheapest of them.
    """
    measured = [stitch for stitch in stitches if stitch.flops and "accuracy" in stitch.metrics]
    anchors = list(untouched_anchors(stitches, before).values())
    flops = [flops for flops, _ in anchors]
    if len(on_own_front(flops, [accuracy for _, accuracy in anchors])) < 2 or all(
        (stitch.flops or 0) > min(flops) for stitch in measured
    ):
        return None
    return judge(
        [stitch.flops or 0 for stitch in measured],
        [stitch.metrics["accuracy"] for stitch in measured],
        flops,
        [accuracy for _, accuracy in anchors],
    )


def in_words(judged: Judgement) -> str:
    """A sentence or two for people."""
    share = "too near it for a share" if judged.share is None else f"share {judged.share:.2f}"
    chosen = "" if judged.images else " Chosen and measured on the same images, which favours the stitches."
    return (
        f"Area of the front (mean of the best accuracy over log FLOPs, from the cheapest to the dearest anchor): "
        f"{100 * judged.area:.2f} %; of the untouched anchors (the null line): {100 * judged.null_line:.2f} %; of the "
        f"straight line through them: {100 * judged.straight_line:.2f} %, {share}.{chosen}"
    )


def judge_two_fold(
    networks: tuple[Half, Half], anchors: tuple[Half, Half], anchor_accuracies: npt.ArrayLike, *, seed: int = 0
) -> Judgement:
    """Judge networks against untouched anchors, each half of the images choosing for the other.

    Args:
        networks: all that can be chosen, on both halves.
        anchors: the untouched anchors, on the same halves.
        anchor_accuracies: (A,) of these on all images; they say which anchors are on their own front.
        seed: of the bootstrap.

    Raises:
        ValueError: as `judge`.
    """
    flops, accuracies = _anchors(anchors[0].flops, anchor_accuracies)
    ranges = flops[0], flops[-1]
    reached = np.concatenate([half.area(*ranges) for half in networks])
    untouched = np.concatenate([half.area(*ranges) for half in anchors])
    interval = paired_interval(reached - untouched, seed=seed)
    made = _judgement(float(reached.mean()), flops, accuracies, null_line=float(untouched.mean()))
    return Judgement(made.area, made.null_line, made.straight_line, made.share, interval, len(reached))


def halves(num_images: int, seed: int = 0) -> npt.NDArray[np.bool_]:
    """Which half each image (N,) is in, at random: of data sorted by class, the first half has other classes.

    Raises:
        ValueError: fewer than two images.
    """
    if num_images < 2:
        raise ValueError(
            f"each half of the images chooses for the other, so none may be empty; got {num_images} images"
        )
    return np.random.default_rng(seed).permutation(num_images) % 2 == 1


def paired_interval(gains: npt.ArrayLike, *, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean of what was gained image by image (N,): quantiles of 2,000 bootstrap resamples."""
    gains_N = np.asarray(gains, dtype=float)
    generator = np.random.default_rng(seed)
    means = [gains_N[generator.integers(0, len(gains_N), len(gains_N))].mean() for _ in range(_NUM_RESAMPLES)]
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def _anchors(flops: npt.ArrayLike, accuracies: npt.ArrayLike) -> tuple[list[float], list[float]]:
    """FLOPs and accuracies of the anchors on their own front."""
    front = on_own_front(flops, accuracies)
    if len(front) < 2:
        raise ValueError(
            "a front is judged between at least two anchors of which the dearer is the better; here "
            f"{'none is' if not front else 'one is as good as all'}"
        )
    return [float(np.asarray(flops)[index]) for index in front], [
        float(np.asarray(accuracies)[index]) for index in front
    ]


def _judgement(
    reached: float, flops: Sequence[float], accuracies: Sequence[float], null_line: float | None = None
) -> Judgement:
    whole = math.log(flops[-1] / flops[0])
    parts = [math.log(stop / start) / whole for start, stop in pairwise(flops)]
    means = [(start + stop) / 2 for start, stop in pairwise(accuracies)]
    straight = sum(part * mean for part, mean in zip(parts, means, strict=True))
    null = area(flops, accuracies, flops[0], flops[-1]) if null_line is None else null_line
    share = (reached - null) / (straight - null) if straight - null >= LEAST_DIFFERENCE else None
    return Judgement(reached, null, straight, share)


def _checked(flops: npt.ArrayLike, accuracies: npt.ArrayLike) -> tuple[Floats, Floats]:
    flops_M, accuracies_M = np.asarray(flops, dtype=float), np.asarray(accuracies, dtype=float)
    if flops_M.ndim != 1 or flops_M.shape != accuracies_M.shape:
        raise ValueError(f"there must be as many accuracies as FLOPs, got {accuracies_M.shape} and {flops_M.shape}")
    if not (np.isfinite(flops_M).all() and np.isfinite(accuracies_M).all() and (flops_M > 0).all()):
        raise ValueError("FLOPs must be positive and accuracies finite; leave out what was not measured")
    return flops_M, accuracies_M
