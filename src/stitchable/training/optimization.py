"""Optimiser, learning rates and gradient clipping of a schedule, by timm and Accelerate."""

from typing import Any

import torch
from accelerate import Accelerator
from timm.optim import create_optimizer_v2, list_optimizers, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils.agc import adaptive_clip_grad

from stitchable.model.modeling_stitchable import StitchablePreTrainedModel
from stitchable.training.recipe import Schedule


def parameter_groups(model: StitchablePreTrainedModel, schedule: Schedule) -> list[dict[str, Any]]:
    """Parameters by role: anchors and stitching layers, each with and without weight decay.

    Biases, norms, and what timm's `no_weight_decay` names for an anchor (position embeddings, class tokens) decay not.
    `lr_scale` is what timm's schedulers multiply the learning rate with: anchors of hierarchical families learn at a
    tenth of the rate of the stitching layers (section 4 of the paper).
    """
    groups: dict[tuple[str, float], list[torch.nn.Parameter]] = {}
    roles: list[tuple[str, Any]] = [("anchors", anchor) for anchor in model.anchors] + [
        ("stitching layers", model.stitching_layers)
    ]
    for role, module in roles:
        names = module.no_weight_decay() if hasattr(module, "no_weight_decay") else ()
        for group in param_groups_weight_decay(module, schedule.weight_decay, no_weight_decay_list=names):
            groups.setdefault((role, group["weight_decay"]), []).extend(group["params"])
    scales = {"anchors": schedule.anchor_learning_rate_scale, "stitching layers": 1.0}
    return [
        {"params": parameters, "weight_decay": decay, "lr_scale": scales[role], "role": role}
        for (role, decay), parameters in groups.items()
        if parameters
    ]


def make_optimizer(groups: list[dict[str, Any]], schedule: Schedule) -> torch.optim.Optimizer:
    """The optimiser of a schedule over groups of parameters; what timm refuses is a ValueError."""
    try:
        return create_optimizer_v2(
            groups, opt=schedule.optimizer, lr=schedule.learning_rate, **schedule.optimizer_options
        )
    except (TypeError, AssertionError, ValueError) as error:
        known = ", ".join(map(str, list_optimizers()))
        raise ValueError(
            f"timm cannot make the optimizer {schedule.optimizer!r} with {schedule.optimizer_options}: {error}. "
            f"It has {known}"
        ) from error


def make_scheduler(optimizer: torch.optim.Optimizer, schedule: Schedule, steps_per_epoch: int) -> Scheduler:
    """Timm's cosine by optimiser step: `step_update(step)` sets the learning rates of a step counted from 0."""
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched="cosine",
        num_epochs=max(1, schedule.epochs),
        warmup_epochs=schedule.warmup_epochs,  # type: ignore[arg-type]
        warmup_lr=schedule.warmup_learning_rate,
        min_lr=schedule.min_learning_rate,
        step_on_epochs=False,
        updates_per_epoch=steps_per_epoch,
    )
    return scheduler


def clip_gradients(accelerator: Accelerator, parameters: list[torch.nn.Parameter], schedule: Schedule) -> None:
    """Clip as the schedule says, once the gradients of a step are complete."""
    if schedule.clip is None or not accelerator.sync_gradients:
        return
    if schedule.clip == "norm":
        accelerator.clip_grad_norm_(parameters, schedule.clip_at)
    else:
        accelerator.unscale_gradients()
        adaptive_clip_grad(parameters, schedule.clip_at)
