"""Which stitches a training step runs.

Every draw is a function of the seed, the step and the process, with a generator of its own: nothing needs to be saved,
any step can be replayed, and no other random number of the run is touched.
"""

import random
from collections.abc import Sequence
from typing import Literal

from stitchable import Stitch

Method = Literal["uniform", "flops_groups", "sandwich"]
AcrossProcesses = Literal["same", "independent"]


class StitchSampler:
    """Draws the stitches of each step.

    Args:
        stitches: of the model.
        stitch_ids: those to draw from; all of them if None.
        method: "uniform", each stitch equally likely (algorithm 1, line 5, of Pan et al., CVPR 2023); "flops_groups",
            each group of stitches of like cost equally likely, uniform inside (Pan et al., SN-Netv2, 2023);
            "sandwich", a uniform stitch with the anchors it connects (appendix D), the largest anchor first.
        flops_gap: a group of "flops_groups" holds what is at most so many FLOPs above its cheapest stitch; 1e9 there.
        across_processes: "same" draws one stitch for all processes; "independent" lets each draw for itself.
        num_processes: how many processes train together.
        seed: of all draws.

    Raises:
        ValueError: nothing to draw from, an unknown id, or a sandwich without stitches or anchors.
    """

    def __init__(
        self,
        stitches: Sequence[Stitch],
        stitch_ids: Sequence[int] | None = None,
        *,
        method: Method = "uniform",
        flops_gap: float = 1e9,
        across_processes: AcrossProcesses = "same",
        num_processes: int = 1,
        seed: int = 0,
    ) -> None:
        by_id = {stitch.id: stitch for stitch in stitches}
        unknown = [i for i in stitch_ids or [] if i not in by_id]
        if unknown:
            raise ValueError(f"there is no stitch {unknown[0]} to draw; this model has {min(by_id)}..{max(by_id)}")
        drawn = [by_id[i] for i in stitch_ids] if stitch_ids is not None else list(stitches)
        self._anchors = {stitch.route[0].anchor: stitch for stitch in stitches if stitch.is_anchor}
        if method == "sandwich":
            drawn = [stitch for stitch in drawn if not stitch.is_anchor]
            _check_sandwich(drawn, self._anchors)
        if not drawn:
            raise ValueError("there is no stitch to draw")
        self._by_flops = sorted(drawn, key=lambda stitch: (stitch.flops or 0, stitch.id))
        self._groups = _groups(self._by_flops, flops_gap)
        self._method, self._across, self._seed, self._num_processes = method, across_processes, seed, num_processes

    def draw(self, step: int, process: int = 0) -> tuple[int, ...]:
        """The ids that a process runs at a step, counted from 0: one, or with "sandwich" the largest anchor first."""
        key = f"{self._seed} {step} {process}" if self._across == "independent" else f"{self._seed} {step}"
        generator = random.Random(key)
        stitch = generator.choice(generator.choice(self._groups) if self._method == "flops_groups" else self._by_flops)
        if self._method != "sandwich":
            return (stitch.id,)
        anchors = [self._anchors[number] for number in {segment.anchor for segment in stitch.route}]
        anchors.sort(key=lambda anchor: anchor.flops or 0)
        return (anchors[-1].id, stitch.id, *(anchor.id for anchor in anchors[:-1]))

    def draw_all(self, step: int) -> list[tuple[int, ...]]:
        """What each process runs at a step."""
        return [self.draw(step, process) for process in range(self._num_processes)]


def _groups(by_flops: Sequence[Stitch], flops_gap: float) -> list[list[Stitch]]:
    groups: list[list[Stitch]] = []
    for stitch in by_flops:
        if not groups or (stitch.flops or 0) - (groups[-1][0].flops or 0) > flops_gap:
            groups.append([])
        groups[-1].append(stitch)
    return groups


def _check_sandwich(drawn: Sequence[Stitch], anchors: dict[int, Stitch]) -> None:
    if not drawn:
        raise ValueError("a sandwich needs a stitch between anchors to draw")
    missing = {segment.anchor for stitch in drawn for segment in stitch.route} - set(anchors)
    if missing:
        raise ValueError(f"a sandwich runs the anchors too, but anchor {min(missing)} is not among the stitches")
