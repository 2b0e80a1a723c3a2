"""Stitching layers: a 1x1 convolution over channels between the cuts of two anchors, whatever their layouts.

Section 3.2, "How to stitch", of Stitchable Neural Networks (Pan et al., CVPR 2023).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .operations import Grid
from .routes import AnchorShape, carried_tokens


@dataclass(frozen=True)
class Side:
    """One side of a stitching layer: what flows through a cut of an anchor."""

    channels: int
    layout: str
    grid: Grid
    prefix_tokens: int

    @classmethod
    def of(cls, shape: AnchorShape, cut: int) -> "Side":
        """That of a cut of an anchor."""
        channels, height, width = shape.cuts[cut]
        return cls(channels, str(shape.layout), (height, width), shape.prefix_tokens)

    @property
    def is_tokens(self) -> bool:
        """Whether features are (N, L, C)."""
        return self.layout in ("NLC", "UNITS")


class StitchingLayer(nn.Module):
    """Map the features of one anchor's cut to those of another's, y = W x + b at every position of the grid.

    Prefix tokens that both sides have are mapped too; those that only the target has are its anchor's own. Where the
    grids differ, features are resized (bilinear), which commutes with the map, on the side where that costs less.

    The map is a plain `nn.Linear` that sees channels last whatever the layouts, so that what replaces Linears (LoRA,
    quantisation) can replace it; its default initialisation is that of PyTorch's 1x1 convolution (Kaiming uniform).

    Args:
        source: the front anchor's cut.
        target: the back anchor's cut.
        carried: for each prefix token of the target which one of the source becomes it, None for the target's own.
    """

    def __init__(self, source: Side, target: Side, carried: Sequence[int | None] = ()) -> None:
        super().__init__()
        self.linear = nn.Linear(source.channels, target.channels)
        self.source, self.target, self.carried = source, target, tuple(carried)
        self.arguments = source, target, self.carried  # layers of equal arguments do the same work
        self.needs_own_prefix = None in self.carried
        self._maps_all = source.grid == target.grid and self.carried == tuple(range(source.prefix_tokens))

    @classmethod
    def between(cls, source: AnchorShape, stop: int, target: AnchorShape, start: int) -> "StitchingLayer":
        """The layer from cut `stop` of one anchor to cut `start` of another."""
        return cls(Side.of(source, stop), Side.of(target, start), carried_tokens(source, target))

    def forward(
        self,
        features: torch.Tensor,
        own_prefix: torch.Tensor | None = None,
        update: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Features in the source's layout to features in the target's.

        Args:
            features: as they flow through the front anchor's cut; others are refused with a ValueError.
            own_prefix: the target's own prefix tokens (1, tokens, C); read only where the source lacks some.
            update: what a stitch adds to the map, given the same features, channels last.
        """
        source, target = self.source, self.target
        channels = features.shape[1 if source.layout == "NCHW" else -1]
        if features.ndim != (3 if source.is_tokens else 4) or channels != source.channels:
            raise ValueError(f"by its layout the front anchor gives {source}, but its features are {features.shape}")
        if own_prefix is None and self.needs_own_prefix:
            raise ValueError("this stitching layer needs the back anchor's own prefix tokens")

        def linear(x: torch.Tensor) -> torch.Tensor:
            return self.linear(x) if update is None else self.linear(x) + update(x)

        if self._maps_all:
            return from_channels_last(linear(to_channels_last(features, source.layout)), target)
        x = grid_of(features, source)
        if math.prod(target.grid) < math.prod(source.grid):
            x = resize(x, target.grid)
        x = resize(linear(x), target.grid)
        if not self.carried:
            return from_channels_last(x, target)
        own = () if own_prefix is None else own_prefix.expand(x.shape[0], -1, -1).split(1, dim=1)
        prefix = [
            own[place] if index is None else linear(features[:, index : index + 1])
            for place, index in enumerate(self.carried)
        ]
        return torch.cat([*prefix, x.flatten(1, 2)], dim=1)


def to_channels_last(features: torch.Tensor, layout: str) -> torch.Tensor:
    """Features of any layout with channels last: (N, H, W, C) from NCHW and NHWC, (N, L, C) from tokens."""
    return features.permute(0, 2, 3, 1) if layout == "NCHW" else features


def from_channels_last(features: torch.Tensor, side: Side) -> torch.Tensor:
    """Features (N, H, W, C) or (N, L, C) in the layout of a side."""
    if side.is_tokens:
        return features.flatten(1, -2)
    if features.ndim == 3:
        features = features.unflatten(1, side.grid)
    # In the order in memory that the back anchor has alone, so that it runs as fast, and its predicted latency holds.
    return features.permute(0, 3, 1, 2).contiguous() if side.layout == "NCHW" else features


def grid_of(features: torch.Tensor, side: Side) -> torch.Tensor:
    """The grid (N, H, W, C) of features, without prefix tokens."""
    if side.is_tokens:
        return features[:, side.prefix_tokens :].unflatten(1, side.grid)
    return to_channels_last(features, side.layout)


def resize(x_NHWC: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Features (N, H, W, C) on another grid, by bilinear interpolation."""
    if x_NHWC.shape[1:3] == grid:
        return x_NHWC
    x = F.interpolate(x_NHWC.permute(0, 3, 1, 2), size=grid, mode="bilinear", align_corners=False)
    return x.permute(0, 2, 3, 1)
