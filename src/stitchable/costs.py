"""FLOPs and parameters: counted once per anchor, part by part, on the meta device, and summed per route.

One multiply-add is one FLOP, as in the paper and in fvcore (https://github.com/facebookresearch/fvcore, whose
conventions for normalisation are followed so that figures agree to the integer): 5 per element of a LayerNorm or
GroupNorm, 2 per element of a BatchNorm in evaluation mode (4 and 1 where they have no weight), and 1 per input element
of an adaptive average pooling. Other elementwise operations, softmax and activations count as nothing there and here.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from stitchable.model.anchors import Chain, Layout, TimmModel, create_timm_model
from stitchable.model.modeling_stitchable import StitchablePreTrainedModel
from stitchable.model.routes import AnchorShape, Cut, Stitch


@dataclass(frozen=True)
class Cost:
    """What a part costs: `flops` per image (multiply-adds plus normalisation terms) and `params`."""

    flops: int = 0
    params: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        """The cost of both parts."""
        return Cost(self.flops + other.flops, self.params + other.params)


@dataclass(frozen=True)
class AnchorProfile:
    """An anchor's shape and the cost of each of its parts; `neck_flops` is the share of its final norm in the head."""

    shape: AnchorShape
    stem: Cost
    blocks: tuple[Cost, ...]
    head: Cost
    neck_flops: int

    @property
    def total(self) -> Cost:
        """The cost of the whole anchor."""
        return sum((*self.blocks, self.head), self.stem)


def profile_anchor(model: TimmModel, image_size: Sequence[int], num_channels: int = 3) -> AnchorProfile:
    """Run a timm model once, part by part, on its device (meta costs no arithmetic).

    Args:
        model: a timm model of a supported class.
        image_size: (height, width) in pixels.
        num_channels: channels of the image.

    Raises:
        ValueError: the class is not supported, or the model cannot take images of this size.
    """
    chain, training = Chain.of(model), model.training
    model.eval()
    pixel_values = torch.empty(1, num_channels, *image_size, device=next(model.parameters()).device)
    try:
        stem_flops, features = _counted(chain.run_stem, model, pixel_values)
        cuts, block_flops = [_cut(features, chain, image_size)], []
        for index in range(chain.depth):
            flops, features = _counted(chain.run_block, model, index, features)
            block_flops.append(flops)
            cuts.append(_cut(features, chain, image_size))
        neck_flops, features = _counted(chain.run_neck, model, features)
        head_flops, _ = _counted(model.forward_head, features)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(
            f"{type(model).__name__} cannot take images of {num_channels}x{image_size[0]}x{image_size[1]}: {error}"
        ) from error
    finally:
        model.train(training)

    params: dict[str | int, int] = {}
    for name, parameter in model.named_parameters():
        params[chain.part_of(name)] = params.get(chain.part_of(name), 0) + parameter.numel()
    return AnchorProfile(
        shape=AnchorShape(chain.stages, tuple(cuts), chain.layout.value, chain.prefix_tokens),
        stem=Cost(stem_flops, params.get("stem", 0)),
        blocks=tuple(Cost(flops, params.get(index, 0)) for index, flops in enumerate(block_flops)),
        head=Cost(neck_flops + head_flops, params.get("head", 0)),
        neck_flops=neck_flops,
    )


def profile_architecture(
    architecture: str, kwargs: Mapping[str, Any], num_labels: int | None, image_size: Sequence[int], num_channels: int
) -> AnchorProfile:
    """The profile of an architecture that need not be in memory: it is built on the meta device.

    Raises:
        ValueError: as `create_timm_model` and `profile_anchor`.
    """
    with torch.device("meta"):
        model = create_timm_model(architecture, kwargs, num_classes=num_labels)
    return profile_anchor(model, image_size, num_channels)


def cost_of_layer(source: AnchorShape, stop: int, target: AnchorShape, start: int) -> Cost:
    """The stitching layer from cut `stop` of one anchor to cut `start` of another, bias included in the parameters."""
    cut, channels = source.cuts[stop], target.cuts[start].channels
    positions = cut.height * cut.width + source.prefix_tokens
    return Cost(flops=positions * cut.channels * channels, params=cut.channels * channels + channels)


def cost_of_stitch(stitch: Stitch, profiles: Sequence[AnchorProfile]) -> Cost:
    """The sum over a route: the first anchor's stem, the blocks, the stitching layers, the last anchor's head."""
    first, last = profiles[stitch.route[0].anchor], profiles[stitch.route[-1].anchor]
    cost = first.stem + last.head
    if stitch.skips_neck:
        cost = replace(cost, flops=cost.flops - last.neck_flops)
    for segment in stitch.route:
        cost = sum(profiles[segment.anchor].blocks[segment.start : segment.stop], cost)
    for index, (name, front, back) in enumerate(stitch.joints):
        layer = cost_of_layer(profiles[front.anchor].shape, front.stop, profiles[back.anchor].shape, back.start)
        # A chain may pass one stitching layer twice: it works twice, but its parameters are there once.
        used_before = name in stitch.layers[:index]
        cost = cost + (replace(layer, params=0) if used_before else layer)
    return cost


def update_costs(model: StitchablePreTrainedModel) -> None:
    """Count again and write `flops` and `params` of every stitch into the model's table, after its classifiers changed.

    Metrics and latencies, which no longer hold, are dropped.
    """
    config = model.config
    profiles = [
        profile_architecture(
            entry["architecture"], entry["kwargs"], config.num_labels, config.image_size, config.num_channels
        )
        for entry in config.anchors
    ]
    for stitch in model.stitches:
        cost = cost_of_stitch(stitch, profiles)
        model.record(stitch.id, flops=cost.flops, params=cost.params, latency_ms=None, memory_mb=None, metrics={})
    config.num_labels_of_costs = config.num_labels


def count_flops(function: Callable[..., Any], *inputs: torch.Tensor) -> int:
    """FLOPs of one call of a module or function, as this project counts them, for the whole batch of its inputs."""
    return _counted(function, *inputs)[0]


def _counted(function: Callable[..., Any], *inputs: Any) -> tuple[int, Any]:
    # FlopCounterMode counts a multiply-add as two. It knows plain matrix products on every device and in every version,
    # but not every fused attention (on CPUs only since torch 2.15).
    with (
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as products,
        _ElementwiseCounter() as elementwise,
    ):
        output = function(*inputs)
    return products.get_total_flops() // 2 + elementwise.flops, output


class _ElementwiseCounter(TorchFunctionMode):
    """Count what FlopCounterMode leaves out and fvcore does not: normalisation and adaptive average pooling.

    It looks at the functions that modules call, not at the operators below: PyTorch turns a pooling to 1x1 into a mean,
    which fvcore would not count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if func in (F.layer_norm, F.group_norm):
            self.flops += args[0].numel() * (5 if _weight(args, kwargs, 2) else 4)
        elif func is F.batch_norm:
            training = args[5] if len(args) > 5 else kwargs.get("training", False)
            per_element = 5 if training else 2
            self.flops += args[0].numel() * (per_element if _weight(args, kwargs, 3) else per_element - 1)
        elif func in (F.adaptive_avg_pool2d, F.adaptive_avg_pool1d):
            self.flops += args[0].numel()
        return func(*args, **kwargs)


def _weight(args: tuple[Any, ...], kwargs: dict[str, Any], position: int) -> bool:
    return (args[position] if len(args) > position else kwargs.get("weight")) is not None


def _cut(features: torch.Tensor, chain: Chain, image_size: Sequence[int]) -> Cut:
    if chain.layout is Layout.NCHW:
        return Cut(features.shape[1], features.shape[2], features.shape[3])
    if chain.layout is Layout.NHWC:
        return Cut(features.shape[3], features.shape[1], features.shape[2])
    tokens = features.shape[1] - chain.prefix_tokens
    # The grid of tokens has the proportions of the image.
    height = max(1, round((tokens * image_size[0] / image_size[1]) ** 0.5))
    if tokens % height:
        raise ValueError(f"{tokens} tokens are no grid with the proportions of {image_size[0]}x{image_size[1]} pixels")
    return Cut(features.shape[2], height, tokens // height)
