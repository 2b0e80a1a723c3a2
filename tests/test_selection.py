"""Which stitches are kept: by scores that need no labels, written out, and after training by what was measured."""

from itertools import pairwise

import pytest
import torch
from torch.nn.functional import softmax

from families import images, make
from stitchable import StitchableForImageClassification, prune, select
from stitchable.model.routes import Stitches
from stitchable.selection import score_stitches


def batches(family: str = "vit", number: int = 120) -> list[torch.Tensor]:
    return list(images(family, number).split(40))


def test_the_scores_compare_a_stitch_with_the_anchor_at_its_end() -> None:
    model = make("vit")
    found = score_stitches(model, batches(), [1, 4])
    assert found[1] == {"kl": 0.0, "agreement": 1.0, "feature_distance": 0.0}
    with torch.no_grad():
        x = torch.cat(batches())
        ours, theirs = (model(x, stitch_id=i).logits.double() for i in (4, 1))
        f, g = (model.run_features(x, i)[0].double().flatten(1) for i in (4, 1))
    p, q = softmax(theirs, 1), softmax(ours, 1)
    assert found[4]["kl"] == pytest.approx(float((p * (p / q).log()).sum(1).mean()), rel=1e-4)
    assert found[4]["agreement"] == pytest.approx(float((ours.argmax(1) == theirs.argmax(1)).double().mean()))
    assert 0 < found[4]["agreement"] < 1
    distance = ((f - g).square().sum(1) / g.square().sum(1)).mean()
    assert found[4]["feature_distance"] == pytest.approx(float(distance), rel=1e-4)


def test_each_group_of_like_cost_keeps_the_stitch_with_the_best_score() -> None:
    model, spacing = make("vit"), 1.2
    cheaper = [s for s in model.stitches if not s.is_anchor and s.flops < model.stitches[1].flops]
    by_flops = sorted(cheaper, key=lambda s: s.flops)
    groups: list[list[int]] = []
    first = 0.0
    for stitch in by_flops:
        if stitch.flops > spacing * first:
            groups.append([])
            first = stitch.flops
        groups[-1].append(stitch.id)
    assert len(groups) > 1
    assert max(map(len, groups)) > 1
    for score, sign in (("kl", 1), ("agreement", -1)):
        scores = score_stitches(model, batches())
        best = {min(group, key=lambda i: (sign * scores[i][score], model.stitches[i].flops)) for group in groups}
        kept = select(model, batches(), spacing=spacing, score=score)
        assert {stitch.id for stitch in kept.stitches} == {0, 1} | best


def test_what_is_kept_keeps_id_figures_and_weights(tmp_path) -> None:
    model = make("swin")
    model.record(1, metrics={"accuracy": 0.5})
    model.set_stitch(0)
    kept = select(model, batches("swin"), number=3)
    ids = [stitch.id for stitch in kept.stitches]
    assert ids[:2] == [0, 1]
    assert 3 <= len(ids) <= 5
    assert len(model.stitches) > len(ids)
    assert kept.stitch.id == 0
    assert kept.stitches[1].metrics == {"accuracy": 0.5}
    assert kept.anchors[0].patch_embed.proj.weight.data_ptr() == model.anchors[0].patch_embed.proj.weight.data_ptr()
    assert sum(p.numel() for p in kept.stitching_layers.parameters()) < sum(
        p.numel() for p in model.stitching_layers.parameters()
    )
    kept.save_pretrained(tmp_path)
    again = StitchableForImageClassification.from_pretrained(tmp_path).eval()
    x = images("swin")
    for stitch_id in ids:
        assert torch.equal(again(x, stitch_id=stitch_id).logits, model(x, stitch_id=stitch_id).logits)
    with pytest.raises(ValueError, match="out of range"):
        again.set_stitch(next(stitch.id for stitch in model.stitches if stitch.id not in ids))


def test_more_stitches_for_a_greater_number_and_none_dearer_than_their_anchors() -> None:
    model = make("vit")
    counts = [len(select(model, batches(), number=number).stitches) - 2 for number in (1, 2, 3, 100)]
    assert counts[0] == 1
    assert all(few <= many for few, many in pairwise(counts))
    assert all(count <= number for count, number in zip(counts, (1, 2, 3, 100), strict=True))
    dearest = model.stitches[1].flops
    kept = select(model, batches(), number=100)
    assert max(stitch.flops for stitch in kept.stitches if not stitch.is_anchor) < dearest


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give a number of stitches to keep or a spacing"),
        ({"number": 2, "spacing": 1.1}, "give a number of stitches to keep or a spacing"),
        ({"number": 0}, "number=0 keeps nothing of some of the 1 pairs"),
        ({"number": 1.5}, "number must be an integer"),
        ({"spacing": 0.9}, "a multiple of FLOPs"),
        ({"spacing": float("nan")}, "a multiple of FLOPs"),
        ({"spacing": float("inf")}, "a multiple of FLOPs"),
    ],
)
def test_a_selection_that_keeps_nothing_is_refused(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        select(make("vit"), batches(), **arguments)


def test_images_and_models_that_cannot_be_compared_are_refused() -> None:
    model = make("vit")
    with pytest.raises(ValueError, match="3x48x48, and those of this model 3x32x32"):
        select(model, [torch.randn(4, 3, 48, 48)], number=2)
    with pytest.raises(ValueError, match="there are no images"):
        select(model, [], number=2)
    with pytest.raises(ValueError, match="keep the anchors alone"):
        select(model.extract(1), batches(), number=1)
    with pytest.raises(ValueError, match="anchor 0 was left out"):
        select(model.extract(4), batches(), number=1)
    model.record(4, flops=None)
    with pytest.raises(ValueError, match="nobody has counted the FLOPs of stitch 4"):
        select(model, batches(), number=1)
    dear = make("vit")
    for stitch in dear.stitches[2:]:
        dear.record(stitch.id, flops=dear.stitches[1].flops)
    with pytest.raises(ValueError, match="keep the anchors alone"):
        select(dear, batches(), number=1)


def test_few_images_are_said_to_be_few(caplog) -> None:
    select(make("vit"), [images("vit", 8)], number=1)
    assert "only 8 images score the stitches" in caplog.text


def measured() -> StitchableForImageClassification:
    """Stitch 2 is beaten by another, 3 too but runs in a cascade, 4 was not measured."""
    model = make("vit")
    first, last = model.stitches[0], model.stitches[1]
    figures = {0: 0.7, 1: 0.9, 2: 0.6, 3: 0.65}
    for stitch_id, accuracy in figures.items():
        model.record(stitch_id, metrics={"accuracy": accuracy})
    for stitch in model.stitches[5:]:
        model.record(stitch.id, metrics={"accuracy": 0.5})
    cheap = {"score": "max_probability", "threshold": 0.8}
    stages = [{"stitch": 0, "flops": first.flops, **cheap}, {"stitch": 3, "flops": 1.0}]
    model.cascades = [{"id": 7, "stages": stages, "flops": first.flops + 0.5, "max_flops": last.flops}]
    return model


def test_what_is_dominated_goes() -> None:
    model = measured()
    kept = prune(model)
    assert [stitch.id for stitch in kept.stitches] == [0, 1, 3, 4]
    assert [cascade.id for cascade in kept.cascades] == [7]
    assert isinstance(kept.stitches, Stitches)
    x = images("vit")
    assert torch.equal(kept(x, stitch_id=3).logits, model(x, stitch_id=3).logits)
    assert torch.equal(kept(x, cascade=7).logits, model(x, cascade=7).logits)


def test_a_default_that_goes_is_replaced_by_the_dearest_anchor() -> None:
    model = measured()
    model.set_stitch(2)
    assert prune(model).stitch.id == 1
    model.set_cascade(7)
    assert prune(model).config.cascade_id == 7


def test_a_model_that_nobody_measured_is_not_pruned() -> None:
    with pytest.raises(ValueError, match="no stitch has a measured accuracy"):
        prune(make("vit"))
    with pytest.raises(ValueError, match="no stitch has a measured agreement"):
        prune(measured(), metric="agreement")
