"""The space of a family: which stitches there are, and which positions share a stitching layer. Pure Python.

Section 3.2 of Stitchable Neural Networks (Pan et al., CVPR 2023): sliding windows between anchors of equal depth,
nearest interpolation between anchors of unequal depth, stage by stage. In the paper's notation a position "(j, k)" runs
front blocks 0..j and back blocks k..L-1 of a stage.

Ids are explicit and stable: the anchors first, then for each stage, for each pair of anchors, the positions in window
order, then the chains through more than two anchors.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Literal

from stitchable.model.routes import AnchorShape, Segment, Stitch, layer_name

Direction = Literal["fast_to_slow", "slow_to_fast", "both"]
Pairs = Literal["all", "forward"]


@dataclass(frozen=True)
class Position:
    """A place where anchor `front`, after `stop` blocks, is joined to anchor `back` at cut `start` by `layer`."""

    front: int
    stop: int
    back: int
    start: int
    layer: str


def enumerate_stitches(
    anchors: Sequence[AnchorShape],
    *,
    kernel_size: int = 2,
    stride: int = 1,
    stages: Sequence[int] | None = None,
    direction: Direction = "fast_to_slow",
    nearest: bool = True,
    pairs: Pairs | None = None,
) -> list[Stitch]:
    """Every stitch of a family, without costs.

    Args:
        anchors: the family, smallest first.
        kernel_size: blocks in a sliding window (equal depths); the positions of a window share a stitching layer.
        stride: blocks from one window to the next.
        stages: the stages to stitch in, counted from 0; None means all but the last of a hierarchical model (section
            4.1), the only one of a plain model.
        direction: "fast_to_slow" goes from smaller to larger anchors, "slow_to_fast" back, "both" does both.
        nearest: whether to join only neighbours in FLOPs; otherwise all pairs, and chains through more than two.
        pairs: "all" positions of a window, also those that repeat depth (the authors' choice for plain models and the
            default there), or "forward", only positions whose back starts beyond the front's last block (their choice
            for hierarchical models and the default there).

    Raises:
        ValueError: fewer than two anchors, an argument out of range, different numbers of stages, or an empty space.
    """
    stages = _check_arguments(anchors, kernel_size, stride, stages, direction, pairs)
    pairs = pairs or default_pairs(anchors)

    positions: list[Position] = []
    for stage in stages:
        for front, back in _anchor_pairs(len(anchors), direction, nearest):
            first_index = len({p.layer for p in positions if (p.front, p.back) == (front, back)})
            positions += _positions(anchors, front, back, stage, kernel_size, stride, pairs, first_index)
    if not positions:
        raise ValueError(
            f"this space has no stitch: no two cuts of equal grid and prefix tokens with kernel_size={kernel_size}, "
            f"stride={stride}, stages={list(stages)}, direction={direction!r}, pairs={pairs!r}; "
            "try other stages, or pairs='all'"
        )

    depths = [anchor.depth for anchor in anchors]
    chains = [[position] for position in positions]
    if not nearest:
        chains += _longer_chains(positions, len(anchors), direction)
    stitches = [Stitch(id=anchor, route=(Segment(anchor, 0, depth),)) for anchor, depth in enumerate(depths)]
    for chain in chains:
        route, layers = _route(chain, depths)
        stitches.append(Stitch(id=len(stitches), route=route, layers=layers))
    return stitches


def default_stages(anchors: Sequence[AnchorShape]) -> Sequence[int]:
    """All stages but the last of a hierarchical model (section 4.1 of the paper), the only one of a plain model."""
    return range(max(1, len(anchors[0].stages) - 1))


def default_pairs(anchors: Sequence[AnchorShape]) -> Pairs:
    """What the authors chose: "all" for plain models, "forward" for hierarchical ones."""
    return "all" if len(anchors[0].stages) == 1 else "forward"


def _check_arguments(
    anchors: Sequence[AnchorShape],
    kernel_size: int,
    stride: int,
    stages: Sequence[int] | None,
    direction: str,
    pairs: str | None,
) -> Sequence[int]:
    if len(anchors) < 2:
        raise ValueError(f"stitching needs at least two anchors, got {len(anchors)}")
    for name, value in (("kernel_size", kernel_size), ("stride", stride)):
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} must be a positive integer (blocks), got {value!r}")
    if direction not in ("fast_to_slow", "slow_to_fast", "both"):
        raise ValueError(f"direction must be 'fast_to_slow', 'slow_to_fast' or 'both', got {direction!r}")
    if pairs not in (None, "all", "forward"):
        raise ValueError(f"pairs must be 'all', 'forward' or None, got {pairs!r}")
    num_stages = [len(anchor.stages) for anchor in anchors]
    if len(set(num_stages)) > 1:
        raise ValueError(
            f"the anchors have {num_stages} stages; stitching stage by stage needs the same number in each "
            "(for other families write the routes of the config by hand)"
        )
    if stages is None:
        return default_stages(anchors)
    if len(set(stages)) != len(stages) or any(type(s) is not int or not 0 <= s < num_stages[0] for s in stages):
        raise ValueError(f"stages must be distinct numbers out of 0..{num_stages[0] - 1}, got {list(stages)}")
    return sorted(stages)


def _anchor_pairs(num_anchors: int, direction: str, nearest: bool) -> list[tuple[int, int]]:
    fast_to_slow = [pair for pair in combinations(range(num_anchors), 2) if not nearest or pair[1] - pair[0] == 1]
    slow_to_fast = [(back, front) for front, back in fast_to_slow]
    return {
        "fast_to_slow": fast_to_slow,
        "slow_to_fast": slow_to_fast,
        "both": fast_to_slow + slow_to_fast,
    }[direction]


def _positions(
    anchors: Sequence[AnchorShape],
    front: int,
    back: int,
    stage: int,
    kernel_size: int,
    stride: int,
    pairs: str,
    first_index: int,
) -> Iterator[Position]:
    """The positions of one pair in one stage; their layers are numbered from `first_index`."""
    front_depth, back_depth = anchors[front].stages[stage], anchors[back].stages[stage]
    front_offset, back_offset = sum(anchors[front].stages[:stage]), sum(anchors[back].stages[:stage])
    windows = (
        _sliding_windows(front_depth, kernel_size, stride)
        if front_depth == back_depth
        else _nearest_windows(front_depth, back_depth)
    )
    # "Beyond the front's last block" counts blocks from the stems where the back is the deeper (the authors' j < k),
    # and from the heads where the front is the deeper: the same rule seen in a mirror.
    forward_margin = min(0, back_depth - front_depth)
    layers: dict[tuple[int, int, int], str] = {}
    for window, (j, k) in windows:
        if pairs == "forward" and not k - j > forward_margin:
            continue
        stop, start = front_offset + j + 1, back_offset + k
        source, target = anchors[front].cuts[stop], anchors[back].cuts[start]
        same_prefix = anchors[front].prefix_tokens == anchors[back].prefix_tokens
        if not same_prefix or (source.height, source.width) != (target.height, target.width):
            continue  # e.g. a back stage entered before its downsampling: nothing a 1x1 convolution can join
        # One layer per window; where a window spans a change of width (a stem narrower than its stage), one per width.
        key = (window, source.channels, target.channels)
        layers.setdefault(key, layer_name(front, back, first_index + len(layers)))
        yield Position(front, stop, back, start, layers[key])


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


def _longer_chains(positions: Sequence[Position], num_anchors: int, direction: str) -> list[list[Position]]:
    """Positions in a row through three anchors or more, all in one direction, with at least one block in between."""
    subsets = [subset for size in range(3, num_anchors + 1) for subset in combinations(range(num_anchors), size)]
    fast_to_slow = subsets if direction in ("fast_to_slow", "both") else []
    slow_to_fast = [subset[::-1] for subset in subsets] if direction in ("slow_to_fast", "both") else []
    of_pair: dict[tuple[int, int], list[Position]] = {}
    for position in positions:
        of_pair.setdefault((position.front, position.back), []).append(position)

    chains: list[list[Position]] = []
    for subset in [*fast_to_slow, *slow_to_fast]:
        partial: list[list[Position]] = [[]]
        for pair in pairwise(subset):
            partial = [
                [*chain, position]
                for chain in partial
                for position in of_pair.get(pair, [])
                if not chain or position.stop > chain[-1].start
            ]
        chains += partial
    return chains


def _route(chain: Sequence[Position], depths: Sequence[int]) -> tuple[tuple[Segment, ...], tuple[str, ...]]:
    starts = [0, *(position.start for position in chain)]
    stops = [*(position.stop for position in chain), depths[chain[-1].back]]
    anchors = [chain[0].front, *(position.back for position in chain)]
    route = tuple(Segment(*segment) for segment in zip(anchors, starts, stops, strict=True))
    return route, tuple(position.layer for position in chain)
