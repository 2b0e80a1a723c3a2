"""The space of a family: which stitches there are, and which positions share a stitching layer. Pure Python.

Section 3.2 of Stitchable Neural Networks (Pan et al., CVPR 2023): sliding windows between anchors of equal depth,
nearest interpolation between anchors of unequal depth, stage by stage. In the paper's notation a position "(j, k)" runs
front blocks 0..j and back blocks k..L-1 of a stage. Anchors whose stages differ (a ResNet and a ViT) meet where their
grids are equal: the blocks of each that leave one grid are a stage then.

Ids are explicit and stable: the anchors first, then for each stage, for each pair of anchors, the positions in window
order, then the chains through more than two anchors.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import combinations, groupby, pairwise, permutations
from typing import Any, Literal, NamedTuple

from stitchable.model.routes import AnchorShape, Joint, Segment, Stitch, why_not_joined

Direction = Literal["fast_to_slow", "slow_to_fast", "both"]
Pairs = Literal["all", "forward"]
Resize = Literal["bilinear"]


class Stage(NamedTuple):
    """Blocks of an anchor, as many as `depth` from `start` on, that take part in a stage, and the grid they leave."""

    start: int
    depth: int
    grid: tuple[int, int]


def enumerate_stitches(
    anchors: Sequence[AnchorShape],
    *,
    kernel_size: int = 2,
    stride: int = 1,
    stages: Sequence[int] | None = None,
    direction: Direction = "fast_to_slow",
    nearest: bool = True,
    pairs: Pairs | None = None,
    resize: Resize | None = None,
) -> list[Stitch]:
    """Every stitch of a family, without costs.

    Args:
        anchors: the family, smallest first.
        kernel_size: blocks in a sliding window (equal depths); the positions of a window share a stitching layer.
        stride: blocks from one window to the next.
        stages: the stages to stitch in, counted from 0; None means all but the last of a hierarchical model (section
            4.1), the only one of a plain model. Where the anchors' stages differ, the grids on which two of them meet
            are counted instead, the largest first, and None means all.
        direction: "fast_to_slow" goes from smaller to larger anchors, "slow_to_fast" back, "both" does both.
        nearest: whether to join only neighbours in FLOPs; otherwise all pairs, and chains through more than two.
        pairs: "all" positions of a window, also those that repeat depth (the authors' choice for plain models and the
            default where an anchor is one), or "forward", only positions whose back starts beyond the front's last
            block (their choice for hierarchical models and the default there). A stage without any such position, as
            one of single blocks, is joined at its end.
        resize: "bilinear" to join cuts of different grids too, those of the nearest stages; None for equal grids only.

    Raises:
        ValueError: fewer than two anchors, an argument out of range, or an empty space.
    """
    _check_arguments(anchors, kernel_size, stride, direction, pairs, resize)
    meetings = stages_of(anchors, resize)
    stages = _check_stages(anchors, stages, len(meetings), resize)
    pairs = pairs or default_pairs(anchors)

    joints: list[Joint] = []
    for stage in stages:
        for front, back in _anchor_pairs(len(anchors), direction, nearest):
            if (front, back) in meetings[stage]:
                first_index = len({joint.layer for joint in joints if (joint.front, joint.back) == (front, back)})
                both = meetings[stage][front, back]
                joints += _joints(anchors, front, back, both, kernel_size, stride, pairs, resize, first_index)
    if not joints:
        raise ValueError(
            f"this space has no stitch with kernel_size={kernel_size}, stride={stride}, stages={list(stages)}, "
            f"direction={direction!r}, pairs={pairs!r}, resize={resize!r}. {_why_empty(anchors, resize)}"
        )

    depths = [anchor.depth for anchor in anchors]
    chains = [[joint] for joint in joints]
    if not nearest:
        chains += _longer_chains(joints, len(anchors), direction)
    stitches = [Stitch(id=anchor, route=(Segment(anchor, 0, depth),)) for anchor, depth in enumerate(depths)]
    for chain in chains:
        route, layers = _route(chain, depths)
        stitches.append(Stitch(id=len(stitches), route=route, layers=layers))
    return stitches


def stages_of(
    anchors: Sequence[AnchorShape], resize: Resize | None = None
) -> list[Mapping[tuple[int, int], tuple[Stage, Stage]]]:
    """The stages of a family: which blocks of both anchors of a pair take part in each.

    Anchors with the same stages meet stage by stage, others where their grids are equal (nearest, if they are resized).
    """
    if _have_the_same_stages(anchors):
        own = [_designed_stages(anchor) for anchor in anchors]
        pairs = list(permutations(range(len(anchors)), 2))
        return [{(a, b): (own[a][number], own[b][number]) for a, b in pairs} for number in range(len(own[0]))]
    own = [_stages_by_grid(anchor) for anchor in anchors]
    by_grids: dict[Any, dict[tuple[int, int], tuple[Stage, Stage]]] = {}
    for a, b in combinations(range(len(anchors)), 2):
        for one, other in _meetings(own[a], own[b], resize):
            # All pairs that meet on the same grids do so in one stage.
            grids = tuple(sorted((math.prod(stage.grid), stage.grid) for stage in (one, other)))[::-1]
            by_grids.setdefault(grids, {}).update({(a, b): (one, other), (b, a): (other, one)})
    return [by_grids[grids] for grids in sorted(by_grids, reverse=True)]


def groups_by_cost(by_flops: Iterable[Stitch], most: Callable[[float], float]) -> list[list[Stitch]]:
    """Groups of stitches of like cost, as in SN-Netv2 (Pan et al., 2023, https://arxiv.org/abs/2307.00154).

    Args:
        by_flops: the cheapest first.
        most: the FLOPs up to which a stitch is in a group, given those of the group's first.
    """
    groups: list[list[Stitch]] = []
    for stitch in by_flops:
        if not groups or (stitch.flops or 0) > most(groups[-1][0].flops or 0):
            groups.append([])
        groups[-1].append(stitch)
    return groups


def default_stages(anchors: Sequence[AnchorShape], resize: Resize | None = None) -> Sequence[int]:
    """All stages but the last of a hierarchical model (section 4.1 of the paper), else all there are."""
    if _have_the_same_stages(anchors):
        return range(max(1, len(anchors[0].stages) - 1))
    return range(len(stages_of(anchors, resize)))


def default_pairs(anchors: Sequence[AnchorShape]) -> Pairs:
    """What the authors chose: "all" for plain models, "forward" for hierarchical ones."""
    return "all" if any(len(anchor.stages) == 1 for anchor in anchors) else "forward"


def _have_the_same_stages(anchors: Sequence[AnchorShape]) -> bool:
    return len({tuple(stage.grid for stage in _designed_stages(anchor)) for anchor in anchors}) == 1


def _designed_stages(anchor: AnchorShape) -> list[Stage]:
    stops = [sum(anchor.stages[: stage + 1]) for stage in range(len(anchor.stages))]
    return [
        Stage(stop - depth, depth, (anchor.cuts[stop].height, anchor.cuts[stop].width))
        for stop, depth in zip(stops, anchor.stages, strict=True)
    ]


def _stages_by_grid(anchor: AnchorShape) -> list[Stage]:
    stages, start = [], 0
    for grid, cuts in groupby((cut.height, cut.width) for cut in anchor.cuts[1:]):
        depth = len(list(cuts))
        stages.append(Stage(start, depth, grid))
        start += depth
    return stages


def _meetings(stages: Sequence[Stage], others: Sequence[Stage], resize: Resize | None) -> Iterator[tuple[Stage, Stage]]:
    """The pairs of equal grid; with `resize`, each stage of the anchor with fewer of them and the nearest other one."""
    if resize is None:
        yield from ((stage, other) for stage in stages for other in others if stage.grid == other.grid)
        return

    def nearest(stage: Stage, candidates: Sequence[Stage]) -> Stage:
        return min(candidates, key=lambda other: abs(math.log(math.prod(stage.grid) / math.prod(other.grid))))

    if len(stages) <= len(others):
        yield from ((stage, nearest(stage, others)) for stage in stages)
    else:
        yield from ((nearest(other, stages), other) for other in others)


def _why_empty(anchors: Sequence[AnchorShape], resize: Resize | None) -> str:
    grids = ["/".join(f"{h}x{w}" for h, w in dict.fromkeys((c.height, c.width) for c in a.cuts)) for a in anchors]
    reasons = [
        why_not_joined(front, stop, back, start, resize)
        for front, back in permutations(anchors, 2)
        for stop in range(1, front.depth)
        for start in range(1, back.depth)
    ]
    if None not in reasons:
        other = [reason for reason in reasons if reason and "equal grids" not in reason]
        if other:
            return other[0]
        return f"The grids of the anchors are {' and '.join(grids)}" + (
            "" if resize else "; resize='bilinear' joins different grids, or another image_size makes them equal"
        )
    return f"The grids of the anchors are {' and '.join(grids)}; try other stages, or pairs='all'"


def _check_arguments(
    anchors: Sequence[AnchorShape],
    kernel_size: int,
    stride: int,
    direction: str,
    pairs: str | None,
    resize: str | None,
) -> None:
    if len(anchors) < 2:
        raise ValueError(f"stitching needs at least two anchors, got {len(anchors)}")
    for name, value in (("kernel_size", kernel_size), ("stride", stride)):
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} must be a positive integer (blocks), got {value!r}")
    if direction not in ("fast_to_slow", "slow_to_fast", "both"):
        raise ValueError(f"direction must be 'fast_to_slow', 'slow_to_fast' or 'both', got {direction!r}")
    if pairs not in (None, "all", "forward"):
        raise ValueError(f"pairs must be 'all', 'forward' or None, got {pairs!r}")
    if resize not in (None, "bilinear"):
        raise ValueError(f"resize must be 'bilinear' or None, got {resize!r}")


def _check_stages(
    anchors: Sequence[AnchorShape], stages: Sequence[int] | None, num_stages: int, resize: Resize | None
) -> Sequence[int]:
    if not num_stages:
        raise ValueError(f"the anchors meet nowhere, so this space has no stitch. {_why_empty(anchors, resize)}")
    if stages is None:
        return default_stages(anchors, resize)
    if len(set(stages)) != len(stages) or any(type(s) is not int or not 0 <= s < num_stages for s in stages):
        raise ValueError(f"stages must be distinct numbers out of 0..{num_stages - 1}, got {list(stages)}")
    return sorted(stages)


def _anchor_pairs(num_anchors: int, direction: str, nearest: bool) -> list[tuple[int, int]]:
    fast_to_slow = [pair for pair in combinations(range(num_anchors), 2) if not nearest or pair[1] - pair[0] == 1]
    slow_to_fast = [(back, front) for front, back in fast_to_slow]
    return {
        "fast_to_slow": fast_to_slow,
        "slow_to_fast": slow_to_fast,
        "both": fast_to_slow + slow_to_fast,
    }[direction]


def _joints(
    anchors: Sequence[AnchorShape],
    front: int,
    back: int,
    stages: tuple[Stage, Stage],
    kernel_size: int,
    stride: int,
    pairs: str,
    resize: Resize | None,
    first_index: int,
) -> Iterator[Joint]:
    """The joints of one pair in one stage; their layers are numbered from `first_index`."""
    (front_start, front_depth, _), (back_start, back_depth, _) = stages
    windows = (
        _sliding_windows(front_depth, kernel_size, stride)
        if front_depth == back_depth
        else _nearest_windows(front_depth, back_depth)
    )
    # "Beyond the front's last block" counts blocks from the stems where the back is the deeper (the authors' j < k),
    # and from the heads where the front is the deeper: the same rule seen in a mirror.
    forward_margin = min(0, back_depth - front_depth)
    cuts = [
        (window, front_start + j + 1, back_start + k)
        for window, (j, k) in windows
        if pairs == "all" or k - j > forward_margin
    ]
    joined = [cut for cut in cuts if _can_join(anchors[front], cut[1], anchors[back], cut[2], stages, resize)]
    if not joined:
        end = (0, front_start + front_depth, back_start + back_depth)
        joined = [end] if _can_join(anchors[front], end[1], anchors[back], end[2], stages, resize) else []
    layers: dict[tuple[int, int, int], str] = {}
    for window, stop, start in joined:
        # One layer per window; where a window spans a change of width (a stem narrower than its stage), one per width.
        key = (window, anchors[front].cuts[stop].channels, anchors[back].cuts[start].channels)
        layers.setdefault(key, f"{front}-{back}.{first_index + len(layers)}")
        yield Joint(front, stop, back, start, layers[key])


def _can_join(
    front: AnchorShape, stop: int, back: AnchorShape, start: int, stages: tuple[Stage, Stage], resize: Resize | None
) -> bool:
    if start >= back.depth or why_not_joined(front, stop, back, start, resize) is not None:
        return False
    # A back stage is not entered before its downsampling, not even where features could be resized to what is there.
    grids = [(cut.height, cut.width) for cut in (front.cuts[stop], back.cuts[start])]
    return grids[0] == grids[1] or grids == [stage.grid for stage in stages]


def _sliding_windows(depth: int, kernel_size: int, stride: int) -> Iterator[tuple[int, tuple[int, int]]]:
    """Positions (j, k) of each window that no earlier window has, with the window's number (figure 5, left)."""
    seen: set[tuple[int, int]] = set()
    for window, first in enumerate(range(0, depth, stride)):
        blocks = range(first, min(first + kernel_size, depth))
        for position in ((j, k) for j in blocks for k in blocks):
            if position not in seen:
                seen.add(position)
                yield window, position


def _nearest_windows(front_depth: int, back_depth: int) -> Iterator[tuple[int, tuple[int, int]]]:
    """Each block of the shallower anchor with the blocks of the deeper one that it is nearest to (figure 5, right)."""
    shallow, deep = sorted((front_depth, back_depth))
    for deep_block in range(deep):
        shallow_block = deep_block * shallow // deep
        position = (shallow_block, deep_block) if front_depth == shallow else (deep_block, shallow_block)
        yield shallow_block, position


def _longer_chains(joints: Sequence[Joint], num_anchors: int, direction: str) -> list[list[Joint]]:
    """Joints in a row through three anchors or more, all in one direction, with at least one block in between."""
    subsets = [subset for size in range(3, num_anchors + 1) for subset in combinations(range(num_anchors), size)]
    fast_to_slow = subsets if direction in ("fast_to_slow", "both") else []
    slow_to_fast = [subset[::-1] for subset in subsets] if direction in ("slow_to_fast", "both") else []
    of_pair: dict[tuple[int, int], list[Joint]] = {}
    for joint in joints:
        of_pair.setdefault((joint.front, joint.back), []).append(joint)

    chains: list[list[Joint]] = []
    for subset in [*fast_to_slow, *slow_to_fast]:
        partial: list[list[Joint]] = [[]]
        for pair in pairwise(subset):
            partial = [
                [*chain, joint]
                for chain in partial
                for joint in of_pair.get(pair, [])
                if not chain or joint.stop > chain[-1].start
            ]
        chains += partial
    return chains


def _route(chain: Sequence[Joint], depths: Sequence[int]) -> tuple[tuple[Segment, ...], tuple[str, ...]]:
    starts = [0, *(joint.start for joint in chain)]
    stops = [*(joint.stop for joint in chain), depths[chain[-1].back]]
    anchors = [chain[0].front, *(joint.back for joint in chain)]
    route = tuple(Segment(*segment) for segment in zip(anchors, starts, stops, strict=True))
    return route, tuple(joint.layer for joint in chain)
