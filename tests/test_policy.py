"""The policy of the server: every small case against the best by its order, written out without its tables."""

import itertools
import subprocess
import sys
from collections.abc import Iterator, Sequence

import pytest

from stitchable.serving import policy as policy_module
from stitchable.serving.policy import Choice, Plan, Policy, Request

SIZES = (1, 2, 4)
# Seconds that floating-point numbers hold exactly. The middle one is slow alone and quick in batches; the last two are
# equally accurate.
CHOICES = (
    Choice("stitch", 0, 0.375, 1, fixed=0.5, per_image=0.5),
    Choice("stitch", 1, 0.625, 2, fixed=1.75, per_image=0.125),
    Choice("cascade", 0, 0.75, 3, fixed=1.0, per_image=1.0, worst=1.5),
    Choice("stitch", 3, 0.75, 4, fixed=2.0, per_image=1.0),
)
TARGET = 6.0


def drain(number: int) -> float:
    """Seconds in which so many requests can be answered, by the quickest choice of each batch."""
    if number == 0:
        return 0.0
    sizes = [size for size in SIZES if size <= number]
    return min(min(choice.bound(size) for choice in CHOICES) + drain(number - size) for size in sizes)


def extra(request: Request) -> float:
    mine = [choice.bound(1) for i, choice in enumerate(CHOICES) if request.allowed >> i & 1]
    return min(mine) - drain(1)


def sift(queue: Sequence[Request], now: float) -> tuple[list[int], list[Request]]:
    shed: list[int] = []
    for place, request in enumerate(queue):
        if now + drain(place - len(shed)) + drain(1) + extra(request) > request.deadline:
            shed.append(place)
    return shed, [request for place, request in enumerate(queue) if place not in shed]


def rank(queue: Sequence[Request], now: float, choice: Choice, size: int, growth: float) -> tuple[float, float, float]:
    """What the order compares: deadlines out of reach, minus the summed accuracy, seconds."""
    end = now + choice.bound(size)
    lost = sum(request.deadline < end for request in queue[:size])
    lost += sum(r.deadline < end + drain(place + 1) + extra(r) for place, r in enumerate(queue[size:]))
    lost += choice.bound(size) * growth + drain(len(queue) - size + 1) > TARGET  # who comes next
    return lost, -size * choice.accuracy, choice.bound(size)


def pairs(queue: Sequence[Request]) -> Iterator[tuple[Choice, int]]:
    for size, (i, choice) in itertools.product(SIZES, enumerate(CHOICES)):
        if size <= len(queue) and all(request.allowed >> i & 1 for request in queue[:size]):
            yield choice, size


def check(policy: Policy, queue: Sequence[Request], now: float, growth: float = 1.0) -> None:
    plan = policy.decide(queue, now)
    shed, kept = sift(queue, now)
    assert plan.shed == shed, queue
    if not kept:
        assert plan.choice is None
        return
    assert plan.choice is not None
    assert (plan.choice, plan.size) in list(pairs(kept)), queue
    best = min(rank(kept, now, choice, size, growth) for choice, size in pairs(kept))
    assert rank(kept, now, plan.choice, plan.size, growth) == best, queue
    assert plan.seconds == plan.choice.seconds(plan.size)


@pytest.mark.parametrize("number", range(6))
def test_every_small_queue_is_served_as_the_order_says(number) -> None:
    policy = Policy(CHOICES, TARGET, SIZES)
    for deadlines in itertools.combinations_with_replacement((10.5, 11.0, 12.0, 13.25, 14.0, 15.5, 18.0), number):
        check(policy, [Request(deadline) for deadline in deadlines], now=10.0)


def test_every_small_queue_of_requests_that_permit_some_choices_only() -> None:
    policy = Policy(CHOICES, TARGET, SIZES)
    permitted = [
        None,
        lambda choice: choice.accuracy > 0.6,
        lambda choice: choice.kind == "stitch" and choice.id == 0,
        lambda choice: choice.flops >= 3,
    ]
    for deadlines in itertools.combinations_with_replacement((11.0, 12.5, 14.0, 16.0), 3):
        for permits in itertools.product(permitted, repeat=3):
            check(policy, [policy.request(*pair) for pair in zip(deadlines, permits, strict=True)], now=10.0)


def test_every_small_queue_while_requests_keep_coming() -> None:
    policy = Policy(CHOICES, TARGET, SIZES)
    for moment in range(16):
        policy.arrived(moment / 4)
    assert policy.rate(4.0) == 4.0
    per_request = min(drain(size) / size for size in SIZES)
    for deadlines in itertools.combinations_with_replacement((5.0, 6.5, 8.0, 10.0), 4):
        check(policy, [Request(deadline) for deadline in deadlines], now=4.0, growth=1 + 4.0 * per_request)


def test_no_deadline_is_missed_that_some_order_of_single_requests_could_keep() -> None:
    policy = Policy(CHOICES, 1e6, (1,))
    quickest = min(choice.bound(1) for choice in CHOICES)
    for deadlines in itertools.combinations_with_replacement((11.0, 12.0, 13.0, 14.5, 17.0), 4):
        if any(10 + (place + 1) * quickest > deadline for place, deadline in enumerate(deadlines)):
            continue
        now, queue = 10.0, [Request(deadline) for deadline in deadlines]
        while queue:
            plan = policy.decide(queue, now)
            assert not plan.shed
            assert plan.choice is not None
            now += plan.choice.bound(1)
            assert now <= queue.pop(0).deadline


def test_the_quiet_get_the_best_and_the_many_a_quick_one() -> None:
    policy = Policy(CHOICES, 100.0, SIZES)
    assert policy.decide([Request(100.0)], 0.0).choice == CHOICES[2]  # as accurate as the last one, and quicker
    assert policy.decide([Request(11.0)] * 15, 0.0).choice == CHOICES[1]
    # A request that has no choice about it has its deadline shed, and the others go on.
    slow = policy.request(2.9, lambda choice: choice.id == 3)
    plan = policy.decide([Request(2.0), slow, Request(50.0)], 0.0)
    assert plan.shed == [1]
    assert plan.choice == CHOICES[1]


def test_a_machine_that_slows_down_is_noticed_within_50_batches() -> None:
    policy = Policy(CHOICES, TARGET, SIZES)
    plan = Plan([], CHOICES[0], 1, CHOICES[0].seconds(1))
    queue, now = [Request(14.0)], 10.0
    assert policy.decide(queue, now).choice == CHOICES[2]  # 3 seconds at the worst
    for _ in range(50):
        policy.observe(plan, 2 * plan.seconds)
    assert policy.scale == pytest.approx(2, abs=0.02)
    assert policy.factor == pytest.approx(2, abs=0.2)
    assert policy.decide(queue, now).choice == CHOICES[0]
    for _ in range(100):
        policy.observe(plan, plan.seconds)
    assert policy.decide(queue, now).choice == CHOICES[2]


def test_what_only_the_margin_puts_out_of_reach_is_still_tried() -> None:
    quick, slow = Choice("stitch", 0, 0.5, 1, 0.0, 0.010), Choice("stitch", 1, 0.9, 2, 0.0, 0.040)
    policy = Policy([quick, slow], target=0.1, batch_sizes=SIZES)
    policy.spread = 0.1  # so that 10 ms are judged as 14
    for left, choice in ((0.012, quick), (0.015, quick), (0.060, slow)):
        assert policy.decide([Request(left)], 0.0).choice == choice


def test_one_hiccup_or_an_image_that_goes_through_all_stages_is_no_slow_machine() -> None:
    policy = Policy(CHOICES, TARGET, SIZES)
    policy.observe(Plan([], CHOICES[0], 1, CHOICES[0].seconds(1)), 1000.0)
    assert policy.factor < 2
    policy = Policy(CHOICES, TARGET, SIZES)
    cascade = CHOICES[2]
    for _ in range(50):
        policy.observe(Plan([], cascade, 1, cascade.seconds(1)), cascade.bound(1))
        policy.observe(Plan([], cascade, 1, cascade.seconds(1)), cascade.seconds(1) / 2)
    assert policy.spread < 0.02
    assert policy.scale == pytest.approx(1, abs=0.05)


def test_what_asks_for_nothing_possible_is_refused() -> None:
    policy = Policy(CHOICES, TARGET, SIZES)
    with pytest.raises(ValueError, match="no choice is permitted"):
        policy.request(1.0, lambda choice: False)
    for arguments in (((), TARGET, SIZES), (CHOICES, 0.0, SIZES), (CHOICES, TARGET, (2, 4))):
        with pytest.raises(ValueError, match="a policy needs"):
            Policy(*arguments)


def test_ever_other_wishes_take_no_ever_growing_memory() -> None:
    choices = [Choice("stitch", i, 0.5 + i / 1000, i, 1.0 + i, 1.0) for i in range(400)]
    policy = Policy(choices, TARGET, SIZES)
    for number in range(400):
        assert policy.request(1.0, lambda choice, number=number: choice.id >= number).extra == number
    assert len(policy._tables) < 300
    assert policy.decide([Request(1e9)], 0.0).choice == choices[2]  # 4 of the 6 seconds, then 2 for the next request


def test_the_file_imports_no_torch() -> None:
    code = f"import runpy, sys; runpy.run_path({policy_module.__file__!r}); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_late_answers_make_it_careful_until_they_are_as_rare_as_they_shall_be() -> None:
    policy = Policy(CHOICES, TARGET)
    queue = [Request(TARGET - 1)]
    assert policy.decide(queue, 0.0).choice == CHOICES[2]
    for _ in range(200):
        policy.answered(in_time=False)
    assert policy.caution == TARGET / 2  # and no more
    assert policy.decide(queue, 0.0).choice == CHOICES[1]
    assert policy.decide([Request(1.0)], 0.0).choice == CHOICES[0]  # the fastest is in time still, so nothing is shed
    for _ in range(99):
        policy.answered(in_time=True)
    assert policy.caution < TARGET / 2
    policy.answered(in_time=False)
    assert policy.caution == pytest.approx(TARGET / 2)  # one miss in a hundred holds the balance
