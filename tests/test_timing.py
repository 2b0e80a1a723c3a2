"""The timer, images per second and seconds of a call of every stitch."""

import time

import pytest
import torch

from families import make
from stitchable import StitchableForImageClassification, measure_throughput
from stitchable.timing import Clock, measure_latencies


def test_rates_join_the_stitch_table_and_say_where_they_are_from(tmp_path) -> None:
    model = make("vit").train()
    model.record(0, metrics={"accuracy": 0.5})
    ran = []
    forward = model.forward
    model.forward = lambda x, stitch_id: (
        ran.append((tuple(x.shape), stitch_id, model.training)) or forward(x, stitch_id=stitch_id)
    )
    rates = measure_throughput(model, [0, 4], batch_size=3, num_runs=5, num_warmup_runs=2)
    del model.forward
    assert ran == [((3, 3, 32, 32), i, False) for i in (0, 4) for _ in range(7)]
    assert model.training
    assert all(rate > 0 for rate in rates.values())
    assert model.stitches[0].metrics == {"accuracy": 0.5, "images_per_second": rates[0]}
    assert model.stitches[5].metrics == {}
    model.save_pretrained(tmp_path)
    loaded = StitchableForImageClassification.from_pretrained(tmp_path)
    assert loaded.config.throughput == model.config.throughput
    assert loaded.config.throughput["batch_size"] == 3
    assert loaded.config.throughput["threads"] == torch.get_num_threads()
    assert loaded.for_budget(1e12, metric="images_per_second").id == max(rates, key=rates.__getitem__)


def test_rates_of_other_circumstances_do_not_stay_beside_new_ones() -> None:
    model = make("vit")
    model.record(5, metrics={"accuracy": 0.5})
    measure_throughput(model, [0, 5], batch_size=2, num_runs=1)
    first = model.stitches[5].metrics
    assert set(first) == {"accuracy", "images_per_second"}
    measure_throughput(model, [0], batch_size=2, num_runs=1)
    assert model.stitches[5].metrics == first
    measure_throughput(model, [0], batch_size=3, num_runs=1)
    assert model.stitches[5].metrics == {"accuracy": 0.5}
    assert model.config.throughput["batch_size"] == 3


def test_measuring_leaves_no_trace_in_random_draws_and_gradients() -> None:
    """LeViT of timm keeps its attention biases in evaluation mode; those of inference mode would get no gradient."""
    model = make("levit")
    state = torch.get_rng_state()
    measure_throughput(model, [0], batch_size=2, num_runs=1)
    assert torch.equal(torch.get_rng_state(), state)
    model(torch.zeros(2, 3, 64, 64), labels=torch.tensor([0, 1]), stitch_id=0).loss.backward()
    biases = [p for name, p in model.anchors[0].named_parameters() if name.endswith("attention_biases")]
    assert biases
    assert all(bias.grad is not None for bias in biases)


def test_a_stitch_of_twice_the_work_is_slower() -> None:
    """By far: an order that no noise of a shared machine turns round."""
    model = make("vit")
    small, large = (measure_throughput(model, [0], batch_size=size, num_runs=10)[0] / size for size in (1, 256))
    assert large < small  # batches per second


def test_calls_are_measured_in_turn_each_after_one_of_its_kind() -> None:
    model, ran = make("vit").train(), []
    forward = model.forward

    def slow(x: torch.Tensor, stitch_id: int):
        ran.append((tuple(x.shape), stitch_id, model.training))
        time.sleep(0.03 * stitch_id)
        return forward(x, stitch_id=stitch_id)

    model.forward = slow
    measured = measure_latencies(model, [0, 1], batch_size=2, num_runs=2)
    del model.forward
    assert ran == [((2, 3, 32, 32), stitch_id, False) for stitch_id in (0, 0, 1, 1)] * 2
    assert list(measured) == [0, 1]
    assert measured[1] >= 0.03
    assert model.training


def test_bad_input_is_named() -> None:
    model = make("vit")
    with pytest.raises(ValueError, match="stitch_id 99"):
        measure_throughput(model, [99])
    with pytest.raises(ValueError, match="at least 0, got 0, 30 and 3"):
        measure_throughput(model, batch_size=0)
    with pytest.raises(ValueError, match="at least 0, got 64, 30 and -1"):
        measure_throughput(model, num_warmup_runs=-1)


def test_a_clock_times_pieces_apart_and_gives_what_they_return() -> None:
    clock = Clock(torch.device("cpu"))
    assert [clock.time(lambda: time.sleep(0.02) or 7), clock.time(lambda: 8)] == [7, 8]
    slow, quick = clock.seconds()
    assert quick < 0.02 <= slow
