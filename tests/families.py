"""Tiny families of every supported kind, with random weights in every parameter and buffer."""

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import stitchable
from stitchable import StitchableConfig, StitchableForImageClassification

NUM_LABELS = 5
SHIPPED = {
    *("architectures.py", "cascades.py", "chain.py", "configuration_stitchable.py", "modeling_stitchable.py"),
    *("operations.py", "own.py", "placement.py", "routes.py", "schema.py", "shards.py", "stitching.py"),
}
"""The code that travels with every checkpoint."""


@dataclass(frozen=True)
class Family:
    """Two anchors of one architecture family: timm names, with kwargs, and the image size they are tested at."""

    small: tuple[str, dict[str, Any]]
    large: tuple[str, dict[str, Any]]
    image_size: int = 32
    space: dict[str, Any] = field(default_factory=dict)

    @property
    def anchors(self) -> list[dict[str, Any]]:
        return [{"architecture": name, "kwargs": kwargs} for name, kwargs in (self.small, self.large)]


def _vit(name: str = "vit_tiny_patch16_224", depth: int = 3, **kwargs: Any) -> Family:
    return Family(*((name, _plain_vit(width, 8, depth=depth, **kwargs)[1]) for width in (8, 12)))


def _plain_vit(width: int, patch_size: int, **kwargs: Any) -> tuple[str, dict[str, Any]]:
    kwargs = {"img_size": 32, "patch_size": patch_size, "depth": 3, "embed_dim": width, "num_heads": 2, **kwargs}
    return "vit_tiny_patch16_224", kwargs


def _resnet18(layers: list[int]) -> tuple[str, dict[str, Any]]:
    return "resnet18", {"layers": layers, "channels": [4, 8, 12, 16]}


def _tnt(width: int) -> dict[str, Any]:
    return {"img_size": 32, "patch_size": 8, "embed_dim": width, "inner_dim": 8, "depth": 3, "num_heads_outer": 2}


def _pit(width: int) -> dict[str, Any]:
    return {"img_size": 32, "patch_size": 4, "stride": 4, "base_dims": [width] * 2, "depth": [2, 2], "heads": [1, 2]}


def _swin(depths: list[int], width: int, patch_size: int = 2, image_size: int = 32) -> tuple[str, dict[str, Any]]:
    kwargs = {"img_size": image_size, "patch_size": patch_size, "window_size": 4, "num_heads": [1, 2, 4, 4]}
    return "swin_tiny_patch4_window7_224", {**kwargs, "depths": depths, "embed_dim": width}


def _levit(name: str, width: int) -> tuple[str, dict[str, Any]]:
    kwargs = {"img_size": 64, "num_heads": [2, 2, 3], "depth": [2, 2, 1], "key_dim": 4}
    return name, {**kwargs, "embed_dim": [width, 2 * width, 3 * width]}


def _convnext(depths: list[int], width: int) -> tuple[str, dict[str, Any]]:
    return "convnext_atto", {"depths": depths, "dims": [width, 2 * width, 2 * width, 3 * width]}


RESNET18 = _resnet18([2, 2, 2, 1])
RESNET50 = ("resnet50", {"layers": [2, 4, 3, 1], "channels": [4, 8, 12, 16]})

FAMILIES = {
    "vit": _vit(),
    "vit-registers": _vit(reg_tokens=2),
    "vit-no-class-token": _vit(class_token=False, global_pool="avg"),
    "deit-distilled": _vit("deit_tiny_distilled_patch16_224"),
    # What their blocks need besides the features: rotary embeddings, shared biases of the attention.
    "eva-mixed": Family(*(("vit_small_patch16_rope_mixed_224", _plain_vit(width, 8)[1]) for width in (16, 24))),
    "beit-shared": Family(
        *(("beit_base_patch16_224", _plain_vit(width, 8, use_shared_rel_pos_bias=True)[1]) for width in (8, 12))
    ),
    "relpos-shared": Family(
        *(("vit_srelpos_small_patch16_224", _plain_vit(width, 8, rel_pos_dim=4)[1]) for width in (8, 12))
    ),
    "swin": Family(_swin([2, 2, 2], 8), _swin([2, 6, 2], 12)),
    "resnet": Family(RESNET18, RESNET50, space={"stages": [0, 1, 2]}),
    "levit": Family(_levit("levit_128s", 8), _levit("levit_128s", 12), image_size=64),
    "levit-conv": Family(_levit("levit_conv_128s", 8), _levit("levit_conv_128s", 12), image_size=64),
    "convnext": Family(_convnext([2, 2, 4, 1], 8), _convnext([2, 3, 2, 1], 12), image_size=64),
    "regnet": Family(("regnetx_002", {}), ("regnety_004", {})),
    "efficientnet": Family(("mnasnet_small", {}), ("efficientnet_lite0", {}), image_size=64, space={"pairs": "all"}),
    "mobilenetv3": Family(("mobilenetv3_small_050", {}), ("mobilenetv3_small_075", {}), image_size=64),
    "resnet-swin": Family(
        _resnet18([1, 2, 2, 1]),
        _swin([1, 2, 4, 1], 12, patch_size=4, image_size=64),
        image_size=64,
        space={"stages": [1, 2]},
    ),
    # Anchors that meet only where their grids are equal, or are resized, and that differ in prefix tokens.
    "resnet-vit": Family(_resnet18([1, 2, 2, 1]), _plain_vit(12, 8, img_size=64), 64, {"direction": "both"}),
    "swin-vit-registers": Family(
        _swin([1, 2, 4, 1], 8, patch_size=4, image_size=64),
        _plain_vit(12, 8, img_size=64, reg_tokens=2),
        64,
        {"direction": "both"},
    ),
    "deit-and-distilled": Family(
        _plain_vit(8, 8), ("deit_tiny_distilled_patch16_224", _plain_vit(12, 8)[1]), space={"direction": "both"}
    ),
    "vit-patches": Family(_plain_vit(8, 16), _plain_vit(12, 8), space={"direction": "both", "resize": "bilinear"}),
}


# Their blocks take or return more than features, which not every test can imitate.
WITH_STREAMS = {
    "tnt": Family(*(("tnt_s_patch16_224", _tnt(width)) for width in (8, 12))),
    "pit": Family(*(("pit_ti_224", _pit(width)) for width in (4, 6))),
}


def make(name: str, seed: int = 0, **settings: Any) -> StitchableForImageClassification:
    """The stitchable model of a family, everything randomised, in evaluation mode."""
    family = {**FAMILIES, **WITH_STREAMS}[name]
    settings = {"image_size": family.image_size, "num_labels": NUM_LABELS, **family.space, **settings}
    # Families made for tests need no agreement on the pixels' normalisation.
    settings |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    key = name, repr(sorted(settings.items()))
    if key not in _configs:  # most of the time of making a tiny model goes into its config
        _configs[key] = stitchable.make_config(family.anchors, pretrained=False, **settings)
    return randomise(StitchableForImageClassification(copy.deepcopy(_configs[key])), seed).eval()


_configs: dict[tuple[str, str], StitchableConfig] = {}


def images(name: str, number: int = 2, seed: int = 1) -> torch.Tensor:
    """Normalised pixel values (number, 3, H, W) for a family."""
    size = {**FAMILIES, **WITH_STREAMS}[name].image_size
    return torch.randn(number, 3, size, size, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter and floating-point statistic a random value: norms at their defaults hide errors."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim <= 1:
                parameter.copy_(0.1 * noise + (1.0 if name == "weight" else 0.0))
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
        if getattr(module, "running_var", None) is not None:
            module.running_mean.copy_(0.1 * torch.randn(module.running_mean.shape, generator=generator))
            module.running_var.copy_(0.5 + torch.rand(module.running_var.shape, generator=generator))
    return model
