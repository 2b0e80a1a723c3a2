"""What a policy makes of a trace, without a clock: the server's own policy, and what to compare it with."""

from bisect import insort
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from stitchable.serving.policy import Choice, Plan, Policy, Request
from stitchable.serving.traces import Arrivals


class Decider(Protocol):
    """What the engine asks a policy, and tells it."""

    def arrived(self, now: float) -> None: ...
    def decide(self, queue: Sequence[Request], now: float) -> Plan: ...
    def observe(self, plan: Plan, seconds: float) -> None: ...
    def answered(self, in_time: bool) -> None: ...


@dataclass
class Outcome:
    """What became of each request of a trace, in order of arrival.

    Attributes:
        arrivals: seconds from the beginning.
        finished: when the answer was there; NaN where the request was shed.
        accuracy: of the choice that answered; NaN where none did.
        target: seconds from arrival to deadline.
        busy: seconds in which the device ran.
        batches: of each choice that ran, by (kind, id).
    """

    arrivals: Arrivals
    finished: Arrivals
    accuracy: Arrivals
    target: float
    busy: float = 0.0
    batches: Counter[tuple[str, int]] = field(default_factory=Counter)

    @property
    def in_time(self) -> np.ndarray:
        """Whether each request was answered within the target."""
        return self.finished - self.arrivals <= self.target + 1e-9  # NaN is not

    @property
    def accuracy_or_0(self) -> np.ndarray:
        """Of the choice that answered each request, 0 where it was shed."""
        return np.nan_to_num(self.accuracy)

    def summary(self) -> dict[str, float | None]:
        """Attainment (of all requests), mean accuracy (of those answered in time), percentiles in ms, utilisation."""
        taken = 1e3 * (self.finished - self.arrivals)[~np.isnan(self.finished)]
        percentiles = np.percentile(taken, (50, 95, 99)).tolist() if len(taken) else (None, None, None)
        end = max(np.nanmax(self.finished) if len(taken) else 0.0, self.arrivals[-1])
        return {
            "attainment": float(self.in_time.mean()),
            "accuracy": float(self.accuracy[self.in_time].mean()) if self.in_time.any() else None,
            "p50_ms": percentiles[0],
            "p95_ms": percentiles[1],
            "p99_ms": percentiles[2],
            "shed": float(np.isnan(self.finished).mean()),
            "utilisation": float(self.busy / end) if end else 0.0,
        }


def simulate(
    policy: Decider, arrivals: Arrivals, target: float, *, slowdown: Callable[[float], float] = lambda now: 1.0
) -> Outcome:
    """Run a policy on one device against a trace.

    Args:
        policy: a fresh one.
        arrivals: seconds, ascending.
        target: seconds from each arrival to its deadline.
        slowdown: by which a batch that begins at a time takes longer than predicted.
    """
    outcome = Outcome(arrivals, np.full(len(arrivals), np.nan), np.full(len(arrivals), np.nan), target)
    queue: list[tuple[Request, int]] = []
    now, coming = 0.0, 0
    while coming < len(arrivals) or queue:
        if not queue:
            now = max(now, arrivals[coming])
        while coming < len(arrivals) and arrivals[coming] <= now:
            policy.arrived(arrivals[coming])
            insort(queue, (Request(arrivals[coming] + target), coming))
            coming += 1
        plan = policy.decide([request for request, _ in queue], now)
        for place in reversed(plan.shed):
            queue.pop(place)
        if plan.choice is not None:
            seconds = plan.seconds * slowdown(now)
            now += seconds
            answered = [index for _, index in queue[: plan.size]]
            del queue[: plan.size]
            outcome.finished[answered], outcome.accuracy[answered] = now, plan.choice.accuracy
            outcome.busy += seconds
            outcome.batches[plan.choice.kind, plan.choice.id] += 1
            policy.observe(plan, seconds)
            for index in answered:
                policy.answered(bool(now <= arrivals[index] + target))
    return outcome


class Threshold:
    """A baseline: the most accurate choice while few requests wait, the quickest when there are more."""

    def __init__(self, choices: Sequence[Choice], target: float, threshold: int, **options: Any) -> None:
        best = max(choices, key=lambda choice: (choice.accuracy, -choice.seconds(1)))
        quickest = min(choices, key=lambda choice: choice.seconds(1))
        self.threshold = threshold
        self.calm, self.busy = (Policy([choice], target, **options) for choice in (best, quickest))

    def arrived(self, now: float) -> None:
        self.calm.arrived(now)
        self.busy.arrived(now)

    def decide(self, queue: Sequence[Request], now: float) -> Plan:
        shed = self.busy.decide(queue, now).shed  # only what the quickest cannot answer either
        waiting = [request for place, request in enumerate(queue) if place not in set(shed)]
        if not waiting or len(waiting) > self.threshold:
            return self.busy.decide(queue, now)
        plan = self.calm.decide(waiting, now)
        return self.busy.decide(queue, now) if plan.choice is None or plan.shed else plan._replace(shed=shed)

    def observe(self, plan: Plan, seconds: float) -> None:
        self.calm.observe(plan, seconds)
        self.busy.observe(plan, seconds)

    def answered(self, in_time: bool) -> None:
        self.calm.answered(in_time)
        self.busy.answered(in_time)
