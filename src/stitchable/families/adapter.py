"""Where the parts are in the models of one class, in a few names: resolved for a model, an `Adapter` is a `Chain`."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from stitchable.families import timm_functions
from stitchable.model.chain import PARTS, Chain, lacking
from stitchable.model.operations import FUNCTION, OWN_CODE, TimmModel


class Layout(str, Enum):
    """The layout of the features between blocks: batch N, channels C, grid height H and width W, tokens L."""

    NCHW = "NCHW"
    NHWC = "NHWC"
    NLC = "NLC"  # prefix tokens first, then the grid row by row
    UNITS = "UNITS"  # tokens (N, L, C) in the order of Hiera's mask units; meets its like only


Operation = str | Callable[..., Any]
"""A step of a part by name, as in a `Chain`, or a function in the file of the model's class."""

Block = tuple[Operation, ...]


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
        own_prefix: as in `Chain`, like the next two.
        call: see there.
        context: see there.
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
    own_prefix: Operation | None = None
    call: Operation | None = None
    context: Operation | None = None
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
        unknown = set(self.uses or ()) - set(PARTS)
        if unknown:
            raise ValueError(f"uses is of the parts 'stem', 'prefix', 'context' and 'head', got {min(unknown)!r}")


@dataclass(frozen=True)
class Description:
    """An adapter resolved for one model.

    Attributes:
        chain: its parts.
        layout: of the features between blocks.
        stages: number of blocks of each stage.
        prefix_names: what each prefix token is, such as "cls_token"; empty unless the layout is NLC.
        model_class: name of the model's class, for messages.
    """

    chain: Chain
    layout: Layout
    stages: tuple[int, ...]
    prefix_names: tuple[str, ...]
    model_class: str

    @classmethod
    def of(cls, model: TimmModel, adapter: Adapter) -> "Description":
        """Describe a model.

        Raises:
            ValueError: the adapter names what the model lacks.
        """
        try:
            stages = [stage for pattern in adapter.stages for stage in _stages(model, pattern)]
            prefix = [(name, tokens) for name in adapter.prefix if (tokens := _part_named(model, name)) is not None]
            blocks = tuple(block for stage in stages for block in stage)
            parts = _parts(model, adapter, blocks)
        except AttributeError as error:
            raise lacking(model, error) from None

        def named(operations: Sequence[Operation]) -> tuple[str, ...]:
            return tuple(_name(operation, type(model)) for operation in operations)

        chain = Chain(
            stem=named(adapter.stem),
            blocks=tuple(map(named, blocks)),
            neck=named(adapter.neck),
            head=named(adapter.head),
            prefix=tuple(name for name, _ in prefix),
            own_prefix=_name(adapter.own_prefix, type(model)) if adapter.own_prefix else None,
            call=_name(adapter.call, type(model)) if adapter.call else None,
            context=_name(adapter.context, type(model)) if adapter.context else None,
            parts={part: names for part, names in parts.items() if names},
        )
        chain.check_names(model)
        names = tuple(name.split(".")[-1] for name, tokens in prefix for _ in range(tokens.shape[1]))
        return cls(chain, adapter.layout, tuple(len(stage) for stage in stages), names, type(model).__name__)

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
            tokens, channels = features.shape[1] - len(self.prefix_names), features.shape[2]
            # The grid of tokens has the proportions of the image.
            height = max(1, round((tokens * image_size[0] / image_size[1]) ** 0.5))
            width = tokens // height
            if tokens < 1 or tokens % height:
                raise ValueError(
                    f"{declared}, but {tokens} tokens after {len(self.prefix_names)} prefix tokens are no grid with "
                    f"the proportions of {image_size[0]}x{image_size[1]} pixels"
                )
        if image_size[0] == image_size[1] and height != width:
            raise ValueError(f"{declared}, but square images give {tuple(features.shape)}, a grid of {height}x{width}")
        return channels, height, width


def code_reference(code: type | Callable[..., Any]) -> str | None:
    """The name "file.Name" by which a checkpoint brings a class or function along; None for timm's and torch's."""
    module = code.__module__
    if module.startswith(("timm.", "torch.")):
        return None
    file = getattr(sys.modules.get(module), "__file__", None)
    return f"{Path(file).stem if file else module.split('.')[-1]}.{code.__name__}"


def _name(operation: Operation, model_class: type) -> str:
    """What an operation is called in config.json; a function is made known by that name."""
    if isinstance(operation, str):
        return operation
    name = getattr(operation, "__name__", "")
    if not name.isidentifier():
        raise ValueError(f"{operation!r} has no name by which a config could call it; define a function in a file")
    if operation.__module__ not in (model_class.__module__, timm_functions.__name__):
        raise ValueError(f"the function {name!r} is not in the file of {model_class.__name__}, which checkpoints bring")
    reference = str(code_reference(operation))
    OWN_CODE[reference] = operation
    return f"{FUNCTION}{reference}"


def _part_named(model: TimmModel, name: str) -> Any:
    owner, _, attribute = name.rpartition(".")
    return getattr(model.get_submodule(owner), attribute, None)


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


def _parts(model: TimmModel, adapter: Adapter, blocks: Sequence[Block]) -> dict[str, tuple[str, ...]]:
    """Which names belong to which part, but for those of the blocks."""
    owners: dict[str, str | int] = dict.fromkeys(_own_tensors(model), "prefix" if adapter.prefix else "stem")

    def own(part: str | int, operations: Sequence[Operation]) -> None:
        owners.update({str(name): part for name in operations if _is_part(name)})

    own("stem", adapter.stem)
    own("head", (*adapter.neck, *adapter.head))
    for index, block in enumerate(blocks):
        own(index, block)
    for part, names in (adapter.uses or {}).items():
        own(part, names)
    if adapter.prefix:  # see own_prefix of a chain; position embeddings have a place for each token
        added = [
            name for name in adapter.stem if _is_part(name) and isinstance(_part_named(model, str(name)), nn.Parameter)
        ]
        there = [name for name in (*adapter.prefix, "norm_pre") if _has(model, name)]
        own("prefix", (*there, *added))
    return {part: tuple(name for name, owner in owners.items() if owner == part) for part in PARTS}


def _is_part(operation: Operation) -> bool:
    return isinstance(operation, str) and not operation.startswith(FUNCTION)


def _has(model: TimmModel, name: str) -> bool:
    owner, _, attribute = name.rpartition(".")
    return hasattr(model.get_submodule(owner), attribute)


def _own_tensors(module: nn.Module) -> list[str]:
    return [name for name, _ in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]]
