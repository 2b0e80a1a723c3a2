"""Stitching layers: a 1x1 convolution over channels between the cuts of two anchors, whatever their layouts.

Section 3.2, "How to stitch", of Stitchable Neural Networks (Pan et al., CVPR 2023).
"""

import torch
import torch.nn.functional as F
from torch import nn

from .anchors import Layout


class StitchingLayer(nn.Linear):
    """Map the features of one anchor's cut to those of another's, y = W x + b at every position of the grid.

    Weights have the shapes of `nn.Linear`, so there is one form for all layouts: weight (out_channels, in_channels),
    bias (out_channels,). The default initialisation is that of PyTorch's 1x1 convolution (Kaiming uniform).
    """

    def __init__(
        self, in_channels: int, out_channels: int, source: Layout, target: Layout, grid: tuple[int, int]
    ) -> None:
        """Describe both sides.

        Args:
            in_channels: channels at the front anchor's cut.
            out_channels: channels at the back anchor's cut.
            source: layout of the front anchor.
            target: layout of the back anchor.
            grid: height and width at both cuts; read only where tokens (NLC) become a grid (NCHW or NHWC).
        """
        super().__init__(in_channels, out_channels)
        self.source = source
        self.target = target
        self.grid = grid

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Features in the source layout to features in the target layout; prefix tokens (NLC to NLC) are mapped too."""
        if self.source is self.target is Layout.NCHW:
            return F.conv2d(features, self.weight[:, :, None, None], self.bias)
        return from_channels_last(super().forward(to_channels_last(features, self.source)), self.target, self.grid)

    def extra_repr(self) -> str:
        """Sizes and layouts, for `print(model)`."""
        return f"{super().extra_repr()}, {self.source.value} -> {self.target.value}"


def to_channels_last(features: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Features of any layout with channels last: (N, H, W, C) from NCHW and NHWC, (N, L, C) from NLC."""
    return features.permute(0, 2, 3, 1) if layout is Layout.NCHW else features


def from_channels_last(features: torch.Tensor, layout: Layout, grid: tuple[int, int]) -> torch.Tensor:
    """Features (N, H, W, C) or (N, L, C) in a layout; `grid` is (H, W) and read only for (N, L, C) to a grid."""
    if layout is Layout.NLC:
        return features.flatten(1, -2)
    if features.ndim == 3:
        features = features.unflatten(1, grid)
    return features.permute(0, 3, 1, 2) if layout is Layout.NCHW else features
