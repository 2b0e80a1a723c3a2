"""Parameter groups, learning rates and clipping of a schedule."""

import math
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from families import make, randomise
from stitchable.model.modeling_stitchable import StitchablePreTrainedModel
from stitchable.training.optimization import clip_gradients, make_optimizer, make_scheduler, parameter_groups
from stitchable.training.recipe import Schedule


def optimizer_of(model: StitchablePreTrainedModel, settings: Schedule) -> torch.optim.Optimizer:
    return make_optimizer(parameter_groups(model, settings), settings)


def schedule(**settings: Any) -> Schedule:
    return Schedule(**{"epochs": 10, "batch_size": 4, "learning_rate": 0.1, **settings})


def names_of(model: torch.nn.Module, groups: list[dict[str, Any]]) -> dict[tuple[str, float], set[str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {(g["role"], g["weight_decay"]): {names[id(p)] for p in g["params"]} for g in groups}


@pytest.mark.parametrize("family", ["vit", "swin", "resnet", "levit"])
def test_parameters_are_grouped_by_role_and_decay(family: str) -> None:
    model = make(family)
    groups = names_of(model, parameter_groups(model, schedule(weight_decay=0.3)))
    assert set(groups) == {(role, decay) for role in ("anchors", "stitching layers") for decay in (0.0, 0.3)}
    assert sum(map(len, groups.values())) == len(list(model.parameters()))  # each once
    for (role, decay), names in groups.items():
        for name in names:
            assert name.startswith("anchors." if role == "anchors" else "stitching_layers.")
            parameter = model.get_parameter(name)
            named = role == "anchors" and name.split(".", 2)[2] in _spared(model, name)
            assert (decay == 0.0) == (parameter.ndim <= 1 or name.endswith(".bias") or named), name
    assert any(name.endswith(".weight") for name in groups["stitching layers", 0.3])


def _spared(model: torch.nn.Module, name: str) -> set[str]:
    anchor = model.anchors[int(name.split(".")[1])]
    return set(anchor.no_weight_decay()) if hasattr(anchor, "no_weight_decay") else set()


def test_position_embeddings_and_class_tokens_do_not_decay() -> None:
    model = make("vit")
    groups = names_of(model, parameter_groups(model, schedule()))
    spared = {f"anchors.{anchor}.{name}" for anchor in range(2) for name in ("pos_embed", "cls_token")}
    assert spared <= groups["anchors", 0.0]


def test_frozen_parameters_are_left_out() -> None:
    model = make("vit")
    model.anchors.requires_grad_(False)
    assert {role for role, _ in names_of(model, parameter_groups(model, schedule()))} == {"stitching layers"}


def test_weight_decay_is_that_of_the_group() -> None:
    """Without gradients a step of AdamW is (1 - learning rate x weight decay) of a weight."""
    model = randomise(make("vit"))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    settings = schedule(weight_decay=0.3, learning_rate=0.1, anchor_learning_rate_scale=0.5)
    optimizer = optimizer_of(model, settings)
    make_scheduler(optimizer, settings, steps_per_epoch=1).step_update(0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for (role, decay), names in names_of(model, optimizer.param_groups).items():
        rate = 0.1 * (0.5 if role == "anchors" else 1.0)
        for name in names:
            torch.testing.assert_close(model.get_parameter(name), before[name] * (1 - rate * decay))


def test_the_optimizer_and_its_options_are_timms() -> None:
    model = make("vit")
    sgd = optimizer_of(model, schedule(optimizer="sgd", optimizer_options={"momentum": 0.8, "nesterov": True}))
    assert isinstance(sgd, torch.optim.SGD)
    assert all(group["momentum"] == 0.8 and group["nesterov"] for group in sgd.param_groups)
    adamw = optimizer_of(model, schedule(optimizer_options={"betas": [0.8, 0.95], "eps": 1e-6}))
    assert isinstance(adamw, torch.optim.AdamW)
    assert all((*group["betas"], group["eps"]) == (0.8, 0.95, 1e-6) for group in adamw.param_groups)


@pytest.mark.parametrize("settings", [{"optimizer": "adamq"}, {"optimizer_options": {"warmth": 1}}])
def test_an_optimizer_that_timm_cannot_make_is_named(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"timm cannot make the optimizer .*adam.*It has .*adamw"):
        optimizer_of(make("vit"), schedule(**settings))


def rates(settings: Schedule, steps: list[int], steps_per_epoch: int = 5) -> dict[str, list[float]]:
    optimizer = optimizer_of(make("vit"), settings)
    scheduler = make_scheduler(optimizer, settings, steps_per_epoch)
    measured: dict[str, list[float]] = {"anchors": [], "stitching layers": []}
    for step in steps:
        scheduler.step_update(step)
        for role, values in measured.items():
            (rate,) = {group["lr"] for group in optimizer.param_groups if group["role"] == role}
            values.append(rate)
    return measured


def test_learning_rates_warm_up_and_decay_by_steps() -> None:
    """The cosine runs over the whole training, warm-up included, as in timm."""
    settings = schedule(
        warmup_epochs=2,
        warmup_learning_rate=0.01,
        min_learning_rate=0.02,
        anchor_learning_rate_scale=0.1,
    )
    steps = [0, 1, 5, 9, 10, 25, 40, 49]
    expected = [
        0.01 + step / 10 * 0.09 if step < 10 else 0.02 + 0.08 * (1 + math.cos(math.pi * step / 50)) / 2
        for step in steps
    ]
    measured = rates(settings, steps)
    assert measured["stitching layers"] == pytest.approx(expected)
    assert measured["anchors"] == pytest.approx([rate / 10 for rate in expected])


def test_a_warm_up_may_be_a_part_of_an_epoch() -> None:
    measured = rates(schedule(warmup_epochs=0.5), [0, 1, 2, 3], steps_per_epoch=4)["stitching layers"]
    assert measured[:2] == pytest.approx([0.0, 0.05])
    assert measured[2] > 0.099


def clipped(**settings: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    parameters = [
        torch.nn.Parameter(torch.ones(3, 2)),
        torch.nn.Parameter(torch.ones(2)),
        torch.nn.Parameter(torch.ones(1)),
    ]
    parameters[0].grad = torch.tensor([[3.0, 4.0], [0.03, 0.04], [0.0, 0.0]])
    parameters[1].grad = torch.tensor([-12.0, 0.0])  # the third is of a stitch that was not drawn
    before = [parameter.grad.clone() for parameter in parameters[:2]]  # type: ignore[union-attr]
    clip_gradients(Accelerator(), parameters, schedule(**settings))
    assert parameters[2].grad is None
    return before, [parameter.grad for parameter in parameters[:2]]  # type: ignore[misc]


def test_gradients_are_clipped_by_their_norm() -> None:
    before, after = clipped(clip="norm", clip_at=1.3)
    norm = math.sqrt(25 + 0.0025 + 144)
    torch.testing.assert_close(after, [gradient * 1.3 / norm for gradient in before])
    before, after = clipped(clip="norm", clip_at=100.0)
    torch.testing.assert_close(after, before)


def test_gradients_are_clipped_by_unit() -> None:
    """Adaptively (Brock et al., 2021): the norm of a row at most clip_at times that of its weights."""
    before, after = clipped(clip="agc", clip_at=0.1)
    limit = 0.1 * math.sqrt(2)
    torch.testing.assert_close(after[0][0], before[0][0] * limit / 5)
    torch.testing.assert_close(after[0][1:], before[0][1:])  # small enough
    torch.testing.assert_close(after[1], before[1] * limit / 12)


def test_without_clip_gradients_stay() -> None:
    before, after = clipped(clip=None, clip_at=0.1)
    torch.testing.assert_close(after, before)
