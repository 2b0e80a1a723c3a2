"""A family of your own that knows nothing of timm, nor of stitchable: small convolutional mixers for 8x8 pixels.

A checkpoint brings this file along. register_digit_mixer.py says where the parts of these models are.
"""

import torch
from torch import nn


class MixerBlock(nn.Module):
    """A depthwise convolution mixes positions, two pointwise ones mix channels, each beside a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(1, width)
        self.positions = nn.Conv2d(width, width, kernel_size=3, padding=1, groups=width)
        self.norm2 = nn.GroupNorm(1, width)
        self.channels = nn.Sequential(nn.Conv2d(width, 2 * width, 1), nn.GELU(), nn.Conv2d(2 * width, width, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, width, H, W) to the same shape."""
        x = x + self.positions(self.norm1(x))
        return x + self.channels(self.norm2(x))


class DigitMixer(nn.Module):
    """Patches of 2x2 pixels, blocks, and a linear classifier of the mean over the grid.

    Args:
        width: channels.
        depth: number of blocks.
        num_classes: of the classifier.
    """

    def __init__(self, width: int, depth: int, num_classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, kernel_size=2, stride=2)
        self.blocks = nn.Sequential(*(MixerBlock(width) for _ in range(depth)))
        self.norm = nn.GroupNorm(1, width)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images (N, 3, H, W) to logits (N, num_classes)."""
        return self.classifier(self.pool(self.norm(self.blocks(self.stem(x)))))
