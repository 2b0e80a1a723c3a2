"""The best that can be made of a trace by who knows it: a search over all schedules in order of arrival."""

from collections.abc import Sequence

import numpy as np

from stitchable.serving.policy import BATCH_SIZES, Choice
from stitchable.serving.simulator import Outcome
from stitchable.serving.traces import Arrivals

_BINS = 64  # of the time that the device is behind; of the schedules that fall into one bin the best is kept


def best_schedule(
    choices: Sequence[Choice], arrivals: Arrivals, target: float, batch_sizes: Sequence[int] = BATCH_SIZES
) -> Outcome:
    """The schedule that answers most requests in time, and of those the most accurate one.

    It knows all arrivals, so it may also wait for a batch to fill. Requests are answered in order of arrival, or not at
    all. Schedules are kept apart by when the device is free again, in steps of a 64th of the target, so that better
    ones may be missed by as much.

    Args:
        choices: what can run.
        arrivals: seconds, ascending.
        target: seconds from each arrival to its deadline.
        batch_sizes: that can run.
    """
    number = len(arrivals)
    actions = [(size, choice) for size in batch_sizes for choice in choices if choice.seconds(size) <= target]
    sizes = np.array([size for size, _ in actions], dtype=int)
    seconds = np.array([choice.seconds(size) for size, choice in actions])
    gains = np.array([size * (2 * number + choice.accuracy) for size, choice in actions])
    states = [_States() for _ in range(number + 1)]  # after the first so many requests
    states[0].offer(np.array([0.0]), np.array([0.0]), 0, np.array([-1]), np.array([-1]))
    for first in range(number):
        free, score = states[first].settle(arrivals[first], target / _BINS)
        origin = np.arange(len(free))
        states[first + 1].offer(free, score, first, origin, np.full(len(free), -1))  # shed
        for size in batch_sizes:
            if first + size > number:
                break
            mine = np.flatnonzero(sizes == size)
            finish = np.maximum(free, arrivals[first + size - 1])[:, None] + seconds[mine]
            row, column = np.nonzero(finish <= arrivals[first] + target)
            states[first + size].offer(
                finish[row, column], score[row] + gains[mine[column]], first, origin[row], mine[column]
            )
    return _read_back(states, actions, arrivals, target)


class _States:
    """Schedules of the first so many requests: when the device is free, the score, and where each came from."""

    def __init__(self) -> None:
        self.parts: list[tuple[np.ndarray, ...]] = []

    def offer(self, free: np.ndarray, score: np.ndarray, first: int, origin: np.ndarray, action: np.ndarray) -> None:
        if len(free):
            self.parts.append((free, score, np.full(len(free), first), origin, action))

    def settle(self, now: float, step: float) -> tuple[np.ndarray, np.ndarray]:
        """Keep the best schedule of each bin that no earlier bin beats; free times before `now` are all the same."""
        free, score, first, origin, action = (np.concatenate(part) for part in zip(*self.parts, strict=True))
        bins = np.maximum(0, np.ceil((free - now) / step))
        order = np.lexsort((-score, bins))
        running = np.maximum.accumulate(score[order])
        better = np.concatenate(([True], running[1:] > running[:-1]))
        kept = order[better]
        self.free, self.score = free[kept], score[kept]
        self.first, self.origin, self.action = first[kept], origin[kept], action[kept]
        self.parts = []
        return self.free, self.score


def _read_back(
    states: Sequence[_States], actions: Sequence[tuple[int, Choice]], arrivals: Arrivals, target: float
) -> Outcome:
    outcome = Outcome(arrivals, np.full(len(arrivals), np.nan), np.full(len(arrivals), np.nan), target)
    states[-1].settle(np.inf, 1.0)
    place, index = len(arrivals), int(states[-1].score.argmax())
    while place > 0:
        state = states[place]
        first, action = int(state.first[index]), int(state.action[index])
        if action >= 0:
            size, choice = actions[action]
            outcome.finished[first:place] = state.free[index]
            outcome.accuracy[first:place] = choice.accuracy
            outcome.busy += choice.seconds(size)
            outcome.batches[choice.kind, choice.id] += 1
        place, index = first, int(state.origin[index])
    return outcome
