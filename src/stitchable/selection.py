"""Which stitches are worth having: before training by a score that needs no labels, after it by what was measured.

The score says how far a stitch is, after least squares alone, from the anchor at its end, which it is going to be
taught by; `benchmarks/selection.py` measures how well each score predicts the accuracy after training. KL divergence is
that of KLAS (arXiv 2605.29259).
"""

import copy
from collections.abc import Collection, Iterable, Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from transformers.utils import logging

from stitchable.batches import unpack_batch
from stitchable.costs import check_counted
from stitchable.evaluation import evaluation_mode, run_to_heads
from stitchable.front import pareto_front
from stitchable.model.modeling_stitchable import StitchableForImageClassification
from stitchable.model.routes import Stitch, check_integer
from stitchable.model.schema import write
from stitchable.space import groups_by_cost

logger = logging.get_logger(__name__)

Score = Literal["kl", "agreement", "feature_distance"]
SCORES: tuple[Score, ...] = get_args(Score)

_FEW_IMAGES = 100


def select(
    model: StitchableForImageClassification,
    batches: Iterable[Any],
    *,
    number: int | None = None,
    spacing: float | None = None,
    score: Score = "kl",
) -> StitchableForImageClassification:
    """Keep the anchors and the most promising stitches: of those that cost about the same, the one with the best score.

    Stitches that join the same anchors stand in groups of like cost, and each group keeps one. A stitch that costs as
    much as the dearest of its anchors is never kept: it could only be worse than that.

    Args:
        model: its stitching layers are fitted; it stays as it is.
        batches: pixel values (N, C, H, W), or mappings or sequences that hold them as "pixel_values" or first, of a few
            hundred images; labels are not looked at.
        number: how many stitches to keep at most, beside the anchors; the groups are as wide as that takes.
        spacing: the FLOPs of the dearest stitch of a group are at most this multiple of those of the cheapest, such as
            1.1. One of the two is given.
        score: of `score_stitches`, by which the best of a group is found.

    Returns:
        A model of the stitches that are kept. They keep their ids, and share their weights with `model`.

    Raises:
        ValueError: neither or both of `number` and `spacing`, or one that keeps nothing; stitches without FLOPs, a
            model that lacks an anchor, no images, or images of another size than the model's.
    """
    among = promising(model)
    if not among:
        raise ValueError(
            "no stitch of this model is cheaper than the dearest of its anchors, so none is worth keeping; keep the "
            "anchors alone"
        )
    groups = _groups(among, number, spacing)
    scores = score_stitches(model, batches, [stitch.id for group in groups for stitch in group])
    # Better when it is higher, or else lower.
    sign = 1 if score == "agreement" else -1
    best = {
        max(group, key=lambda stitch: (sign * scores[stitch.id][score], -(stitch.flops or 0))).id for group in groups
    }
    return keep_stitches(model, best | {stitch.id for stitch in model.stitches if stitch.is_anchor})


def promising(model: StitchableForImageClassification) -> list[Stitch]:
    """The stitches that are cheaper than the dearest of their anchors; a dearer one could only be worse than that.

    Raises:
        ValueError: stitches without FLOPs, or a model that lacks one of their anchors.
    """
    check_counted(model, [stitch.id for stitch in model.stitches])
    stitches = [stitch for stitch in model.stitches if not stitch.is_anchor]
    anchors = {stitch.route[0].anchor: stitch.flops or 0 for stitch in model.stitches if stitch.is_anchor}
    missing = {segment.anchor for stitch in stitches for segment in stitch.route} - set(anchors)
    if missing:
        raise ValueError(
            f"stitches are compared with their anchors, and anchor {min(missing)} was left out of this model"
        )
    return [s for s in stitches if (s.flops or 0) < max(anchors[segment.anchor] for segment in s.route)]


@torch.no_grad()
def score_stitches(
    model: StitchableForImageClassification, batches: Iterable[Any], stitch_ids: Sequence[int] | None = None
) -> dict[int, dict[str, float]]:
    """How far each stitch is from the anchor at its end, over images without labels, in one pass.

    Args:
        model: as for `select`, like the next.
        batches: see there.
        stitch_ids: which stitches; all but the anchors if None.

    Returns:
        By id, means over all images: "kl", the divergence of the stitch's probabilities from the anchor's, in nats;
        "agreement", how often both have the same class first, in 0..1; "feature_distance", |f - g|^2 / |g|^2 of what
        the head takes, f of the stitch and g of the anchor.

    Raises:
        ValueError: an unknown stitch, no images, or images of another size than the model's.
    """
    wanted = [s for s in model.stitches if (not s.is_anchor if stitch_ids is None else s.id in set(stitch_ids))]
    for stitch_id in stitch_ids or ():
        model.steps(stitch_id)  # raises for an unknown one
    anchors = {stitch.route[0].anchor: stitch.id for stitch in model.stitches if stitch.is_anchor}
    ends = {stitch.id: anchors[stitch.route[-1].anchor] for stitch in wanted}
    sums, num_images = dict.fromkeys(ends, torch.zeros(3, dtype=torch.float64)), 0
    with evaluation_mode(model):
        for batch in logging.tqdm(batches, desc="scoring stitches", leave=False):
            pixel_values, _ = unpack_batch(batch, labels="optional")
            _check_size(model, pixel_values)
            heads = run_to_heads(model, pixel_values, [*set(ends.values()), *ends])
            outputs = {i: (features, model.run_head(anchor, features)) for i, anchor, features in heads}
            for stitch_id, anchor_id in ends.items():
                sums[stitch_id] = sums[stitch_id] + distances(outputs[stitch_id], outputs[anchor_id])
            num_images += len(pixel_values)
    if num_images == 0:
        raise ValueError("there are no images to score the stitches on")
    if num_images < _FEW_IMAGES:
        logger.warning(f"only {num_images} images score the stitches; a few hundred tell them apart")
    return {i: dict(zip(SCORES, (total / num_images).tolist(), strict=True)) for i, total in sums.items()}


def prune(model: StitchableForImageClassification, metric: str = "accuracy") -> StitchableForImageClassification:
    """Drop every stitch that another one beats: no budget would choose it.

    Kept are the front of FLOPs and `metric`, the anchors, the stages of cascades, and stitches that were not measured,
    of which nobody knows.

    Args:
        model: measured; it stays as it is.
        metric: a measured figure, better when higher.

    Returns:
        A model of the stitches that are kept. They keep their ids, and share their weights with `model`.

    Raises:
        ValueError: no stitch has been measured by this metric.
    """
    front = {stitch.id for stitch in pareto_front(model.stitches, metric)}
    if not front:
        raise ValueError(f"no stitch has a measured {metric}; stitchable.evaluate(model, batches) measures accuracy")
    needed = {stitch_id for cascade in model.cascades for stitch_id in cascade.stitch_ids}
    others = {stitch.id for stitch in model.stitches if stitch.is_anchor or metric not in stitch.metrics}
    return keep_stitches(model, front | needed | others)


def keep_stitches(
    model: StitchableForImageClassification, stitch_ids: Collection[int]
) -> StitchableForImageClassification:
    """A model of some stitches of another, with their ids and its weights, and of its cascades those that it can run.

    The default is that of the model where it is kept, and else the dearest anchor.

    Args:
        model: it stays as it is.
        stitch_ids: those to keep.
    """
    settings = copy.deepcopy(model.config.to_dict())
    kept = [stitch for stitch in model.stitches if stitch.id in set(stitch_ids)]
    cascades = [x for x in model.cascades if x.stitch_ids <= set(stitch_ids)]
    settings |= {"stitches": write(kept), "cascades": write(cascades)}
    if settings.get("cascade_id") not in [cascade.id for cascade in cascades]:
        settings["cascade_id"] = None
    if settings.get("cascade_id") is None and settings.get("stitch_id") not in {stitch.id for stitch in kept}:
        settings["stitch_id"] = max(kept, key=lambda stitch: (stitch.is_anchor, stitch.flops or 0)).id
    smaller: Any = type(model)(type(model.config).from_dict(settings))
    weights = model.state_dict()
    smaller.load_state_dict({name: weights[name] for name in smaller.state_dict()}, assign=True)
    smaller.name_or_path, smaller.hub_arguments = model.name_or_path, dict(model.hub_arguments)
    return smaller.to(model.device).train(model.training)


def _groups(stitches: Sequence[Stitch], number: int | None, spacing: float | None) -> list[list[Stitch]]:
    """Groups of stitches of the same anchors, with FLOPs that differ by a factor up to `spacing`, or up to `number`."""
    if (number is None) == (spacing is None):
        raise ValueError(f"give a number of stitches to keep or a spacing, got number={number!r}, spacing={spacing!r}")
    pairs: dict[tuple[int, ...], list[Stitch]] = {}
    for stitch in sorted(stitches, key=lambda stitch: (stitch.flops or 0, stitch.id)):
        pairs.setdefault(tuple(segment.anchor for segment in stitch.route), []).append(stitch)
    if spacing is not None:
        if not 1 <= spacing < float("inf"):
            raise ValueError(f"a spacing is a multiple of FLOPs, such as 1.1 for a tenth more, got {spacing!r}")
        return _of_spacing(pairs.values(), spacing)
    if check_integer(number, "number") < len(pairs):
        raise ValueError(
            f"number={number} keeps nothing of some of the {len(pairs)} pairs of anchors that are stitched; give at "
            f"least {len(pairs)}"
        )
    # Only the quotient of two costs can change how many groups there are.
    costs = [[stitch.flops or 0 for stitch in pair] for pair in pairs.values()]
    spacings = sorted(
        {1.0, *(dear / cheap for pair in costs for cheap in set(pair) for dear in set(pair) if dear > cheap)}
    )
    low, high = 0, len(spacings) - 1
    while low < high:
        middle = (low + high) // 2
        few = len(_of_spacing(pairs.values(), spacings[middle])) <= (number or 0)
        low, high = (low, middle) if few else (middle + 1, high)
    return _of_spacing(pairs.values(), spacings[low])


def _of_spacing(pairs: Iterable[Sequence[Stitch]], spacing: float) -> list[list[Stitch]]:
    return [group for pair in pairs for group in groups_by_cost(pair, lambda first: first * spacing * (1 + 1e-9))]


def _check_size(model: StitchableForImageClassification, pixel_values: torch.Tensor) -> None:
    expected = (model.config.num_channels, *model.config.image_size)
    if tuple(pixel_values.shape[1:]) != expected:
        raise ValueError(
            f"the images are {'x'.join(map(str, pixel_values.shape[1:]))}, and those of this model "
            f"{'x'.join(map(str, expected))}; its image processor makes them so"
        )


def distances(stitch: tuple[torch.Tensor, torch.Tensor], anchor: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """The sums (3,) over a batch of what `score_stitches` returns, each from features and logits (N, num_labels)."""
    (ours, logits), (theirs, target) = ((x.double().flatten(1) for x in pair) for pair in (stitch, anchor))
    divergence = F.kl_div(logits.log_softmax(1), target.log_softmax(1), reduction="sum", log_target=True)
    agreement = (logits.argmax(1) == target.argmax(1)).sum()
    distance = ((ours - theirs).square().sum(1) / theirs.square().sum(1).clamp(min=1e-12)).sum()
    return torch.stack([divergence, agreement.double(), distance]).cpu()
