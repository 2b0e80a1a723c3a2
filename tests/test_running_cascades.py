"""Cascades as a model runs them: undecided images go on, from where two stitches part."""

import threading
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageClassification, pipeline

from families import FAMILIES, images, make
from stitchable import StitchableForImageClassification, StitchableModel
from stitchable.costs import shared_flops
from stitchable.model.cascades import beginnings, score
from stitchable.model.routes import Stage
from stitchable.model.schema import write

STITCHES = (0, 2, 4, 1)
LARGEST = Stage(0, 1.0, "max_probability", 0.5)


def stages_of(model, stitches, thresholds, combine="last", temperature=1.0, kind="max_probability") -> list[dict]:
    shared = shared_flops(model, stitches)
    flops = [model.stitches[i].flops for i in stitches]
    stages = []
    for place, stitch in enumerate(stitches):
        added = flops[place] - max((shared[place][earlier] for earlier in range(place)), default=0)
        decides = {"score": kind, "threshold": thresholds[place]} if place < len(thresholds) else {}
        stages.append({"stitch": stitch, "flops": added, "temperature": temperature, "combine": combine, **decides})
    return stages


def with_cascade(name="vit", stitches=STITCHES[:3], thresholds=(0.25, 0.25), number=0, **options):
    model = make(name)
    by_cost = sorted(stitches, key=lambda i: model.stitches[i].flops)
    stages = stages_of(model, by_cost, thresholds, **options)
    cascade = {
        "id": number,
        "stages": stages,
        "flops": stages[0]["flops"],
        "max_flops": sum(s["flops"] for s in stages),
    }
    model.cascades = [cascade]
    return model, model.cascades[0]


def by_hand(model, cascade, x: torch.Tensor) -> tuple[torch.Tensor, list[int], list[float]]:
    """One image at a time, every stitch from its beginning."""
    logits, ids, flops = [], [], []
    for image in x:
        total, spent = 0, 0.0
        number = 0
        for stage in cascade.stages:
            own = model(image[None], stitch_id=stage.stitch).logits
            total, spent, number = total + own / stage.temperature, spent + stage.flops, number + 1
            if stage.threshold is None or score(own, stage) >= stage.threshold:
                break
        logits.append(total / number if stage.combine == "mean" else own)
        ids.append(stage.stitch)
        flops.append(spent)
    return torch.cat(logits), ids, flops


@torch.no_grad()
def middle(model, stitch: int, x: torch.Tensor, stage: Stage) -> float:
    """A threshold that half of the images stay below, far from all of their scores."""
    scores = (
        score(torch.cat([model(image[None], stitch_id=stitch).logits for image in x]), stage).double().sort().values
    )
    return float(scores[len(x) // 2 - 1 : len(x) // 2 + 1].mean())


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_a_cascade_of_every_family_answers_as_its_stitches_do_one_by_one(name: str) -> None:
    x = images(name, 6)
    model = make(name)
    model, cascade = with_cascade(
        name, (0, make(name).stitches[-1].id), [middle(make(name), 0, x, Stage(0, 1.0, "max_probability", 0.5))]
    )
    output = model(x, cascade=0)
    logits, ids, flops = by_hand(model, cascade, x)
    assert len(set(ids)) == 2
    assert output.stitch_ids.tolist() == ids
    assert output.flops.tolist() == flops
    torch.testing.assert_close(output.logits, logits, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"combine": "mean", "temperature": 1.7}, {"kind": "margin"}])
def test_three_stages_in_any_batch(options: dict) -> None:
    x = images("vit", 12)
    kind, temperature = options.get("kind", "max_probability"), options.get("temperature", 1.0)
    stage = Stage(0, 1.0, kind, 0.5, temperature)
    by_cost = sorted(STITCHES[:3], key=lambda i: make("vit").stitches[i].flops)
    model, cascade = with_cascade(thresholds=[middle(make("vit"), i, x, stage) for i in by_cost[:2]], **options)
    logits, ids, _ = by_hand(model, cascade, x)
    assert len(set(ids)) > 1
    for size in (12, 5, 1):
        outputs = [model(part, cascade=0) for part in x.split(size)]
        torch.testing.assert_close(torch.cat([o.logits for o in outputs]), logits, rtol=1e-4, atol=1e-5)
        assert torch.cat([o.stitch_ids for o in outputs]).tolist() == ids


@torch.no_grad()
def test_no_step_of_a_shared_beginning_runs_twice() -> None:
    model, cascade = with_cascade(thresholds=(1.0, 1.0))  # all images go through all stages
    counts: dict[str, int] = {}
    for index, anchor in enumerate(model.anchors):
        for place, block in enumerate(anchor.blocks):
            name = f"{index}.{place}"
            block.register_forward_hook(
                lambda m, args, out, name=name: counts.update({name: counts.get(name, 0) + len(out)})
            )
    output = model(images("vit", 3), cascade=0)
    assert output.stitch_ids.tolist() == [cascade.stages[-1].stitch] * 3
    plans = [model.steps(stage.stitch) for stage in cascade.stages]
    expected: dict[str, int] = {}
    for plan, (_, shared) in zip(plans, beginnings(plans), strict=True):
        for step in plan[shared:]:
            if step.kind == "block":
                expected[f"{step.anchor}.{step.block}"] = expected.get(f"{step.anchor}.{step.block}", 0) + 3
    assert counts == expected
    assert counts["0.0"] == 3  # of all three stages together
    assert output.flops.tolist() == [sum(stage.flops for stage in cascade.stages)] * 3


def test_a_third_stage_starts_from_the_longest_beginning_of_any_earlier_one() -> None:
    assert beginnings([(1, 2, 3), (1, 9), (1, 2, 3, 4), (7,)]) == [(0, 0), (0, 1), (0, 3), (0, 0)]
    assert beginnings([(1, 2), (3, 4, 5), (3, 4, 6), (3, 4, 6, 8)])[2:] == [(1, 2), (2, 3)]


def test_scores() -> None:
    logits = torch.tensor([[2.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
    first, second = logits.softmax(-1).topk(2).values.T
    torch.testing.assert_close(score(logits, Stage(0, 1.0, "max_probability", 0.5)), first)
    torch.testing.assert_close(score(logits, Stage(0, 1.0, "margin", 0.5)), first - second)
    hot = Stage(0, 1.0, "max_probability", 0.5, temperature=2.0)
    torch.testing.assert_close(score(logits, hot), (logits / 2).softmax(-1).amax(-1))


def test_a_cascade_is_a_default_a_call_or_a_block(tmp_path: Path) -> None:
    model, _ = with_cascade()
    x = images("vit", 3)
    expected = model(x, cascade=0).logits
    assert torch.equal(model.set_cascade(0) and model(x).logits, expected)
    assert (model.config.stitch_id, model.config.cascade_id) == (None, 0)
    with pytest.raises(ValueError, match="the default of this model is cascade 0; name a stitch_id"):
        model.extract()
    model.save_pretrained(tmp_path)
    loaded = StitchableForImageClassification.from_pretrained(tmp_path)
    assert loaded.cascades == model.cascades
    torch.testing.assert_close(loaded(x).logits, expected)
    with loaded.using(1) as stitch:
        assert loaded.stitch == stitch
        assert loaded(x).get("stitch_ids") is None
    with loaded.using(cascade=0):
        assert torch.equal(loaded(x).logits, expected)
    assert loaded.config.cascade_id == 0
    assert loaded.set_stitch(2).id == 2
    assert loaded.config.cascade_id is None
    with pytest.raises(ValueError, match="a stitch_id or a cascade"), loaded.using():
        pass


def test_a_budget_on_average_and_one_for_every_image() -> None:
    model, cascade = with_cascade()
    for stitch in model.stitches:
        model.record(stitch.id, metrics={"accuracy": 0.5})
    best = {**write(cascade), "metrics": {"accuracy": 0.9}}
    model.cascades = [best]
    assert model.find(mean_flops=cascade.flops) == model.cascades[0]
    assert model.find(flops=cascade.flops).id != 0 or model.find(flops=cascade.flops).mean_flops <= cascade.flops
    assert model.find(flops=cascade.max_flops) == model.cascades[0]
    assert model.find(flops=cascade.max_flops - 1) in model.stitches
    assert model.find(flops=cascade.max_flops - 1, mean_flops=1e12) in model.stitches
    found = model.for_budget(mean_flops=cascade.flops)
    assert (found.id, found.mean_flops, found.max_flops, found.metrics) == (
        0,
        cascade.flops,
        cascade.max_flops,
        {"accuracy": 0.9},
    )
    assert model.config.cascade_id == 0
    assert model.for_budget(params=1e12) in model.stitches


def test_a_part_of_a_checkpoint_for_one_cascade(tmp_path: Path) -> None:
    model, _ = with_cascade(stitches=(0, 2), thresholds=(0.25,))
    model.save_pretrained(tmp_path)
    alone = StitchableForImageClassification.from_pretrained(tmp_path, cascade=0)
    assert [stitch.id for stitch in alone.stitches] == [0, 2]
    assert alone.config.cascade_id == 0
    x = images("vit", 4)
    torch.testing.assert_close(alone(x).logits, model(x, cascade=0).logits)
    extracted = model.extract(cascade=0)
    assert torch.equal(extracted(x).logits, alone(x).logits)
    assert {name for name, _ in extracted.named_parameters()} == {name for name, _ in alone.named_parameters()}
    part = StitchableForImageClassification.from_pretrained(tmp_path, stitch_id=2)
    assert part.cascades == ()
    with pytest.raises(ValueError, match=r"cascade 0 runs stitches \[0\], left out here; load with cascade=0"):
        part.set_cascade(0)
    with pytest.raises(ValueError, match="there is no cascade 7"):
        StitchableForImageClassification.from_pretrained(tmp_path, cascade=7)


def test_a_pipeline_runs_the_default_cascade(tmp_path: Path) -> None:
    model, _ = with_cascade()
    model.set_cascade(0)
    model.save_pretrained(tmp_path)
    answers = pipeline("image-classification", model=str(tmp_path))(Image.new("RGB", (30, 30), "red"), top_k=2)
    assert len(answers) == 2
    assert AutoModelForImageClassification.from_pretrained(tmp_path).config.cascade_id == 0


@torch.no_grad()
def test_threads_get_the_cascade_they_ask_for() -> None:
    model, _ = with_cascade()
    x = images("vit", 4)
    expected = {None: model(x, stitch_id=1).logits, 0: model(x, cascade=0).logits}
    wrong = []

    def ask(cascade: int | None) -> None:
        with torch.no_grad():
            for _ in range(30):
                given = model(x, cascade=cascade, stitch_id=1 if cascade is None else None).logits
                wrong.extend([cascade] * (not torch.equal(given, expected[cascade])))

    threads = [threading.Thread(target=ask, args=(cascade,)) for cascade in (None, 0, 0, None)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["stages"][0].update(threshold=1.5), r"cascades\[0\]\.stages\[0\]: a threshold is a number from 0"),
        (lambda c: c["stages"][0].update(threshold=float("nan")), "a threshold is a number from 0 to 1"),
        (lambda c: c["stages"][0].pop("threshold"), "a threshold is a number"),
        (lambda c: c["stages"][-1].update(threshold=0.5, score="margin"), "each but the last a threshold"),
        (lambda c: c["stages"][0].update(score="entropy"), "score must be one of 'max_probability', 'margin'"),
        (lambda c: c["stages"][0].update(temperature=0.0), "temperature and flops must be finite and above 0"),
        (lambda c: c["stages"][0].update(reached=1.5), r"reached from 0 to 1: 1\.0, .*, 1\.5"),
        (lambda c: c["stages"].reverse(), "each but the last a threshold"),
        (lambda c: c["stages"][0].update(stitch=c["stages"][-1]["stitch"]), "different stitches"),
        (lambda c: c["stages"][0].update(stitch=77), r"cascades\[0\]: there is no stitch 77"),
        (lambda c: c["stages"][1].update(reached=0.0), "it must be some of each, ever fewer"),
        (lambda c: c["stages"][0].update(reached=0.5), "it must be some of each, ever fewer"),
        (lambda c: c["stages"].pop(), "each but the last a threshold"),
        (lambda c: c.update(flops=-1.0), "flops must be above 0 and at most max_flops"),
        (lambda c: c.update(stage=[]), r"cascades\[0\] has no 'stage'; did you mean 'stages'"),
    ],
)
def test_what_is_no_cascade_is_refused(change, message: str) -> None:
    model, cascade = with_cascade()
    wrong = write(cascade)
    change(wrong)
    with pytest.raises(ValueError, match=message):
        model.cascades = [wrong]
    assert model.cascades == (cascade,)


def test_stages_of_descending_cost_are_refused() -> None:
    model, cascade = with_cascade()
    wrong = write(cascade)
    first, last = wrong["stages"][0], wrong["stages"][-1]
    first["stitch"], last["stitch"] = last["stitch"], first["stitch"]
    with pytest.raises(ValueError, match="known stitches of growing cost"):
        model.cascades = [wrong]


def test_a_cascade_is_not_trained_and_has_a_head() -> None:
    model, _ = with_cascade()
    with pytest.raises(ValueError, match="in evaluation mode"):
        model.train()(images("vit"), cascade=0)
    with pytest.raises(ValueError, match="without a stitch_id"):
        model.eval()(images("vit"), cascade=0, stitch_id=1)
    with pytest.raises(ValueError, match="by a classifier"):
        StitchableModel(model.config).eval()(images("vit"), cascade=0)
    loss = model(images("vit"), labels=torch.tensor([0, 1]), cascade=0).loss
    assert loss.isfinite()
    with pytest.raises(ValueError, match="must be an integer"):
        model(images("vit"), cascade="0")


def test_what_a_cascade_cannot_give_is_refused(tmp_path: Path) -> None:
    model, _ = with_cascade()
    x = images("vit")
    with pytest.raises(ValueError, match="a cascade returns no hidden states"):
        model(x, cascade=0, output_hidden_states=True)
    model.config.problem_type = "multi_label_classification"
    with pytest.raises(ValueError, match="one of several classes per image, not 5, multi_label_classification"):
        model(x, cascade=0)
    model.config.problem_type = None
    model.save_pretrained(tmp_path)
    for also in ({"stitch_id": 2}, {"max_flops": 1e9}):
        with pytest.raises(ValueError, match="a part is the stitches of a cascade, or what stitch_id"):
            StitchableForImageClassification.from_pretrained(tmp_path, cascade=0, **also)


def test_a_default_cascade_is_not_trained(tmp_path: Path) -> None:
    model, _ = with_cascade()
    model.set_cascade(0)
    with pytest.raises(ValueError, match="cascade 0 runs in evaluation mode"):
        model.train()(images("vit"), labels=torch.zeros(len(images("vit")), dtype=torch.long))
