"""Every stitch over one pass of the data."""

import pytest
import torch

from families import NUM_LABELS, images, make
from stitchable import evaluate
from stitchable.evaluation import run_stitches


def batches(name: str, sizes: tuple[int, ...] = (5, 3)) -> list[dict[str, torch.Tensor]]:
    x = images(name, sum(sizes))
    labels = torch.arange(sum(sizes)) % NUM_LABELS
    return [{"pixel_values": p, "labels": y} for p, y in zip(x.split(sizes), labels.split(sizes), strict=True)]


@pytest.mark.parametrize("name", ["vit", "swin", "resnet-swin"])
def test_it_equals_running_each_stitch_alone(name: str) -> None:
    model, data = make(name), batches(name)
    model.train()
    model.anchors[0].eval()  # frozen, say
    measured = evaluate(model, data)
    assert model.training
    assert not any(module.training for module in model.anchors[0].modules())
    model.eval()
    x, labels = torch.cat([b["pixel_values"] for b in data]), torch.cat([b["labels"] for b in data])
    assert list(measured) == [stitch.id for stitch in model.stitches]
    for stitch in model.stitches:
        output = model(x, labels=labels, stitch_id=stitch.id)
        assert measured[stitch.id]["accuracy"] == float((output.logits.argmax(-1) == labels).float().mean())
        assert measured[stitch.id]["loss"] == pytest.approx(float(output.loss.detach()), rel=1e-4)
        assert stitch.metrics == measured[stitch.id]


@torch.no_grad()
def test_sharing_changes_no_bit_and_runs_common_beginnings_once() -> None:
    model, x = make("vit", nearest=False), images("vit")
    ran: list[tuple] = []
    run_step = model.run_step
    model.run_step = lambda step, features: ran.append(step) or run_step(step, features)
    shared = dict(run_stitches(model, x, [stitch.id for stitch in model.stitches]))
    num_shared = len(ran)
    prefixes = {model.steps(s.id)[:n] for s in model.stitches for n in range(1, len(model.steps(s.id)) + 1)}
    assert num_shared == len(prefixes)
    for stitch in model.stitches:
        assert torch.equal(shared[stitch.id], model(x, stitch_id=stitch.id).logits)
    assert num_shared < len(ran) - num_shared


def test_some_stitches_only() -> None:
    model = make("vit")
    assert set(evaluate(model, batches("vit"), [0, 4])) == {0, 4}
    assert model.stitches[5].metrics == {}


def test_bad_input_is_named() -> None:
    model = make("vit")
    with pytest.raises(ValueError, match="the batches are empty"):
        evaluate(model, [])
    with pytest.raises(ValueError, match="stitch_id 99"):
        evaluate(model, batches("vit"), [0, 99])
