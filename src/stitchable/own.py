"""What is a stitch's own, without training: statistics of batch norms; who teaches a stitch, and what it had before."""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from transformers.utils import logging

from stitchable.batches import unpack_batch
from stitchable.evaluation import evaluation_mode, known_ids
from stitchable.model.chain import Flow
from stitchable.model.modeling_stitchable import Step, StitchableForImageClassification, StitchablePreTrainedModel
from stitchable.model.routes import Own, Stitch, find_stitch

logger = logging.get_logger(__name__)


@torch.no_grad()
def recalibrate_batch_norms(
    model: StitchableForImageClassification,
    batches: Iterable[Any],
    stitch_ids: Sequence[int] | None = None,
    *,
    rank: int = 16,
) -> dict[int, tuple[float, float]]:
    """Give stitches running statistics of their own, of what flows through them, where held-out images say it helps.

    The statistics are the mean over all batches but the last quarter, in training mode. On that quarter a stitch then
    has to be right more often than with those it had (where there are labels), or to agree more often with its back
    anchor; else it gets back what it had. The anchors keep theirs. Needs no labels.

    Args:
        model: with its anchors whole.
        batches: at least two, of images alike and as large as possible; see `stitchable.batches`.
        stitch_ids: which stitches; all that run a batch norm behind their first joint if None.
        rank: of the updates of its stitching layers that a stitch gets besides if nothing was its own.

    Returns:
        For each stitch, the part of the held-out images before and with the new statistics.

    Raises:
        ValueError: a stitch without batch norms behind its first joint, an anchor, or fewer than two batches.
    """
    given = [unpack_batch(batch, labels="optional") for batch in batches]
    if len(given) < 2:
        raise ValueError(f"statistics need at least two batches, one to judge them by; got {len(given)}")
    held_out = given[-max(1, len(given) // 4) :]
    scores: dict[int, tuple[float, float]] = {}
    for stitch_id in logging.tqdm(ids_to_teach(model, stitch_ids), desc="statistics", leave=False):
        stitch = find_stitch(model.stitches, stitch_id)
        teacher, give_back = teacher_of(model, stitch), remember_own(model, stitch_id)
        model.give_own(stitch_id, stitch.own.rank if stitch.own else rank)
        modules = model.own[str(stitch_id)].modules()
        norms = [module for module in modules if isinstance(module, _BatchNorm) and module.track_running_stats]
        if not norms:
            give_back()
            if stitch_ids is None:
                continue
            raise ValueError(f"stitch {stitch_id} runs no batch norm behind its first joint, so it has no statistics")
        try:
            before = _score(model, stitch_id, teacher, held_out)
            _collect(model, stitch_id, norms, [pixel_values for pixel_values, _ in given[: -len(held_out)]])
            scores[stitch_id] = before, _score(model, stitch_id, teacher, held_out)
        except BaseException:
            give_back()
            raise
        if scores[stitch_id][1] <= before:
            give_back()
    if not scores:
        raise ValueError("this model has no batch norm behind a joint, so there are no statistics to give its stitches")
    return scores


def give_own(model: StitchablePreTrainedModel, stitch_id: int, rank: int | None) -> None:
    """Give a stitch norms of its own behind its first joint, as the anchors have them, and updates of its layers.

    What it computes stays the same until these are trained. A stitch that has some of this rank keeps them.

    Args:
        model: whose stitch it is.
        stitch_id: no anchor's.
        rank: of the updates; whole matrices where factors of this rank would be no smaller. None takes away all.

    Raises:
        ValueError: an unknown stitch, one without a joint or without norms behind it, or that has another rank.
    """
    stitch, own = find_stitch(model.stitches, stitch_id, model.config.left_out), None if rank is None else Own(rank)
    if own and stitch.own not in (None, own):
        raise ValueError(f"stitch {stitch.id} has {stitch.own} already, not {own}; give_own(..., None) takes it away")
    model.replace(replace(stitch, own=own))


def _collect(
    model: StitchableForImageClassification, stitch_id: int, norms: Sequence[Any], batches: Iterable[torch.Tensor]
) -> None:
    momenta = [norm.momentum for norm in norms]
    with evaluation_mode(model):  # of all else: nothing is dropped
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # the plain mean over all batches
                norm.train()
            for pixel_values in batches:
                model.run_features(pixel_values, stitch_id)
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum


def _score(
    model: StitchableForImageClassification, stitch_id: int, teacher: Sequence[Step], held_out: Iterable[Any]
) -> float:
    """The part of images of which the class is that of the label, or where there are none, of the teacher."""
    right = []
    with evaluation_mode(model):
        for pixel_values, labels in held_out:
            if labels is None:
                features = run_steps(model, teacher, model.start(pixel_values)).features
                labels = model.run_head(teacher[-1].anchor, features).argmax(-1)
            right.append(model(pixel_values, stitch_id=stitch_id).logits.argmax(-1) == labels.to(model.device))
    return float(torch.cat(right).float().mean())


def forget(model: StitchableForImageClassification, stitch_ids: Iterable[int]) -> None:
    """Drop what was measured of stitches that have changed since: their metrics, and the cascades that run one."""
    changed = set(stitch_ids)
    for stitch_id in changed:
        model.record(stitch_id, metrics={})
    stages = [{stage["stitch"] for stage in cascade["stages"]} for cascade in model.config.cascades]
    left = [cascade for cascade, ran in zip(model.config.cascades, stages, strict=True) if not ran & changed]
    if len(left) < len(stages):
        logger.warning(
            f"{len(stages) - len(left)} of {len(stages)} cascades run a stitch that has changed and are dropped; "
            "stitchable.find_cascades finds new ones"
        )
        model.cascades = left


def ids_to_teach(model: StitchableForImageClassification, stitch_ids: Sequence[int] | None) -> list[int]:
    """The ids of the stitches to change, each once; all but the anchors if None. Errors are those of `known_ids`."""
    if stitch_ids is None:
        stitch_ids = [stitch.id for stitch in model.stitches if not stitch.is_anchor]
    return known_ids(model, stitch_ids)


def teacher_of(model: StitchableForImageClassification, stitch: Stitch) -> tuple[Step, ...]:
    """The steps of the back anchor of a stitch.

    Raises:
        ValueError: the stitch is this anchor, or the model does not hold the whole anchor.
    """
    back = stitch.route[-1].anchor
    if stitch.is_anchor:
        raise ValueError(f"stitch {stitch.id} is anchor {back} itself, which cannot teach itself; name other stitches")
    for other in model.stitches:
        if other.is_anchor and other.route[0].anchor == back:
            return model.steps(other.id)
    raise ValueError(
        f"stitch {stitch.id} is taught by anchor {back}, which this model does not hold; load the checkpoint whole"
    )


def remember_own(model: StitchableForImageClassification, stitch_id: int) -> Callable[[], None]:
    """What gives a stitch back what it has of its own now, be it nothing."""
    had = find_stitch(model.stitches, stitch_id).own
    state = copy.deepcopy(model.own[str(stitch_id)].state_dict()) if had else {}

    def give_back() -> None:
        model.give_own(stitch_id, had.rank if had else None)
        if had:
            model.own[str(stitch_id)].load_state_dict(state)

    return give_back


def run_steps(model: StitchableForImageClassification, steps: Iterable[Step], flow: Flow) -> Flow:
    """What flows behind the last of these steps."""
    for step in steps:
        flow = model.run_step(step, flow)
    return flow
