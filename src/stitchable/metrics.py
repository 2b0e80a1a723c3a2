"""Top-1, top-5 and loss of many stitches on the same samples, as a metric of Hugging Face's `evaluate`."""

from collections.abc import Sequence

import evaluate
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from datasets import Features, List, Value

IGNORED = -100
"""The label of a sample that counts in no figure (PyTorch's `ignore_index`)."""


class StitchMetric(evaluate.Metric):
    """Accuracy, top-5 accuracy and mean cross entropy per stitch.

    `add_batch(rank=..., loss=...)` takes (N, S) arrays, what `rank_and_loss` gives for N samples and S stitches;
    `compute(stitch_ids=...)`, with the ids of these stitches, returns {stitch_id: {"accuracy", "top5_accuracy",
    "loss"}}, the loss summed in float64. Nothing is loaded from the Hub; with `keep_in_memory=True` nothing is written.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Top-1 and top-5 accuracy and mean cross entropy of the stitches of one model.",
            citation="",
            inputs_description="rank: number of classes before the label's, per stitch. loss: in nats, per stitch.",
            features=Features({"rank": List(Value("int32")), "loss": List(Value("float32"))}),
        )

    def _build_data_dir(self) -> str:
        # The base class makes a folder in the user's cache even for what stays in memory.
        return "" if self.keep_in_memory else super()._build_data_dir()

    def _compute(
        self, *, rank: npt.ArrayLike, loss: npt.ArrayLike, stitch_ids: Sequence[int]
    ) -> dict[int, dict[str, float]]:
        rank_NS, loss_NS = np.asarray(rank), np.asarray(loss, dtype=np.float64)
        figures = ((rank_NS < 1).mean(0), (rank_NS < 5).mean(0), loss_NS.mean(0))
        names = ("accuracy", "top5_accuracy", "loss")
        return {
            stitch_id: dict(zip(names, map(float, row), strict=True))
            for stitch_id, row in zip(stitch_ids, np.stack(figures, axis=1), strict=True)
        }


def rank_and_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """What the metric needs of each sample.

    Args:
        logits: (N, num_labels).
        labels: (N,) class numbers; figures of samples with a label of no class mean nothing.

    Returns:
        (N, 2) in float32: the number of classes before the label's in the order of the logits, among equal logits in
        that of the classes, as `argmax` has it (where a logit is not a number, one that is never among the first
        five); the cross entropy.
    """
    logits = logits.float()
    classes = torch.arange(logits.shape[-1], device=logits.device)
    column = labels.clamp(0, logits.shape[-1] - 1)[:, None]
    own = logits.gather(1, column)
    before = (logits > own) | ((logits == own) & (classes < column))
    # No comparison with NaN is true, so such a row would otherwise count as right.
    rank = before.sum(1).where(~logits.isnan().any(1), logits.shape[-1] + 5)
    return torch.stack([rank.float(), F.cross_entropy(logits, column[:, 0], reduction="none")], dim=1)


def compute_figures(rows: torch.Tensor, stitch_ids: Sequence[int]) -> dict[int, dict[str, float]]:
    """The metric of samples (N, S, 2) as `rank_and_loss` gives them for each of S stitches."""
    rank, loss = rows.unbind(-1)
    # Not through `add_batch`: on their way to Arrow and back, all numbers become Python objects.
    return StitchMetric(keep_in_memory=True)._compute(rank=rank.numpy(), loss=loss.numpy(), stitch_ids=stitch_ids)
