"""Which architectures can be stitched: a table of timm's modules, with the reason where one cannot."""

import difflib
import traceback
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import timm
import torch
from timm.models import build_model_with_cfg
from torch import nn
from transformers.utils import logging

from stitchable.families.adapter import Adapter
from stitchable.families.registry import adapter_of_class, create_model, find_adapter, own_architectures


@dataclass(frozen=True)
class Module:
    """What is known of a module of timm, such as `timm.models.convnext`.

    Attributes:
        name: without "timm.models."; for your own architectures the name of their class.
        architectures: how many it has, of `timm.list_models()`.
        supported: how many of them can be anchors.
        pattern: the layout of the features and where the blocks are; empty where none is supported.
        reasons: why the others cannot, each reason once.
    """

    name: str
    architectures: int
    supported: int
    pattern: str
    reasons: tuple[str, ...]


def survey(modules: Collection[str] = ()) -> list[Module]:
    """Look at every architecture of some modules of timm, or of all, and of your own registered families.

    Args:
        modules: their names, such as "convnext"; all if there is none.

    Raises:
        ValueError: timm has no such module.
    """
    known = {name: timm.list_models(module=name) for name in timm.list_modules()}
    known = {name: architectures for name, architectures in known.items() if architectures}
    for name, model_class in own_architectures().items():
        known.setdefault(model_class.__name__, []).append(name)
    unknown = set(modules) - set(known)
    if unknown:
        near = difflib.get_close_matches(min(unknown), known, n=3) or sorted(known)
        raise ValueError(f"timm {timm.__version__} has no module {min(unknown)!r}; the nearest are {', '.join(near)}")
    chosen = sorted(modules or known)
    return [_look_at(name, known[name]) for name in logging.tqdm(chosen, desc="looking at modules", leave=False)]


def timm_modules() -> list[str]:
    """The modules of timm itself that have classifiers, without those that were registered with it later."""
    return [name for name in timm.list_modules() if hasattr(timm.models, name) and timm.list_models(module=name)]


def to_markdown(modules: Sequence[Module]) -> str:
    """The table, and the sum below it."""
    rows = [
        f"| {row.name} | {row.architectures} | {row.supported} | {row.pattern} | {'; '.join(row.reasons)} |"
        for row in modules
    ]
    head = ["| module | architectures | supported | pattern | why not |", "|:---|---:|---:|:---|:---|"]
    return "\n".join([*head, *rows, "", total(modules)])


def total(modules: Sequence[Module]) -> str:
    """How many modules and architectures there are, and how many can be stitched."""
    timms = [module for module in modules if module.name in timm_modules()]
    supported = [module for module in timms if module.supported]
    own = sum(module.architectures for module in modules) - sum(module.architectures for module in timms)
    return (
        f"timm {timm.__version__}: {len(supported)} of {len(timms)} modules, "
        f"{sum(module.supported for module in timms):,} of {sum(module.architectures for module in timms):,} "
        f"architectures{f', and {own} of your own' if own else ''}."
    )


def to_dicts(modules: Sequence[Module]) -> list[dict[str, Any]]:
    """The table in JSON types."""
    return [asdict(module) for module in modules]


def _look_at(name: str, architectures: Sequence[str]) -> Module:
    patterns: Counter[str] = Counter()
    reasons: dict[str, None] = {}
    for architecture in architectures:
        adapter = _adapter_of(architecture)
        if isinstance(adapter, Adapter):
            patterns[describe_pattern(adapter)] += 1
        else:
            reasons[adapter] = None
    return Module(
        name,
        architectures=len(architectures),
        supported=sum(patterns.values()),
        pattern="; ".join(pattern for pattern, _ in patterns.most_common()),
        reasons=tuple(reasons),
    )


def _adapter_of(architecture: str) -> Adapter | str:
    """The adapter of an architecture, or why it has none."""
    try:
        model_class = own_architectures().get(architecture) or _class_of(architecture)
        if model_class is not None:
            adapter = adapter_of_class(model_class)
            if isinstance(adapter, Adapter):
                return adapter
        with torch.device("meta"):
            return find_adapter(create_model(architecture, num_classes=None))
    except ValueError as error:
        return str(error).partition(" cannot be stitched: ")[2] or str(error)


def _class_of(architecture: str) -> type[nn.Module] | None:
    """The class that timm constructs for an architecture, without building it; None if that cannot be seen.

    Building all of timm's models takes minutes, even on the meta device. No constructor takes the argument given here,
    and where it is refused, the builder that all of timm's models pass through had the class in hand.
    """
    try:
        with torch.device("meta"):
            return type(timm.create_model(architecture, no_such_argument=True))
    except TypeError as error:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            if frame.f_code is build_model_with_cfg.__code__:
                return frame.f_locals["model_cls"]
    return None


def describe_pattern(adapter: Adapter) -> str:
    """The layout of the features and where the blocks are, such as "NCHW: `stages.*`"."""
    names = [stage if isinstance(stage, str) else _first_part(stage) for stage in adapter.stages]
    return f"{adapter.layout.value}: {', '.join(f'`{name}`' for name in names)}"


def _first_part(stage: Sequence[Any]) -> str:
    parts = [part for block in stage for part in block if isinstance(part, str)]
    return f"{parts[0]}, ..." if len(parts) > 1 else parts[0]
