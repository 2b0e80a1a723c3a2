"""What to run next: the whole policy of the server, pure and without a clock.

Requests wait in the order of their deadlines. Each time the device is free, `Policy.decide` looks at the queue and the
time, sheds what cannot be answered in time, and picks a choice (a stitch or a cascade) and how many requests from the
front of the queue it runs on: the pair that puts the fewest deadlines out of reach, among those the one of the highest
summed accuracy, among those the quickest. All times are seconds of one clock, whichever.
"""

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import inf, sqrt
from operator import methodcaller
from typing import Literal, NamedTuple

import numpy as np

BATCH_SIZES = (1, 2, 4, 8, 16, 32)
_MAX_TABLES = 256
_FORGETTING = 0.1  # of the running means of latencies: 90 % of a change is seen after 22 batches, 99.5 % after 50
_AIM = 0.99  # part of the answers that are to be there in time
_CAUTION = 0.02  # of the target: by which a missed deadline raises the margin, up to half of the target
_ARRIVALS = 16  # over which the rate is taken: few, because a burst must be noticed while it begins


@dataclass(frozen=True)
class Choice:
    """One network of the checkpoint, as the policy sees it: how good, and how long for a batch of n.

    A batch takes `fixed + per_image * n` seconds; of a cascade this is the mean, and `worst` times as long where every
    image goes through all stages.
    """

    kind: Literal["stitch", "cascade"]
    id: int
    accuracy: float
    flops: float
    fixed: float
    per_image: float
    worst: float = 1.0

    def seconds(self, size: int) -> float:
        """Of a batch, as predicted."""
        return self.fixed + self.per_image * size

    def bound(self, size: int) -> float:
        """What deadlines are judged by: the mean of n images strays from the mean as one does, by the root of n."""
        return self.seconds(size) * (1 + (self.worst - 1) / sqrt(size))


def front_by(choices: Iterable[Choice], seconds: Callable[[Choice], float]) -> list[Choice]:
    """Those that no other beats in both seconds and accuracy, quickest first."""
    front: list[Choice] = []
    for choice in sorted(choices, key=lambda choice: (seconds(choice), -choice.accuracy)):
        if not front or choice.accuracy > front[-1].accuracy:
            front.append(choice)
    return front


class Request(NamedTuple):
    """What the policy knows of a request, made by `Policy.request`.

    Attributes:
        deadline: when the answer must be there.
        allowed: the choices that may give it, bit i for choice i.
        extra: seconds that the quickest of them takes longer than the quickest of all.
    """

    deadline: float
    allowed: int = -1
    extra: float = 0.0


class Plan(NamedTuple):
    """What to do now.

    Attributes:
        shed: places in the queue of the requests that no choice can answer in time.
        choice: what runs; None where nothing is left to run.
        size: so many requests run, the first of the queue without the shed ones.
        seconds: what `Policy.observe` takes as expected.
    """

    shed: list[int]
    choice: Choice | None
    size: int
    seconds: float


class Policy:
    """Decides by tables that are made once; `arrived`, `observe` and `answered` tell it how machine and load are.

    Args:
        choices: what can run, in any order.
        target: seconds within which a request is to be answered unless it says otherwise.
        batch_sizes: of a batch, ascending from 1.
        max_queue: the most requests that `decide` is asked about.
    """

    def __init__(
        self,
        choices: Sequence[Choice],
        target: float,
        batch_sizes: Sequence[int] = BATCH_SIZES,
        max_queue: int = 256,
    ) -> None:
        if not choices or batch_sizes[0] != 1 or not target > 0:
            raise ValueError("a policy needs a choice, a target above 0, and batch sizes from 1 on")
        self.choices, self.target, self.batch_sizes = tuple(choices), target, tuple(batch_sizes)
        self.max_queue = max_queue
        self.scale, self.spread = 1.0, 0.0  # observed / predicted seconds: the mean, and how far above it they go
        self.caution = 0.0  # seconds to spare for what no prediction sees: a burst, HTTP, other processes
        self._arrivals: deque[float] = deque(maxlen=_ARRIVALS)
        self._tables: dict[int, _Table] = {}
        everything = self._table(-1)
        drain = [0.0]  # drain[k]: seconds in which k requests can be answered at the least
        for k in range(1, max_queue + 2):
            fits = zip(self.batch_sizes, everything.fastest, strict=True)
            drain.append(min(drain[k - size] + seconds for size, seconds in fits if size <= k))
        self._drain, self._drained = drain, np.array(drain)
        self._marginal = min(s / n for n, s in zip(self.batch_sizes, everything.fastest, strict=True))
        places = np.arange(max_queue) - np.array(self.batch_sizes)[:, None]
        self._waits = places >= 0  # (sizes, places in the queue): who waits while a batch of that size runs
        self._after = np.where(self._waits, self._drained[np.maximum(places, -1) + 1], 0.0)  # and is answered after it

    def decide(self, queue: Sequence[Request], now: float) -> Plan:
        """What to run now of a queue that is sorted by deadlines."""
        shed, kept = self._sift(queue[: self.max_queue], now)
        if not kept:
            return Plan(shed, None, 0, 0.0)
        tables = self._tables_of(kept)
        rows, waiting = len(tables), len(kept)
        deadlines, _, extra = zip(*kept, strict=True)
        left_to = np.array(deadlines) - now
        after = self._after[:rows, :waiting]
        if any(extra):
            after = after + self._waits[:rows, :waiting] * np.array(extra)
        slack = left_to / self.factor - after
        # One more deadline: of the request that comes next, behind this queue and those that come while a batch runs.
        left = [self._drain[waiting - size + 1] for size in self.batch_sizes[:rows]]
        growth = 1 + self.rate(now) * self._marginal * self.scale
        coming = (self.target / self.factor - np.array(left)) / growth
        slack = np.concatenate((slack, coming[:, None]), axis=1)
        fastest = np.array([table.fastest[row] for row, table in enumerate(tables)])[:, None]
        lost = (slack < fastest).sum(axis=1).tolist()  # deadlines that even the fastest choice puts out of reach
        # And so long none is lost beyond them; what leaves less than the caution to spare gets the fastest.
        spare = np.maximum(slack - self.caution / self.factor, fastest)
        limits = np.where(slack < fastest, inf, spare).min(axis=1)
        if self.spread and any(lost):  # what only the margin puts out of reach may still be in time
            by_mean = left_to / self.scale - after
            hoped = np.where((slack[:, :waiting] < fastest) & (by_mean >= fastest), by_mean, inf)
            limits = np.minimum(limits, hoped.min(axis=1))
        best: tuple[float, float, float] = (inf, 0.0, 0.0)
        plan = Plan(shed, None, 0, 0.0)
        for row, table in enumerate(tables):
            size, choice = self.batch_sizes[row], table.most_accurate(row, float(limits[row]))
            key = (lost[row], -size * choice.accuracy, choice.bound(size))
            if key < best:
                best, plan = key, Plan(shed, choice, size, choice.seconds(size))
        return plan

    @property
    def factor(self) -> float:
        """By which predicted seconds are multiplied: the observed mean, and a margin as TCP has (RFC 6298)."""
        return self.scale + 4 * self.spread

    def arrived(self, now: float) -> None:
        """A request has come."""
        self._arrivals.append(now)

    def rate(self, now: float) -> float:
        """Requests per second, of late."""
        arrivals = self._arrivals
        return len(arrivals) / max(now - arrivals[0], 1e-9) if len(arrivals) == _ARRIVALS else 0.0

    def observe(self, plan: Plan, seconds: float) -> None:
        """A batch took so long. One hiccup is not taken for more than a doubling."""
        assert plan.choice is not None
        limit = 2 * self.scale
        above = min(seconds / plan.choice.bound(plan.size), limit) - self.scale
        self.spread += _FORGETTING * (max(0.0, above) - self.spread)
        self.scale += _FORGETTING * (min(seconds / plan.seconds, limit) - self.scale)

    def answered(self, in_time: bool) -> None:
        """A request has its answer, by its deadline or not; those that were shed no caution would have saved.

        Steps of these sizes hold where the aim is met: the caution follows that quantile of what is needed (Robbins and
        Monro, 1951).
        """
        step = -(1 - _AIM) if in_time else _AIM
        self.caution = min(max(self.caution + _CAUTION * self.target * step, 0.0), self.target / 2)

    def request(self, deadline: float, permits: Callable[[Choice], bool] | None = None) -> Request:
        """What the queue holds of a request, which may permit some choices only.

        Raises:
            ValueError: it permits none.
        """
        if permits is None:
            return Request(deadline)
        allowed = sum(1 << i for i, choice in enumerate(self.choices) if permits(choice))
        if not allowed:
            raise ValueError("no choice is permitted")
        return Request(deadline, allowed, self._table(allowed).fastest[0] - self._table(-1).fastest[0])

    def _sift(self, queue: Sequence[Request], now: float) -> tuple[list[int], list[Request]]:
        """Places of the requests that come too late even if only the fastest runs from now on, and the others."""
        scale, quickest, drain = self.scale, self._table(-1).fastest[0], self._drain
        deadlines, _, extras = zip(*queue, strict=True) if queue else ((), (), ())
        if not any(extras) and (now + scale * (self._drained[: len(queue)] + quickest) <= deadlines).all():
            return [], list(queue)  # at once, as is usual
        shed: list[int] = []
        kept: list[Request] = []
        for place, (deadline, _, extra) in enumerate(queue):
            if now + scale * (drain[len(kept)] + quickest + extra) > deadline:
                shed.append(place)
            else:
                kept.append(queue[place])
        return shed, kept

    def _tables_of(self, queue: Sequence[Request]) -> list["_Table"]:
        """For each batch size that the queue fills: of the choices that all requests of such a batch allow."""
        tables, allowed, last = [], -1, 0
        for size in self.batch_sizes:
            if size > len(queue):
                break
            for request in queue[last:size]:
                allowed &= request.allowed
            if not allowed:
                break
            tables.append(self._table(allowed))
            last = size
        return tables

    def _table(self, allowed: int) -> "_Table":
        if allowed not in self._tables:
            chosen = [choice for i, choice in enumerate(self.choices) if allowed >> i & 1]
            if len(self._tables) > _MAX_TABLES:  # requests may ask for ever other accuracies
                self._tables = {-1: self._tables[-1]}
            self._tables[allowed] = _Table(chosen, self.batch_sizes)
        return self._tables[allowed]


class _Table:
    """Of some choices, for each batch size: latencies in ascending order, and the best choice up to each."""

    def __init__(self, choices: Sequence[Choice], batch_sizes: Sequence[int]) -> None:
        self.best = [front_by(choices, methodcaller("bound", size)) for size in batch_sizes]
        self.latencies = [
            [choice.bound(size) for choice in front] for size, front in zip(batch_sizes, self.best, strict=True)
        ]
        self.fastest = [latencies[0] for latencies in self.latencies]

    def most_accurate(self, row: int, limit: float) -> Choice:
        return self.best[row][bisect_right(self.latencies[row], limit) - 1]
