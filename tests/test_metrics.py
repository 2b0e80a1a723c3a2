"""Top-1, top-5 and loss per stitch as a metric of Hugging Face's `evaluate`."""

import sys

import evaluate
import pytest
import torch
import torch.nn.functional as F

from stitchable.metrics import StitchMetric, compute_figures, rank_and_loss


def test_figures_are_those_of_topk_and_cross_entropy() -> None:
    logits = torch.randn(3, 40, 11, generator=torch.Generator().manual_seed(0))  # of three stitches
    labels = torch.arange(40) % 11
    figures = compute_figures(torch.stack([rank_and_loss(each, labels) for each in logits], dim=1), [4, 0, 9])
    assert list(figures) == [4, 0, 9]
    for each, row in zip(logits, figures.values(), strict=True):
        hits = each.topk(5).indices == labels[:, None]
        assert row["accuracy"] == float(hits[:, 0].double().mean())
        assert row["top5_accuracy"] == float(hits.any(1).double().mean())
        assert row["loss"] == pytest.approx(float(F.cross_entropy(each, labels)), rel=1e-5)


def test_batches_add_up_and_no_file_is_left(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path / "cache"))
    rows = torch.stack([torch.arange(12.0), torch.linspace(0, 3, 12)], dim=1)[:, None]
    metric = StitchMetric(keep_in_memory=True)
    for part in rows.split(5):
        metric.add_batch(rank=part[..., 0].int().numpy(), loss=part[..., 1].numpy())
    figures = metric.compute(stitch_ids=[3])
    assert figures == compute_figures(rows, [3])
    assert figures[3] == pytest.approx({"accuracy": 1 / 12, "top5_accuracy": 5 / 12, "loss": 1.5})
    assert not (tmp_path / "cache").exists()


def test_the_work_in_python_does_not_grow_with_the_samples() -> None:
    """Numbers that become Python objects, as on the way to Arrow, cost a hundred times their arithmetic."""

    def num_calls(num_samples: int) -> int:
        rows, calls = torch.zeros(num_samples, 7, 2), []
        sys.setprofile(lambda *event: calls.append(event[1]))
        try:
            compute_figures(rows, range(7))
        finally:
            sys.setprofile(None)
        return len(calls)

    num_calls(2)  # imports
    assert num_calls(5000) == num_calls(50)


def test_it_combines_with_other_metrics() -> None:
    rows = torch.rand(6, 2, 2)
    rank, loss = rows.unbind(-1)
    both = evaluate.combine({name: StitchMetric(keep_in_memory=True) for name in ("first", "second")})
    both.add_batch(rank=rank.int().numpy(), loss=loss.numpy())
    figures = compute_figures(rows, [3, 4])
    named = {f"{name}_{stitch_id}": figures[stitch_id] for name in ("first", "second") for stitch_id in (3, 4)}
    assert both.compute(stitch_ids=[3, 4]) == named


def test_losses_are_summed_in_double_precision() -> None:
    loss = torch.cat([torch.tensor([1e8]), torch.full((1000,), 0.5)])
    rows = torch.stack([torch.zeros_like(loss), loss], dim=1)[:, None]
    assert compute_figures(rows, [7])[7]["loss"] == pytest.approx((1e8 + 500) / 1001, rel=1e-12)


def test_ranks_are_those_of_a_sorted_list() -> None:
    logits = torch.randn(200, 9, generator=torch.Generator().manual_seed(0)).round(decimals=0)  # with many ties
    labels = torch.arange(200) % 9
    rank, loss = rank_and_loss(logits, labels).unbind(1)
    order = logits.sort(dim=1, descending=True, stable=True).indices
    assert torch.equal(rank.long(), (order == labels[:, None]).int().argmax(1))
    assert torch.equal(rank == 0, logits.argmax(1) == labels)
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels, reduction="none"))


def test_a_logit_that_is_not_a_number_is_never_right() -> None:
    logits = torch.tensor([[torch.nan, 0.0, 1.0], [torch.nan] * 3, [3.0, 0.0, 0.0]])
    both = torch.stack([rank_and_loss(each, torch.tensor([2, 0, 0])) for each in (logits, logits.nan_to_num())], dim=1)
    figures = compute_figures(both, [0, 1])
    assert figures[0]["accuracy"] == figures[0]["top5_accuracy"] == pytest.approx(1 / 3)
    assert figures[0]["loss"] != figures[0]["loss"]
    assert figures[1]["top5_accuracy"] == 1
    assert figures[1]["loss"] == figures[1]["loss"]
