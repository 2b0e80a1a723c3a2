"""A classifier seen as a chain: stem, L blocks, head; usually one of timm's (https://github.com/huggingface/pytorch-image-models).

An `Adapter` says where these parts are in the models of one class, in a few names; the layers themselves, their
parameter names and their arithmetic stay the model's. A `Chain` is that description resolved for one model and runs it.
The descriptions of timm's classes are in adapters.py.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from operator import attrgetter
from typing import Any, Literal, NamedTuple

import torch
from torch import nn


class Layout(str, Enum):
    """The layout of the features between blocks: batch N, channels C, grid height H and width W, tokens L."""

    NCHW = "NCHW"
    NHWC = "NHWC"
    NLC = "NLC"  # prefix tokens first, then the grid row by row
    UNITS = "UNITS"  # tokens (N, L, C) in the order of Hiera's mask units; meets its like only


TimmModel = Any
"""An `nn.Module` with timm's `forward_features` and `forward_head`, which timm gives no type of its own."""

Grid = tuple[int, int]
"""Height and width of the grid that features live on."""

Operation = str | Callable[[TimmModel, torch.Tensor], Any]
"""A step of a part: a submodule or method, which is called, or a parameter, which is added (a position embedding), by
name; one that is None in a model is passed over. Or a function of the model and its features. An operation of a stem
may return a tuple: the features, and the context of the blocks."""

Block = tuple[Operation, ...]

Part = str | int
"""What of a model is needed together: "stem", "prefix" (own prefix tokens), "context", a number of a block, "head"."""


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
class Adapter:
    """Where the parts of an architecture are.

    Attributes:
        layout: the layout of the features from the stem to the last block.
        stem: what turns pixel values into the features of cut 0, in order.
        stages: the stages, each the name of a module or a tuple of blocks. "layers.*" stands for every child of
            `layers`. A stage with a child `blocks` has these as its blocks (what stands before them, such as
            `downsample`, belongs to the first, and what stands after them to the last); else every child is a block.
        neck: what follows the last block before the head, such as a final norm. It belongs to the head.
        head: what turns the features into logits, the classifier last; empty for timm's own `forward_head`.
        prefix: parameters (1, tokens, C) that the stem puts in front of the grid (layout NLC), in order.
        own_prefix: what these are at cut 0 (1, tokens, C), a function of the model, if not their sum with the first
            positions of `pos_embed` (unless the model says `no_embed_class`) after `norm_pre`, as in timm's ViT.
        call: how the operation of a block is called, if not as `operation(features, *context)`: a function of the
            model, the operation, the number of the block, the features and the context. It returns the features, or a
            tuple of the features and the context of the next block.
        context: what the blocks need besides the features, when the stem returns none and when a stitch enters the
            anchor in its middle: a function of the model, the features, the pixel values and the grid (None after the
            anchor's own stem) that returns a tuple.
        uses: further submodules and parameters of the parts "stem", "prefix", "context" and "head", which their
            functions and methods use. What no part names is the stem's (the prefix's, if there is one) if the model
            itself owns it, and the head's otherwise.
    """

    layout: Layout
    stem: tuple[Operation, ...]
    stages: tuple[str | tuple[Block, ...], ...]
    neck: tuple[Operation, ...] = ()
    head: tuple[Operation, ...] = ()
    prefix: tuple[str, ...] = ()
    own_prefix: Callable[[TimmModel], torch.Tensor] | None = None
    call: Callable[..., Any] | None = None
    context: Callable[[TimmModel, torch.Tensor, torch.Tensor, Grid | None], tuple[Any, ...]] | None = None
    uses: Mapping[Literal["stem", "prefix", "context", "head"], Sequence[str]] | None = None

    def __post_init__(self) -> None:
        """Refuse what is easily written by mistake: a name where a tuple of names belongs, a part that is none."""
        if not isinstance(self.layout, Layout):
            raise ValueError(f"the layout of an adapter is a Layout, such as Layout.NCHW, got {self.layout!r}")
        named: dict[str, Any] = {name: getattr(self, name) for name in ("stem", "stages", "neck", "head", "prefix")}
        named |= {f"uses[{part!r}]": names for part, names in (self.uses or {}).items()}
        for name, operations in named.items():
            if isinstance(operations, str):
                raise ValueError(f"{name} of an adapter is a tuple, got {operations!r}; write ({operations!r},)")
        unknown = set(self.uses or ()) - {"stem", "prefix", "context", "head"}
        if unknown:
            raise ValueError(f"uses is of the parts 'stem', 'prefix', 'context' and 'head', got {min(unknown)!r}")


@dataclass(frozen=True)
class Chain:
    """The stem, blocks and head of one model, by name. Holds no modules, so it is the same for every copy of the model.

    Attributes:
        adapter: the description it comes from.
        model_class: name of the model's class, for messages.
        prefix_names: what each prefix token is, such as "cls_token"; empty unless the layout is NLC.
        stages: number of blocks of each stage.
        blocks: the operations of each block, in order.
        owners: submodules and parameters by name, with the part that they belong to.
    """

    adapter: Adapter
    model_class: str
    prefix_names: tuple[str, ...]
    stages: tuple[int, ...]
    blocks: tuple[Block, ...]
    owners: Mapping[str, Part]

    @classmethod
    def of(cls, model: TimmModel, adapter: Adapter) -> "Chain":
        """Describe a model.

        Raises:
            ValueError: the adapter names what the model lacks.
        """
        try:
            stages = [stage for pattern in adapter.stages for stage in _stages(model, pattern)]
            prefix = [(name, tokens) for name in adapter.prefix if (tokens := _find(model, name)) is not None]
            blocks = tuple(block for stage in stages for block in stage)
            used = [name for names in (adapter.uses or {}).values() for name in names]
            parts = [part for block in blocks for part in block]
            for operation in (*adapter.stem, *parts, *adapter.neck, *adapter.head, *used):
                if isinstance(operation, str):
                    attrgetter(operation)(model)
        except AttributeError as error:
            raise ValueError(
                f"the adapter of {type(model).__name__} names a part that this model lacks: {error}"
            ) from None
        return cls(
            adapter=adapter,
            model_class=type(model).__name__,
            prefix_names=tuple(name.split(".")[-1] for name, tokens in prefix for _ in range(tokens.shape[1])),
            stages=tuple(len(stage) for stage in stages),
            blocks=blocks,
            owners=_owners(model, adapter, blocks),
        )

    @property
    def layout(self) -> Layout:
        """Layout of the features between blocks."""
        return self.adapter.layout

    @property
    def prefix_tokens(self) -> int:
        """Tokens before the grid."""
        return len(self.prefix_names)

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    def run_stem(self, model: TimmModel, pixel_values: torch.Tensor) -> Flow:
        """Pixel values (N, C, H, W) to what flows at cut 0."""
        features, context = pixel_values, None
        for operation in self.adapter.stem:
            result = _run(model, operation, features)
            features, *rest = result if isinstance(result, tuple) else (result,)
            context = rest or context
        if context is None:
            return self.enter(model, features, pixel_values, None)
        return Flow(features, pixel_values, tuple(context))

    def enter(self, model: TimmModel, features: torch.Tensor, pixel_values: torch.Tensor, grid: Grid | None) -> Flow:
        """What flows at a cut of this anchor where features come in from another; `grid` is that of the cut."""
        context = self.adapter.context
        return Flow(features, pixel_values, () if context is None else context(model, features, pixel_values, grid))

    def run_block(self, model: TimmModel, index: int, flow: Flow) -> Flow:
        """What flows at cut `index` to what flows at cut `index + 1`."""
        features, pixel_values, context = flow
        for operation in self.blocks[index]:
            part = attrgetter(operation)(model) if isinstance(operation, str) else operation
            if self.adapter.call is not None:
                result = self.adapter.call(model, part, index, features, *context)
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
        for operation in self.adapter.neck:
            features = _run(model, operation, features)
        return flow._replace(features=features)

    def run_head(self, model: TimmModel, features: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Features after the neck to logits (N, num_labels), or to what the classifier gets."""
        head = self.adapter.head
        if not head:
            return model.forward_head(features, pre_logits=pre_logits)
        for operation in head[:-1] if pre_logits else head:
            features = _run(model, operation, features)
        return features

    def own_prefix(self, model: TimmModel) -> torch.Tensor:
        """The prefix tokens (1, tokens, C) of cut 0, for features that come without."""
        if self.adapter.own_prefix is not None:
            return self.adapter.own_prefix(model)
        named = [_find(model, name) for name in self.adapter.prefix]
        tokens = torch.cat([token for token in named if token is not None], dim=1)
        positions = getattr(model, "pos_embed", None)
        if positions is not None and not getattr(model, "no_embed_class", False):
            tokens = tokens + positions[:, : tokens.shape[1]]
        return _run(model, "norm_pre", tokens) if hasattr(model, "norm_pre") else tokens

    def measure(self, features: Any, image_size: Sequence[int]) -> tuple[int, int, int]:
        """Channels, and height and width of the grid, of the features at a cut, for images of (height, width) pixels.

        Raises:
            ValueError: features of another rank or layout than the adapter declares.
        """
        declared = f"the adapter of {self.model_class} declares features {self.layout.value}"
        on_grid = self.layout in (Layout.NCHW, Layout.NHWC)
        if not isinstance(features, torch.Tensor) or features.ndim != (4 if on_grid else 3):
            found = (
                f"of shape {tuple(features.shape)}" if isinstance(features, torch.Tensor) else type(features).__name__
            )
            raise ValueError(f"{declared}, but found are some {found}")
        if on_grid:
            channels, height, width = (
                features[0].shape if self.layout is Layout.NCHW else features[0].permute(2, 0, 1).shape
            )
        else:
            tokens, channels = features.shape[1] - self.prefix_tokens, features.shape[2]
            # The grid of tokens has the proportions of the image.
            height = max(1, round((tokens * image_size[0] / image_size[1]) ** 0.5))
            width = tokens // height
            if tokens < 1 or tokens % height:
                raise ValueError(
                    f"{declared}, but {tokens} tokens after {self.prefix_tokens} prefix tokens are no grid with the "
                    f"proportions of {image_size[0]}x{image_size[1]} pixels"
                )
        if image_size[0] == image_size[1] and height != width:
            raise ValueError(f"{declared}, but square images give {tuple(features.shape)}, a grid of {height}x{width}")
        return channels, height, width

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


def _find(model: TimmModel, name: str) -> Any:
    owner, _, attribute = name.rpartition(".")
    return getattr(model.get_submodule(owner), attribute, None)


def _run(model: TimmModel, operation: Operation, features: torch.Tensor) -> Any:
    if not isinstance(operation, str):
        return operation(model, features)
    part = attrgetter(operation)(model)
    if part is None:
        return features
    return features + part if isinstance(part, nn.Parameter) else part(features)


def _stages(model: TimmModel, pattern: str | tuple[Block, ...]) -> list[tuple[Block, ...]]:
    if not isinstance(pattern, str):
        return [pattern]
    if not pattern.endswith(".*"):
        return [_blocks_of_stage(model, pattern)]
    container = pattern.removesuffix(".*")
    return [
        _blocks_of_stage(model, f"{container}.{name}") for name, _ in model.get_submodule(container).named_children()
    ]


def _blocks_of_stage(model: TimmModel, stage: str) -> tuple[Block, ...]:
    children = [name for name, _ in model.get_submodule(stage).named_children()]
    if "blocks" not in children:
        return tuple((f"{stage}.{name}",) for name in children)
    # timm's stages all downsample first, wherever they list it.
    place = children.index("blocks")
    before = [name for name in children if name == "downsample" or children.index(name) < place]
    after = [name for name in children[place + 1 :] if name not in before]
    blocks: list[Block] = [
        (f"{stage}.blocks.{name}",) for name, _ in model.get_submodule(f"{stage}.blocks").named_children()
    ]
    blocks[0] = (*(f"{stage}.{name}" for name in before), *blocks[0])
    blocks[-1] = (*blocks[-1], *(f"{stage}.{name}" for name in after))
    return tuple(blocks)


def _owners(model: TimmModel, adapter: Adapter, blocks: Sequence[Block]) -> dict[str, Part]:
    direct: Part = "prefix" if adapter.prefix else "stem"
    owners: dict[str, Part] = {name: direct for name, _ in _own_tensors(model)}

    def own(part: Part, operations: Sequence[Operation]) -> None:
        owners.update({name: part for name in operations if isinstance(name, str)})

    own("stem", adapter.stem)
    own("head", (*adapter.neck, *adapter.head))
    for index, block in enumerate(blocks):
        own(index, block)
    for part, names in (adapter.uses or {}).items():
        own(part, names)
    if adapter.prefix:  # see own_prefix; position embeddings have a place for each token
        added = [
            name for name in adapter.stem if isinstance(name, str) and isinstance(_find(model, name), nn.Parameter)
        ]
        own("prefix", (*adapter.prefix, *added, "norm_pre"))
    return owners


def _own_tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
