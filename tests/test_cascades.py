"""Cascades: stages worked out by hand, the search against an exhaustive one, the pass over images."""

import math
from itertools import combinations, product
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from families import NUM_LABELS, images, make
from stitchable import cascade_search, evaluate
from stitchable.cascade_search import search, search_two_fold
from stitchable.cascade_stages import (
    Costs,
    Stage,
    check_reached,
    check_stages,
    fit_temperature,
    run_cascade,
    scores_of,
)
from stitchable.cascades import (
    LogitFile,
    beside_stitches,
    cascade_table,
    evaluate_with_cascades,
    find_and_judge,
    find_cascades,
    runnable,
)
from stitchable.costs import shared_flops, update_costs
from stitchable.fingerprints import NUM_STORED, fingerprints, remember

LOG = math.log

# Three images of class 0. Stitch 0 is sure and right, then twice unsure and wrong; stitch 1 has the second right.
HAND = np.array(
    [
        [[LOG(9), 0.0], [0.0, LOG(1.5)], [0.0, LOG(2)]],
        [[LOG(3), 0.0], [LOG(4), 0.0], [0.0, LOG(3)]],
    ]
)
HAND_COSTS = Costs(np.array([10, 30]), np.array([[10, 4], [4, 30]]))


def test_a_cascade_by_hand() -> None:
    # Probabilities of stitch 0: 0.9, 0.6, 2/3. Below 0.65 is the second image alone, and it goes on.
    run = run_cascade([Stage(0, 1.0, "max_probability", 0.65), Stage(1)], HAND, HAND_COSTS)
    assert run.predictions.tolist() == [0, 0, 1]
    assert run.stages.tolist() == [0, 1, 0]
    # The second stage costs 30 - 4, since both begin alike for 4.
    assert run.flops.tolist() == [10, 10 + 26, 10]
    assert run.flops.mean() == pytest.approx(10 + 1 / 3 * (30 - 4))
    # A score that is the threshold stops.
    even = np.zeros((2, 1, 2))
    assert run_cascade([Stage(0, 1.0, "max_probability", 0.5), Stage(1)], even, HAND_COSTS).stages.tolist() == [0]
    assert run_cascade([Stage(0, 1.0, "max_probability", 0.501), Stage(1)], even, HAND_COSTS).stages.tolist() == [1]


def test_scores_by_hand() -> None:
    scaled = torch.tensor([[LOG(6), LOG(3), 0.0], [0.0, 0.0, 0.0]])
    probabilities, margins = scores_of(scaled)
    torch.testing.assert_close(probabilities, torch.tensor([0.6, 1 / 3]))
    torch.testing.assert_close(margins, torch.tensor([0.3, 0.0]))
    # The temperature divides the logits: 9 : 1 becomes 3 : 1 at 2, so that 0.8 sends the first image on.
    run = run_cascade([Stage(0, 2.0, "max_probability", 0.8), Stage(1)], HAND[:, :1], HAND_COSTS)
    assert run.stages.tolist() == [1]
    # The margin of 9 : 1 is 0.8.
    run = run_cascade([Stage(0, 1.0, "margin", 0.79), Stage(1)], HAND[:, :2], HAND_COSTS)
    assert run.stages.tolist() == [0, 1]


def test_the_mean_of_logits_by_hand() -> None:
    # On the second image -log 1.5 / T + log 4 / 1 is above 0 for T = 1, below for T = 0.25.
    for temperature, answer in ((1.0, 0), (0.25, 1)):
        stages = [Stage(0, temperature, "max_probability", 1.0), Stage(1, 1.0, combine="mean")]
        assert run_cascade(stages, HAND[:, 1:2], HAND_COSTS).predictions.tolist() == [answer]
    # Of three stages the mean is over those that ran, the middle one included.
    logits = np.array([[[0.0, 1.0]], [[0.0, 1.0]], [[1.5, 0.0]]])
    costs = Costs(np.array([1, 2, 3]), np.zeros((3, 3)))
    first = [Stage(0, 1.0, "margin", 1.0), Stage(1, 1.0, "margin", 1.0)]
    assert run_cascade([*first, Stage(2)], logits, costs).predictions.tolist() == [0]
    assert run_cascade([*first, Stage(2, combine="mean")], logits, costs).predictions.tolist() == [1]
    # 1.5 / 0.5 is more than both together.
    assert run_cascade([*first, Stage(2, 0.5, combine="mean")], logits, costs).predictions.tolist() == [0]


def test_a_third_stage_starts_from_the_longest_beginning_it_shares() -> None:
    costs = Costs(np.array([10, 20, 40]), np.array([[10, 3, 7], [3, 20, 5], [7, 5, 40]]))
    logits = np.zeros((3, 1, 2))
    stages = [Stage(0, 1.0, "margin", 0.5), Stage(1, 1.0, "margin", 0.5), Stage(2)]
    assert run_cascade(stages, logits, costs).flops.tolist() == [10 + (20 - 3) + (40 - 7)]


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], "at least one stage"),
        ([Stage(1, 1.0, "margin", 0.5), Stage(0)], "has 10 FLOPs, and the stage before 30: each stage must cost more"),
        ([Stage(0, 1.0, "margin", 0.5), Stage(0)], "each stage must cost more than the one before"),
        ([Stage(0, 1.0, "margin", 1.5), Stage(1)], r"the threshold must be a number in 0\.\.1, got 1\.5"),
        ([Stage(0, 1.0, "margin", -0.1), Stage(1)], r"the threshold must be a number in 0\.\.1, got -0\.1"),
        ([Stage(0, 1.0, "margin", math.nan), Stage(1)], r"the threshold must be a number in 0\.\.1, got nan"),
        ([Stage(0, 1.0, "margin", math.inf), Stage(1)], r"the threshold must be a number in 0\.\.1, got inf"),
        ([Stage(0, 1.0, "margin"), Stage(1)], r"the threshold must be a number in 0\.\.1, got None"),
        ([Stage(0, 1.0, "entropy", 0.5), Stage(1)], "the score is one of max_probability, margin, got 'entropy'"),
        ([Stage(0, 1.0, "margin", 0.5), Stage(1, combine="sum")], "combine is one of last, mean, got 'sum'"),
        ([Stage(0, 0.0, "margin", 0.5), Stage(1)], "the temperature must be positive and finite, got 0.0"),
        ([Stage(0, 1.0, "margin", 0.5), Stage(1, 1.0, "margin", 0.5)], "is the last and decides for every image"),
        ([Stage(0, 1.0, "margin", 0.5), Stage(2)], "there is no such stitch among 2"),
    ],
)
def test_stages_that_are_no_cascade_are_named(stages: list[Stage], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_stages(stages, HAND_COSTS.flops)


def test_a_second_stage_that_is_never_reached_is_named() -> None:
    stages = [Stage(0, 1.0, "max_probability", 0.1), Stage(1)]
    with pytest.raises(ValueError, match=r"no image reaches stage 1 \(stitch 1\): every score is at least .* 0\.1"):
        check_reached(stages, run_cascade(stages, HAND, HAND_COSTS))
    stages = [Stage(0, 1.0, "max_probability", 0.65), Stage(1)]
    check_reached(stages, run_cascade(stages, HAND, HAND_COSTS))


def test_the_temperature_is_where_the_cross_entropy_is_least() -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(3000, 6, generator=generator) * 3
    labels = torch.multinomial((z / 2.5).softmax(1), 1, generator=generator)[:, 0]  # as calibrated at 2.5
    found = fit_temperature(z, labels)
    assert found == pytest.approx(2.5, rel=0.05)
    losses = [torch.nn.functional.cross_entropy(z / t, labels) for t in (found * 0.99, found, found * 1.01)]
    assert losses[1] < min(losses[0], losses[2])
    # One that is never wrong has none: it stays within bounds, and so does one that is always wrong.
    assert fit_temperature(z, z.argmax(1)) == pytest.approx(0.1, rel=0.01)
    assert fit_temperature(z, z.argmin(1)) == pytest.approx(10, rel=0.01)


def made_up(
    num_stitches: int, num_images: int, num_labels: int = 4, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, Costs]:
    """Logits of stitches that are better the more they cost, on images of which some are hard for all."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, num_labels, num_images)
    flops = np.cumsum(generator.integers(5, 20, num_stitches))
    logits = generator.normal(size=(num_stitches, num_images, num_labels))
    ease = generator.normal(size=num_images)
    logits[:, np.arange(num_images), labels] += 1 + ease + 0.15 * np.arange(num_stitches)[:, None]
    shared = np.tril(generator.integers(0, 5, (num_stitches, num_stitches)), -1)
    return logits, labels, Costs(flops, shared + shared.T + np.diag(flops))


def exhaustive(logits: np.ndarray, labels: np.ndarray, costs: Costs) -> list[tuple[float, float]]:
    """The front of everything, one cascade after the other, as the documentation of the search defines it."""
    num_stitches, points = len(logits), []
    z, y = torch.from_numpy(logits).float(), torch.from_numpy(labels)

    def measure(stages: list[Stage]) -> tuple[float, float] | None:
        run = run_cascade(stages, logits.astype(np.float32), costs)
        if run.stages.max() < len(stages) - 1:  # a stage that is not reached
            return None
        points.append((run.flops.mean(), (run.predictions == labels).mean()))
        return points[-1]

    def score(stitch: int, temperature: float, name: str) -> np.ndarray:
        return scores_of(z[stitch] / temperature)[cascade_search.SCORES.index(name)].numpy().astype(float)

    for stitch in range(num_stitches):
        measure([Stage(stitch)])
    for a, b in combinations(range(num_stitches), 2):
        for name in cascade_search.SCORES:
            first = Stage(a, fit_temperature(z[a], y), name)
            scores = score(a, first.temperature, name)
            thresholds = cascade_search._grid(scores)
            found = {t: measure([first._replace(threshold=float(t)), Stage(b)]) for t in thresholds}
            chosen = max((t for t in thresholds if found[t]), key=lambda t: (found[t][1], -t))
            reached = scores < chosen
            second = Stage(b, fit_temperature(z[b][reached], y[reached]))
            for t in thresholds:
                measure([first._replace(threshold=float(t)), second._replace(combine="mean")])
            for middle in cascade_search.SCORES:
                grid = cascade_search._grid(score(b, second.temperature, middle)[reached])
                for t, u, c in product(thresholds, grid, range(b + 1, num_stitches)):
                    stages = [first._replace(threshold=float(t)), second._replace(score=middle, threshold=float(u))]
                    measure([*stages, Stage(c)])
    front: list[tuple[float, float]] = []
    for flops, accuracy in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or accuracy > front[-1][1]:
            front.append((flops, accuracy))
    return front


def test_the_search_equals_an_exhaustive_one(monkeypatch) -> None:
    monkeypatch.setattr(cascade_search, "_NUM_THRESHOLDS", 4)
    monkeypatch.setattr(cascade_search, "_IMAGES_AT_A_TIME", 50)
    logits, labels, costs = made_up(8, 120)
    found = search(logits, labels, costs)
    expected = exhaustive(logits, labels, costs)
    assert [candidate.accuracy for candidate in found] == pytest.approx([accuracy for _, accuracy in expected])
    assert [candidate.flops for candidate in found] == pytest.approx([flops for flops, _ in expected])
    kinds = {(len(c.stages), c.stages[-1].combine) for c in found}
    assert {(2, "last"), (2, "mean"), (3, "last")} <= kinds
    for candidate in found:  # what is claimed is what happens
        run = run_cascade(candidate.stages, logits.astype(np.float32), costs)
        assert run.flops.mean() == pytest.approx(candidate.flops)
        assert (run.predictions == labels).mean() == pytest.approx(candidate.accuracy)
        ids = [stage.stitch for stage in candidate.stages]
        assert candidate.max_flops == sum(costs.added(i, ids[:place]) for place, i in enumerate(ids))


def test_pairs_are_ranked_by_what_they_share() -> None:
    # Stitches 1 and 2 are equally good and stitch 2 costs more, but all of stitch 0 is its beginning.
    logits, labels, _ = made_up(3, 400)
    logits[2] = logits[1]
    shared = np.array([[10, 0, 10], [0, 30, 0], [10, 0, 35]])
    found = search(logits, labels, Costs(np.array([10, 30, 35]), shared))
    assert {stage.stitch for c in found if c.is_cascade for stage in c.stages[:2]} == {0, 2}
    found = search(logits, labels, Costs(np.array([10, 30, 35]), np.diag([10, 30, 35])))
    assert {stage.stitch for c in found if c.is_cascade for stage in c.stages[:2]} == {0, 1}


def test_of_many_stitches_the_promising_ones_are_searched(monkeypatch) -> None:
    logits, labels, costs = made_up(12, 300)
    logits[[1, 4, 7]] = 0  # of no use
    everything = search(logits, labels, costs)
    monkeypatch.setattr(cascade_search, "_MOST_STITCHES", 9)
    pruned = search(logits, labels, costs)
    assert not {1, 4, 7} & {stage.stitch for candidate in pruned for stage in candidate.stages}
    assert max(c.accuracy for c in pruned) == pytest.approx(max(c.accuracy for c in everything), abs=0.005)


def test_figures_are_of_the_half_that_did_not_choose() -> None:
    logits, labels, costs = made_up(6, 500)
    found = search_two_fold(logits, labels, costs, seed=3)
    second = cascade_search.halves(500, 3)
    for which, half, alone in zip((~second, second), found.cascades, found.stitches, strict=True):
        theirs = search(logits[:, ~which], labels[~which], costs)
        assert half.chosen_by.tolist() == [candidate.accuracy for candidate in theirs]
        for index, candidate in enumerate(theirs):
            run = run_cascade(candidate.stages, logits[:, which].astype(np.float32), costs)
            assert (half.correct(index) == (run.predictions == labels[which])).all()
            assert half.flops[index] == pytest.approx(run.flops.mean())
        assert (alone.correct(2) == (logits[2, which].argmax(1) == labels[which])).all()
        assert alone.chosen_by[2] == (logits[2, ~which].argmax(1) == labels[~which]).mean()
    correct, stitches = found.within(30)
    assert correct.shape == stitches.shape == (500,)


def test_labels_that_mean_nothing_gain_nothing() -> None:
    # Chosen on the same images, the best of hundreds of cascades is better than the best stitch even here.
    logits, _, costs = made_up(6, 400)
    labels = np.random.default_rng(7).integers(0, 4, 400)
    found = search_two_fold(logits, labels, costs)
    correct, alone = found.within(float(costs.flops[-1]))
    assert found.candidates[-1].accuracy > (logits.argmax(2) == labels).mean(1).max() + 0.01
    assert correct.mean() - alone.mean() < 0.01


def test_logits_and_labels_that_no_cascade_can_be_chosen_by() -> None:
    logits, labels, costs = made_up(3, 50)
    with pytest.raises(ValueError, match="of at least two classes, and all of these are of one"):
        search(logits, np.zeros(50, dtype=np.int64), costs)
    with pytest.raises(ValueError, match="none may be empty"):
        search_two_fold(logits[:, :1], labels[:1], costs)
    logits[1, 7, 2] = np.nan
    with pytest.raises(ValueError, match=r"the logits of stitch 1 .* are not finite, first for image 7"):
        search(logits, labels, costs)


def test_the_logit_file_keeps_what_decides() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [[torch.randn(n, 5, generator=generator) * 20 + 1000 for _ in range(3)] for n in (4, 2, 5)]
    with LogitFile([7, 8, 9]) as logits:
        for batch in batches:
            logits.append(batch)
        assert len(logits) == 3
        for place in range(3):
            whole = torch.cat([batch[place] for batch in batches])
            kept = torch.from_numpy(logits[place]).float()
            assert logits[place].dtype == np.float16
            assert torch.equal(kept.argmax(1), whole.argmax(1))
            torch.testing.assert_close(kept.softmax(1), whole.softmax(1), rtol=0, atol=2e-3)
        wrong = [*batches[0][:2], torch.full((4, 5), torch.nan)]
        with pytest.raises(ValueError, match="the logits of stitch 9 are not finite for 4 of 4 images"):
            logits.append(wrong)


def data(name: str = "vit", number: int = 300) -> list[dict[str, torch.Tensor]]:
    """Labels that the dearest stitch mostly has right."""
    model, x = make(name, nearest=False), images(name, number)
    with torch.no_grad():
        labels = model(x, stitch_id=1).logits.argmax(-1)
    noise = torch.Generator().manual_seed(0)
    wrong = torch.rand(number, generator=noise) < 0.2
    labels = labels.where(~wrong, torch.randint(0, NUM_LABELS, (number,), generator=noise))
    return [{"pixel_values": p, "labels": y} for p, y in zip(x.split(64), labels.split(64), strict=True)]


@pytest.fixture
def said(monkeypatch) -> list[str]:
    """The warnings."""
    from stitchable import cascades

    warnings: list[str] = []
    monkeypatch.setattr(cascades, "logger", SimpleNamespace(warning=warnings.append))
    return warnings


def test_one_pass_gives_cascades_and_what_evaluate_gives(said) -> None:
    model, batches = make("vit", nearest=False), data()
    batches[0]["labels"][3] = -100
    expected = evaluate(model, batches)
    for stitch in model.stitches:
        model.record(stitch.id, metrics={})
    drawn = []
    found = find_cascades(model, (drawn.append(1) or batch for batch in batches), dataset="noise", split="test")
    assert len(drawn) == len(batches)
    for stitch in model.stitches:
        assert stitch.metrics == pytest.approx(expected[stitch.id])
    assert found
    assert found == model.config.cascades
    flops = {stitch.id: stitch.flops for stitch in model.stitches}
    ids = list(flops)
    costs = Costs(np.array(list(flops.values())), np.array(shared_flops(model, ids)))
    with torch.no_grad():
        x = torch.cat([batch["pixel_values"] for batch in batches])
        x = torch.cat([x[:3], x[4:]])
        logits = {i: model(x, stitch_id=i).logits.numpy() for i in ids}
    for place, cascade in enumerate(found):
        assert (cascade["id"], cascade["images"], cascade["dataset"], cascade["split"]) == (place, 299, "noise", "test")
        known = [{k: x for k, x in stage.items() if k not in ("flops", "reached")} for stage in cascade["stages"]]
        stages = [Stage(**{**stage, "stitch": ids.index(stage["stitch"])}) for stage in known]
        check_stages(stages, costs.flops)
        run = run_cascade(stages, [logits[i] for i in ids], costs)
        assert run.flops.mean() == pytest.approx(cascade["flops"], rel=0.01)  # float16 may send another image on
        for stage, reached in zip(cascade["stages"], (run.stages >= i for i in range(3)), strict=False):
            assert stage["reached"] == pytest.approx(reached.mean(), abs=0.01)
        assert sum(s["reached"] * s["flops"] for s in cascade["stages"]) == pytest.approx(cascade["flops"])
        low, high = cascade["interval"]
        assert low <= cascade["metrics"]["gain"] <= high
        assert cascade["max_flops"] >= cascade["flops"]
    costly = [cascade["flops"] for cascade in found]
    assert costly == sorted(costly)
    assert [c["metrics"]["accuracy"] for c in found] == sorted(c["metrics"]["accuracy"] for c in found)


def test_what_stitches_and_cascades_are_worth_comes_from_the_same_pass(said) -> None:
    model, batches = make("vit", nearest=False), data()
    found, stitches, together = find_and_judge(model, batches, dataset="noise")
    assert found == model.config.cascades
    assert stitches.null_line == together.null_line
    assert stitches.images == together.images == 300
    accuracies = [model.stitches[i].metrics["accuracy"] for i in (0, 1)]
    assert stitches.straight_line == pytest.approx(sum(accuracies) / 2)
    # Chosen by the other half, the cheaper anchor alone is the null line up to where the dearer one begins.
    assert stitches.null_line == pytest.approx(accuracies[0], abs=1e-6)
    again, _, _ = find_and_judge(make("vit", nearest=False), batches, dataset="noise", metric="agreement")
    assert [cascade["flops"] for cascade in again] == [cascade["flops"] for cascade in found]


def test_agreement_is_not_called_accuracy(said) -> None:
    model = make("vit", nearest=False)
    with torch.no_grad():
        parts = images("vit", 300).split(64)
        batches = [{"pixel_values": x, "labels": model(x, stitch_id=1).logits.argmax(-1)} for x in parts]
    found, _, _ = find_and_judge(model, batches, metric="agreement")
    assert model.stitches[1].metrics == {"agreement": 1.0}
    assert all(set(cascade["metrics"]) == {"agreement", "gain"} for cascade in model.config.cascades)
    assert found == model.config.cascades
    assert "| agreement | gain |" in cascade_table(model.config.cascades)
    assert not any("are right" in text for text in said)


def test_without_a_dearer_anchor_that_is_better_nothing_is_judged(said) -> None:
    model = make("vit", nearest=False)
    with torch.no_grad():
        parts = images("vit", 300).split(64)
        batches = [{"pixel_values": x, "labels": model(x, stitch_id=0).logits.argmax(-1)} for x in parts]
    assert find_and_judge(model, batches)[1:] == (None, None)


def test_what_was_measured_of_few_images_is_said(said) -> None:
    find_cascades(make("vit", nearest=False), data())
    assert any("only 300 images decide" in text for text in said)


def test_the_table_says_what_its_figures_are() -> None:
    stages = [
        {"stitch": 0, "temperature": 1.1, "score": "max_probability", "threshold": 0.9},
        {"stitch": 57, "temperature": 1.0, "combine": "mean"},
    ]
    cascade = {"id": 3, "stages": stages, "flops": 5.2e6, "max_flops": 16.75e6, "images": 5000}
    cascade |= {"metrics": {"accuracy": 0.9381, "gain": 0.0042}, "interval": [0.0008, 0.0078]}
    assert cascade_table([cascade]).splitlines() == [
        "| id | stages | MFLOPs, mean | at most | accuracy | gain | interval of the gain |",
        "| ---: | :--- | ---: | ---: | ---: | ---: | ---: |",
        "| 3 | 0, where p < 0.9 → 57, mean | 5.200 | 16.750 | 93.81 % | +0.42 | +0.08 to +0.78 |",
        "",
        "Two-fold on 5,000 images: each half chose for the other. The gain is in points above the best stitch of the "
        "same cost, with its 95 % interval.",
    ]
    assert cascade_table([]) == "no cascade is better than the best stitch of its cost"


def test_the_table_of_what_was_measured_on_other_data_and_calibrated() -> None:
    stages = [{"stitch": 0, "score": "margin", "threshold": 0.5}, {"stitch": 1}]
    plain = {"stages": stages, "flops": 5e6, "max_flops": 9e6, "images": 2000}
    known = {
        **plain,
        "id": 1,
        "metrics": {"accuracy": 0.9, "mean_flops": 6e6},
        "latency_ms": 1.5,
        "latency_p95_ms": 3.0,
    }
    lines = cascade_table([{**plain, "id": 0}, known]).splitlines()
    assert lines[0] == "| id | stages | MFLOPs, mean | at most | accuracy | ms, mean | ms, 95 % |"
    assert lines[2:4] == [
        "| 0 | 0, where margin < 0.5 → 1 | 5.000 | 9.000 |  |  |  |",
        "| 1 | 0, where margin < 0.5 → 1 | 6.000 | 9.000 | 90.00 % | 1.50 | 3.00 |",
    ]
    assert lines[-1].startswith("Thresholds were chosen on 2,000 images of other data")


def test_stitches_and_cascades_are_measured_in_one_pass(said) -> None:
    model, batches = make("vit", nearest=False), data()
    found = find_cascades(model, batches, dataset="noise")
    batches[0]["labels"][3] = -100
    drawn = []
    same, figures = evaluate_with_cascades(model, (drawn.append(1) or batch for batch in batches), dataset="noise")
    assert len(drawn) == len(batches)
    assert model.config.cascades == found  # two-fold figures stay
    assert same == evaluate(model, batches)
    assert set(figures) == {cascade["id"] for cascade in found}
    x, labels = (torch.cat([batch[key] for batch in batches]) for key in ("pixel_values", "labels"))
    counts = labels != -100
    with torch.no_grad():
        for number, measured in figures.items():
            output = model(x, cascade=number)
            right = (output.logits.argmax(1) == labels)[counts]
            assert measured["accuracy"] == pytest.approx(right.double().mean().item(), abs=0.01)
            assert measured["mean_flops"] == pytest.approx(output.flops[counts].mean().item(), rel=0.01)
    used = {stage["stitch"] for stage in found[0]["stages"]}
    _, figures = evaluate_with_cascades(model, batches, sorted(used), dataset="other")
    assert found[0]["id"] in figures
    for cascade in model.config.cascades:  # what was measured on other data does not stand beside it
        assert cascade.get("metrics", {}) == figures.get(cascade["id"], {})
        assert "interval" not in cascade
    part = model.extract(0)
    assert runnable(part.config) == []
    assert len(part.config.cascades) == len(found)


def test_costs_that_are_counted_again_and_new_cascades_end_an_old_default(said) -> None:
    model = make("vit", nearest=False)
    find_cascades(model, data())
    model.set_cascade(model.cascades[-1].id)
    update_costs(model)
    assert (model.cascades, model.config.cascade_id, model.config.stitch_id) == ((), None, model.stitches[-1].id)


def test_it_is_said_when_no_cascade_is_surely_better(said) -> None:
    model, batches = make("vit"), data(number=80)
    for batch in batches:
        batch["labels"] = torch.arange(len(batch["labels"])) % NUM_LABELS
    find_cascades(model, batches)
    assert any("no cascade is better" in text or "the interval of the gain contains zero" in text for text in said)


def test_images_that_were_trained_on_are_recognised(said) -> None:
    model, batches = make("vit", nearest=False), data()
    remember(model.config, batches[:2])
    find_cascades(model, batches[2:])
    assert not any("trained on" in text for text in said)
    find_cascades(model, batches[1:])
    assert any("64 of the 236 images are among those that the model was trained on" in text for text in said)


def test_an_accuracy_too_good_to_be_true_is_said_where_nothing_is_known(said) -> None:
    model, batches = make("vit", nearest=False), data()
    with torch.no_grad():
        for batch in batches:
            batch["labels"] = model(batch["pixel_values"], stitch_id=1).logits.argmax(-1)
    find_cascades(model, batches)
    assert any("100.0 % of the images are right, which is a lot" in text for text in said)
    said.clear()
    remember(model.config, [{"pixel_values": images("vit", 8, seed=9)}])
    find_cascades(model, batches)
    assert not any("which is a lot" in text for text in said)


def test_a_fingerprint_is_of_one_image_and_of_what_can_be_seen_of_it() -> None:
    x = images("vit", 4)
    names = fingerprints(x)
    assert len(set(names)) == 4
    assert fingerprints(x[[2, 0]]) == [names[2], names[0]]
    # The last bits of a decoder, or float16, decide only at the edge between two levels.
    near = (x * 8).round() / 8
    assert fingerprints(near + 1e-3) == fingerprints(near)
    config = SimpleNamespace()
    remember(config, [x, x])
    assert config.trained_on == names
    read = []
    many = (read.append(1) or images("vit", 100, seed=10 + i) for i in range(20))
    remember(config, many)
    assert len(config.trained_on) == 4 + NUM_STORED
    assert len(read) == 6


def test_bad_input_is_named() -> None:
    model, batches = make("vit"), data(number=20)
    with pytest.raises(ValueError, match="stitch_id 99 is out of range"):
        find_cascades(model, batches, [0, 99])
    with pytest.raises(ValueError, match="at least two stitches"):
        find_cascades(model, batches, [1])
    with pytest.raises(ValueError, match="the batches are empty, or every label is -100"):
        find_cascades(model, [])
    batches[0]["labels"][0] = 7
    with pytest.raises(ValueError, match=r"label 7 is none of the model's classes 0\.\.4"):
        find_cascades(model, batches)
    model.config.problem_type = "multi_label_classification"
    with pytest.raises(ValueError, match="'multi_label_classification'; only single_label_classification has cascades"):
        find_cascades(model, batches)


def test_a_part_of_a_model_has_cascades_of_that_part_only(tmp_path) -> None:
    whole = make("vit")
    whole.save_pretrained(tmp_path)
    part = type(whole).from_pretrained(tmp_path, max_flops=whole.stitches[0].flops).eval()
    with pytest.raises(ValueError, match="stitch 1 was left out of this model"):
        find_cascades(part, data(number=20), [0, 1])


def test_logits_that_are_no_numbers_are_named() -> None:
    model = make("vit")
    with torch.no_grad():
        model.anchors[1].head.bias.fill_(torch.nan)
    with pytest.raises(ValueError, match="the logits of stitch 1 are not finite for 20 of 20 images"):
        find_cascades(model, data(number=20))


def test_two_mean_budgets_beside_the_stitches() -> None:
    config = SimpleNamespace(
        stitches=[
            {"id": 0, "route": [[0, 0, 1]], "flops": 1e6},
            {"id": 1, "route": [[1, 0, 1]], "flops": 8e6},
            {"id": 2, "route": [[0, 0, 1], [1, 0, 1]], "flops": 9e6},
        ],
        cascades=[],
    )
    nothing = "no cascade is better than the best stitch"
    assert beside_stitches(config).splitlines() == [  # type: ignore[arg-type]
        f"2.00 MFLOPs per image on average: {nothing}",
        f"4.00 MFLOPs per image on average: {nothing}",
    ]
    stages = [{"stitch": 0, "score": "max_probability", "threshold": 0.9}, {"stitch": 1}]
    facts = {"stages": stages, "max_flops": 9e6, "interval": [0.01, 0.03]}
    config.cascades = [
        {"id": 0, "flops": 3e6, "metrics": {"accuracy": 0.9, "gain": 0.02}, **facts},
        {"id": 1, "flops": 3.5e6, "metrics": {"accuracy": 0.89, "gain": 0.02}, **facts},
        {"id": 2, "flops": 3.6e6, "metrics": {"accuracy": 0.99}, **facts},  # measured elsewhere, so nothing to compare
    ]
    assert beside_stitches(config).splitlines() == [  # type: ignore[arg-type]
        f"2.00 MFLOPs per image on average: {nothing}",
        "4.00 MFLOPs per image on average: cascade 0 (0, where p < 0.9 → 1) takes 3.00 and has 90.00 %, the best "
        "stitch of that cost 88.00 % (+2.00 points, +1.00 to +3.00)",
    ]
