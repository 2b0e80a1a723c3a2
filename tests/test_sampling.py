"""Which stitches a step runs: how often, on which process, and the same ones again."""

import random
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch

from stitchable import Segment, Stitch
from stitchable.training.sampling import StitchSampler

DEPTH = 4


def family(flops: Sequence[int] = (10, 30, 90)) -> list[Stitch]:
    """Three anchors, and stitches between neighbours whose FLOPs lie between theirs."""
    stitches = [
        Stitch(id=anchor, route=(Segment(anchor, 0, DEPTH),), flops=cost, params=1) for anchor, cost in enumerate(flops)
    ]
    for front in range(2):
        for stop in range(1, DEPTH):
            route = (Segment(front, 0, stop), Segment(front + 1, stop, DEPTH))
            cost = flops[front] + (flops[front + 1] - flops[front]) * (DEPTH - stop) // DEPTH
            layers = (f"{front}-{front + 1}.{stop}",)
            stitches.append(Stitch(id=len(stitches), route=route, layers=layers, flops=cost, params=1))
    return stitches


def draws(steps: int, process: int = 0, **settings: Any) -> list[tuple[int, ...]]:
    sampler = StitchSampler(family(), **settings)
    return [sampler.draw(step, process) for step in range(steps)]


def test_uniform_draws_every_stitch_equally_often() -> None:
    counts = Counter(draws(9000))
    assert set(counts) == {(number,) for number in range(9)}
    # Six standard deviations of a binomial distribution with p = 1/9.
    assert all(abs(count - 1000) < 6 * (9000 / 9 * 8 / 9) ** 0.5 for count in counts.values())


def test_neighbouring_steps_are_independent() -> None:
    drawn = draws(8100)
    counts = Counter(pairwise(drawn))
    assert len(counts) == 81
    assert all(40 < count < 170 for count in counts.values())


def test_only_the_stitches_given_are_drawn() -> None:
    assert set(draws(200, stitch_ids=[4, 7])) == {(4,), (7,)}
    assert set(draws(5, stitch_ids=[2])) == {(2,)}


def test_groups_begin_where_the_gap_to_their_first_is_too_wide() -> None:
    """As in SN-Netv2, although no two neighbours are farther apart than the gap."""
    groups = [{0, 5, 4, 3}, {1, 8}, {7, 6}, {2}]
    flops = {stitch.id: stitch.flops for stitch in family()}
    assert [sorted(flops[i] for i in group) for group in groups] == [[10, 15, 20, 25], [30, 45], [60, 75], [90]]
    counts = Counter(stitch_id for (stitch_id,) in draws(8000, method="flops_groups", flops_gap=15))
    for group in groups:
        drawn = [counts[stitch_id] for stitch_id in group]
        assert abs(sum(drawn) - 2000) < 6 * (8000 / 4 * 3 / 4) ** 0.5
        expected = 2000 / len(group)
        assert all(abs(count - expected) < 6 * expected**0.5 for count in drawn)  # uniform inside


def test_one_group_is_uniform_and_every_cost_may_be_a_group() -> None:
    counts = Counter(draws(9000, method="flops_groups", flops_gap=80))
    assert len(counts) == 9
    assert all(800 < count < 1200 for count in counts.values())
    sampler = StitchSampler(family((5, 5, 90)), [0, 1, 2], method="flops_groups", flops_gap=0)
    counts = Counter(sampler.draw(step) for step in range(4000))
    assert [round(counts[(i,)] / 1000) for i in range(3)] == [1, 1, 2]


def test_a_sandwich_is_a_stitch_with_its_anchors_the_largest_first() -> None:
    drawn = set(draws(500, method="sandwich"))
    assert drawn == {(1, stitch_id, 0) for stitch_id in (3, 4, 5)} | {(2, stitch_id, 1) for stitch_id in (6, 7, 8)}


def test_a_sandwich_of_three_anchors() -> None:
    route = (Segment(0, 0, 1), Segment(1, 1, 2), Segment(2, 2, DEPTH))
    stitches = [*family(), Stitch(id=9, route=route, layers=("0-1.0", "1-2.0"), flops=50, params=1)]
    sampler = StitchSampler(stitches, [9], method="sandwich")
    assert sampler.draw(0) == (2, 9, 0, 1)


def test_several_stitches_of_a_step_are_drawn_as_one_is() -> None:
    drawn = draws(3000, stitches_per_step=4)
    assert {len(ids) for ids in drawn} == {4}
    assert [ids[:1] for ids in drawn] == draws(3000)  # the first as if it were alone
    counts = Counter(pairwise(stitch_id for ids in drawn for stitch_id in ids))
    assert len(counts) == 81  # every pair, the same twice too
    assert all(90 < count < 210 for count in counts.values())


@pytest.mark.parametrize("method", ["uniform", "flops_groups"])
def test_anchors_come_as_often_as_they_shall(method: Any) -> None:
    settings = {"method": method, "flops_gap": 15, "stitches_per_step": 2, "anchor_probability": 0.3}
    counts = Counter(i for ids in draws(6000, **settings) for i in ids)
    expected = StitchSampler(family(), **settings).updates(6000)
    assert [round(expected[anchor]) for anchor in range(3)] == [1200] * 3
    assert sum(expected.values()) == pytest.approx(12000)
    assert all(abs(counts[i] - number) < 6 * number**0.5 for i, number in expected.items())


def test_in_rounds_each_comes_once_before_any_comes_again() -> None:
    drawn = [i for ids in draws(9 * 5, order="rounds", stitches_per_step=3) for i in ids]
    rounds = [drawn[first : first + 9] for first in range(0, len(drawn), 9)]
    assert all(sorted(ids) == list(range(9)) for ids in rounds)
    assert len(set(map(tuple, rounds))) == len(rounds)  # in another order each time


def test_in_rounds_anchors_come_exactly_as_often_as_they_shall() -> None:
    settings = {"order": "rounds", "stitches_per_step": 4, "anchor_probability": 0.25}
    drawn = draws(12, **settings)
    assert all(sum(i < 3 for i in ids) == 1 for ids in drawn)
    counts = Counter(i for ids in drawn for i in ids)
    assert counts == {**dict.fromkeys(range(3), 4), **dict.fromkeys(range(3, 9), 6)}
    assert counts == pytest.approx(StitchSampler(family(), **settings).updates(12))


def test_groups_and_sandwiches_in_rounds() -> None:
    groups = [{0, 5, 4, 3}, {1, 8}, {7, 6}, {2}]
    drawn = [i for ids in draws(4 * 4, method="flops_groups", flops_gap=15, order="rounds") for i in ids]
    for first in range(0, 16, 4):
        assert all(len(group & set(drawn[first : first + 4])) == 1 for group in groups)
    assert Counter(drawn) == {i: 4 // len(group) for group in groups for i in group}
    assert {ids[1] for ids in draws(6, method="sandwich", order="rounds")} == set(range(3, 9))


def test_updates_are_those_of_all_processes_and_of_whole_sandwiches() -> None:
    settings = {"across_processes": "independent", "num_processes": 3}
    assert StitchSampler(family(), **settings).updates(90) == pytest.approx(dict.fromkeys(range(9), 30))
    assert StitchSampler(family(), num_processes=3).updates(90) == pytest.approx(dict.fromkeys(range(9), 10))
    sandwich = StitchSampler(family(), method="sandwich").updates(60)
    assert sandwich == pytest.approx({0: 30, 1: 60, 2: 30, **dict.fromkeys(range(3, 9), 10)})


def test_processes_draw_the_same_unless_told_otherwise() -> None:
    for method in ("uniform", "flops_groups", "sandwich"):
        sampler = StitchSampler(family(), method=method, num_processes=3)  # type: ignore[arg-type]
        assert all(len(set(sampler.draw_all(step))) == 1 for step in range(50))
        assert sampler.draw_all(7) == [sampler.draw(7, process) for process in range(3)]


def test_independent_processes_have_rounds_of_their_own() -> None:
    sampler = StitchSampler(family(), order="rounds", across_processes="independent", num_processes=2)
    first, second = zip(*(sampler.draw_all(step) for step in range(9)), strict=True)
    assert sorted(first) == sorted(second) == [(i,) for i in range(9)]
    assert first != second


def test_independent_processes_draw_for_themselves() -> None:
    sampler = StitchSampler(family(), across_processes="independent", num_processes=2)
    pairs = Counter(tuple(sampler.draw_all(step)) for step in range(8100))
    assert len(pairs) == 81  # every combination
    assert all(40 < count < 170 for count in pairs.values())


@pytest.mark.parametrize("method", ["uniform", "flops_groups", "sandwich"])
@pytest.mark.parametrize("across", ["same", "independent"])
@pytest.mark.parametrize("order", ["independent", "rounds"])
def test_a_draw_depends_on_seed_step_and_process_alone(method: Any, across: Any, order: Any) -> None:
    settings = {"method": method, "across_processes": across, "order": order, "num_processes": 2}
    sampler = StitchSampler(family(), **settings)
    forwards = [sampler.draw_all(step) for step in range(60)]
    random.seed(5)
    torch.manual_seed(5)
    backwards = [StitchSampler(family(), **settings).draw_all(step) for step in reversed(range(60))]
    assert backwards[::-1] == forwards
    other = StitchSampler(family(), **settings, seed=1)
    assert [other.draw_all(step) for step in range(60)] != forwards


def test_a_draw_touches_no_other_generator() -> None:
    states = random.getstate(), torch.get_rng_state()
    draws(20, method="flops_groups", across_processes="independent", num_processes=3)
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])


def test_what_cannot_be_drawn_is_named() -> None:
    with pytest.raises(ValueError, match=r"there is no stitch 12 to draw; this model has 0\.\.8"):
        StitchSampler(family(), [3, 12])
    with pytest.raises(ValueError, match="there is no stitch to draw"):
        StitchSampler(family(), [])
    for ids in ([0, 1], [4, 5]):
        with pytest.raises(ValueError, match="anchor_probability needs both anchors and other stitches to draw"):
            StitchSampler(family(), ids, anchor_probability=0.5)
    for several in ({"stitches_per_step": 2}, {"anchor_probability": 0.5}):
        with pytest.raises(ValueError, match="a sandwich is one stitch with its anchors"):
            StitchSampler(family(), method="sandwich", **several)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a sandwich needs a stitch between anchors to draw"):
        StitchSampler(family(), [0, 1, 2], method="sandwich")
    with pytest.raises(ValueError, match="a sandwich runs the anchors too, but anchor 1 is not among the stitches"):
        StitchSampler([stitch for stitch in family() if stitch.id != 1], method="sandwich")
