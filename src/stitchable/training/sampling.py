"""Which stitches a training step runs.

Every draw is a function of the seed, the step and the process, with a generator of its own: nothing needs to be saved,
any step can be replayed, and no other random number of the run is touched.
"""

import random
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from math import floor
from typing import Literal, TypeVar

from stitchable import Stitch
from stitchable.space import groups_by_cost

Method = Literal["uniform", "flops_groups", "sandwich"]
Order = Literal["independent", "rounds"]
AcrossProcesses = Literal["same", "independent"]
T = TypeVar("T")


class StitchSampler:
    """Draws the stitches of each step.

    Args:
        stitches: of the model.
        stitch_ids: those to draw from; all of them if None.
        method: "uniform", each stitch equally likely (algorithm 1, line 5, of Pan et al., CVPR 2023); "flops_groups",
            each group of stitches of like cost equally likely, uniform inside (Pan et al., SN-Netv2, 2023);
            "sandwich", a uniform stitch with the anchors it connects (appendix D), the largest anchor first.
        flops_gap: a group of "flops_groups" holds what is at most so many FLOPs above its cheapest stitch; 1e9 there.
        order: "independent" draws; or "rounds", in which each comes once in shuffled order, so that a short schedule
            trains all of them equally often (each group too, and within it each stitch).
        stitches_per_step: how many are drawn, each for an equal share of the images of a process.
        anchor_probability: that a draw is an anchor, each equally likely, and otherwise what `method` draws of the
            others; in rounds every so many draws are one. None draws anchors like all stitches.
        across_processes: "same" draws for all processes; "independent" lets each draw for itself, as the authors' code
            does.
        num_processes: how many processes train together.
        seed: of all draws.

    Raises:
        ValueError: nothing to draw from, an unknown id, an anchor_probability without anchors or without others, or a
            sandwich without stitches or anchors, or several.
    """

    def __init__(
        self,
        stitches: Sequence[Stitch],
        stitch_ids: Sequence[int] | None = None,
        *,
        method: Method = "uniform",
        flops_gap: float = 1e9,
        order: Order = "independent",
        stitches_per_step: int = 1,
        anchor_probability: float | None = None,
        across_processes: AcrossProcesses = "same",
        num_processes: int = 1,
        seed: int = 0,
    ) -> None:
        by_id = {stitch.id: stitch for stitch in stitches}
        unknown = [i for i in stitch_ids or [] if i not in by_id]
        if unknown:
            raise ValueError(f"there is no stitch {unknown[0]} to draw; this model has {min(by_id)}..{max(by_id)}")
        drawn = [by_id[i] for i in stitch_ids] if stitch_ids is not None else list(stitches)
        self.stitches_per_step, self._anchor_probability = stitches_per_step, anchor_probability
        self._method, self._order, self._across = method, order, across_processes
        self._seed, self._num_processes = seed, num_processes
        self._anchors = {stitch.route[0].anchor: stitch for stitch in stitches if stitch.is_anchor}
        self._drawn_anchors = [stitch for stitch in drawn if stitch.is_anchor]
        if method == "sandwich" or anchor_probability is not None:
            drawn = [stitch for stitch in drawn if not stitch.is_anchor]
        if method == "sandwich":
            self._check_sandwich(drawn)
        elif anchor_probability is not None and not (drawn and self._drawn_anchors):
            raise ValueError("anchor_probability needs both anchors and other stitches to draw; leave it null")
        if not drawn:
            raise ValueError("there is no stitch to draw")
        by_flops = sorted(drawn, key=lambda stitch: (stitch.flops or 0, stitch.id))
        self._groups = [by_flops]
        if method == "flops_groups":
            self._groups = groups_by_cost(by_flops, lambda first: first + flops_gap)

    def draw(self, step: int, process: int = 0) -> tuple[int, ...]:
        """The ids that a process runs at a step, counted from 0.

        One, or `stitches_per_step` of them (one may come twice), or with "sandwich" the largest anchor first.
        """
        own = f" {process}" if self._across == "independent" else ""
        numbers = range(step * self.stitches_per_step, (step + 1) * self.stitches_per_step)
        if self._order == "rounds":
            drawn = [self._in_rounds(f"{self._seed}{own}", number) for number in numbers]
        else:
            generator = random.Random(f"{self._seed} {step}{own}")
            drawn = [self._draw(generator) for _ in numbers]
        if self._method != "sandwich":
            return tuple(stitch.id for stitch in drawn)
        anchors = self._anchors_of(drawn[0])
        return (anchors[-1].id, drawn[0].id, *(anchor.id for anchor in anchors[:-1]))

    def draw_all(self, step: int) -> list[tuple[int, ...]]:
        """What each process runs at a step."""
        return [self.draw(step, process) for process in range(self._num_processes)]

    def updates(self, num_steps: int) -> dict[int, float]:
        """How often each stitch is drawn in so many steps, by id: what is expected of all processes together."""
        draws = num_steps * self.stitches_per_step * (self._num_processes if self._across == "independent" else 1)
        of_anchors = self._anchor_probability or 0.0
        expected: dict[int, float] = defaultdict(float)
        for group in self._groups:
            for stitch in group:
                share = draws * (1 - of_anchors) / len(self._groups) / len(group)
                for each in (stitch, *(self._anchors_of(stitch) if self._method == "sandwich" else ())):
                    expected[each.id] += share
        for stitch in self._drawn_anchors if of_anchors else ():
            expected[stitch.id] += draws * of_anchors / len(self._drawn_anchors)
        return dict(expected)

    def _draw(self, generator: random.Random) -> Stitch:
        if self._anchor_probability is not None and generator.random() < self._anchor_probability:
            return generator.choice(self._drawn_anchors)
        return generator.choice(generator.choice(self._groups) if self._method == "flops_groups" else self._groups[0])

    def _in_rounds(self, key: str, number: int) -> Stitch:
        """The draw of this number, counted from 0 over all steps."""
        of_anchors = self._anchor_probability or 0.0
        before = floor(of_anchors * number)  # of these draws were anchors
        if floor(of_anchors * (number + 1)) > before:
            return _member(self._drawn_anchors, before, f"{key} anchors")
        group = _member(range(len(self._groups)), number - before, f"{key} groups")
        return _member(self._groups[group], (number - before) // len(self._groups), f"{key} {group}")

    def _anchors_of(self, stitch: Stitch) -> list[Stitch]:
        anchors = [self._anchors[number] for number in {segment.anchor for segment in stitch.route}]
        return sorted(anchors, key=lambda anchor: anchor.flops or 0)

    def _check_sandwich(self, drawn: Sequence[Stitch]) -> None:
        if self.stitches_per_step > 1 or self._anchor_probability is not None:
            raise ValueError("a sandwich is one stitch with its anchors: no stitches_per_step, no anchor_probability")
        if not drawn:
            raise ValueError("a sandwich needs a stitch between anchors to draw")
        missing = {segment.anchor for stitch in drawn for segment in stitch.route} - set(self._anchors)
        if missing:
            raise ValueError(f"a sandwich runs the anchors too, but anchor {min(missing)} is not among the stitches")


def _member(members: Sequence[T], number: int, key: str) -> T:
    """The draw of this number where all members come in each round, in an order of its own."""
    which, place = divmod(number, len(members))
    return members[_shuffled(len(members), f"{key} {which}")[place]]


@lru_cache(maxsize=64)  # some rounds, because a step draws from each round many times
def _shuffled(size: int, key: str) -> list[int]:
    return random.Random(key).sample(range(size), size)
