"""Stitches as data: what a config may hold, budgets, the Pareto front."""

import math

import numpy as np
import pytest

from stitchable.front import pareto_front
from stitchable.model.routes import Segment, Stitch, best_within, check_stitches, find_stitch, measured_by


def stitch(route: list[list[int]], layers: tuple[str, ...] = (), stitch_id: int = 0) -> Stitch:
    return Stitch(stitch_id, tuple(Segment(*segment) for segment in route), layers)


def measured(stitch_id: int, flops: int, accuracy: float | None = None, **costs: float) -> Stitch:
    metrics = {} if accuracy is None else {"accuracy": accuracy}
    return Stitch(stitch_id, (Segment(0, 0, 4),), flops=flops, params=10 * flops, metrics=metrics, **costs)


TABLE = [measured(0, 100, 0.70), measured(1, 200, 0.80), measured(2, 300, 0.75), measured(3, 400, 0.90)]


@pytest.mark.parametrize(
    ("route", "layers", "problem"),
    [
        ([], (), "no segment"),
        ([[2, 0, 4]], (), "anchor 2 is out of range, there are 2 anchors"),
        ([[-1, 0, 4]], (), "anchor -1 is out of range"),
        ([[0, 0, 5]], (), "empty or out of range, anchor 0 has blocks 0..3"),
        ([[0, 0, 0], [1, 0, 6]], ("0-1.0",), "empty or out of range"),
        ([[0, 1, 4]], (), "gap: the first segment must start at 0 and the last one stop at 4, not at 1 and 4"),
        ([[0, 0, 3]], (), "gap: the first segment must start at 0 and the last one stop at 4, not at 0 and 3"),
        ([[0, 0, 2], [0, 3, 4]], ("0-0.0",), "[0, 0, 2] and [0, 3, 4] are of one anchor, so they must be one segment"),
        ([[0, 0, 3], [0, 2, 4]], ("0-0.0",), "are of one anchor, so they must be one segment"),
        ([[0, 0, 2], [1, 3, 6]], (), "2 segments need 1 stitching layers"),
        ([[0, 0, 2], [1, 3, 6]], ("1-0.0",), "unknown stitching layer '1-0.0'"),
        ([[0, 0, 2], [1, 3, 6]], ("first",), "unknown stitching layer 'first'"),
        ([[0, 0, 2], [1, 3, 6]], ("0-01.0",), "unknown stitching layer '0-01.0'"),
    ],
)
def test_routes_that_do_not_fit_are_named(route: list, layers: tuple, problem: str) -> None:
    with pytest.raises(ValueError, match="stitch 0") as error:
        check_stitches([stitch(route, layers)], depths=[4, 6])
    assert problem in str(error.value)


def test_routes_of_one_two_and_three_segments_fit() -> None:
    routes = [
        stitch([[0, 0, 4]], (), 0),
        stitch([[0, 0, 3], [1, 2, 6]], ("0-1.5",), 7),
        stitch([[1, 0, 1], [0, 1, 2], [1, 5, 6]], ("1-0.0", "0-1.0"), 9),
    ]
    check_stitches(routes, depths=[4, 6])


def test_ids_are_unique_and_there_is_a_stitch() -> None:
    with pytest.raises(ValueError, match="no stitch"):
        check_stitches([], [4])
    with pytest.raises(ValueError, match="id 0 occurs twice"):
        check_stitches([stitch([[0, 0, 4]]), stitch([[0, 0, 4]])], [4])


@pytest.mark.parametrize(
    "entry",
    [
        {"id": 0},
        {"id": 0, "route": [[0, 0]]},
        {"id": 0, "route": [[0, 0.0, 4]]},
        {"id": 0, "route": [[0, 0, 4]], "accuracy": 1.0},
        {"id": 0, "route": None},
        {"id": 0, "route": [0, 0, 4]},
        {"id": 0, "route": [[0, 0, 4]], "layers": None},
        {"id": 0, "route": [[0, 0, 4]], "layers": [3]},
    ],
)
def test_a_stitch_of_the_wrong_form_is_refused(entry: dict) -> None:
    with pytest.raises(ValueError, match="stitch"):
        Stitch.from_dict(entry)


def test_a_stitch_survives_json_types() -> None:
    full = Stitch(5, (Segment(0, 0, 2), Segment(1, 1, 3)), ("0-1.0",), 10, 20, 1.5, metrics={"accuracy": 0.5})
    assert Stitch.from_dict(full.to_dict()) == full
    assert "latency_ms" not in measured(0, 1).to_dict()


@pytest.mark.parametrize("wrong", [True, 1.0, "1", None, [1]])
def test_an_id_that_is_no_integer_is_refused(wrong: object) -> None:
    with pytest.raises(ValueError, match="must be an integer"):
        find_stitch(TABLE, wrong)


def test_an_id_out_of_range_names_the_range_and_the_nearest() -> None:
    assert find_stitch(TABLE, np.int64(2)) is TABLE[2]
    with pytest.raises(ValueError, match=r"stitches 0\.\.3; the nearest is 3"):
        find_stitch(TABLE, 9)
    with pytest.raises(ValueError, match=r"stitches \[0, 3\]; the nearest is 0"):
        find_stitch([TABLE[0], TABLE[3]], -1)


def test_a_budget_takes_the_best_measured_not_the_largest() -> None:
    assert best_within(TABLE, flops=350).id == 1
    assert best_within(TABLE, flops=400).id == 3  # the bound itself is within
    assert best_within(TABLE, flops=1e12, params=2500).id == 1
    assert best_within(TABLE, flops=math.inf).id == 3


def test_among_equals_the_cheaper_wins_and_unmeasured_ones_lose() -> None:
    assert best_within([measured(0, 300, 0.9), measured(1, 200, 0.9), measured(2, 350)], flops=400).id == 1


def test_without_measurements_the_largest_flops_win() -> None:
    assert best_within([measured(0, 100), measured(1, 300), measured(2, 500)], flops=400).id == 1


def test_another_metric_can_be_maximised() -> None:
    table = [Stitch(0, (), flops=1, metrics={"top5": 0.3}), Stitch(1, (), flops=2, metrics={"top5": 0.2})]
    assert best_within(table, flops=5, metric="top5").id == 0
    with pytest.raises(ValueError, match=r"measured by 'accuracy'; there are \['top5'\]"):
        best_within(table, flops=5)
    with pytest.raises(ValueError, match="a loss is better when it is lower"):
        best_within(TABLE, flops=500, metric="loss")
    assert best_within([measured(0, 1, math.nan), measured(1, 2, 0.1)], flops=5).id == 1


def test_where_nobody_had_labels_agreement_decides() -> None:
    table = [Stitch(0, (), flops=1, metrics={"agreement": 0.9}), Stitch(1, (), flops=2, metrics={"agreement": 0.8})]
    assert best_within(table, flops=5).id == 0
    assert measured_by(table) == "agreement"
    assert measured_by([*table, *TABLE]) == measured_by([]) == "accuracy"
    assert best_within([*table, *TABLE], flops=150).metrics == {"accuracy": 0.7}


@pytest.mark.parametrize("budget", [0, -1, math.nan, "many", -math.inf])
def test_a_budget_that_is_no_positive_number_is_refused(budget: object) -> None:
    with pytest.raises(ValueError, match="the budget flops must be a"):
        best_within(TABLE, flops=budget)


def test_a_budget_below_the_cheapest_names_it() -> None:
    with pytest.raises(ValueError, match=r"flops <= 99.*stitch 0 \(flops 100\)"):
        best_within(TABLE, flops=99)
    with pytest.raises(ValueError, match="at least one of"):
        best_within(TABLE)
    with pytest.raises(ValueError, match="carries latency_ms"):
        best_within(TABLE, latency_ms=5)


def test_latency_bounds_only_calibrated_stitches() -> None:
    table = [measured(0, 100, 0.7, latency_ms=2.0), measured(1, 200, 0.8)]
    assert best_within(table, latency_ms=3.0).id == 0


def test_the_pareto_front_is_what_no_other_beats() -> None:
    assert [s.id for s in pareto_front([*reversed(TABLE), measured(9, 50)])] == [0, 1, 3]
