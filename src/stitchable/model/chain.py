"""A classifier run as a chain: stem, L blocks, neck, head; usually one of timm's (https://github.com/huggingface/pytorch-image-models).

The layers themselves, their parameter names and their arithmetic stay the model's. Which of them are the stem, which a
block, is said by the description in config.json, by name.
"""

import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import nn

from .operations import OPERATIONS, Grid, TimmModel


class Layout(str, Enum):
    """The layout of the features between blocks: batch N, channels C, grid height H and width W, tokens L."""

    NCHW = "NCHW"
    NHWC = "NHWC"
    NLC = "NLC"  # prefix tokens first, then the grid row by row
    UNITS = "UNITS"  # tokens (N, L, C) in the order of Hiera's mask units; meets its like only


Operation = str | Callable[[TimmModel, torch.Tensor], Any]
"""A step of a part: a submodule or method, which is called, or a parameter, which is added (a position embedding), by
name; one that is None in a model is passed over. Or a function of the model and its features. An operation of a stem
may return a tuple: the features, and the context of the blocks."""

Block = tuple[Operation, ...]

Part = str | int
"""What of a model is needed together: "stem", "prefix" (own prefix tokens), "context", a number of a block, "head"."""

_FUNCTION = "function:"  # what the name of a function begins with in a description


class Flow(NamedTuple):
    """What flows through a stitch at one cut.

    Attributes:
        features: in the layout of the current anchor.
        pixel_values: the images (N, C, H, W), for the context of an anchor that is entered.
        context: what the blocks of the current anchor get besides: rotary embeddings, sizes, a second stream.
    """

    features: torch.Tensor
    pixel_values: torch.Tensor
    context: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Chain:
    """The parts of one model, by name. Holds no modules, so it is the same for every copy of the model.

    Attributes:
        stem: what turns pixel values into the features of cut 0, in order.
        blocks: the operations of each block.
        neck: what follows the last block before the head, such as a final norm. It belongs to the head.
        head: what turns the features into logits, the classifier last; empty for timm's own `forward_head`.
        prefix: parameters (1, tokens, C) that the stem puts in front of the grid, in order.
        own_prefix: what these are at cut 0 (1, tokens, C), a function of the model, if not their sum with the first
            positions of `pos_embed` (unless the model says `no_embed_class`) after `norm_pre`, as in timm's ViT.
        call: how an operation of a block is called, if not as `operation(features, *context)`: a function of the model,
            the operation, the number of the block, the features and the context. It returns the features, or a tuple of
            the features and the context of the next block.
        context: what the blocks need besides the features, when the stem returns none and when a stitch enters the
            anchor in its middle: a function of the model, the features, the pixel values and the grid (None after the
            anchor's own stem) that returns a tuple.
        parts: names of submodules and parameters that belong to "stem", "prefix", "context" or "head"; those of a block
            belong to it, and what is named nowhere to the head.
    """

    stem: tuple[Operation, ...]
    blocks: tuple[Block, ...]
    neck: tuple[Operation, ...] = ()
    head: tuple[Operation, ...] = ()
    prefix: tuple[str, ...] = ()
    own_prefix: Callable[[TimmModel], torch.Tensor] | None = None
    call: Callable[..., Any] | None = None
    context: Callable[[TimmModel, torch.Tensor, torch.Tensor, Grid | None], tuple[Any, ...]] | None = None
    parts: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON types only, the form it has in `config.json`; what is empty is left out."""
        described = {
            "stem": list(map(_name, self.stem)),
            "blocks": [list(map(_name, block)) for block in self.blocks],
            "neck": list(map(_name, self.neck)),
            "head": list(map(_name, self.head)),
            "prefix": list(self.prefix),
            **{name: _name(getattr(self, name)) for name in _FUNCTIONS if getattr(self, name)},
            "parts": {part: list(names) for part, names in self.parts.items() if names},
        }
        return {name: value for name, value in described.items() if value}

    @classmethod
    def from_dict(cls, described: Mapping[str, Any], model_class: type | None = None) -> "Chain":
        """The inverse of `to_dict`.

        Args:
            described: the "chain" of an anchor of the config.
            model_class: whose file may define functions of the description, if it is none of timm's.

        Raises:
            ValueError: other keys, names that are none, or a function that neither operations.py nor that file has.
        """
        check_description(described)

        def found(name: str) -> Any:
            return _function(name.removeprefix(_FUNCTION), model_class) if name.startswith(_FUNCTION) else name

        lists: dict[str, Any] = {name: tuple(map(found, described.get(name, ()))) for name in ("stem", "neck", "head")}
        return cls(
            **lists,
            blocks=tuple(tuple(map(found, block)) for block in described["blocks"]),
            prefix=tuple(described.get("prefix", ())),
            parts={part: tuple(names) for part, names in described.get("parts", {}).items()},
            **{name: found(described[name]) for name in _FUNCTIONS if name in described},
        )

    def check_names(self, model: TimmModel) -> None:
        """Refuse a model that lacks what this chain names.

        Raises:
            ValueError: names the first part that is missing.
        """
        named = [*self.stem, *(part for block in self.blocks for part in block), *self.neck, *self.head, *self.prefix]
        for name in (*named, *(name for names in self.parts.values() for name in names)):
            try:
                if isinstance(name, str):
                    attrgetter(name)(model)
            except AttributeError as error:
                raise lacking(model, error) from None

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    def run_stem(self, model: TimmModel, pixel_values: torch.Tensor) -> Flow:
        """Pixel values (N, C, H, W) to what flows at cut 0."""
        features, context = pixel_values, None
        for operation in self.stem:
            result = _run(model, operation, features)
            features, *rest = result if isinstance(result, tuple) else (result,)
            context = rest or context
        if context is None:
            return self.enter(model, features, pixel_values, None)
        return Flow(features, pixel_values, tuple(context))

    def enter(self, model: TimmModel, features: torch.Tensor, pixel_values: torch.Tensor, grid: Grid | None) -> Flow:
        """What flows at a cut of this anchor where features come in from another; `grid` is that of the cut."""
        context = self.context
        return Flow(features, pixel_values, () if context is None else context(model, features, pixel_values, grid))

    def run_block(self, model: TimmModel, index: int, flow: Flow) -> Flow:
        """What flows at cut `index` to what flows at cut `index + 1`."""
        features, pixel_values, context = flow
        for operation in self.blocks[index]:
            part = attrgetter(operation)(model) if isinstance(operation, str) else operation
            if self.call is not None:
                result = self.call(model, part, index, features, *context)
            elif isinstance(part, nn.Module):
                result = part(features, *context)
            else:
                result = _run(model, operation, features)
            features, *rest = result if isinstance(result, tuple) else (result, *context)
            context = tuple(rest)
        return Flow(features, pixel_values, context)

    def run_neck(self, model: TimmModel, flow: Flow) -> Flow:
        """What flows at cut L to what timm's `forward_features` returns."""
        features = flow.features
        for operation in self.neck:
            features = _run(model, operation, features)
        return flow._replace(features=features)

    def run_head(self, model: TimmModel, features: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Features after the neck to logits (N, num_labels), or to what the classifier gets."""
        if not self.head:
            return model.forward_head(features, pre_logits=pre_logits)
        for operation in self.head[:-1] if pre_logits else self.head:
            features = _run(model, operation, features)
        return features

    def prefix_of(self, model: TimmModel) -> torch.Tensor:
        """The prefix tokens (1, tokens, C) of cut 0, for features that come without."""
        if self.own_prefix is not None:
            return self.own_prefix(model)
        tokens = torch.cat([attrgetter(name)(model) for name in self.prefix], dim=1)
        positions = getattr(model, "pos_embed", None)
        if positions is not None and not getattr(model, "no_embed_class", False):
            tokens = tokens + positions[:, : tokens.shape[1]]
        return _run(model, "norm_pre", tokens) if hasattr(model, "norm_pre") else tokens

    def modules_of_blocks(self, model: TimmModel) -> dict[str, nn.Module]:
        """The submodules that the blocks of a model consist of, by name."""
        named = {part: attrgetter(part)(model) for block in self.blocks for part in block if isinstance(part, str)}
        return {name: module for name, module in named.items() if isinstance(module, nn.Module)}

    def modules_for(self, model: TimmModel, block: int) -> Collection[nn.Module]:
        """The submodules that a block needs, the model itself among them; all but those of the blocks if it is -1."""
        if block >= 0:
            parts = [attrgetter(part)(model) for part in self.blocks[block] if isinstance(part, str)]
            return [model, *(module for part in parts if isinstance(part, nn.Module) for module in part.modules())]
        blocks = {module for part in self.modules_of_blocks(model).values() for module in part.modules()}
        return [module for module in model.modules() if module not in blocks]

    @cached_property
    def owners(self) -> Mapping[str, Part]:
        """Submodules and parameters by name, with the part that they belong to."""
        owners: dict[str, Part] = {name: part for part, names in self.parts.items() for name in names}
        for index, block in enumerate(self.blocks):
            owners.update({name: index for name in block if isinstance(name, str) and name not in owners})
        return owners

    def part_of(self, name: str) -> Part:
        """Which part owns the submodule, parameter or buffer `name`."""
        pieces = name.split(".")
        for length in range(len(pieces), 0, -1):
            part = self.owners.get(".".join(pieces[:length]))
            if part is not None:
                return part
        return "head"

    def keep_only(self, model: TimmModel, parts: Collection[Part]) -> None:
        """Drop what the parts do not need; the names of the rest stay."""
        self._hollow_out(model, "", parts)
        for name, _ in [*model.named_parameters(), *model.named_buffers()]:
            if self.part_of(name) not in parts:
                owner, _, attribute = name.rpartition(".")
                setattr(model.get_submodule(owner), attribute, None)

    def _hollow_out(self, module: nn.Module, prefix: str, parts: Collection[Part]) -> None:
        for name, child in list(module.named_children()):
            path = f"{prefix}{name}"
            if any(owner.startswith(f"{path}.") for owner in self.owners):
                self._hollow_out(child, f"{path}.", parts)
            elif self.part_of(path) not in parts and [*child.parameters(), *child.buffers()]:
                # What has no weights costs nothing, and other parts may use it too: a dropout of positions.
                setattr(module, name, nn.Identity())


def lacking(model: TimmModel, error: AttributeError) -> ValueError:
    """The error for a model that lacks a part of its description."""
    return ValueError(f"the description of {type(model).__name__} names a part that this model lacks: {error}")


PARTS = ("stem", "prefix", "context", "head")
_FUNCTIONS = ("own_prefix", "call", "context")


def check_description(described: Any) -> None:
    """Refuse what is no description of a chain.

    Raises:
        ValueError: names the key.
    """
    keys = ("stem", "blocks", "neck", "head", "prefix", *_FUNCTIONS, "parts")
    if not isinstance(described, Mapping) or not {"stem", "blocks"} <= set(described) <= set(keys):
        raise ValueError(f"the chain of an anchor is a mapping of {', '.join(keys)}, at least of the first two")
    for key, value in described.items():
        if key in _FUNCTIONS:
            good = isinstance(value, str) and value.startswith(_FUNCTION)
        elif key == "blocks":
            good = isinstance(value, list | tuple) and len(value) > 0 and all(map(_are_names, value))
        elif key == "parts":
            good = isinstance(value, Mapping) and set(value) <= set(PARTS)
            good = good and all(map(_are_names, value.values()))
        else:
            good = _are_names(value)
        if not good:
            raise ValueError(f"{key} of the chain of an anchor is not made of names: {value!r}")


def _are_names(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(name, str) and name for name in value)


def _name(operation: Any) -> str:
    if isinstance(operation, str):
        return operation
    name = getattr(operation, "__name__", "")
    if OPERATIONS.get(name) is not operation and not name.isidentifier():
        raise ValueError(f"{operation!r} has no name by which a config could call it; define a function in a file")
    return f"{_FUNCTION}{name}"


def _function(name: str, model_class: type | None) -> Callable[..., Any]:
    if name in OPERATIONS:
        return OPERATIONS[name]
    file = sys.modules.get(model_class.__module__) if model_class else None
    function = getattr(file, name, None)
    if file is None or function is None or getattr(function, "__module__", None) != file.__name__:
        place = f" nor in the file of {model_class.__name__}" if model_class else ""
        raise ValueError(f"the chain of an anchor names a function {name!r} that is not in operations.py{place}")
    return function


def _run(model: TimmModel, operation: Operation, features: torch.Tensor) -> Any:
    if not isinstance(operation, str):
        return operation(model, features)
    part = attrgetter(operation)(model)
    if part is None:
        return features
    return features + part if isinstance(part, nn.Parameter) else part(features)
