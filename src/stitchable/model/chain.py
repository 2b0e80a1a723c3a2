"""A classifier run as a chain: stem, L blocks, neck, head; usually one of timm's.

The layers themselves, their parameter names and their arithmetic stay the model's. Which of them are the stem, which a
block, is said by the description in config.json, by name.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import attrgetter
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from .architectures import check_name, create_model
from .operations import FUNCTION, Grid, TimmModel, find_function
from .routes import AnchorShape, Stitch, carried_tokens
from .schema import read

Operation = str
"""A step of a part, by name: a submodule or method, which is called, or a parameter, which is added (a position
embedding); one that is None in a model is passed over. Or "function:NAME" of operations.py, "function:FILE.NAME" of a
file beside the config, which gets the model and its features. An operation of a stem may return a tuple: the features,
and the context of the blocks."""

Part = str | int
"""What of a model is needed together: "stem", "prefix" (own prefix tokens), "context", a number of a block, "head"."""

PARTS = ("stem", "prefix", "context", "head")
NECK = -1
"""The number of what follows the last block, where blocks are counted."""

_OF_A_FILE = re.compile(r"[^\W\d]\w*\.[^\W\d]\w*")


class Flow(NamedTuple):
    """What flows through a stitch at one cut."""

    features: torch.Tensor  # in the layout of the current anchor
    pixel_values: torch.Tensor  # (N, C, H, W), for the context of an anchor that is entered
    context: tuple[Any, ...] = ()  # what the blocks get besides: rotary embeddings, sizes, a second stream

    def select(self, images: torch.Tensor, per_image: bool | None) -> "Flow":
        """That of some images of the batch, by their numbers; `per_image` says whether their context is one of each.

        None, where the function that makes it does not say so (`function.per_image = True`): what is as long as the
        batch is taken for that.
        """
        number = len(self.pixel_values)

        def selected(x: Any) -> Any:
            if not isinstance(x, torch.Tensor) or not (len(x) == number if per_image is None else per_image):
                return x
            return x.unflatten(0, (number, -1))[images.to(x.device)].flatten(0, 1)

        features, pixel_values = (x[images.to(x.device)] for x in (self.features, self.pixel_values))
        return Flow(features, pixel_values, tuple(map(selected, self.context)))


@dataclass(frozen=True)
class Chain:
    """The parts of one model, by name. Holds no modules, so it is the same for every copy of the model."""

    stem: tuple[Operation, ...]  # what turns pixel values into the features of cut 0, in order
    blocks: tuple[tuple[Operation, ...], ...]
    neck: tuple[Operation, ...] = ()  # what follows the last block before the head, such as a final norm; the head's
    head: tuple[Operation, ...] = ()  # features to logits, the classifier last; empty for timm's own `forward_head`
    prefix: tuple[str, ...] = ()  # parameters (1, tokens, C) that the stem puts in front of the grid, in order
    # "function:NAME" of what these are at cut 0 (1, tokens, C), given the model, if not their sum with the first
    # positions of `pos_embed` (unless it says `no_embed_class`) after `norm_pre`, as in timm's ViT.
    own_prefix: str | None = None
    # "function:NAME" of how an operation of a block is called, if not as `operation(features, *context)`: given the
    # model, the operation, the number of the block, the features and the context. It returns the features, or a tuple
    # of the features and the context of the next block.
    call: str | None = None
    # "function:NAME" of what the blocks need besides the features, a tuple, when the stem returns none and when the
    # anchor is entered in its middle: given the model, the features, the pixel values and the grid (None after its own
    # stem).
    context: str | None = None
    # Names of submodules and parameters that belong to "stem", "prefix", "context" or "head"; those of a block belong
    # to it, and what is named nowhere to the head.
    parts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    functions: ClassVar[dict[str, Any]]  # of each chain, by the names that begin so; `check_names` finds them

    def __post_init__(self) -> None:
        """Refuse what no model could be made of."""
        if not self.blocks or not all(self._names):
            raise ValueError("a chain has at least one block, and no empty names")
        for key in ("own_prefix", "call", "context"):
            if not (getattr(self, key) or FUNCTION).startswith(FUNCTION):
                raise ValueError(f"{key} must be '{FUNCTION}NAME', got {getattr(self, key)!r}")
        for name in self.code:
            if not _OF_A_FILE.fullmatch(name):
                raise ValueError(f"a function is 'NAME', or 'file.NAME' of a file beside the config, got {name!r}")
        if not set(self.parts) <= set(PARTS):
            raise ValueError(f"the parts are {', '.join(PARTS)}, got {', '.join(self.parts)}")
        object.__setattr__(self, "functions", {})

    @property
    def _names(self) -> list[str]:
        functions = filter(None, (self.own_prefix, self.call, self.context))
        lists = (self.stem, *self.blocks, self.neck, self.head, self.prefix, *self.parts.values(), functions)
        return [name for names in lists for name in names]

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @property
    def code(self) -> set[str]:
        """The functions of files beside the config, as "file.name"."""
        return {name.removeprefix(FUNCTION) for name in self._names if name.startswith(FUNCTION) and "." in name}

    @property
    def per_image(self) -> bool | None:
        """Whether the context of the blocks holds something of each image; None where its function does not say so."""
        return getattr(self.functions[self.context], "per_image", None) if self.context else False

    def check_names(self, model: TimmModel) -> None:
        """Refuse with a ValueError a model that lacks what this chain names, and functions that nobody knows."""
        for name in self._names:
            try:
                if name.startswith(FUNCTION):
                    self.functions[name] = find_function(name.removeprefix(FUNCTION))
                else:
                    attrgetter(name)(model)
            except AttributeError as error:
                raise lacking(model, error) from None

    def run_stem(self, model: TimmModel, pixel_values: torch.Tensor) -> Flow:
        """Pixel values (N, C, H, W) to what flows at cut 0."""
        features, context = pixel_values, None
        for name in self.stem:
            result = self._run(model, name, features)
            features, *rest = result if isinstance(result, tuple) else (result,)
            context = rest or context
        if context is None:
            return self.enter(model, features, pixel_values, None)
        return Flow(features, pixel_values, tuple(context))

    def enter(self, model: TimmModel, features: torch.Tensor, pixel_values: torch.Tensor, grid: Grid | None) -> Flow:
        """What flows at a cut of this anchor where features come in from another; `grid` is that of the cut."""
        if self.context is None:
            return Flow(features, pixel_values)
        return Flow(features, pixel_values, self.functions[self.context](model, features, pixel_values, grid))

    def run_block(self, model: TimmModel, index: int, flow: Flow) -> Flow:
        """What flows at cut `index` to what flows at cut `index + 1`."""
        features, context, call = flow.features, [*flow.context], self.functions.get(self.call or "")
        for name in self.blocks[index]:
            if call is None:
                result = self._run(model, name, features, context)
            else:
                part = self.functions.get(name) or attrgetter(name)(model)
                result = call(model, part, index, features, *context)
            features, *context = result if isinstance(result, tuple) else (result, *context)
        return Flow(features, flow.pixel_values, tuple(context))

    def run_neck(self, model: TimmModel, flow: Flow) -> Flow:
        """What flows at cut L to what timm's `forward_features` returns."""
        return flow._replace(features=self._run_all(model, self.neck, flow.features))

    def run_head(self, model: TimmModel, features: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Features after the neck to logits (N, num_labels), or to what the classifier gets."""
        if not self.head:
            return model.forward_head(features, pre_logits=pre_logits)
        return self._run_all(model, self.head[:-1] if pre_logits else self.head, features)

    def _run_all(self, model: TimmModel, names: Sequence[Operation], features: torch.Tensor) -> torch.Tensor:
        for name in names:
            features = self._run(model, name, features)
        return features

    def _run(self, model: TimmModel, name: Operation, features: torch.Tensor, context: Sequence[Any] = ()) -> Any:
        if name in self.functions:
            return self.functions[name](model, features)
        part = attrgetter(name)(model)
        if isinstance(part, nn.Module):
            return part(features, *context)
        if part is None:
            return features
        return features + part if isinstance(part, nn.Parameter) else part(features)

    def prefix_of(self, model: TimmModel) -> torch.Tensor:
        """The prefix tokens (1, tokens, C) of cut 0, for features that come without."""
        if self.own_prefix is not None:
            return self.functions[self.own_prefix](model)
        tokens = torch.cat([attrgetter(name)(model) for name in self.prefix], dim=1)
        positions = getattr(model, "pos_embed", None)
        if positions is not None and not getattr(model, "no_embed_class", False):
            tokens = tokens + positions[:, : tokens.shape[1]]
        return model.norm_pre(tokens) if getattr(model, "norm_pre", None) is not None else tokens

    def operations_of(self, block: int) -> tuple[Operation, ...]:
        """Those of a block, or of the neck (-1)."""
        return self.neck if block == NECK else self.blocks[block]

    def modules_of(self, model: TimmModel, operations: Sequence[Operation] | None = None) -> dict[str, nn.Module]:
        """Those operations that are submodules of a model, by name; of all blocks if None."""
        names = [name for block in self.blocks for name in block] if operations is None else operations
        named = {name: attrgetter(name)(model) for name in names if not name.startswith(FUNCTION)}
        return {name: module for name, module in named.items() if isinstance(module, nn.Module)}

    @cached_property
    def _owners(self) -> Mapping[str, Part]:
        """Submodules and parameters by name, with the part that they belong to."""
        owners: dict[str, Part] = {name: part for part, names in self.parts.items() for name in names}
        for index, block in enumerate(self.blocks):
            owners.update({name: index for name in block if name not in owners})
        return owners

    def part_of(self, name: str) -> Part:
        """Which part owns the submodule, parameter or buffer `name`."""
        pieces = name.split(".")
        owners = (self._owners.get(".".join(pieces[:length])) for length in range(len(pieces), 0, -1))
        return next((part for part in owners if part is not None), "head")

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
            if any(owner.startswith(f"{path}.") for owner in self._owners):
                self._hollow_out(child, f"{path}.", parts)
            elif self.part_of(path) not in parts and [*child.parameters(), *child.buffers()]:
                # What has no weights costs nothing, and other parts may use it too: a dropout of positions.
                setattr(module, name, nn.Identity())


def lacking(model: TimmModel, error: AttributeError) -> ValueError:
    """The error for a model that lacks a part of its description."""
    return ValueError(f"the description of {type(model).__name__} names a part that this model lacks: {error}")


@dataclass(frozen=True, kw_only=True)
class Anchor(AnchorShape):
    """An anchor of the config: its shape, and how to build and run it."""

    architecture: str  # a timm name, or one of a class of your own
    kwargs: Mapping[str, Any] = field(default_factory=dict)  # of its constructor, all but the number of classes
    class_: str | None = None  # "file.Class" of a file beside the config, for what is none of timm's; "class" in JSON
    pretrained: str | None = None  # which weights it started from; provenance only
    chain: Chain  # its parts, by name

    def __post_init__(self) -> None:
        """Refuse names that are paths or markup, and a chain of another depth."""
        super().__post_init__()
        check_name(self.architecture)
        if self.class_ is not None and not _OF_A_FILE.fullmatch(self.class_):
            raise ValueError(f"class is 'file.Class' of a file beside the config, got {self.class_!r}")
        if self.chain.depth != self.depth:
            raise ValueError(f"its chain has {self.chain.depth} blocks, its stages have {self.depth}")

    @classmethod
    def from_dict(cls, entry: Any, path: str = "an anchor") -> "Anchor":
        """An anchor of the config; a ValueError names the place, whose beginning is `path`."""
        depth = entry.get("depth") if isinstance(entry, Mapping) else None
        rest = {key: x for key, x in entry.items() if key != "depth"} if isinstance(entry, Mapping) else entry
        anchor = read(cls, rest, path)
        if depth != anchor.depth:
            raise ValueError(f"{path}.depth must be the sum of its stages, {anchor.depth}, got {depth!r}")
        return anchor

    @property
    def code(self) -> set[str]:
        """The class and the functions of files beside the config that it needs, as "file.Name"."""
        return self.chain.code | ({self.class_} if self.class_ else set())

    def build(self, num_classes: int | None) -> TimmModel:
        """Its model, with random weights and all of its parts; a ValueError if it cannot be made, or lacks some."""
        try:
            model = create_model(self.architecture, self.kwargs, num_classes=num_classes, own_class=self.class_)
            self.chain.check_names(model)
        except ValueError as error:
            raise ValueError(f"{self.architecture}: {error}") from error
        return model


def parts_used(anchors: Sequence[AnchorShape], stitches: Iterable[Stitch]) -> list[set[Part]]:
    """What the stitches need of each anchor; nothing of one that none of them uses."""
    parts: list[set[Part]] = [set() for _ in anchors]
    for stitch in stitches:
        for segment in stitch.route:
            parts[segment.anchor] |= {*range(segment.start, segment.stop), "context"}
        parts[stitch.route[0].anchor] |= {"stem", "prefix"}
        parts[stitch.route[-1].anchor].add("head")
        for joint in stitch.joints:
            if None in carried_tokens(anchors[joint.front], anchors[joint.back]):
                parts[joint.back].add("prefix")
    return parts
