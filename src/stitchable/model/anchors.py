"""A timm classifier (https://github.com/huggingface/pytorch-image-models) seen as a chain: stem, L blocks, head.

An `Adapter` says where these parts are in the models of one timm class, in a few names; the layers themselves, their
parameter names and their arithmetic stay timm's. A `Chain` is that description resolved for one model and runs it.
"""

import difflib
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from enum import Enum
from typing import Any

import timm
import torch
from timm.models.convnext import ConvNeXt
from timm.models.efficientnet import EfficientNet
from timm.models.levit import Levit
from timm.models.mobilenetv3 import MobileNetV3
from timm.models.regnet import RegNet
from timm.models.resnet import ResNet
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode


class Layout(str, Enum):
    """The layout of the features between blocks: batch N, channels C, grid height H and width W, tokens L."""

    NCHW = "NCHW"
    NHWC = "NHWC"
    NLC = "NLC"  # prefix tokens first, then the grid row by row


TimmModel = Any
"""An `nn.Module` with timm's `forward_features` and `forward_head`, which timm gives no type of its own."""

Operation = str | Callable[[TimmModel, torch.Tensor], torch.Tensor]
"""A step of a stem or neck: the name of a submodule or method, or a function of the model and its features."""


@dataclass(frozen=True)
class Adapter:
    """Where the parts of an architecture are.

    Attributes:
        layout: the layout of the features from the stem to the last block.
        stem: what turns pixel values into the features of cut 0, in order.
        stages: names of the stages; "layers.*" stands for every child of `layers`. A stage is a module with a child
            `blocks` (what stands before it, such as `downsample`, then belongs to the stage's first block, and what
            stands after it to the last), or else a sequence of blocks.
        neck: what follows the last block before timm's `forward_head`, such as a final norm. It belongs to the head.
        stem_modules: further submodules that the operations of the stem use.
    """

    layout: Layout
    stem: tuple[Operation, ...]
    stages: tuple[str, ...]
    neck: tuple[Operation, ...] = ()
    stem_modules: tuple[str, ...] = ()


def _tokens_of_grid(model: TimmModel, x_NCHW: torch.Tensor) -> torch.Tensor:
    return x_NCHW.flatten(2).transpose(1, 2)


def _levit(model: TimmModel) -> Adapter:
    if model.use_conv:
        return Adapter(Layout.NCHW, stem=("stem",), stages=("stages.*",))
    return Adapter(Layout.NLC, stem=("stem", _tokens_of_grid), stages=("stages.*",))


# Class of the timm model -> its adapter, or a function that picks one for a model.
_ADAPTERS: dict[type[nn.Module], Adapter | Callable[[TimmModel], Adapter]] = {
    VisionTransformer: Adapter(  # ViT, DeiT (also distilled), and others with prefix tokens
        Layout.NLC,
        stem=("patch_embed", "_pos_embed", "patch_drop", "norm_pre"),
        stages=("blocks",),
        neck=("norm",),
        stem_modules=("pos_drop",),
    ),
    SwinTransformer: Adapter(Layout.NHWC, stem=("patch_embed",), stages=("layers.*",), neck=("norm",)),
    ResNet: Adapter(
        Layout.NCHW, stem=("conv1", "bn1", "act1", "maxpool"), stages=("layer1", "layer2", "layer3", "layer4")
    ),
    Levit: _levit,
    ConvNeXt: Adapter(Layout.NCHW, stem=("stem",), stages=("stages.*",), neck=("norm_pre",)),
    RegNet: Adapter(Layout.NCHW, stem=("stem",), stages=("s1", "s2", "s3", "s4"), neck=("final_conv",)),
    EfficientNet: Adapter(Layout.NCHW, stem=("conv_stem", "bn1"), stages=("blocks.*",), neck=("conv_head", "bn2")),
    MobileNetV3: Adapter(Layout.NCHW, stem=("conv_stem", "bn1"), stages=("blocks.*",)),
}


def register_anchor(model_class: type[nn.Module], adapter: Adapter | Callable[[TimmModel], Adapter]) -> None:
    """Make the timm models of a class stitchable.

    Args:
        model_class: the class that `timm.create_model` returns. Subclasses are served too, as long as they inherit its
            `forward_features`.
        adapter: where the parts of its models are, or a function that says so for one model.

    The registration holds for this process: a checkpoint of such models loads where the same call was made before.
    """
    _ADAPTERS[model_class] = adapter


def supported_classes() -> list[str]:
    """Names of the model classes that have an adapter."""
    return sorted(model_class.__name__ for model_class in _ADAPTERS)


def find_adapter(model: TimmModel) -> Adapter:
    """The adapter for the class of a timm model.

    Raises:
        ValueError: no adapter serves its class.
    """
    for base in type(model).__mro__[:-1]:
        # A subclass with a forward of its own may compose its parts in another way.
        adapter = _ADAPTERS.get(base)
        if adapter and type(model).forward_features is getattr(base, "forward_features", None):
            return adapter if isinstance(adapter, Adapter) else adapter(model)
    raise ValueError(
        f"models of class {type(model).__name__} cannot be stitched yet; supported are "
        f"{', '.join(supported_classes())}. "
        "Describe its parts in an Adapter and pass both to stitchable.register_anchor(model_class, adapter)"
    )


def is_known(architecture: str) -> bool:
    """Whether timm has this architecture in this process, or asks the Hub for it ("hf-hub:...")."""
    return ":" in architecture or timm.is_model(architecture.split("/")[-1].split(".")[0])


def create_timm_model(
    architecture: str, kwargs: Mapping[str, Any] | None = None, *, num_classes: int | None, pretrained: bool = False
) -> TimmModel:
    """`timm.create_model` with an error that helps; `num_classes=None` means the architecture's own.

    Raises:
        ValueError: timm does not know the architecture (the nearest names are suggested) or refuses the kwargs.
    """
    if not isinstance(architecture, str):
        raise ValueError(f"an architecture is the name of a timm model, got {architecture!r}")
    name = architecture.split("/")[-1].split(".")[0]
    if not is_known(architecture):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise ValueError(
            f"timm {timm.__version__} has no model {architecture!r}"
            + (f"; the nearest are {', '.join(near)}" if near else "; timm.list_models() lists them all")
        )
    # Most of the time of building a model on the meta device would go into initialising what has no values.
    without_values = _NoValues() if torch.get_default_device().type == "meta" else nullcontext()
    try:
        with without_values:
            return timm.create_model(architecture, pretrained=pretrained, num_classes=num_classes, **(kwargs or {}))
    except (TypeError, AssertionError, RuntimeError) as error:
        raise ValueError(f"timm cannot make {architecture!r} with {dict(kwargs or {})}: {error}") from error


class _NoValues(TorchDispatchMode):
    """Leave out operations that only change the values of a meta tensor, which has none."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        changes_values = func._schema.name.endswith("_") and torch.Tag.inplace_view not in func.tags
        if changes_values and isinstance(args[0], torch.Tensor) and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Chain:
    """The stem, blocks and head of one model, by name. Holds no modules, so it is the same for every copy of the model.

    Attributes:
        layout: layout of the features between blocks.
        prefix_tokens: tokens before the grid, 0 unless the layout is NLC.
        stages: number of blocks of each stage.
        stem, neck: operations before and after the blocks.
        blocks: the submodules of each block, in order.
        stem_modules: every submodule of the model that the stem owns; what neither stem nor blocks own is the head's.
    """

    layout: Layout
    prefix_tokens: int
    stages: tuple[int, ...]
    stem: tuple[Operation, ...]
    blocks: tuple[tuple[str, ...], ...]
    neck: tuple[Operation, ...]
    stem_modules: frozenset[Operation]

    @classmethod
    def of(cls, model: TimmModel) -> "Chain":
        """Describe a timm model.

        Raises:
            ValueError: no adapter serves its class.
        """
        adapter = find_adapter(model)
        stages = [_blocks_of_stage(model, name) for pattern in adapter.stages for name in _expand(model, pattern)]
        is_nlc = adapter.layout is Layout.NLC
        return cls(
            layout=adapter.layout,
            prefix_tokens=getattr(model, "num_prefix_tokens", 0) if is_nlc else 0,
            stages=tuple(len(stage) for stage in stages),
            stem=adapter.stem,
            blocks=tuple(block for stage in stages for block in stage),
            neck=adapter.neck,
            stem_modules=frozenset(dict(model.named_children())) & {*adapter.stem, *adapter.stem_modules},
        )

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    def run_stem(self, model: TimmModel, pixel_values: torch.Tensor) -> torch.Tensor:
        """Pixel values (N, C, H, W) to the features of cut 0."""
        return _apply(model, self.stem, pixel_values)

    def run_block(self, model: TimmModel, index: int, features: torch.Tensor) -> torch.Tensor:
        """Features of cut `index` to those of cut `index + 1`."""
        for name in self.blocks[index]:
            features = model.get_submodule(name)(features)
        return features

    def run_neck(self, model: TimmModel, features: torch.Tensor) -> torch.Tensor:
        """Features of cut L to what timm's `forward_features` returns."""
        return _apply(model, self.neck, features)

    def part_of(self, name: str) -> str | int:
        """Which part owns the parameter or buffer `name`: "stem", the number of a block, or "head"."""
        for index, block in enumerate(self.blocks):
            if any(name.startswith(f"{owner}.") for owner in block):
                return index
        # What a model owns directly (class token, position embedding) enters in the stem.
        return "stem" if "." not in name or name.split(".")[0] in self.stem_modules else "head"

    def keep_only(self, model: TimmModel, parts: Collection[str | int]) -> None:
        """Drop what the parts ("stem", "head", numbers of blocks) do not need; the names of the rest stay."""
        if "stem" not in parts:
            for name, _ in [*model.named_parameters(recurse=False), *model.named_buffers(recurse=False)]:
                setattr(model, name, None)
        self._hollow_out(model, "", parts)

    def _hollow_out(self, module: nn.Module, prefix: str, parts: Collection[str | int]) -> None:
        for name, child in list(module.named_children()):
            path = f"{prefix}{name}."
            if any(owner.startswith(path) for block in self.blocks for owner in block):
                self._hollow_out(child, path, parts)
            elif self.part_of(path) not in parts:
                setattr(module, name, nn.Identity())


def _apply(model: TimmModel, operations: Iterable[Operation], features: torch.Tensor) -> torch.Tensor:
    for operation in operations:
        features = getattr(model, operation)(features) if isinstance(operation, str) else operation(model, features)
    return features


def _expand(model: TimmModel, pattern: str) -> list[str]:
    if not pattern.endswith(".*"):
        return [pattern]
    container = pattern.removesuffix(".*")
    return [f"{container}.{name}" for name, _ in model.get_submodule(container).named_children()]


def _blocks_of_stage(model: TimmModel, stage: str) -> list[tuple[str, ...]]:
    children = [name for name, _ in model.get_submodule(stage).named_children()]
    if "blocks" not in children:
        return [(f"{stage}.{name}",) for name in children]
    blocks: list[tuple[str, ...]] = [
        (f"{stage}.blocks.{name}",) for name, _ in model.get_submodule(f"{stage}.blocks").named_children()
    ]
    place = children.index("blocks")
    blocks[0] = (*(f"{stage}.{name}" for name in children[:place]), *blocks[0])
    blocks[-1] = (*blocks[-1], *(f"{stage}.{name}" for name in children[place + 1 :]))
    return blocks
