"""The front and its area, with figures that can be worked out by hand: budgets are powers of two."""

import math

import numpy as np
import pytest

from stitchable import Segment, Stitch
from stitchable.front import (
    Half,
    area,
    halves,
    in_words,
    judge,
    judge_stitches,
    judge_two_fold,
    on_own_front,
    paired_interval,
    staircase,
    untouched_anchors,
)


def test_the_null_line_and_the_straight_line_of_two_anchors() -> None:
    # The staircase of the anchors stays at 0.5 up to the dearer one; the line through them has 0.7 in the middle.
    found = judge([1, 4], [0.5, 0.9], [1, 4], [0.5, 0.9])
    assert found.area == found.null_line == pytest.approx(0.5)
    assert found.straight_line == pytest.approx(0.7)
    assert found.share == pytest.approx(0.0)
    # A stitch half-way in log FLOPs adds half of what it is better.
    found = judge([1, 2, 4], [0.5, 0.8, 0.9], [1, 4], [0.5, 0.9])
    assert found.area == pytest.approx(0.65)
    assert found.gain == pytest.approx(0.15)
    assert found.share == pytest.approx(0.75)
    # One on the straight line adds less than half of it, and a worse smaller anchor costs.
    found = judge([1, 2, 4], [0.4, 0.7, 0.9], [1, 4], [0.5, 0.9])
    assert found.area == pytest.approx(0.55)
    assert found.share == pytest.approx(0.25)


def test_the_published_anchors_of_the_paper() -> None:
    # DeiT-Ti/S/B with the accuracies that their paper prints. By hand, null line and straight line are
    # 0.4923 x 72.1 + 0.5077 x 79.8 and 0.4923 x 75.95 + 0.5077 x 80.8, the weights being log(4.608 / 1.258) and
    # log(17.583 / 4.608) parts of their sum.
    flops, published = [1258411200, 4608338304, 17582740224], [0.721, 0.798, 0.818]
    found = judge(flops, published, flops, published)
    assert round(100 * found.null_line, 2) == 76.01
    assert round(100 * found.straight_line, 2) == 78.41
    # An area of 77.46, as the authors' stitches have it, is a share of 0.60.
    within = (77.46 - 76.01) / (78.41 - 76.01)
    assert round(within, 2) == 0.60


def test_anchors_that_others_beat_are_no_part_of_the_lines() -> None:
    with_it = judge([1, 2, 4], [0.5, 0.6, 0.9], [1, 2, 4], [0.5, 0.4, 0.9])
    assert with_it == judge([1, 2, 4], [0.5, 0.6, 0.9], [1, 4], [0.5, 0.9])
    # The range ends at the dearest that is worth its cost.
    dear = judge([1, 4, 64], [0.5, 0.9, 0.8], [1, 4, 64], [0.5, 0.9, 0.8])
    assert (dear.area, dear.straight_line) == (pytest.approx(0.5), pytest.approx(0.7))


def test_a_share_is_stated_only_where_the_lines_are_apart() -> None:
    assert judge([1, 4], [0.5, 0.51], [1, 4], [0.5, 0.51]).share is not None  # 0.5 points
    assert judge([1, 4], [0.5, 0.509], [1, 4], [0.5, 0.509]).share is None


def test_what_is_no_front_is_named() -> None:
    with pytest.raises(ValueError, match="at least two anchors"):
        judge([1, 4], [0.5, 0.9], [1, 4], [0.9, 0.5])
    with pytest.raises(ValueError, match="no network is within 1 FLOPs, where the range begins: the cheapest has 2"):
        judge([2, 4], [0.5, 0.9], [1, 4], [0.5, 0.9])
    with pytest.raises(ValueError, match="accuracies finite"):
        judge([1, 4], [0.5, math.nan], [1, 4], [0.5, 0.9])
    with pytest.raises(ValueError, match="as many accuracies as FLOPs"):
        area([1, 2], [0.5], 1, 2)
    with pytest.raises(ValueError, match="a range of FLOPs begins above 0 and ends no lower, got 4 to 1"):
        staircase([1], [0.5], 4, 1)
    with pytest.raises(ValueError, match="none may be empty; got 1 images"):
        halves(1)


def test_the_staircase() -> None:
    # Log FLOPs from 1 to 16 are four doublings: one at 0.2, one at 0.5, two at 0.6; 0.4 at 8 is beaten.
    stairs = staircase([4, 1, 2, 8], [0.6, 0.2, 0.5, 0.4], 1, 16)
    assert stairs == [(1, pytest.approx(0.25)), (2, pytest.approx(0.25)), (0, pytest.approx(0.5))]
    assert on_own_front([4, 1, 2, 8], [0.6, 0.2, 0.5, 0.4]) == [1, 2, 0]
    assert on_own_front([2, 2, 2], [0.1, 0.3, 0.3]) == [1]
    # What is cheaper than the range counts from its beginning; at a single budget one network stands for all.
    assert staircase([1, 2, 4], [0.1, 0.2, 0.9], 4, 16) == [(2, pytest.approx(1.0))]
    assert staircase([1, 2, 4], [0.1, 0.2, 0.9], 2, 2) == [(1, 1.0)]


def half(flops: list[float], chosen_by: list[float], correct: list[list[int]]) -> Half:
    return Half(np.array(flops, dtype=float), np.array(chosen_by), lambda index: np.array(correct[index], dtype=bool))


def test_each_half_chooses_for_the_other() -> None:
    # Two networks at one cost: the other half prefers network 1, which is right on one image of four here. A figure on
    # the images that chose would be 0.75.
    here = half([1, 1, 4], [0.2, 0.3, 0.9], [[1, 1, 1, 0], [0, 0, 1, 0], [1, 1, 1, 1]])
    assert here.within(1) == here.within(3.9) == 1
    assert here.within(4) == 2
    np.testing.assert_allclose(here.area(1, 4), [0, 0, 1, 0])
    there = half([1, 1, 4], [0.4, 0.3, 0.9], [[1, 0], [0, 0], [1, 1]])
    # Budgets are those of this half: what costs 2 on it is chosen from 2 on, half of the range.
    dearer = half([1, 2, 4], [0.2, 0.3, 0.9], [[1, 1, 1, 0], [0, 0, 1, 0], [1, 1, 1, 1]])
    np.testing.assert_allclose(dearer.area(1, 4), [0.5, 0.5, 1, 0])
    with pytest.raises(ValueError, match=r"no network is within 0.5 FLOPs; the cheapest has 1"):
        here.within(0.5)

    anchors = (half([1, 4], [0.2, 0.9], [[0, 0, 0, 0], [1, 1, 1, 1]]), half([1, 4], [0.2, 0.9], [[0, 0], [1, 1]]))
    found = judge_two_fold((here, there), anchors, [0.1, 0.9])
    assert found.images == 6
    assert found.area == pytest.approx(2 / 6)  # (1 of 4, and 1 of 2)
    assert found.null_line == 0
    assert found.straight_line == pytest.approx(0.5)
    assert found.share == pytest.approx(2 / 6 / 0.5)
    assert found.interval is not None
    assert found.interval[0] == 0.0  # six images decide nothing
    assert found.to_dict()["gain"] == pytest.approx(2 / 6)


def test_the_stitches_of_a_model_are_judged_against_the_anchors_as_they_were() -> None:
    small, large = (Segment(0, 0, 2),), (Segment(1, 0, 2),)
    between = (Segment(0, 0, 1), Segment(1, 1, 2))
    stitches = [
        Stitch(0, small, flops=1, metrics={"accuracy": 0.4}),
        Stitch(1, large, flops=4, metrics={"accuracy": 0.7}),
        Stitch(2, between, ("0-1.0",), flops=2, metrics={"accuracy": 0.8}),
        Stitch(3, between, ("0-1.0",), flops=2),  # not measured
    ]
    assert untouched_anchors(stitches, {1: 0.9}) == {0: (1, 0.4), 1: (4, 0.9)}
    found = judge_stitches(stitches, {0: 0.5, 1: 0.9})
    assert found == judge([1, 4, 2], [0.4, 0.7, 0.8], [1, 4], [0.5, 0.9])
    assert in_words(found) == (
        "Area of the front (mean of the best accuracy over log FLOPs, from the cheapest to the dearest anchor): "
        "60.00 %; of the untouched anchors (the null line): 50.00 %; of the straight line through them: 70.00 %, "
        "share 0.50. Chosen and measured on the same images, which favours the stitches."
    )
    near = judge_stitches(stitches, {0: 0.5, 1: 0.501})
    assert near is not None
    assert "too near it for a share" in in_words(near)
    assert judge_stitches(stitches, {0: 0.9, 1: 0.5}) is None
    assert judge_stitches(stitches[1:], {1: 0.9}) is None
    assert judge_stitches([], {}) is None


def test_halves_are_as_large_and_random() -> None:
    which = halves(11)
    assert which.sum() == 5
    assert (which == halves(11)).all()
    assert not (which == halves(11, seed=1)).all()


def test_the_interval_is_that_of_a_mean() -> None:
    assert paired_interval([0.25] * 7) == (0.25, 0.25)
    gains = np.random.default_rng(3).normal(1.0, 2.0, 400)
    low, high = paired_interval(gains)
    # 1.96 standard errors to either side.
    assert low == pytest.approx(gains.mean() - 1.96 * gains.std() / 20, abs=0.03)
    assert high == pytest.approx(gains.mean() + 1.96 * gains.std() / 20, abs=0.03)
