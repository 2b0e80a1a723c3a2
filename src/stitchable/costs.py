"""FLOPs and parameters: counted once per anchor, part by part, on the meta device, and summed per route.

One multiply-add is one FLOP, as in the paper and in fvcore (https://github.com/facebookresearch/fvcore, whose
conventions for normalisation are followed so that figures agree to the integer): 5 per element of a LayerNorm or
GroupNorm, 2 per element of a BatchNorm in evaluation mode (4 and 1 where they have no weight), and 1 per input element
of an adaptive average pooling. Other elementwise operations, softmax and activations count as nothing there and here.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import FlopCounterMode

from stitchable.families.adapter import Description, Layout, code_reference
from stitchable.families.registry import create_model, describe
from stitchable.model.cascades import num_shared_steps
from stitchable.model.chain import Anchor, Chain, Part
from stitchable.model.modeling_stitchable import StitchablePreTrainedModel
from stitchable.model.operations import TimmModel
from stitchable.model.routes import AnchorShape, Cut, Joint, Stitch, carried_tokens, find_stitch

_FLOPS_OF_BILINEAR = 4
"""Per output element, as fvcore counts them."""


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
    """An anchor's shape and the cost of each of its parts.

    Attributes:
        shape: its stages and cuts.
        stem: from the pixel values to cut 0, and the parameters of the context and the own prefix tokens.
        blocks: of each block.
        head: what follows the last block.
        neck_flops: the share of the final norm in the head.
        chain: the names of its parts.
        own_class: "file.Class" of a class that is not timm's.
        context: what the blocks need besides the features, once for every segment of the anchor but a first one.
        prefix: the own prefix tokens, for features that come without.
    """

    shape: AnchorShape
    stem: Cost
    blocks: tuple[Cost, ...]
    head: Cost
    neck_flops: int
    chain: Chain
    own_class: str | None
    context: Cost = Cost()
    prefix: Cost = Cost()

    @property
    def total(self) -> Cost:
        """The cost of the whole anchor."""
        return sum((*self.blocks, self.head), self.stem)


def profile_anchor(
    model: TimmModel, image_size: Sequence[int], num_channels: int = 3, described: Description | None = None
) -> AnchorProfile:
    """Run a timm model once, part by part, on its device (meta costs no arithmetic).

    Args:
        model: a timm model of a supported class.
        image_size: (height, width) in pixels.
        num_channels: channels of the image.
        described: where its parts are, if that is not what this process knows of its class.

    Raises:
        ValueError: the class is not supported, or the model cannot take images of this size, or its features have not
            the rank or layout that its adapter declares.
    """
    described, training = described or describe(model), model.training
    chain = described.chain
    model.eval()
    pixel_values = torch.empty(1, num_channels, *image_size, device=next(model.parameters()).device)
    try:
        stem_flops, flow = _counted(chain.run_stem, model, pixel_values)
        cuts, block_flops = [Cut(*described.measure(flow.features, image_size))], []
        for index in range(chain.depth):
            flops, flow = _counted(chain.run_block, model, index, flow)
            block_flops.append(flops)
            cuts.append(Cut(*described.measure(flow.features, image_size)))
        neck_flops, flow = _counted(chain.run_neck, model, flow)
        head_flops, _ = _counted(chain.run_head, model, flow.features)
        middle = cuts[chain.depth // 2]
        context_flops, _ = _counted(chain.enter, model, flow.features, pixel_values, (middle.height, middle.width))
        prefix_flops, _ = _counted(chain.prefix_of, model) if chain.prefix else (0, None)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(
            f"{described.model_class} cannot take images of {num_channels}x{image_size[0]}x{image_size[1]}: "
            f"{str(error) or 'an assertion of timm fails'}"
        ) from error
    finally:
        model.train(training)

    params: Counter[Part] = Counter()
    for name, parameter in model.named_parameters():
        params[chain.part_of(name)] += parameter.numel()
    return AnchorProfile(
        shape=AnchorShape(
            described.stages,
            tuple(cuts),
            described.layout.value,
            len(described.prefix_names),
            described.prefix_names,
        ),
        stem=Cost(stem_flops, params["stem"] + params["context"] + params["prefix"]),
        blocks=tuple(Cost(flops, params[index]) for index, flops in enumerate(block_flops)),
        head=Cost(neck_flops + head_flops, params["head"]),
        neck_flops=neck_flops,
        chain=chain,
        own_class=code_reference(type(model)),
        context=Cost(context_flops, params["context"]),
        prefix=Cost(prefix_flops, params["prefix"]),
    )


def profile_architecture(
    architecture: str, kwargs: Mapping[str, Any], num_labels: int | None, image_size: Sequence[int], num_channels: int
) -> AnchorProfile:
    """The profile of an architecture that need not be in memory: it is built on the meta device.

    Raises:
        ValueError: as `create_model` and `profile_anchor`.
    """
    with torch.device("meta"):
        model = create_model(architecture, kwargs, num_classes=num_labels)
    try:
        return profile_anchor(model, image_size, num_channels)
    except ValueError as error:
        raise ValueError(f"anchor {architecture!r}: {error}") from error


def cost_of_layer(source: AnchorShape, stop: int, target: AnchorShape, start: int) -> Cost:
    """The stitching layer from cut `stop` of one anchor to cut `start` of another, bias included in the parameters."""
    before, after = source.cuts[stop], target.cuts[start]
    area, target_area = before.height * before.width, after.height * after.width
    positions = min(area, target_area) + sum(token is not None for token in carried_tokens(source, target))
    flops = positions * before.channels * after.channels
    if (before.height, before.width) != (after.height, after.width):
        # Where the grid becomes smaller it is resized before the map, else after it.
        flops += _FLOPS_OF_BILINEAR * target_area * (before.channels if target_area < area else after.channels)
    return Cost(flops, params=before.channels * after.channels + after.channels)


def cost_of_stitch(stitch: Stitch, profiles: Sequence[AnchorProfile]) -> Cost:
    """The sum over a route: the first anchor's stem, the blocks, the stitching layers, the last anchor's head."""
    first, last = profiles[stitch.route[0].anchor], profiles[stitch.route[-1].anchor]
    cost = first.stem + last.head
    if stitch.skips_neck:
        cost = replace(cost, flops=cost.flops - last.neck_flops)
    for segment in stitch.route:
        cost = sum(profiles[segment.anchor].blocks[segment.start : segment.stop], cost)
    # What a chain passes twice works twice, but its parameters are there once.
    there: set[Any] = {("context", stitch.route[0].anchor), ("prefix", stitch.route[0].anchor)}

    def add(what: Any, part: Cost) -> None:
        nonlocal cost
        cost += replace(part, params=0) if what in there else part
        there.add(what)

    for joint in stitch.joints:
        for what, part in _parts_of_joint(joint, profiles).items():
            add(what, part)
    return cost


def _parts_of_joint(joint: Joint, profiles: Sequence[AnchorProfile]) -> dict[Any, Cost]:
    """What a stitching layer brings with it: itself, and what the blocks behind it need."""
    source, target = profiles[joint.front].shape, profiles[joint.back].shape
    parts: dict[Any, Cost] = {joint.layer: cost_of_layer(source, joint.stop, target, joint.start)}
    parts["context", joint.back] = profiles[joint.back].context
    if None in carried_tokens(source, target):
        parts["prefix", joint.back] = profiles[joint.back].prefix
    return parts


def flops_of_steps(stitch: Stitch, profiles: Sequence[AnchorProfile]) -> list[int]:
    """FLOPs of each step of a stitch, in the order of `model.steps`: all that it costs but for its head."""
    flops = [profiles[stitch.route[0].anchor].stem.flops]
    for segment, joint in zip(stitch.route, (*stitch.joints, None), strict=True):
        flops += [block.flops for block in profiles[segment.anchor].blocks[segment.start : segment.stop]]
        if joint is not None:
            flops.append(sum(part.flops for part in _parts_of_joint(joint, profiles).values()))
    return [*flops, 0 if stitch.skips_neck else profiles[stitch.route[-1].anchor].neck_flops]


def shared_flops(model: StitchablePreTrainedModel, stitch_ids: Sequence[int]) -> list[list[int]]:
    """For each two stitches the FLOPs of the steps that both begin with, which need to run only once for both.

    Raises:
        ValueError: an unknown stitch.
    """
    profiles = [_profile_of(anchor, model.config) for anchor in model.shapes]
    steps = [model.steps(stitch_id) for stitch_id in stitch_ids]
    flops = [flops_of_steps(find_stitch(model.stitches, stitch_id), profiles) for stitch_id in stitch_ids]
    return [
        [sum(costs[: num_shared_steps(mine, theirs)]) for theirs in steps]
        for mine, costs in zip(steps, flops, strict=True)
    ]


def check_counted(model: StitchablePreTrainedModel, stitch_ids: Sequence[int]) -> None:
    """Refuse stitches without FLOPs with a ValueError that says what counts them."""
    unknown = [stitch_id for stitch_id in stitch_ids if find_stitch(model.stitches, stitch_id).flops is None]
    if unknown:
        raise ValueError(f"nobody has counted the FLOPs of stitch {unknown[0]}; stitchable.update_costs(model) does")


def update_costs(model: StitchablePreTrainedModel) -> None:
    """Count again and write `flops` and `params` of every stitch into the model's table, after its classifiers changed.

    Metrics and latencies, which no longer hold, are dropped, and so are the cascades.
    """
    config, model.cascades = model.config, ()
    profiles = [_profile_of(anchor, config) for anchor in model.shapes]
    for stitch in model.stitches:
        cost = cost_of_stitch(stitch, profiles)
        model.record(stitch.id, flops=cost.flops, params=cost.params, latency_ms=None, memory_mb=None, metrics={})
    config.num_labels_of_costs = config.num_labels


def _profile_of(anchor: Anchor, config: Any) -> AnchorProfile:
    """The profile of an anchor as its config describes it, whatever this process knows of its class."""
    with torch.device("meta"):
        model = anchor.build(config.num_labels)
    described = Description(
        anchor.chain, Layout(anchor.layout), anchor.stages, anchor.prefix_names, type(model).__name__
    )
    return profile_anchor(model, config.image_size, config.num_channels, described)


def count_flops(function: Callable[..., Any], *inputs: torch.Tensor) -> int:
    """FLOPs of one call of a module or function, as this project counts them, for the whole batch of its inputs."""
    return _counted(function, *inputs)[0]


def _counted(function: Callable[..., Any], *inputs: Any) -> tuple[int, Any]:
    # FlopCounterMode counts a multiply-add as two. It knows plain matrix products on every device and in every version,
    # but not every fused attention (on CPUs only since torch 2.15).
    models = [model for model in (function, *inputs) if isinstance(model, nn.Module)]
    with (
        torch.no_grad(),
        _without_gradients(models),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as products,
        _ElementwiseCounter() as elementwise,
    ):
        output = function(*inputs)
    return products.get_total_flops() // 2 + elementwise.flops, output


@contextmanager
def _without_gradients(models: Sequence[nn.Module]) -> Iterator[None]:
    """FlopCounterMode hooks into the gradients of what modules are given, and a view of a parameter has none here."""
    trained = {parameter for model in models for parameter in model.parameters() if parameter.requires_grad}
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


class _ElementwiseCounter(TorchFunctionMode):
    """Count what FlopCounterMode leaves out: normalisation, adaptive pooling and resizing, as fvcore does, and LSTMs.

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
        elif func is torch.lstm:
            return self._lstm(*args, **kwargs)
        elif func in (F.adaptive_avg_pool2d, F.adaptive_avg_pool1d):
            self.flops += args[0].numel()
        output = func(*args, **kwargs)
        if func is F.interpolate and kwargs.get("mode") == "bilinear":
            self.flops += _FLOPS_OF_BILINEAR * output.numel()
        return output

    def _lstm(self, x: torch.Tensor, states: Any, weights: Any, *settings: Any) -> Any:
        """Every matrix of an LSTM is applied to every element of its sequence; not every device shows the products."""
        self.flops += (x.numel() // x.shape[-1]) * sum(weight.numel() for weight in weights if weight.ndim == 2)
        with _disable_current_modes():
            if not x.is_meta:
                return torch.lstm(x, states, weights, *settings)
            # There PyTorch would go through the sequence in Python.
            *_, bidirectional, _ = settings
            hidden, cells = states
            return x.new_empty(*x.shape[:-1], hidden.shape[-1] * (2 if bidirectional else 1)), hidden, cells


def _weight(args: tuple[Any, ...], kwargs: dict[str, Any], position: int) -> bool:
    return (args[position] if len(args) > position else kwargs.get("weight")) is not None
