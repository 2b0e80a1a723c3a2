"""Traces, what a policy makes of them, the oracle, and the command that compares them."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

from families import make
from stitchable.card import Card
from stitchable.processing import image_processor
from stitchable.publishing import save_repository
from stitchable.serving import comparison
from stitchable.serving.choices import Line, _cascade, choices_of, front_of, measure_latencies
from stitchable.serving.oracle import best_schedule
from stitchable.serving.policy import Choice, Policy
from stitchable.serving.simulator import Threshold, simulate
from stitchable.serving.traces import KINDS, make_trace, read_trace
from stitchable_cli import app

SMALL = Choice("stitch", 0, 0.50, 1, fixed=0.25, per_image=0.25)
LARGE = Choice("stitch", 1, 0.75, 2, fixed=0.5, per_image=1.0)
TARGET = 3.0


@pytest.mark.parametrize("kind", KINDS)
def test_a_trace_has_the_rate_that_was_asked_for(kind) -> None:
    arrivals = make_trace(kind, rate=100, seconds=200, seed=1)
    assert np.all(np.diff(arrivals) >= 0)
    assert 0 <= arrivals[0] <= arrivals[-1] <= 200
    assert len(arrivals) == pytest.approx(20_000, rel=0.03)
    np.testing.assert_array_equal(arrivals, make_trace(kind, rate=100, seconds=200, seed=1))
    assert len(arrivals) != len(make_trace(kind, rate=100, seconds=200, seed=2))
    per_second = np.bincount(arrivals.astype(int), minlength=200) / 100
    if kind == "poisson":
        assert per_second.max() < 1.6
    if kind == "bursty":
        assert 3 <= np.sort(per_second)[-4:].mean() <= 5.5
        assert np.median(per_second) < 1
    if kind == "diurnal":
        assert per_second[:20].mean() < 0.4
        assert per_second[90:110].mean() > 1.6


def test_a_file_of_arrival_times_begins_at_0(tmp_path) -> None:
    (tmp_path / "trace").write_text("1700000001.5\n1700000000.25\n\n1700000001\n", encoding="utf-8")
    assert read_trace(tmp_path / "trace").tolist() == [0.0, 0.75, 1.25]


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "no arrival times"), ("1\nsoon\n", "line 2: an arrival time is a number"), ("inf\n", "must be finite")],
)
def test_a_file_of_anything_else_is_refused(text, message, tmp_path) -> None:
    (tmp_path / "trace").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_trace(tmp_path / "trace")


@pytest.mark.parametrize(("kind", "rate"), [("weekly", 1.0), ("poisson", 0.0), ("bursty", float("inf"))])
def test_a_trace_that_cannot_be_made_is_refused(kind, rate) -> None:
    with pytest.raises(ValueError, match="trace"):
        make_trace(kind, rate, 10)
    with pytest.raises(ValueError, match=r"no request arrives in 1 s at 0\.0001 per second"):
        make_trace("poisson", 0.0001, 1)
    with pytest.raises(
        ValueError, match="a trace is poisson, bursty, diurnal, or a file of arrival times; there is no"
    ):
        read_trace("poison")


def test_a_trace_by_hand() -> None:
    # The first runs alone, those that came meanwhile together; the last comes to an idle device.
    outcome = simulate(Policy([SMALL], TARGET, (1, 2)), np.array([1.0, 1.25, 1.375, 9.0]), TARGET)
    assert outcome.finished.tolist() == [1.5, 2.25, 2.25, 9.5]
    assert outcome.busy == 1.75
    assert outcome.batches == {("stitch", 0): 3}
    summary = outcome.summary()
    assert summary["attainment"] == 1.0
    assert summary["accuracy"] == 0.5
    assert summary["p50_ms"] == pytest.approx(1e3 * (0.5 + 0.875) / 2)
    assert summary["utilisation"] == pytest.approx(1.75 / 9.5)


def test_what_cannot_be_answered_is_shed_and_counts_as_missed() -> None:
    outcome = simulate(Policy([LARGE], TARGET, (1,)), np.zeros(4), TARGET)
    assert np.isnan(outcome.finished).tolist() == [False, False, True, True]
    assert outcome.summary()["attainment"] == 0.5
    assert outcome.summary()["shed"] == 0.5
    nothing = simulate(Policy([LARGE], 1.0, (1,)), np.zeros(2), 1.0).summary()
    assert nothing == {
        **{"attainment": 0.0, "accuracy": None, "p50_ms": None, "p95_ms": None, "p99_ms": None},
        **{"shed": 1.0, "utilisation": 0.0},
    }


def test_the_policy_is_as_good_as_any_fixed_choice_and_a_threshold() -> None:
    arrivals = make_trace("bursty", rate=1.0, seconds=600, seed=0)
    outcomes = comparison.compare([SMALL, LARGE], [0, 1], arrivals, TARGET)
    score = {name: outcome.summary() for name, outcome in outcomes.items()}
    assert list(score) == ["policy", "anchor 0", "anchor 1", "load threshold", "oracle"]
    assert score["policy"]["attainment"] >= score["anchor 0"]["attainment"] - 0.03 > score["anchor 1"]["attainment"]
    assert score["policy"]["accuracy"] > score["anchor 0"]["accuracy"] + 0.08
    total = {name: outcome.accuracy_or_0[outcome.in_time].sum() for name, outcome in outcomes.items()}
    assert total["policy"] > max(total["anchor 0"], total["anchor 1"])
    assert total["policy"] > 0.98 * total["load threshold"]
    assert outcomes["oracle"].in_time.sum() >= max(outcome.in_time.sum() for outcome in outcomes.values())
    text = comparison.to_text(outcomes)
    assert f"{100 * score['policy']['attainment']:6.2f} %" in text.splitlines()[1]


def test_a_machine_that_slows_down_keeps_the_target_by_other_choices() -> None:
    arrivals = np.arange(0, 400, 2.0)
    outcome = simulate(Policy([SMALL, LARGE], 2.5), arrivals, 2.5, slowdown=lambda now: 1.0 if now < 200 else 3.0)
    before, after = arrivals < 200, arrivals >= 200 + 2 * 50
    assert outcome.in_time[before].all()
    assert (outcome.accuracy[before] == LARGE.accuracy).all()
    assert outcome.in_time[after].all()
    assert (outcome.accuracy[after] == SMALL.accuracy).all()


def test_a_threshold_goes_by_how_many_wait() -> None:
    policy = Threshold([SMALL, LARGE], 100.0, threshold=2)
    outcome = simulate(policy, np.array([0.0, 0.5, 0.625, 0.75, 50.0]), 100.0)
    assert outcome.accuracy.tolist() == [0.75, 0.5, 0.5, 0.75, 0.75]


def best_by_hand(arrivals, choices, sizes, target) -> tuple[int, float]:
    def go(first: int, free: float) -> tuple[int, float]:
        if first == len(arrivals):
            return 0, 0.0
        best = go(first + 1, free)
        for size, choice in itertools.product(sizes, choices):
            if first + size <= len(arrivals):
                end = max(free, arrivals[first + size - 1]) + choice.seconds(size)
                if end <= arrivals[first] + target:
                    number, accuracy = go(first + size, end)
                    best = max(best, (number + size, accuracy + size * choice.accuracy))
        return best

    return go(0, 0.0)


def test_the_oracle_finds_the_best_of_all_schedules() -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        arrivals = np.sort(rng.integers(0, 32, 7) / 8)
        outcome = best_schedule([SMALL, LARGE], arrivals, TARGET, (1, 2, 4))
        number, accuracy = best_by_hand(arrivals, [SMALL, LARGE], (1, 2, 4), TARGET)
        assert outcome.in_time.sum() == number
        assert outcome.accuracy[outcome.in_time].sum() == pytest.approx(accuracy)


def measured_model():
    model = make("vit", id2label={i: f"class {i}" for i in range(5)})
    for stitch in model.stitches:
        model.record(stitch.id, metrics={"accuracy": round((stitch.flops or 0) / 1e6, 4)})
    return model


def test_the_choices_of_a_model_are_its_measured_stitches_on_this_device(caplog) -> None:
    model = measured_model()
    model.record(3, metrics={})
    choices = choices_of(model)
    assert [choice.id for choice in choices] == [0, 1, 2, 4, 5, 6, 7, 8]
    for choice in choices:
        stitch = model.stitches[choice.id]
        assert (choice.accuracy, choice.flops) == (stitch.metrics["accuracy"], stitch.flops)
        assert choice.per_image > 0
        assert choice.seconds(1) == pytest.approx(stitch.latency_ms / 1e3, rel=0.2)  # a line fits both sizes nearly
    front = front_of(choices)
    assert [choice.accuracy for choice in front] == sorted({choice.accuracy for choice in front})
    assert "latencies are of" not in caplog.text
    model.config.latency["device"] = "Another CPU"
    measure_latencies(model)
    assert "the checkpoint's latencies are of Another CPU" in caplog.text


def test_a_model_without_accuracies_cannot_be_served() -> None:
    with pytest.raises(ValueError, match="stitchable eval FOLDER DATA measures them"):
        choices_of(make("vit"))


def test_a_cascade_is_a_choice_with_a_mean_and_a_worst_latency() -> None:
    # A quarter of the images reach the second stage: of eight nearly always one.
    stages = [SimpleNamespace(stitch=0, reached=1.0), SimpleNamespace(stitch=1, reached=0.25)]
    cascade = SimpleNamespace(id=7, stages=stages, flops=150, metrics={"accuracy": 0.9})
    choice = _cascade(cascade, [Line(1.0, 1.0), Line(2.0, 3.0)])
    assert (choice.kind, choice.id, choice.accuracy, choice.flops) == ("cascade", 7, 0.9, 150)
    assert choice.seconds(1) == pytest.approx(2 + 0.25 * 5)
    assert choice.seconds(8) == pytest.approx(1 + 8 + 2 * (1 - 0.75**8) + 0.25 * 8 * 3)
    assert choice.bound(1) == pytest.approx(2 + 5)
    assert choice.bound(4) == pytest.approx(choice.seconds(4) * (1 + (7 / 3.25 - 1) / 2))


def test_the_stages_of_a_cascade_are_timed_where_the_checkpoint_does_not_say() -> None:
    model = measured_model()
    flops = [model.stitches[i].flops for i in (0, 1)]
    first = {"stitch": 0, "flops": flops[0], "score": "margin", "threshold": 0.5}
    stages = [first, {"stitch": 1, "flops": flops[1], "reached": 0.5}]
    entry = {"id": 0, "stages": stages, "flops": flops[0], "max_flops": sum(flops), "metrics": {"accuracy": 0.9}}
    model.cascades = [entry]
    lines, found = measure_latencies(model)
    assert set(lines) == {stitch.id for stitch in model.stitches}
    assert [len(found[0]), min(line.per_image for line in found[0]) > 0] == [2, True]
    assert measure_latencies(model) == (lines, found)  # what was measured is in the config now
    (cascade,) = [choice for choice in choices_of(model) if choice.kind == "cascade"]
    assert cascade.seconds(1) < cascade.bound(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    model = measured_model()
    path = tmp_path_factory.mktemp("served") / "tiny"
    save_repository(model, path, image_processor(model.config, crop_pct=1.0), Card("tiny", "noise"))
    return path


def run(*arguments: object):
    return CliRunner().invoke(app, ["simulate", *map(str, arguments)])


def test_the_command_prints_the_comparison(folder, tmp_path) -> None:
    figure = tmp_path / "figure.png"
    result = run(folder, "--trace", "bursty", "--rate", 50, "--seconds", 5, "--output", figure)
    assert result.exit_code == 0, result.output
    assert "s, target 50 ms\n" in result.stdout
    assert figure.read_bytes().startswith(b"\x89PNG")
    (tmp_path / "trace").write_text("0\n0.5\n0.75\n", encoding="utf-8")
    result = run(folder, "--trace", tmp_path / "trace", "--json")
    outcomes = json.loads(result.stdout)
    assert outcomes["policy"]["attainment"] == 1.0
    best = max(choice.accuracy for choice in choices_of(measured_model()))
    assert outcomes["policy"]["accuracy"] == best
    assert {"anchor 0", "anchor 1", "load threshold", "oracle"} < set(outcomes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--trace", "bursty"), "needs --rate"),
        (("--trace", "bursty", "--rate", 5, "--slo-ms", 0), "--slo-ms must be above 0"),
        (("--trace", "no-such-file"), "no-such-file"),
        (("--trace", "poisson", "--rate", 1, "--output", __file__), "exists"),
    ],
)
def test_the_command_says_what_is_wrong(arguments, message, folder) -> None:
    result = run(folder, *arguments)
    assert result.exit_code == 1
    assert message in result.stderr
    assert "Traceback" not in result.output
