"""Routes through a family of anchors: segments, stitches, budgets and the Pareto front. Pure Python, no torch.

An anchor is a chain: stem, L blocks, head. `cut p` is the place after p blocks (0 = after the stem, L = before the
head). A segment is blocks start..stop-1 of one anchor, a route is the segments of a stitch in order. An anchor is a
route of one segment, a stitch of the paper (Pan et al., CVPR 2023, equation 3) one of two; nothing here assumes how
many there are.
"""

import math
import operator
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

_NUMBER = r"(0|[1-9]\d*)"
_SHOWN = 4  # stitches at either end of a long list
_FIGURES = ("flops", "params", "latency_ms", "memory_mb")
_ARCHITECTURE = re.compile(r"[\w.-]+")
_LAYER_NAME = re.compile(rf"{_NUMBER}-{_NUMBER}\.{_NUMBER}")


class Segment(NamedTuple):
    """Blocks start..stop-1 of an anchor (anchors counted from 0, smallest first)."""

    anchor: int
    start: int
    stop: int


class Joint(NamedTuple):
    """A stitching layer between two segments: from cut `front.stop` of one anchor to cut `back.start` of another."""

    layer: str
    front: Segment
    back: Segment


class Cut(NamedTuple):
    """What flows through an anchor at one cut: channels, and the height and width of the grid they live on."""

    channels: int
    height: int
    width: int


@dataclass(frozen=True)
class AnchorShape:
    """An anchor as the space and the stitching layers see it.

    Attributes:
        stages: number of blocks of each stage; a plain transformer has one stage.
        cuts: what flows at cut 0..L, so one more than there are blocks.
        layout: the layout of the features between blocks: "NCHW", "NHWC", "NLC", or "UNITS" (tokens in Hiera's order).
        prefix_tokens: tokens before the grid (class, distillation, register tokens); 0 unless the layout is NLC.
        prefix_names: what each of them is, such as "cls_token"; empty where it is not known.
    """

    stages: tuple[int, ...]
    cuts: tuple[Cut, ...]
    layout: str
    prefix_tokens: int = 0
    prefix_names: tuple[str, ...] = ()

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return sum(self.stages)

    def to_dict(self) -> dict[str, Any]:
        """JSON types only, the form it has in `config.json`."""
        shape: dict[str, Any] = {
            "depth": self.depth,
            "stages": list(self.stages),
            "cuts": [list(cut) for cut in self.cuts],
            "layout": self.layout,
            "prefix_tokens": self.prefix_tokens,
        }
        return {**shape, "prefix_names": list(self.prefix_names)} if self.prefix_names else shape

    @classmethod
    def from_dict(cls, anchor: Mapping[str, Any]) -> "AnchorShape":
        """The inverse of `to_dict`; further keys are left alone.

        Raises:
            ValueError: a key is missing, or depth, stages and cuts disagree.
        """
        missing = [key for key in ("architecture", "depth", "stages", "cuts", "layout", "chain") if key not in anchor]
        if missing:
            raise ValueError(f"an anchor of the config lacks {missing}; it has {sorted(anchor)}")
        if anchor["layout"] not in ("NCHW", "NHWC", "NLC", "UNITS"):
            raise ValueError(f"the layout of an anchor is 'NCHW', 'NHWC', 'NLC' or 'UNITS', got {anchor['layout']!r}")
        if not all(_is_list(cut) and len(cut) == 3 and all(type(n) is int for n in cut) for cut in anchor["cuts"]):
            raise ValueError(f"the cuts of an anchor are [channels, height, width] each, got {anchor['cuts']}")
        shape = cls(
            stages=tuple(anchor["stages"]),
            cuts=tuple(Cut(*cut) for cut in anchor["cuts"]),
            layout=anchor["layout"],
            prefix_tokens=anchor.get("prefix_tokens", 0),
            prefix_names=tuple(anchor.get("prefix_names", ())),
        )
        if shape.depth != anchor["depth"] or len(shape.cuts) != shape.depth + 1:
            raise ValueError(
                f"anchor {anchor.get('architecture')!r} of the config has depth {anchor['depth']}, stages "
                f"{list(shape.stages)} and {len(shape.cuts)} cuts; depth must be the sum of the stages, and the cuts "
                "one more"
            )
        return shape


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
    before, after = source.cuts[stop], target.cuts[start]
    if (source.layout == "UNITS") != (target.layout == "UNITS"):
        return "tokens in the order of mask units (Hiera) meet a grid; they can be joined to their like only"
    if (before.height, before.width) != (after.height, after.width) and (resize is None or source.layout == "UNITS"):
        return (
            f"a stitching layer needs equal grids, but there are {before.height}x{before.width} and "
            f"{after.height}x{after.width}" + ("" if source.layout == "UNITS" else "; resize='bilinear' joins them")
        )
    if None in carried_tokens(source, target) and after.channels != target.cuts[0].channels:
        return (
            f"the back anchor needs {target.prefix_tokens} prefix tokens that the front lacks, and its own have the "
            f"{target.cuts[0].channels} channels of its stem, not {after.channels}"
        )
    return None


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
        memory_mb: predicted peak of memory of one call, in 10^6 bytes, the weights of this stitch alone included; None
            until calibrated.
        metrics: measured figures, e.g. {"accuracy": 0.97}; empty until evaluated. No figure is infinite or NaN: where a
            config or a measurement has such a one, it is left out.
        skips_neck: whether the head takes the features of the last block as they are, without the back anchor's final
            norm. Only weights that were trained so want it: the authors' DeiT stitches.
    """

    id: int
    route: tuple[Segment, ...]
    layers: tuple[str, ...] = ()
    flops: int | None = None
    params: int | None = None
    latency_ms: float | None = None
    memory_mb: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    skips_neck: bool = False

    def __post_init__(self) -> None:
        """Leave out what is not finite: JSON has no such numbers, and no stitch could be chosen by them."""
        for name in _FIGURES:
            if getattr(self, name) is not None and not math.isfinite(getattr(self, name)):
                object.__setattr__(self, name, None)
        metrics = {name: value for name, value in self.metrics.items() if math.isfinite(value)}
        object.__setattr__(self, "metrics", metrics)

    @property
    def is_anchor(self) -> bool:
        """Whether the route stays in one anchor."""
        return len(self.route) == 1

    @property
    def joints(self) -> list[Joint]:
        """Each stitching layer with the segments it joins, front to back."""
        return [Joint(*joint) for joint in zip(self.layers, self.route, self.route[1:], strict=False)]

    def __repr__(self) -> str:
        """Only what is known."""
        return f"Stitch({', '.join(f'{name}={value}' for name, value in self.to_dict().items())})"

    def to_dict(self) -> dict[str, Any]:
        """JSON types only, the form it has in `config.json`; what is not known yet is left out."""
        known: dict[str, Any] = {
            "id": self.id,
            "route": [list(segment) for segment in self.route],
            "layers": list(self.layers),
        }
        if self.skips_neck:
            known["skips_neck"] = True
        for name in _FIGURES:
            if getattr(self, name) is not None:
                known[name] = getattr(self, name)
        if self.metrics:
            known["metrics"] = dict(self.metrics)
        return known

    @classmethod
    def from_dict(cls, stitch: Mapping[str, Any]) -> "Stitch":
        """The inverse of `to_dict`.

        Raises:
            ValueError: an unknown key, no id or route, a segment that is not three integers, or a figure that is no
                number.
        """
        unknown = set(stitch) - set(cls.__dataclass_fields__)
        if unknown or "id" not in stitch or "route" not in stitch:
            known = ", ".join(cls.__dataclass_fields__)
            raise ValueError(f"a stitch is {{{known}}} with at least id and route; got {sorted(stitch)}")
        route, layers = stitch["route"], stitch.get("layers", ())
        if not _is_list(route) or not all(_is_list(segment) for segment in route):
            raise ValueError(f"stitch {stitch['id']}: the route must be a list of segments, got {route!r}")
        if not _is_list(layers) or not all(isinstance(name, str) for name in layers):
            raise ValueError(f"stitch {stitch['id']}: layers must be a list of names, got {layers!r}")
        for segment in route:
            if len(segment) != 3 or not all(type(number) is int for number in segment):
                raise ValueError(f"stitch {stitch['id']}: segment {segment} is not [anchor, start, stop] in integers")
        figures, metrics = {name: stitch.get(name) for name in _FIGURES}, stitch.get("metrics", {})
        if not isinstance(metrics, Mapping):
            raise ValueError(f"stitch {stitch['id']}: the metrics must be figures by name, got {metrics!r}")
        for name, figure in {**figures, **metrics}.items():
            if not _is_number(figure) and (figure is not None or name in metrics):
                raise ValueError(f"stitch {stitch['id']}: {name} must be a number, got {figure!r}")
        segments = tuple(Segment(*segment) for segment in route)
        return cls(**{**stitch, "route": segments, "layers": tuple(layers)})


class Stitches(tuple[Stitch, ...]):
    """The stitches of a model, in the order of its config; shown one per line, of many the first and the last."""

    __slots__ = ()

    def __repr__(self) -> str:
        """A line per stitch."""
        shown = [f"    {stitch!r},\n" for stitch in self]
        if len(shown) > 2 * _SHOWN:
            shown[_SHOWN:-_SHOWN] = [f"    ... {len(shown) - 2 * _SHOWN} more ...\n"]
        return f"({len(self)} stitches\n{''.join(shown)})"


def layer_name(front: int, back: int, index: int) -> str:
    """The name of the index-th stitching layer from anchor `front` to anchor `back`."""
    return f"{front}-{back}.{index}"


def check_name(architecture: Any) -> None:
    """Refuse what cannot be the name of an architecture, such as a path, an address or text that is markup elsewhere.

    Raises:
        ValueError: it has more than letters, digits, "_", "-" and ".".
    """
    if not isinstance(architecture, str) or not _ARCHITECTURE.fullmatch(architecture):
        raise ValueError(
            f"an architecture is named by letters, digits, '_', '-' and '.', as timm names its models; got "
            f"{architecture!r}"
        )


def check_stitches(stitches: Sequence[Stitch], depths: Sequence[int]) -> None:
    """Refuse stitches that do not fit anchors of these depths (in blocks).

    Raises:
        ValueError: no stitch, an id twice, or a route with an unknown anchor, a gap, an overlap, an empty segment, an
            end that is not the anchor's, or a stitching layer that does not join its two anchors.
    """
    if not stitches:
        raise ValueError("the config has no stitch; a stitchable model needs at least one")
    times = Counter(stitch.id for stitch in stitches)
    for stitch in stitches:
        check_integer(stitch.id, "stitch id")
        if times[stitch.id] > 1:
            raise ValueError(f"stitch id {stitch.id} occurs {times[stitch.id]} times; ids must be unique")
        problem = _problem_of_route(stitch, depths)
        if problem:
            raise ValueError(f"stitch {stitch.id}, route {[list(segment) for segment in stitch.route]}: {problem}")


def _problem_of_route(stitch: Stitch, depths: Sequence[int]) -> str | None:
    route = stitch.route
    if not route:
        return "it has no segment"
    for segment in route:
        if not 0 <= segment.anchor < len(depths):
            return f"anchor {segment.anchor} is out of range, there are {len(depths)} anchors (0..{len(depths) - 1})"
        depth = depths[segment.anchor]
        if not 0 <= segment.start < segment.stop <= depth:
            return (
                f"segment {list(segment)} is empty or out of range, anchor {segment.anchor} has blocks 0..{depth - 1}"
            )
    if route[0].start != 0:
        return f"gap: the first segment must start at 0, not at {route[0].start}"
    if route[-1].stop != depths[route[-1].anchor]:
        return f"gap: the last segment must stop at {depths[route[-1].anchor]}, not at {route[-1].stop}"
    for front, back in pairwise(route):
        if front.anchor == back.anchor:
            kind = "gap" if back.start > front.stop else "overlap" if back.start < front.stop else "needless cut"
            return f"{kind} between {list(front)} and {list(back)}: segments of one anchor must be one segment"
    if len(stitch.layers) != len(route) - 1:
        return f"{len(route)} segments need {len(route) - 1} stitching layers, it names {list(stitch.layers)}"
    for name, front, back in stitch.joints:
        match = _LAYER_NAME.fullmatch(name)
        if match is None or (int(match[1]), int(match[2])) != (front.anchor, back.anchor):
            return (
                f"unknown stitching layer {name!r}, between anchors {front.anchor} and {back.anchor} it must be "
                f"named '{front.anchor}-{back.anchor}.INDEX'"
            )
    return None


def find_stitch(stitches: Sequence[Stitch], stitch_id: int | None, left_out: Sequence[int] = ()) -> Stitch:
    """The stitch with this id.

    Args:
        stitches: those there are.
        stitch_id: the one that is wanted.
        left_out: ids of stitches that are known, but were not loaded.

    Raises:
        ValueError: not an integer, or no stitch has it.
    """
    wanted = check_integer(stitch_id, "stitch_id")
    for stitch in stitches:
        if stitch.id == wanted:
            return stitch
    ids = [stitch.id for stitch in stitches]
    nearest = min(ids, key=lambda known: abs(known - wanted))
    if wanted in left_out:
        raise ValueError(
            f"stitch {wanted} was left out of this model, which has {_listed(ids)}; load the checkpoint without "
            "stitch_id and max_flops, or with others"
        )
    raise ValueError(f"stitch_id {wanted} is out of range: this model has {_listed(ids)}; the nearest is {nearest}")


def best_within(
    stitches: Sequence[Stitch],
    *,
    flops: float | None = None,
    params: float | None = None,
    latency_ms: float | None = None,
    memory_mb: float | None = None,
    metric: str = "accuracy",
) -> Stitch:
    """The stitch with the highest `metric` among those within every bound given.

    Among equals the one with fewer FLOPs wins. Where none within the bounds has been measured, the largest FLOPs win.

    Args:
        stitches: the candidates.
        flops: upper bound on multiply-adds plus normalisation terms, per image.
        params: upper bound on parameters.
        latency_ms: upper bound on milliseconds per call; only calibrated stitches have one.
        memory_mb: upper bound on the peak of memory, in 10^6 bytes; only calibrated stitches have one.
        metric: the key of `Stitch.metrics` to maximise; one that is better when higher.

    Raises:
        ValueError: no bound, a bound that is no positive number, a bound on something no stitch carries, a metric no
            stitch has although others were measured, or no stitch within the bounds (names the cheapest).
    """
    _check_metric(stitches, metric)
    affordable = within(stitches, flops=flops, params=params, latency_ms=latency_ms, memory_mb=memory_mb)
    measured = [stitch for stitch in affordable if is_measured(stitch, metric)]
    if measured:
        return max(measured, key=lambda stitch: (stitch.metrics[metric], -(stitch.flops or 0)))
    return max(affordable, key=lambda stitch: stitch.flops or 0)


def is_measured(stitch: Stitch, metric: str) -> bool:
    """Whether a stitch has a figure of this metric that can be compared."""
    return math.isfinite(stitch.metrics.get(metric, math.nan))


def within(stitches: Sequence[Stitch], **given: float | None) -> list[Stitch]:
    """The stitches within every bound that is given, by the names and with the errors of `best_within`."""
    bounds = {name: _check_bound(bound, name) for name, bound in given.items() if bound is not None}
    if not bounds:
        raise ValueError("a budget needs at least one of flops, params, latency_ms and memory_mb")
    for name in bounds:
        if all(getattr(stitch, name) is None for stitch in stitches):
            hint = (
                "; stitchable.calibrate(model) predicts it for this device"
                if name in ("latency_ms", "memory_mb")
                else ""
            )
            raise ValueError(f"no stitch of this model carries {name}, so it cannot be a budget{hint}")
    affordable = [stitch for stitch in stitches if all(_within(stitch, name, bounds[name]) for name in bounds)]
    if not affordable:
        asked = ", ".join(f"{name} <= {bound:g}" for name, bound in bounds.items())
        cheapest = "; ".join(f"by {name} {_cheapest(stitches, name)}" for name in bounds)
        raise ValueError(f"no stitch is within {asked}; the cheapest is, {cheapest}")
    return affordable


def restrict(
    stitches: Sequence[Stitch], default: int | None, stitch_id: int | None, max_flops: float | None
) -> tuple[list[Stitch], int | None]:
    """The stitches to keep of a checkpoint of which a part is loaded, and the default among them.

    Args:
        stitches: of the checkpoint.
        default: of the checkpoint.
        stitch_id: the stitch to keep, alone if there is no `max_flops`; it is the default then.
        max_flops: every stitch up to these FLOPs is kept.

    Raises:
        ValueError: no stitch has this id, or none is within these FLOPs.
    """
    if stitch_id is not None:
        chosen = find_stitch(stitches, stitch_id)
        if max_flops is None:
            return [chosen], chosen.id
        default = chosen.id
    best = best_within(stitches, flops=max_flops)
    kept = [stitch for stitch in stitches if stitch.flops is not None and stitch.flops <= float(max_flops or 0)]
    if any(stitch.id == default for stitch in kept):
        return kept, default
    if stitch_id is not None:
        raise ValueError(f"stitch_id {stitch_id} is beyond max_flops {max_flops:g}; give one of them")
    return kept, best.id


def pareto_front(stitches: Iterable[Stitch], metric: str = "accuracy") -> list[Stitch]:
    """The measured stitches that no other beats in both FLOPs and metric, cheapest first."""
    front: list[Stitch] = []
    measured = [stitch for stitch in stitches if is_measured(stitch, metric) and stitch.flops is not None]
    for stitch in sorted(measured, key=lambda stitch: (stitch.flops, -stitch.metrics[metric])):
        if not front or stitch.metrics[metric] > front[-1].metrics[metric]:
            front.append(stitch)
    return front


def _listed(ids: Sequence[int]) -> str:
    if len(ids) == 1:
        return f"stitch {ids[0]} only"
    return f"stitches {ids[0]}..{ids[-1]}" if ids == list(range(ids[0], ids[-1] + 1)) else f"stitches {ids}"


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (type(value) is int and abs(value) < 1 << 63)


def check_integer(value: Any, name: str) -> int:
    """`value` as an int.

    Raises:
        ValueError: it is not an integer (a boolean is none here).
    """
    # bool is an int in Python, but set_stitch(True) is a mistake.
    if isinstance(value, bool):
        raise ValueError(f"{name} must be an integer, got {value!r}")
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be an integer, got {value!r} ({type(value).__name__})") from None


def _check_bound(bound: Any, name: str) -> float:
    try:
        number = float(bound)
    except (TypeError, ValueError):
        raise ValueError(f"the budget {name} must be a number, got {bound!r}") from None
    if math.isnan(number) or number <= 0:
        raise ValueError(f"the budget {name} must be a positive number, got {bound!r}")
    return number


def _check_metric(stitches: Sequence[Stitch], metric: str) -> None:
    if metric == "loss":
        raise ValueError("a budget maximises its metric, and a loss is better when it is lower; choose another")
    known = {name for stitch in stitches for name in stitch.metrics}
    if known and metric not in known:
        raise ValueError(f"no stitch has been measured by {metric!r}; there are {sorted(known)}")


def _within(stitch: Stitch, name: str, bound: float) -> bool:
    cost = getattr(stitch, name)
    return cost is not None and cost <= bound


def _cheapest(stitches: Sequence[Stitch], name: str) -> str:
    stitch = min((stitch for stitch in stitches if getattr(stitch, name) is not None), key=operator.attrgetter(name))
    return f"stitch {stitch.id} ({name} {getattr(stitch, name):g})"
