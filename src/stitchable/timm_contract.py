"""What code written for timm's models calls: `forward_features`, `forward_intermediates`, `reset_classifier`, ..."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Literal

import torch
from transformers.utils import logging

from stitchable.model.chain import Flow
from stitchable.model.modeling_stitchable import Step, StitchablePreTrainedModel
from stitchable.model.operations import FUNCTION, TimmModel
from stitchable.model.placement import brought_in, entering
from stitchable.model.routes import check_integer
from stitchable.model.stitching import Side, grid_of

logger = logging.get_logger(__name__)


@property  # type: ignore[misc]  # of the model that it becomes a property of
def num_features(model: StitchablePreTrainedModel) -> int:
    """Channels of what `forward_features` returns for the default stitch."""
    back = model.stitch.route[-1].anchor
    return getattr(model.anchors[back], "num_features", model.shapes[back].cuts[-1].channels)


def forward_features(
    model: StitchablePreTrainedModel, pixel_values: torch.Tensor, stitch_id: int | None = None
) -> torch.Tensor:
    """Pixel values (N, C, H, W) to the features after the back anchor's final norm, in its layout."""
    return model.run_features(pixel_values, stitch_id)[0]


def forward_head(
    model: StitchablePreTrainedModel, features: torch.Tensor, pre_logits: bool = False, stitch_id: int | None = None
) -> torch.Tensor:
    """Those features to logits (N, num_labels), or to the pooled features before the classifier."""
    return model.run_head(model.steps(stitch_id)[-1].anchor, features, pre_logits)


def forward_intermediates(
    model: StitchablePreTrainedModel,
    pixel_values: torch.Tensor,
    indices: int | Sequence[int] | None = None,
    return_prefix_tokens: bool = False,
    norm: bool = False,
    stop_early: bool = False,
    output_fmt: Literal["NCHW", "NLC"] = "NCHW",
    intermediates_only: bool = False,
    stitch_id: int | None = None,
) -> Any:
    """Features between the blocks of a stitch, as timm's models give them.

    For an anchor they are what its own `forward_intermediates` returns. Along other routes, and where an anchor has
    no such method, there is one per block of an anchor with a single stage, and one per stage, at its end, of
    others (the stem, which some of timm's models count as one more, is none).

    Args:
        model: whose stitch runs.
        pixel_values: (N, C, H, W).
        indices: which intermediates; the last so many if a number, all if None.
        return_prefix_tokens: give pairs of an intermediate and its prefix tokens (N, tokens, C).
        norm: after the final norm: all of an anchor with a single stage, of others the last one only.
        stop_early: do not run what follows the last intermediate, and return the features there.
        output_fmt: "NCHW" for (N, C, H, W), "NLC" for (N, H W, C).
        intermediates_only: return the intermediates alone.
        stitch_id: the stitch of this call; the default of the model if None.

    Returns:
        What `forward_features` returns, and the list of intermediates.

    Raises:
        ValueError: indices or a format that there are not, a norm that this model does not hold or that leaves no
            grid, or an anchor whose tokens are no grid (Hiera).
    """
    if output_fmt not in ("NCHW", "NLC"):
        raise ValueError(f"output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}")
    stitch, steps = model._find(stitch_id), model.steps(stitch_id)
    back = stitch.route[-1].anchor
    if stitch.is_anchor and hasattr(model.anchors[back], "forward_intermediates"):
        timm_model: TimmModel = model.anchors[back]
        options = {"norm": norm, "stop_early": stop_early, "output_fmt": output_fmt}
        if return_prefix_tokens and model.shapes[back].prefix_tokens:
            options["return_prefix_tokens"] = True
        with brought_in(model, timm_model, model.chains[back], -1):
            return timm_model.forward_intermediates(
                entering(timm_model, model.start(pixel_values).pixel_values),
                indices=indices,
                intermediates_only=intermediates_only,
                **options,
            )
    ends = [place for place, step in enumerate(steps) if step.kind == "block" and _ends_something(model, step)]
    number = len(ends)
    wanted = range(number) if indices is None else range(-indices, 0) if isinstance(indices, int) else indices
    if any(not -number <= index < number for index in wanted) or not len(wanted):
        raise ValueError(f"this stitch has {number} intermediates, 0..{number - 1}; got indices {indices!r}")
    chosen = [ends[index] for index in wanted]
    found: dict[int, Any] = {}
    flow = model.start(pixel_values)
    for place, step in enumerate(steps):
        flow = model.run_step(step, flow)
        if place in chosen:
            found[place] = _intermediate(model, step, flow, norm, place == ends[-1], output_fmt, return_prefix_tokens)
        if stop_early and place == max(chosen):
            break
    intermediates = [found[place] for place in chosen]
    return intermediates if intermediates_only else (flow.features, intermediates)


def _ends_something(model: StitchablePreTrainedModel, step: Step) -> bool:
    stages = model.shapes[step.anchor].stages
    return len(stages) == 1 or step.block + 1 in accumulate(stages)


def _intermediate(
    model: StitchablePreTrainedModel,
    step: Step,
    flow: Flow,
    norm: bool,
    is_last: bool,
    output_fmt: str,
    return_prefix_tokens: bool,
) -> Any:
    shape = model.shapes[step.anchor]
    side = Side.of(shape, step.block + 1)
    if side.layout == "UNITS":
        raise ValueError("tokens in the order of mask units (Hiera) are no grid, so there are no intermediates")
    if norm and (len(shape.stages) == 1 or is_last):
        if "head" not in model.parts[step.anchor]:
            raise ValueError(f"this model does not hold the final norm of anchor {step.anchor}; give norm=False")
        if any(operation.startswith(FUNCTION) for operation in model.chains[step.anchor].neck):
            raise ValueError(f"the final norm of anchor {step.anchor} leaves no grid; give norm=False")
        flow = model.run_step(Step("neck", step.anchor, own=step.own), flow)
    x_NHWC = grid_of(flow.features, side)
    x = x_NHWC.permute(0, 3, 1, 2).contiguous() if output_fmt == "NCHW" else x_NHWC.flatten(1, 2)
    prefix = flow.features[:, : side.prefix_tokens] if return_prefix_tokens and side.prefix_tokens else None
    return x if prefix is None else (x, prefix)


def reset_classifier(model: StitchablePreTrainedModel, num_classes: int) -> None:
    """Give every anchor a new classifier of so many classes, and the config as many labels, without names.

    FLOPs and parameters of the stitches are those of before until `stitchable.update_costs(model)`.

    Raises:
        ValueError: no positive number.
    """
    if check_integer(num_classes, "num_classes") < 1:
        raise ValueError(
            f"num_classes must be at least 1, got {num_classes}; forward_head(pre_logits=True) leaves the "
            "classifier out"
        )
    with_heads = [index for index in model.chains if "head" in model.parts[index]]
    if any(next(model.anchors[index].parameters()).is_meta for index in with_heads):
        raise ValueError("a model whose weights are offloaded gets no new classifiers; load it without")
    for index in with_heads:
        anchor: TimmModel = model.anchors[index]
        known, like = set(anchor.modules()), next(anchor.parameters())
        if hasattr(anchor, "reset_classifier"):
            anchor.reset_classifier(num_classes)
        else:
            name = str(model.chains[index].head[-1])
            fresh = model.shapes[index].build(num_classes)
            anchor.set_submodule(name, fresh.get_submodule(name))
            anchor.num_classes = num_classes
        for module in set(anchor.modules()) - known:
            module.to(like.device, like.dtype).train(anchor.training)  # a batch norm among them, in LeViT
    model.config.num_labels = num_classes
    logger.warning("the classifiers are new; stitchable.update_costs(model) counts their FLOPs and parameters")
