"""Search the cascades of some stitches from their logits, without the model.

All pairs of stitches are tried over a grid of thresholds, then for the most promising pairs the mean of both stages'
logits and every third stage. Each half of the images then measures what the other half found (see `stitchable.front`).

That committees of what there is already beat single networks is from Wang et al. ("Wisdom of Committees",
https://arxiv.org/abs/2012.01988); that a second stage wants a temperature of its own, fitted on what reaches it, from
https://arxiv.org/abs/2509.08318.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from stitchable.cascade_stages import (
    SCORES,
    Bools,
    Costs,
    Floats,
    Logits,
    Stage,
    evenly,
    finite,
    fit_temperature,
    scores_of,
)
from stitchable.front import Half, halves, on_own_front

_NUM_THRESHOLDS = 50
_IMAGES_AT_A_TIME = 4096
_MOST_STITCHES = 100
"""Of more stitches, only those nearest to the front of all are searched."""
_MOST_PAIRS = 80
"""So many pairs, with a score each, are tried with the mean of their logits and with third stages."""


@dataclass(frozen=True)
class Candidate:
    """A cascade, or with one stage a stitch, as the search measured it on the images that chose it.

    Attributes:
        stages: first to last.
        flops: mean FLOPs per image.
        max_flops: of an image that runs all stages.
        accuracy: top-1 in 0..1.
        reached: the part of the images that reach each stage, 1 of the first.
    """

    stages: tuple[Stage, ...]
    flops: float
    max_flops: float
    accuracy: float
    reached: tuple[float, ...] = ()

    @property
    def is_cascade(self) -> bool:
        """Whether there is more than one stage."""
        return len(self.stages) > 1


@dataclass(frozen=True)
class TwoFold:
    """What was found, and what each half of the images, choosing for the other, makes of it.

    Attributes:
        candidates: the front on all images, the cheapest first. Its accuracies are those of the images that chose.
        cascades: both halves with all that the other half found.
        stitches: both halves with the stitches alone.
        choices: what the indices of `cascades` are, for each half.
    """

    candidates: list[Candidate]
    cascades: tuple[Half, Half]
    stitches: tuple[Half, Half]
    choices: tuple[list[Candidate], list[Candidate]]

    def within(self, flops: float) -> tuple[Bools, Bools]:
        """Which images are right within a mean budget, (N,) each: with cascades, and with stitches alone."""
        chosen = ([half.correct(half.within(flops)) for half in of] for of in (self.cascades, self.stitches))
        return tuple(np.concatenate(of) for of in chosen)  # type: ignore[return-value]  # a pair


def search(logits: Logits, labels: npt.NDArray[Any], costs: Costs) -> list[Candidate]:
    """The front of mean FLOPs and accuracy over stitches, pairs and triples, all measured on the images that choose.

    Args:
        logits: of S stitches, (N, num_labels) each, in any float type.
        labels: (N,) class numbers.
        costs: of the stitches.

    Returns:
        The front, the cheapest first; stitches that no cascade beats are candidates of one stage.

    Raises:
        ValueError: logits that are not finite, labels of one class, or no image.
    """
    return _search(_Table(logits, np.asarray(labels)), costs)


def search_two_fold(logits: Logits, labels: npt.NDArray[Any], costs: Costs, *, seed: int = 0) -> TwoFold:
    """Search on all images, and on each half for the other.

    Args:
        logits: see `search`.
        labels: see `search`.
        costs: see `search`.
        seed: of the halves.

    Raises:
        ValueError: see `search`; fewer than two images, or one half with images of one class.
    """
    labels_N = np.asarray(labels)
    second = halves(len(labels_N), seed)
    everything = _search(_Table(logits, labels_N), costs)
    tables = [_Table(logits, labels_N, np.flatnonzero(which)) for which in (~second, second)]
    found = [_search(table, costs) for table in tables]
    return TwoFold(
        everything,
        (_half(tables[0], found[1], costs), _half(tables[1], found[0], costs)),
        (_half_alone(tables[0], tables[1], costs), _half_alone(tables[1], tables[0], costs)),
        (found[1], found[0]),
    )


class _Table:
    """What a search needs to know of each stitch on some images; everything is worked out once."""

    def __init__(self, logits: Logits, labels: npt.NDArray[Any], images: npt.NDArray[Any] | None = None) -> None:
        self._logits = logits
        self._images = slice(None) if images is None else images
        self.labels = labels[self._images]
        self._scores: dict[tuple[int, float], Floats] = {}
        self._temperatures: dict[int, float] = {}
        self._means: dict[tuple[Stage, Stage], Bools] = {}

    def _map(self, function: Callable[..., torch.Tensor], *stitches: int) -> npt.NDArray[Any]:
        """What a function of the logits (n, num_labels) of some stitches returns, (..., N), from parts of the images.

        So memory does not grow with the images, but for two bytes per logit of these stitches.
        """
        kept = [self._logits[stitch][self._images] for stitch in stitches]
        parts = []
        for start in range(0, len(self.labels), _IMAGES_AT_A_TIME):
            part = slice(start, start + _IMAGES_AT_A_TIME)
            parts.append(
                function(*(finite(logits[part], at, start) for logits, at in zip(kept, stitches, strict=True)))
            )
        return torch.cat(parts, dim=-1).numpy()

    @cached_property
    def correct(self) -> Bools:
        """(S, N) which images each stitch alone has right."""
        return np.stack([self._map(lambda z: z.argmax(1), i) == self.labels for i in range(len(self._logits))])

    def temperature(self, stitch: int) -> float:
        """Fitted on all images."""
        if stitch not in self._temperatures:
            self._temperatures[stitch] = self.temperature_of(stitch, np.ones(len(self.labels), dtype=bool))
        return self._temperatures[stitch]

    def temperature_of(self, stitch: int, images: Bools) -> float:
        """Fitted on those images (N,) that reach it."""
        chosen = evenly(np.flatnonzero(images))
        logits = finite(self._logits[stitch][self._images][chosen], stitch)
        return fit_temperature(logits, torch.from_numpy(self.labels[chosen]))

    def scores(self, stitch: int, temperature: float, score: str) -> Floats:
        """(N,) of a stitch."""
        if (stitch, temperature) not in self._scores:
            self._scores[stitch, temperature] = self._map(lambda z: scores_of(z / temperature), stitch)
        return self._scores[stitch, temperature][SCORES.index(score)]

    def correct_mean(self, first: Stage, second: Stage) -> Bools:
        """(N,) which images the mean of two stages' logits has right."""
        if (first, second) not in self._means:
            answers = self._map(
                lambda z, y: (z / first.temperature + y / second.temperature).argmax(1), first.stitch, second.stitch
            )
            self._means[first, second] = answers == self.labels
        return self._means[first, second]

    def run(self, candidate: Candidate, costs: Costs) -> tuple[Bools, Floats, tuple[float, ...]]:
        """`run_cascade` from what is known already.

        Returns:
            Which images (N,) a cascade has right, the FLOPs of each, and the part of them that reach each stage.
        """
        reached = []
        correct, flops = np.zeros(len(self.labels), dtype=bool), np.zeros(len(self.labels))
        undecided = np.ones(len(self.labels), dtype=bool)
        for place, stage in enumerate(candidate.stages):
            earlier = candidate.stages[:place]
            reached.append(float(undecided.mean()))
            right = self.correct[stage.stitch]
            if stage.combine == "mean":
                # The threshold is no part of the key, so that all of a pair share one mean.
                right = self.correct_mean(_undecided(earlier[0]), stage)
            correct[undecided] = right[undecided]
            flops[undecided] += costs.added(stage.stitch, [other.stitch for other in earlier])
            if stage.score is not None:
                undecided &= self.scores(stage.stitch, stage.temperature, stage.score).astype(float) < stage.threshold
        return correct, flops, tuple(reached)


def _undecided(stage: Stage) -> Stage:
    """The stage without what decides who goes on."""
    return stage._replace(score=None, threshold=None)


class _Front:
    """The best of all that was tried, as arrays, and how each came to be."""

    def __init__(self) -> None:
        self.flops, self.accuracies = np.zeros(0), np.zeros(0)
        self._made: list[tuple[Stage, ...]] = []

    def best_within(self, flops: Floats) -> Floats:
        """The accuracy of the front within each of these budgets."""
        return np.concatenate([[-np.inf], self.accuracies])[np.searchsorted(self.flops, flops, side="right")]

    def add(self, flops: Floats, accuracies: Floats, stages: Callable[[int], tuple[Stage, ...]]) -> None:
        """Keep what is better than all that costs as much or less; `stages(index)` says what an index is."""
        better = np.flatnonzero(accuracies > self.best_within(flops))
        if len(better) == 0:
            return
        new = better[on_own_front(flops[better], accuracies[better])]
        all_flops = np.concatenate([self.flops, flops[new]])
        all_accuracies = np.concatenate([self.accuracies, accuracies[new]])
        kept = on_own_front(all_flops, all_accuracies)
        made = self._made
        self._made = [made[i] if i < len(made) else stages(int(new[i - len(made)])) for i in kept]
        self.flops, self.accuracies = all_flops[kept], all_accuracies[kept]

    def candidates(self, costs: Costs) -> list[Candidate]:
        """The cheapest first."""
        found = zip(self._made, self.flops, self.accuracies, strict=True)
        return [Candidate(stages, float(f), _worst(stages, costs), float(a)) for stages, f, a in found]


def _worst(stages: Sequence[Stage], costs: Costs) -> float:
    ids = [stage.stitch for stage in stages]
    return sum(costs.added(stitch, ids[:place]) for place, stitch in enumerate(ids))


@dataclass(frozen=True)
class _Pair:
    """A first stage without its threshold, a second stage, and what each threshold (J,) gives."""

    first: Stage
    second: int
    thresholds: Floats
    flops: Floats
    accuracies: Floats
    valid: Bools

    def stages(self, index: int) -> tuple[Stage, ...]:
        return self.first._replace(threshold=float(self.thresholds[index])), Stage(self.second)

    @property
    def chosen(self) -> float:
        """The threshold with the highest accuracy, the lowest among equals; temperatures are fitted at it."""
        return float(self.thresholds[int(np.where(self.valid, self.accuracies, -np.inf).argmax())])


def _search(table: _Table, costs: Costs) -> list[Candidate]:
    if len(np.unique(table.labels)) < 2:
        raise ValueError(
            "thresholds are chosen on images of at least two classes, and all of these are of one; data that are "
            "sorted by class must be shuffled or read whole"
        )
    front = _Front()
    accuracies = table.correct.mean(1)
    kept = _promising(accuracies, costs)
    front.add(costs.flops[kept].astype(float), accuracies[kept], lambda index: (Stage(int(kept[index])),))
    pairs = [
        pair
        for stitch in kept
        for score in SCORES
        for pair in _pairs_from(table, costs, kept, int(stitch), score, front)
    ]
    pairs.sort(key=lambda pair: _shortfall(pair, front))
    for pair in pairs[:_MOST_PAIRS]:
        reached = table.scores(*pair.first[:2], str(pair.first.score)).astype(float) < pair.chosen
        second = Stage(pair.second, table.temperature_of(pair.second, reached))
        _add_mean(table, pair, second, front)
        for score in SCORES:
            _add_triples(table, costs, kept, pair, second._replace(score=score), reached, front)
    return [replace(found, reached=table.run(found, costs)[2]) for found in front.candidates(costs)]


def _promising(accuracies: Floats, costs: Costs) -> npt.NDArray[Any]:
    """The stitches to search, the cheapest first: those nearest below the front."""
    order = np.lexsort((-accuracies, costs.flops))
    shortfall = np.maximum.accumulate(accuracies[order]) - accuracies[order]
    return order[np.sort(np.argsort(shortfall, kind="stable")[:_MOST_STITCHES])]


def _shortfall(pair: _Pair, front: _Front) -> float:
    return float(np.where(pair.valid, front.best_within(pair.flops) - pair.accuracies, np.inf).min())


def _grid(scores: Floats) -> Floats:
    """Thresholds (J,) that send on growing parts of images, the first ones finer: there a cascade gains the most."""
    parts = (np.arange(1, _NUM_THRESHOLDS + 1) / (_NUM_THRESHOLDS + 1)) ** 2
    places = np.minimum(np.ceil(parts * len(scores)).astype(int), len(scores) - 1)
    return np.unique(np.round(np.sort(scores.astype(float))[places], 6))


def _pairs_from(
    table: _Table, costs: Costs, kept: npt.NDArray[Any], first: int, score: str, front: _Front
) -> list[_Pair]:
    """All pairs that begin with a stitch, by one score, added to the front."""
    later = kept[costs.flops[kept] > costs.flops[first]]
    if len(later) == 0:
        return []
    stage = Stage(first, table.temperature(first), score)
    scores = table.scores(first, stage.temperature, score).astype(float)
    thresholds = _grid(scores)
    # An image goes on at the thresholds from this one on.
    places = np.searchsorted(thresholds, scores, side="right")
    deferred = _going_on(np.ones((1, len(scores)), dtype=bool), places, len(thresholds))[0]
    given_up = _going_on(table.correct[[first]], places, len(thresholds))[0]
    won = _going_on(table.correct[later], places, len(thresholds))
    accuracies = (table.correct[first].sum() - given_up + won) / len(scores)
    added = np.array([costs.added(int(second), [first]) for second in later])
    flops = costs.flops[first] + deferred / len(scores) * added[:, None]
    valid = np.broadcast_to(deferred > 0, flops.shape)
    pairs = [
        _Pair(stage, int(second), thresholds, *rows)
        for second, *rows in zip(later, flops, accuracies, valid, strict=True)
        if rows[2].any()
    ]
    front.add(
        flops.ravel(),
        np.where(valid, accuracies, -1.0).ravel(),
        lambda index: pairs[index // len(thresholds)].stages(index % len(thresholds)),
    )
    return pairs


def _going_on(correct: Bools, places: npt.NDArray[Any], num_thresholds: int) -> Floats:
    """How many images (K, J) of those that go on at each threshold are right, for K networks (K, N)."""
    counts = _count(correct, places, num_thresholds + 1)
    return counts.cumsum(1)[:, :num_thresholds].astype(float)


def _count(correct: Bools, cells: npt.NDArray[Any], num_cells: int) -> npt.NDArray[Any]:
    """How many images of each cell (K, num_cells) are right, for K networks (K, N); `cells` (N,) says where each is."""
    order = np.argsort(cells, kind="stable")
    occupied, starts = np.unique(cells[order], return_index=True)
    counts = np.zeros((len(correct), num_cells), dtype=np.int64)
    counts[:, occupied] = np.add.reduceat(correct[:, order].view(np.uint8), starts, axis=1, dtype=np.int64)
    return counts


def _add_mean(table: _Table, pair: _Pair, second: Stage, front: _Front) -> None:
    """The pair with the mean of both stages' logits."""
    first, second = pair.first, second._replace(combine="mean")
    scores = table.scores(*first[:2], str(first.score)).astype(float)
    places, size = np.searchsorted(pair.thresholds, scores, side="right"), len(pair.thresholds)
    mean = table.correct_mean(_undecided(first), second)
    won, given_up = _going_on(np.stack([mean, table.correct[first.stitch]]), places, size)
    accuracies = (table.correct[first.stitch].sum() - given_up + won) / len(scores)
    front.add(
        pair.flops,
        np.where(pair.valid, accuracies, -1.0),
        lambda index: (pair.stages(index)[0], second),
    )


def _add_triples(
    table: _Table, costs: Costs, kept: npt.NDArray[Any], pair: _Pair, second: Stage, reached: Bools, front: _Front
) -> None:
    """The pair with every third stage, over thresholds of both first ones."""
    later = kept[costs.flops[kept] > costs.flops[second.stitch]]
    if len(later) == 0:
        return
    first, num_images = pair.first, len(reached)
    scores = table.scores(second.stitch, second.temperature, str(second.score)).astype(float)
    thresholds = _grid(scores[reached])
    rows = np.searchsorted(pair.thresholds, table.scores(*first[:2], str(first.score)).astype(float), side="right")
    columns = np.searchsorted(thresholds, scores, side="right")
    shape = len(pair.thresholds) + 1, len(thresholds) + 1
    correct = np.concatenate(
        [np.ones((1, num_images), dtype=bool), table.correct[[first.stitch, second.stitch, *later]]]
    )
    counts = _count(correct, rows * shape[1] + columns, shape[0] * shape[1]).reshape(-1, *shape)
    # [:, i, j] of those that go on from the first stage at its threshold i, and of these from the second at j.
    from_first = counts.sum(2).cumsum(1)[:, :-1, None]
    from_second = counts.cumsum(1).cumsum(2)[:, :-1, :-1]
    right = table.correct[first.stitch].sum() - from_first[1] + from_first[2] - from_second[2] + from_second[3:]
    added = [costs.added(int(third), [first.stitch, second.stitch]) for third in later]
    flops = (
        costs.flops[first.stitch]
        + from_first[0] / num_images * costs.added(second.stitch, [first.stitch])
        + from_second[0] / num_images * np.array(added)[:, None, None]
    )

    def stages(index: int) -> tuple[Stage, ...]:
        third, row, column = np.unravel_index(index, flops.shape)
        return pair.stages(int(row))[0], second._replace(threshold=float(thresholds[column])), Stage(int(later[third]))

    front.add(flops.ravel(), np.where(from_second[0] > 0, right / num_images, -1.0).ravel(), stages)


def _half(table: _Table, found: Sequence[Candidate], costs: Costs) -> Half:
    runs = [table.run(candidate, costs) for candidate in found]
    return Half(
        np.array([flops.mean() for _, flops, _ in runs]),
        np.array([candidate.accuracy for candidate in found]),
        lambda index: runs[index][0],
    )


def _half_alone(table: _Table, other: _Table, costs: Costs, stitches: Sequence[int] | None = None) -> Half:
    chosen = range(len(table.correct)) if stitches is None else stitches
    which = list(chosen)
    return Half(
        costs.flops[which].astype(float), other.correct[which].mean(1), lambda index: table.correct[which[index]]
    )
