"""Routes through a family of anchors: segments, joints, stitches, cascades and budgets. Pure Python.

An anchor is a chain: stem, L blocks, neck, head. `cut p` is the place after p blocks (0 = after the stem, L = before
the neck). A route is the segments of a stitch in order: one for an anchor, two for a stitch of the paper (Pan et al.,
CVPR 2023, equation 3); nothing here assumes how many there are.
"""

import math
import operator
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, NamedTuple, TypeVar

from .schema import read, write

_FIGURES = ("flops", "params", "latency_ms", "memory_mb")
_LAYER_NAME = re.compile(r"((0|[1-9]\d*)-(0|[1-9]\d*))\.(0|[1-9]\d*)")


class Segment(NamedTuple):
    """Blocks start..stop-1 of an anchor (anchors counted from 0, smallest first)."""

    anchor: int
    start: int
    stop: int


class Joint(NamedTuple):
    """The stitching layer `layer`, from cut `stop` of anchor `front` to cut `start` of anchor `back`."""

    front: int
    stop: int
    back: int
    start: int
    layer: str


class Cut(NamedTuple):
    """What flows through an anchor at one cut: channels, and the height and width of the grid they live on."""

    channels: int
    height: int
    width: int


@dataclass(frozen=True)
class AnchorShape:
    """An anchor as the space and the stitching layers see it."""

    stages: tuple[int, ...]  # number of blocks of each; a plain transformer has one stage
    cuts: tuple[Cut, ...]  # what flows at cut 0..L, so one more than there are blocks
    # Of the features between blocks: batch N, channels C, grid height H and width W, tokens L (prefix tokens, then the
    # grid row by row; of "UNITS" in the order of Hiera's mask units).
    layout: Literal["NCHW", "NHWC", "NLC", "UNITS"]
    prefix_tokens: int = 0  # before the grid: class, distillation, register tokens; 0 unless the layout is NLC
    prefix_names: tuple[str, ...] = ()  # what each of them is, such as "cls_token"; empty where it is not known

    def __post_init__(self) -> None:
        """Refuse what fits together nowhere."""
        sizes = [*self.stages, *(number for cut in self.cuts for number in cut)]
        if len(self.cuts) != self.depth + 1 or min(sizes) < 1:
            raise ValueError(f"stages {self.stages} need one cut more than blocks, got {len(self.cuts)}, all above 0")
        if self.prefix_tokens < 0 or len(self.prefix_names) not in (0, self.prefix_tokens):
            raise ValueError(f"{self.prefix_tokens} prefix_tokens have the prefix_names {list(self.prefix_names)}")

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return sum(self.stages)


def carried_tokens(source: AnchorShape, target: AnchorShape) -> tuple[int | None, ...]:
    """For each prefix token of `target` which one of `source` becomes it; None for those that `source` lacks.

    The first class token becomes the first class token, and so on; where names are not known, they go by position.
    """
    if not (source.prefix_names and target.prefix_names):
        return tuple(index if index < source.prefix_tokens else None for index in range(target.prefix_tokens))
    places: dict[str, list[int]] = {}
    for index, name in enumerate(source.prefix_names):
        places.setdefault(name, []).append(index)
    return tuple(places[name].pop(0) if places.get(name) else None for name in target.prefix_names)


def why_not_joined(source: AnchorShape, stop: int, target: AnchorShape, start: int, resize: str | None) -> str | None:
    """Why no stitching layer can join cut `stop` of one anchor to cut `start` of another; None if one can."""
    before, after, units = source.cuts[stop], target.cuts[start], source.layout == "UNITS"
    if units != (target.layout == "UNITS"):
        return "tokens in the order of mask units (Hiera) meet a grid; they can be joined to their like only"
    if before[1:] != after[1:] and (resize is None or units):
        grids = f"there are {before.height}x{before.width} and {after.height}x{after.width}"
        return f"a stitching layer needs equal grids, but {grids}" + ("" if units else "; resize='bilinear' joins them")
    own = target.cuts[0].channels
    if None in carried_tokens(source, target) and after.channels != own:
        return (
            f"the back anchor needs {target.prefix_tokens} prefix tokens that the front lacks, and its own have the "
            f"{own} channels of its stem, not {after.channels}"
        )
    return None


@dataclass(frozen=True)
class Own:
    """What a stitch has of its own behind its first joint: norms, and updates of its stitching layers, of this rank."""

    rank: int

    def __post_init__(self) -> None:
        """Refuse what is no rank."""
        if self.rank < 1:
            raise ValueError(f"the rank of what a stitch has of its own must be at least 1, got {self.rank}")


@dataclass(frozen=True)
class Stitch:
    """One network of a stitchable model.

    Attributes:
        id: the number by which it is chosen.
        route: its segments, front to back.
        layers: names of the stitching layers between them, "FRONT-BACK.INDEX", one fewer than segments.
        flops: multiply-adds plus normalisation terms of one image (the convention of the paper and fvcore).
        params: parameters, as many as `extract` holds.
        latency_ms: predicted milliseconds of one call, None until calibrated.
        memory_mb: predicted peak of memory of one call, in 10^6 bytes, the weights of this stitch alone included.
        metrics: measured figures, e.g. {"accuracy": 0.97}. A figure that is infinite or NaN is left out.
        skips_neck: whether the head takes the features of the last block as they are, without the back anchor's final
            norm. Only weights that were trained so want it: the authors' DeiT stitches.
        own: what belongs to this stitch alone, None where all of it is shared.
    """

    id: int
    route: tuple[Segment, ...]
    layers: tuple[str, ...] = ()
    flops: float | None = None
    params: float | None = None
    latency_ms: float | None = None
    memory_mb: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    skips_neck: bool = False
    own: Own | None = None

    def __post_init__(self) -> None:
        """Leave out what is not finite, for JSON has no such numbers, and refuse costs below 0."""
        for name in _FIGURES:
            figure = getattr(self, name)
            if figure is not None and not math.isfinite(figure):
                object.__setattr__(self, name, None)
            elif figure is not None and figure < 0:
                raise ValueError(f"{name} of stitch {self.id} is below 0: {figure!r}")
        object.__setattr__(self, "metrics", {name: x for name, x in self.metrics.items() if math.isfinite(x)})
        if self.own and self.is_anchor:
            raise ValueError(f"stitch {self.id} is an anchor, without a joint behind which anything could be its own")

    @property
    def mean_flops(self) -> float | None:
        """Those of an image on average, as every choice has them: of a stitch the same for all."""
        return self.flops

    max_flops = mean_flops  # those of the dearest image

    @property
    def is_anchor(self) -> bool:
        """Whether the route stays in one anchor."""
        return len(self.route) == 1

    @property
    def joints(self) -> list[Joint]:
        """Front to back."""
        pairs = zip(self.layers, self.route, self.route[1:], strict=False)
        return [Joint(front.anchor, front.stop, back.anchor, back.start, layer) for layer, front, back in pairs]

    def __repr__(self) -> str:
        """Only what is known."""
        return f"Stitch({', '.join(f'{name}={value}' for name, value in self.to_dict().items())})"

    def to_dict(self) -> dict[str, Any]:
        """JSON types only, the form it has in `config.json`; what is not known yet is left out."""
        return write(self)

    @classmethod
    def from_dict(cls, stitch: Any, path: str = "a stitch") -> "Stitch":
        """The inverse of `to_dict`; a ValueError names the place, whose beginning is `path`."""
        return read(cls, stitch, path)


@dataclass(frozen=True)
class Stage:
    """A stage of a cascade."""

    stitch: int  # its id
    flops: float  # added per image that gets so far: without the beginning shared with an earlier stage
    # What is compared with the threshold, of softmax(logits / temperature): its largest value, or its lead.
    score: Literal["max_probability", "margin"] | None = None
    threshold: float | None = None  # an image goes on to the next stage while its score is below; None of the last
    temperature: float = 1.0
    # What answers where this stage is the last to run: its logits, or the mean of logits / temperature over all stages.
    combine: Literal["last", "mean"] = "last"
    reached: float = 1.0  # the part of the images that get so far, where the thresholds were chosen

    def __post_init__(self) -> None:
        """Refuse what no image could meet."""
        if (self.score is None) != (self.threshold is None) or not 0 <= (self.threshold or 0) <= 1:
            raise ValueError(f"a threshold is a number from 0 to 1 of a score, got {self.threshold} of {self.score}")
        if not (0 < self.temperature < math.inf and 0 <= self.flops < math.inf and 0 <= self.reached <= 1):
            found = f"{self.temperature}, {self.flops}, {self.reached}"
            raise ValueError(f"temperature and flops must be finite and above 0, reached from 0 to 1: {found}")


@dataclass(frozen=True)
class Cascade:
    """Stitches of growing cost, of which each image runs as many as it needs."""

    id: int  # the number by which it is chosen
    stages: tuple[Stage, ...]  # cheapest first
    flops: float  # mean per image, where its thresholds were chosen
    max_flops: float  # of an image that goes through all stages
    # Measured, such as {"accuracy": 0.97}, and the "gain" over the best stitch of the same cost.
    metrics: Mapping[str, float] = field(default_factory=dict)
    interval: tuple[float, float] | None = None  # of this gain, 95 %
    images: int | None = None  # how many decided, of the split of the data set
    dataset: str = ""
    split: str = ""
    latency_ms: float | None = None  # predicted, of a call on average
    latency_p95_ms: float | None = None  # what 95 % of the calls with one image stay within

    def __post_init__(self) -> None:
        """Refuse stages that are no cascade."""
        ends, number = [stage.threshold is None for stage in self.stages], len(self.stitch_ids)
        if number < 2 or number < len(ends) or ends != [False] * (len(ends) - 1) + [True]:
            raise ValueError("a cascade has at least two stages, of different stitches, each but the last a threshold")
        if not 0 < self.flops <= self.max_flops < math.inf:
            raise ValueError(f"flops must be above 0 and at most max_flops, got {self.flops} and {self.max_flops}")

    @property
    def stitch_ids(self) -> frozenset[int]:
        """Of the stitches that it runs."""
        return frozenset(stage.stitch for stage in self.stages)

    @property
    def mean_flops(self) -> float:
        """Those of an image on average, as every choice has them."""
        return self.flops


ChoiceOf = TypeVar("ChoiceOf", Stitch, Cascade, "Stitch | Cascade")
Choice = Stitch | Cascade
"""What a budget chooses among."""


class Stitches(tuple[Stitch, ...]):
    """The stitches of a model, in the order of its config; shown one per line, of many the first and the last."""

    __slots__ = ()

    def __repr__(self) -> str:
        """A line per stitch."""
        shown = [f"    {stitch!r},\n" for stitch in self]
        if len(shown) > 8:
            shown[4:-4] = [f"    ... {len(shown) - 8} more ...\n"]
        return f"({len(self)} stitches\n{''.join(shown)})"


def check_stitches(stitches: Sequence[Stitch], depths: Sequence[int]) -> None:
    """Refuse stitches that do not fit anchors of these depths (in blocks); a ValueError names the stitch and why."""
    if not stitches:
        raise ValueError("stitches: the config has no stitch; a stitchable model needs at least one")
    ids = [stitch.id for stitch in stitches]
    for index, stitch in enumerate(stitches):
        twice = f"id {stitch.id} occurs twice; ids must be unique" if ids.index(stitch.id) < index else None
        problem = twice or _problem_of_route(stitch, depths)
        if problem:
            route = [list(segment) for segment in stitch.route]
            raise ValueError(f"stitches[{index}].route: stitch {stitch.id}, {route}: {problem}")


def _problem_of_route(stitch: Stitch, depths: Sequence[int]) -> str | None:
    if not stitch.route:
        return "it has no segment"
    for anchor, start, stop in stitch.route:
        if not 0 <= anchor < len(depths):
            return f"anchor {anchor} is out of range, there are {len(depths)} anchors (0..{len(depths) - 1})"
        if not 0 <= start < stop <= depths[anchor]:
            blocks = f"anchor {anchor} has blocks 0..{depths[anchor] - 1}"
            return f"segment {[anchor, start, stop]} is empty or out of range, {blocks}"
    first, last = stitch.route[0], stitch.route[-1]
    if first.start != 0 or last.stop != depths[last.anchor]:
        ends = f"not at {first.start} and {last.stop}"
        return f"gap: the first segment must start at 0 and the last one stop at {depths[last.anchor]}, {ends}"
    for front, back in pairwise(stitch.route):
        if front.anchor == back.anchor:
            return f"{list(front)} and {list(back)} are of one anchor, so they must be one segment"
    number = len(stitch.route)
    if len(stitch.layers) != number - 1:
        return f"{number} segments need {number - 1} stitching layers, it names {list(stitch.layers)}"
    for joint in stitch.joints:
        pair, match = f"{joint.front}-{joint.back}", _LAYER_NAME.fullmatch(joint.layer)
        if match is None or match[1] != pair:
            return f"unknown stitching layer {joint.layer!r}, it must be like '{pair}.0'"
    return None


def check_cascades(cascades: Sequence[Cascade], stitches: Sequence[Stitch], left_out: Collection[int] = ()) -> None:
    """Refuse with a ValueError cascades of unknown stitches, not even left out ones, or of stages that fit nowhere."""
    flops, ids = {stitch.id: stitch.flops for stitch in stitches}, [cascade.id for cascade in cascades]
    for number, cascade in enumerate(cascades):
        stages = [stage.stitch for stage in cascade.stages]
        costs = [cost for stitch in stages if (cost := flops.get(stitch)) is not None]
        unknown, reached = set(stages) - {*flops, *left_out}, [stage.reached for stage in cascade.stages]
        problems = {
            f"id {cascade.id} occurs twice; ids must be unique": ids.count(cascade.id) > 1,
            f"there is no stitch {min(unknown, default=0)}": unknown,
            f"stages {stages} must be known stitches of growing cost, these cost {costs} FLOPs": costs != sorted(costs),
            f"of all images {reached} reach its stages; it must be some of each, ever fewer": min(reached) == 0
            or reached != sorted(reached, reverse=True),
        }
        for problem in (text for text, is_so in problems.items() if is_so):
            raise ValueError(f"cascades[{number}]: {problem}")


def find_stitch(stitches: Sequence[Stitch], stitch_id: Any, left_out: Collection[int] = ()) -> Stitch:
    """The stitch with this id; a ValueError names the nearest, or says that the checkpoint has it (`left_out`)."""
    wanted = check_integer(stitch_id, "stitch_id")
    for stitch in stitches:
        if stitch.id == wanted:
            return stitch
    ids = [stitch.id for stitch in stitches]
    all_between = ids == list(range(ids[0], ids[-1] + 1))
    listed = f"stitches {f'{ids[0]}..{ids[-1]}' if all_between else ids}" if len(ids) > 1 else f"stitch {ids[0]} only"
    if wanted in left_out:
        raise ValueError(f"stitch {wanted} was left out of this model, which has {listed}; load the whole checkpoint")
    nearest = min(ids, key=lambda known: abs(known - wanted))
    raise ValueError(f"stitch_id {wanted} is out of range: this model has {listed}; the nearest is {nearest}")


def find_cascade(cascades: Sequence[Cascade], cascade_id: Any, stitches: Sequence[Stitch]) -> Cascade:
    """The cascade with this id; a ValueError where there is none, or it runs others than these stitches."""
    wanted, known = check_integer(cascade_id, "cascade"), {cascade.id: cascade for cascade in cascades}
    if wanted not in known:
        raise ValueError(f"there is no cascade {wanted} (cascade_id); this model has {list(known) or 'none'}")
    missing = known[wanted].stitch_ids - {stitch.id for stitch in stitches}
    if missing:
        raise ValueError(f"cascade {wanted} runs stitches {sorted(missing)}, left out here; load with cascade={wanted}")
    return known[wanted]


def measured_by(choices: Sequence[Choice]) -> str:
    """What choices go by: "accuracy", or where nobody had labels for that, "agreement" with the largest anchor."""
    known = {name for choice in choices for name in choice.metrics}
    return "agreement" if "agreement" in known and "accuracy" not in known else "accuracy"


def best_within(choices: Sequence[Choice], *, metric: str | None = None, **bounds: float | None) -> Choice:
    """The choice with the highest `metric` within every bound; where none of them was measured, the largest mean FLOPs.

    Of equals it is the one with fewer mean FLOPs. A ValueError is that of `within`, or of a metric that nothing has
    although others were measured, or that falls.
    """
    metric = metric or measured_by(choices)
    if metric == "loss":
        raise ValueError("a budget maximises its metric, and a loss is better when it is lower; choose another")
    known = {name for choice in choices for name in choice.metrics}
    if known and metric not in known:
        raise ValueError(f"no stitch has been measured by {metric!r}; there are {sorted(known)}")
    return best_of(within(choices, **bounds), metric)


def best_of(choices: Sequence[ChoiceOf], metric: str) -> ChoiceOf:
    """As `best_within`, among those that are within the bounds."""
    measured = [choice for choice in choices if metric in choice.metrics]
    if measured:
        return max(measured, key=lambda choice: (choice.metrics[metric], -(choice.mean_flops or 0)))
    return max(choices, key=lambda choice: choice.mean_flops or 0)


def within(choices: Sequence[Choice], **bounds: float | None) -> list[Choice]:
    """The stitches and cascades within every bound that is given, named as those of `find` of a model.

    A ValueError refuses no bound, one that is no positive number or on something that nothing carries, or nothing
    within them (names the cheapest).
    """
    known = ("mean_flops", *_FIGURES)
    for name in sorted(set(bounds) - set(known)):
        raise TypeError(f"there is no budget {name!r}; there are {', '.join(known)}")
    given = {name: _check_bound(bound, name) for name, bound in bounds.items() if bound is not None}
    if not given:
        raise ValueError(f"a budget needs at least one of {', '.join(known)}")
    cheapest = {name: min(choices, key=lambda choice: _cost(choice, name)) for name in given}
    for name, choice in cheapest.items():
        if _cost(choice, name) == math.inf:
            hint = "; stitchable.calibrate(model) predicts it for this device" if name in _FIGURES[2:] else ""
            raise ValueError(f"no stitch of this model carries {name}, so it cannot be a budget{hint}")
    affordable = [x for x in choices if all(_cost(x, name) <= bound for name, bound in given.items())]
    if not affordable:
        kinds = {name: f"{type(x).__name__.lower()} {x.id}" for name, x in cheapest.items()}
        found = "; ".join(f"by {name} {kinds[name]} ({name} {_cost(x, name):g})" for name, x in cheapest.items())
        asked = ", ".join(f"{name} <= {bound:g}" for name, bound in given.items())
        raise ValueError(f"no stitch is within {asked}; the cheapest is, {found}")
    return affordable


def _cost(choice: Choice, name: str) -> float:
    cost = getattr(choice, "max_flops" if name == "flops" else name, None)
    return math.inf if cost is None else cost


def _check_bound(bound: Any, name: str) -> float:
    try:
        number = float(bound)
    except (TypeError, ValueError):
        number = math.nan
    if not number > 0:
        raise ValueError(f"the budget {name} must be a positive number, got {bound!r}")
    return number


def restrict(
    stitches: Sequence[Stitch], default: int | None, stitch_id: int | None, max_flops: float | None
) -> tuple[list[Stitch], int | None]:
    """The stitches to keep of a checkpoint of which a part is loaded, and the default among them; else a ValueError."""
    if stitch_id is not None:
        default = find_stitch(stitches, stitch_id).id
    if max_flops is None:
        return [stitch for stitch in stitches if stitch.id == default], default
    kept: Any = within(stitches, flops=max_flops)
    if all(stitch.id != default for stitch in kept):
        if stitch_id is not None:
            raise ValueError(f"stitch_id {stitch_id} is beyond max_flops {max_flops:g}; give one of them")
        default = best_within(stitches, flops=max_flops).id
    return kept, default


def check_integer(value: Any, name: str) -> int:
    """`value` as an int; a ValueError if it is none (nor is a boolean: set_stitch(True) is a mistake)."""
    try:
        return operator.index("" if isinstance(value, bool) else value)  # type: ignore[arg-type]
    except TypeError:
        raise ValueError(f"{name} must be an integer, got {value!r} ({type(value).__name__})") from None
