"""Teaching one stitch at a time: what it changes, what it leaves alone, and what happens where it is interrupted."""

import copy
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import kl_div, log_softmax

from families import images, make
from stitchable import StitchableForImageClassification
from stitchable.evaluation import measure_agreement
from stitchable.own import recalibrate_batch_norms, teacher_of
from stitchable.training.own import (
    Teaching,
    augmented,
    teach_stitch,
    teach_stitches,
)

TEACHING = Teaching(steps=3, rank=2)


def batches_of(name: str, number: int = 6) -> Any:
    """Other images for each stitch and step, without end."""

    def batches(stitch_id: int) -> Iterator[torch.Tensor]:
        seed = 100 * stitch_id
        while True:
            seed += 1
            yield images(name, number, seed)

    return batches


def divergence(model: StitchableForImageClassification, name: str, stitch_id: int, anchor: int) -> float:
    """Of a stitch from an anchor, on images that it was not taught on."""
    with torch.no_grad():
        logits = [model(images(name, 64, 7), stitch_id=i).logits for i in (stitch_id, anchor)]
    return float(kl_div(*(log_softmax(x / 2, -1) for x in logits), reduction="batchmean", log_target=True))


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_a_stitch_learns_from_its_back_anchor_and_nothing_else_changes(name: str) -> None:
    model = make(name)
    before, ids = copy.deepcopy(model.state_dict()), [stitch.id for stitch in model.stitches][2:4]
    with torch.no_grad():
        logits = {i: model(images(name), stitch_id=i).logits for i in (0, 1, ids[1])}
    far = divergence(model, name, ids[0], 1)
    teach_stitch(model, ids[0], batches_of(name, 16)(0), Teaching(steps=50, rank=2, learning_rate=1e-2, features=0.0))
    assert divergence(model, name, ids[0], 1) < far
    after = model.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)
    for i, expected in logits.items():
        with torch.no_grad():
            assert torch.equal(model(images(name), stitch_id=i).logits, expected)
    assert not model.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_only_what_is_its_own_gets_gradients_and_the_front_runs_without() -> None:
    model = make("resnet")
    seen: set[tuple[str, bool]] = set()
    run_step = model.run_step

    def watched(step: Any, flow: Any) -> Any:
        result = run_step(step, flow)
        seen.add(("own" if step.own >= 0 else "shared", result.features.requires_grad))
        return result

    model.run_step = watched  # type: ignore[method-assign]
    teach_stitch(model, 2, batches_of("resnet")(0), TEACHING)
    assert seen == {("own", True), ("shared", False)}


@pytest.mark.parametrize("of_batch", [True, False])
def test_norms_go_by_the_batch_or_by_the_statistics_of_the_anchor(of_batch: bool) -> None:
    model = make("resnet")
    teach_stitch(model, 2, batches_of("resnet")(0), Teaching(steps=2, rank=2, batch_statistics=of_batch))
    own: Any = model.own["2"]
    anchors = model.state_dict()
    for name, key in own.places.items():
        statistics = own.norms[key].running_mean
        assert torch.equal(statistics, anchors[f"{name}.running_mean"]) is not of_batch
        assert not torch.equal(own.norms[key].weight, anchors[f"{name}.weight"])


def test_any_number_in_any_order() -> None:
    one, other = make("vit"), make("vit")
    teach_stitches(one, batches_of("vit"), [3, 2], TEACHING)
    teach_stitches(other, batches_of("vit"), [2, 3, 4], TEACHING)
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])
    taught = []
    teach_stitches(one, batches_of("vit"), teaching=TEACHING, after=taught.append)
    assert taught == [stitch.id for stitch in one.stitches if not stitch.is_anchor]


def test_labels_teach_too() -> None:
    x, labels = images("vit", 6), torch.tensor([0, 1, 2, 3, 4, 0])
    losses = []
    for weight in (0.0, 1.0):
        model = make("vit")
        batches = iter([{"pixel_values": x, "labels": labels}])
        losses.append(teach_stitch(model, 2, batches, Teaching(steps=1, rank=2, labels=weight)))
    with torch.no_grad():
        expected = make("vit")(x, labels=labels, stitch_id=2).loss
    assert losses[1] - losses[0] == pytest.approx(float(expected), rel=1e-4)


def test_a_run_goes_on_behind_the_stitches_that_are_finished(tmp_path: Path) -> None:
    model, whole, drawn = make("resnet"), make("resnet"), []
    endless = batches_of("resnet")

    def interrupted(stitch_id: int) -> Iterator[Any]:
        drawn.append(stitch_id)
        yield from islice(endless(stitch_id), 1 if stitch_id == 3 else None)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        teach_stitches(model, interrupted, [2, 3, 4], TEACHING, folder=tmp_path)
    assert [stitch.id for stitch in model.stitches if stitch.own] == [2]  # the other is as it was
    assert set(model.own) == {"2"}
    fresh, drawn[:] = make("resnet"), []

    def watched(stitch_id: int) -> Iterator[Any]:
        drawn.append(stitch_id)
        return endless(stitch_id)

    teach_stitches(fresh, watched, [2, 3, 4], TEACHING, folder=tmp_path)
    assert drawn == [3, 4]
    teach_stitches(whole, endless, [2], TEACHING)
    assert torch.equal(fresh(images("resnet"), stitch_id=2).logits, model(images("resnet"), stitch_id=2).logits)
    with pytest.raises(ValueError, match=r"stitch-2.safetensors is of another run, of other weights, settings or"):
        teach_stitches(make("resnet", 9), endless, [2], TEACHING, folder=tmp_path)
    (tmp_path / "stitch-3.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="is no finished stitch"):
        teach_stitches(make("resnet"), endless, [3], TEACHING, folder=tmp_path)


def test_augmented_images_are_flipped_and_shifted_and_drawn_for_each_stitch() -> None:
    config = make("vit", num_labels=10).config
    x, labels = images("vit", 10), torch.arange(10)
    batches = augmented(x, labels, config, batch_size=4)
    first, again, other = (list(islice(batches(stitch_id), 5)) for stitch_id in (2, 2, 3))
    assert all(torch.equal(a["pixel_values"], b["pixel_values"]) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0]["pixel_values"], other[0]["pixel_values"])
    assert len(torch.cat([batch["labels"] for batch in first[:2]]).unique()) == 8
    for batch in first:
        for image, label in zip(batch["pixel_values"], batch["labels"], strict=True):
            source = x[label]
            shifts = [
                (dy, dx, flip)
                for dy in range(-4, 5)
                for dx in range(-4, 5)
                for flip in (False, True)
                if torch.equal(_inner(image.flip(-1) if flip else image, 0, 0), _inner(source, dy, dx))
            ]
            assert len(shifts) == 1


def _inner(image: torch.Tensor, dy: int, dx: int) -> torch.Tensor:
    return image[:, 8 + dy : 24 + dy, 8 + dx : 24 + dx]


def test_statistics_are_the_means_over_the_batches_where_held_out_images_say_so() -> None:
    model = make("resnet")
    stitch_id = 2
    for module in model.anchors[1].modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.fill_(3.0)  # far from what the features are
    before = copy.deepcopy(model.state_dict())
    batches = [images("resnet", 32, seed) for seed in range(4)]
    scores = recalibrate_batch_norms(model, batches, [stitch_id])
    reference = copy.deepcopy(model)
    assert scores[stitch_id][1] != scores[stitch_id][0]
    if scores[stitch_id][1] > scores[stitch_id][0]:
        norm = model.own[str(stitch_id)].norms[next(iter(model.own[str(stitch_id)].places.values()))]
        assert norm.num_batches_tracked == 3
        assert norm.momentum == 0.1
    else:
        assert not len(model.own)
    assert all(torch.equal(reference.state_dict()[key], before[key]) for key in before)


def test_statistics_by_labels_against_a_closed_form() -> None:
    model, stitch_id = make("resnet"), 2
    batches = [images("resnet", 16, seed) for seed in range(3)]
    # Labels that only the new statistics get right.
    twin = copy.deepcopy(model)
    twin.give_own(stitch_id, 2)
    norms = [module for module in twin.own.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    with torch.no_grad():
        for x in batches[:2]:
            twin(x, stitch_id=stitch_id)
        labels = twin.eval()(batches[2], stitch_id=stitch_id).logits.argmax(-1)
    given = [*({"pixel_values": x, "labels": torch.zeros(16, dtype=torch.long)} for x in batches[:2])]
    scores = recalibrate_batch_norms(model, [*given, {"pixel_values": batches[2], "labels": labels}], [stitch_id])
    assert scores[stitch_id][1] == 1.0 > scores[stitch_id][0]
    for ours, theirs in zip(model.own.buffers(), twin.own.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)
    wrong = {"pixel_values": batches[2], "labels": (labels + 1) % 5}
    kept = copy.deepcopy(model.state_dict())
    recalibrate_batch_norms(model, [*given, wrong], [stitch_id])
    assert all(torch.equal(kept[key], tensor) for key, tensor in model.state_dict().items())


def test_agreement_with_the_largest_anchor_needs_no_labels() -> None:
    model = make("vit")
    batches = [images("vit", 8, seed) for seed in range(3)]
    agreement = measure_agreement(model, batches)
    assert agreement[1] == 1.0
    with torch.no_grad():
        found = [torch.cat([model(x, stitch_id=i).logits.argmax(-1) for x in batches]) for i in (1, 3)]
    assert agreement[3] == pytest.approx(float((found[0] == found[1]).float().mean()))
    assert model.stitches[3].metrics == {"agreement": agreement[3]}


def test_bad_input() -> None:
    model, endless = make("vit"), batches_of("vit")
    with pytest.raises(ValueError, match="stitch 1 is anchor 1 itself, which cannot teach itself"):
        teach_stitches(model, endless, [2, 1], TEACHING)
    assert not len(model.own)  # refused before anything is taught
    with pytest.raises(ValueError, match="is taught by anchor 1, which this model does not hold"):
        teach_stitches(model.extract(3), endless, [3], TEACHING)
    with pytest.raises(ValueError, match="this model has no batch norm behind a joint"):
        recalibrate_batch_norms(model, [images("vit")] * 4)
    with pytest.raises(ValueError, match="stitch 2 runs no batch norm behind its first joint"):
        recalibrate_batch_norms(model, [images("vit")] * 4, [2])
    assert not len(model.own)
    with pytest.raises(ValueError, match="at least two batches, one to judge them by; got 1"):
        recalibrate_batch_norms(make("resnet"), [images("resnet")])
    unchanged = make("resnet")
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        recalibrate_batch_norms(unchanged, [images("resnet", 1)[..., :8, :8]] * 4, [2])
    assert not len(unchanged.own)
    for wrong in ({"steps": 0}, {"learning_rate": float("nan")}, {"features": -1.0}, {"labels": float("inf")}):
        with pytest.raises(ValueError, match="steps and rank must be at least 1"):
            Teaching(**wrong)
    with pytest.raises(ValueError, match="the batches end after 2 of 3 steps"):
        teach_stitch(model, 2, iter([images("vit")] * 2), TEACHING)
    with pytest.raises(ValueError, match="the model takes images of 3x32x32, these are 3x24x24"):
        augmented(torch.zeros(200, 3, 24, 24), None, model.config)
    with pytest.raises(ValueError, match="100 images are fewer than a batch of 128"):
        augmented(torch.zeros(100, 3, 32, 32), None, model.config)
    with pytest.raises(ValueError, match="the loss of stitch 2 is nan"):
        teach_stitch(model, 2, iter([torch.full((2, 3, 32, 32), torch.nan)] * 3), TEACHING)
    assert not len(model.own)
    with pytest.raises(ValueError, match="empty"):
        measure_agreement(model, [])
    assert teacher_of(model, model.stitches[2]) == model.steps(1)


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_stitches_that_are_taught_together_learn_what_each_learns_alone(name: str, tmp_path: Path) -> None:
    alone, together = make(name), make(name)
    ids = [stitch.id for stitch in alone.stitches if not stitch.is_anchor][:3]
    endless = batches_of(name)
    teach_stitches(alone, lambda _: endless(0), ids, TEACHING)
    taught: list[int] = []
    teach_stitches(
        together, lambda _: endless(0), ids[::-1], TEACHING, folder=tmp_path, after=taught.append, together=2
    )
    assert taught == ids[::-1]
    for key, tensor in alone.state_dict().items():
        torch.testing.assert_close(together.state_dict()[key], tensor)
    runs: list[Any] = []
    fresh = make(name)
    teach_stitches(fresh, lambda i: runs.append(i) or endless(0), ids, TEACHING, folder=tmp_path, together=2)
    assert runs == []  # each is finished


def test_stitches_that_are_taught_together_share_what_runs_without_gradients() -> None:
    model, ids = make("resnet"), [2, 3, 4]
    steps, run_step = [], model.run_step

    def watched(step: Any, flow: Any) -> Any:
        steps.append(step)
        return run_step(step, flow)

    model.run_step = watched  # type: ignore[method-assign]
    teach_stitches(model, batches_of("resnet"), ids, Teaching(steps=1, rank=2), together=3)
    shared = [step for step in steps if step.own < 0]
    assert len(shared) == len(set(shared))
    with pytest.raises(ValueError, match="together must be at least 1, got 0"):
        teach_stitches(model, batches_of("resnet"), ids, TEACHING, together=0)
