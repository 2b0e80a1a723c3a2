"""The CIFAR-10 ResNets of "Deep Residual Learning for Image Recognition", section 4.2, as timm models.

He, Zhang, Ren, Sun, 2015 (https://arxiv.org/abs/1512.03385). Importing this file registers the models with timm. A
checkpoint brings it along; register_cifar_resnet.py says where the parts of these models are.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import create_classifier
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from torch import nn

WIDTHS = (16, 32, 64)
"""Channels of the three stages; the second and the third halve the grid."""


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters (option A of the paper).

    Where the grid is halved, the shortcut takes every second pixel and puts the new channels, all zero, half before and
    half after the old ones: the paper leaves the place open, the published weights have them there.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.new_channels = channels - in_channels
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_channels, H, W) to (N, channels, H / stride, W / stride)."""
        residual = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(residual + self.shortcut(x))

    def shortcut(self, x: torch.Tensor) -> torch.Tensor:
        """The input, brought to the shape of the output."""
        before = self.new_channels // 2
        sampled = x[:, :, :: self.stride, :: self.stride]
        return F.pad(sampled, (0, 0, 0, 0, before, self.new_channels - before))


class CifarResNet(nn.Module):
    """A 3x3 stem, three stages of blocks, and a linear classifier of the mean over the grid.

    Args:
        depth: blocks per stage; the network has 6 * depth + 2 layers.
        num_classes: 0 for no classifier.
        in_chans: channels of the image.
        global_pool: "avg", or "" for features that keep their grid.
        drop_rate: dropout before the classifier.
    """

    def __init__(
        self,
        depth: int,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: Literal["avg", ""] = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.drop_rate = drop_rate
        self.num_features = self.head_hidden_size = WIDTHS[-1]
        self.grad_checkpointing = False
        self.conv1 = nn.Conv2d(in_chans, WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        self.act1 = nn.ReLU()
        self.layer1 = _stage(WIDTHS[0], WIDTHS[0], depth)
        self.layer2 = _stage(WIDTHS[0], WIDTHS[1], depth)
        self.layer3 = _stage(WIDTHS[1], WIDTHS[2], depth)
        self.global_pool, self.fc = create_classifier(self.num_features, num_classes, pool_type=global_pool)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the last layer by a new one for other classes."""
        self.num_classes = num_classes
        pool_type = self.global_pool.pool_type if global_pool is None else global_pool
        self.global_pool, self.fc = create_classifier(self.num_features, num_classes, pool_type=pool_type)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether training recomputes the blocks' activations instead of keeping them."""
        self.grad_checkpointing = enable

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images (N, in_chans, H, W) to features (N, 64, H / 4, W / 4)."""
        x = self.act1(self.bn1(self.conv1(x)))
        blocks = [*self.layer1, *self.layer2, *self.layer3]
        if self.grad_checkpointing and self.training:
            return checkpoint_seq(blocks, x)
        for block in blocks:
            x = block(x)
        return x

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Features to logits (N, num_classes), or to what the classifier gets (N, 64)."""
        x = F.dropout(self.global_pool(x), self.drop_rate, self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images to logits."""
        return self.forward_head(self.forward_features(x))


def _stage(in_channels: int, channels: int, depth: int) -> nn.Sequential:
    first = Block(in_channels, channels, stride=channels // in_channels)
    return nn.Sequential(first, *(Block(channels, channels, stride=1) for _ in range(depth - 1)))


def rename_published(state_dict: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """The names of the published checkpoints (https://github.com/akamaster/pytorch_resnet_cifar10) to those above.

    timm itself takes the weights from below "state_dict" and the prefix "module." from their names.
    """
    return {name.replace("linear.", "fc."): value for name, value in state_dict.items()}


default_cfgs = generate_default_cfgs(
    {
        f"cifar_resnet{layers}": {
            "input_size": (3, 32, 32),
            "mean": (0.485, 0.456, 0.406),  # what the published weights were trained with; they are not CIFAR-10's
            "std": (0.229, 0.224, 0.225),
            "crop_pct": 1.0,
            "num_classes": 10,
            "pool_size": (8, 8),
            "first_conv": "conv1",
            "classifier": "fc",
        }
        for layers in (20, 32, 44, 56)
    }
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> CifarResNet:
    return build_model_with_cfg(CifarResNet, variant, pretrained, pretrained_filter_fn=rename_published, **kwargs)


@register_model
def cifar_resnet20(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-20, 0.27 million parameters."""
    return _create("cifar_resnet20", pretrained, **{"depth": 3, **kwargs})


@register_model
def cifar_resnet32(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-32, 0.46 million parameters."""
    return _create("cifar_resnet32", pretrained, **{"depth": 5, **kwargs})


@register_model
def cifar_resnet44(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-44, 0.66 million parameters."""
    return _create("cifar_resnet44", pretrained, **{"depth": 7, **kwargs})


@register_model
def cifar_resnet56(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-56, 0.85 million parameters."""
    return _create("cifar_resnet56", pretrained, **{"depth": 9, **kwargs})
