"""Stitches trained together by the Trainer of transformers, for those who live there."""

from typing import Any

import torch
from torch import nn
from transformers import Trainer

from stitchable import StitchableForImageClassification
from stitchable.fingerprints import NUM_STORED, remember
from stitchable.own import forget
from stitchable.training.fit import Stitches, keep_statistics
from stitchable.training.losses import StitchLoss
from stitchable.training.sampling import StitchSampler


class StitchTrainer(Trainer):
    """A `transformers.Trainer` that draws stitches for each optimiser step; it evaluates the model's default stitch.

    The batch norms of its anchors keep their running statistics, as those of `train` with pretrained anchors do.

    Args:
        sampler: what is drawn, if it is not simply all stitches, each equally likely.
        stitches_per_step: k stitches are drawn instead of one, and stitch j takes the images at the positions i of a
            batch with i mod k = j; for the sampler that is made here.
        anchor_probability: that an anchor is drawn, as `StitchSampler` takes it; likewise.
        own: a rank, to train only what is each stitch's own (norms behind its first joint, and updates of this rank of
            its stitching layers): the anchors are not drawn, and stay as they are to the bit.
        stitch_loss: of what was drawn; cross entropy, with the `label_smoothing_factor` of the arguments, if None.
        arguments: those of `transformers.Trainer`.

    Raises:
        ValueError: a sampler beside what is for one that is made here, `own` with an anchor_probability or with a
            stitch that has no norms behind its joint, batches that k stitches cannot share, or FSDP or DeepSpeed.
    """

    def __init__(
        self,
        *arguments: Any,
        sampler: StitchSampler | None = None,
        stitches_per_step: int | None = None,
        anchor_probability: float | None = None,
        own: int | None = None,
        stitch_loss: StitchLoss | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*arguments, **options)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError("StitchTrainer keeps all weights on every process; `stitchable train` can use FSDP")
        if sampler and (stitches_per_step or own or anchor_probability is not None):
            raise ValueError("stitches_per_step, anchor_probability and own are for a sampler that is made here")
        model: Any = self.model
        self._own = own is not None
        if own is not None:
            _train_own(model, own, anchor_probability)
        self.sampler = sampler or StitchSampler(
            [stitch for stitch in model.stitches if own is None or not stitch.is_anchor],
            stitches_per_step=stitches_per_step or 1,
            anchor_probability=anchor_probability,
            num_processes=self.args.world_size,
            seed=self.args.seed,
        )
        self.stitch_loss = stitch_loss or StitchLoss(self.args.label_smoothing_factor)
        if self.args.train_batch_size % self.sampler.stitches_per_step:
            raise ValueError(
                f"{self.sampler.stitches_per_step} stitches of a step share each batch equally, so they must divide "
                f"per_device_train_batch_size, which is {self.args.per_device_train_batch_size}"
            )
        self.model_accepts_loss_kwargs = False  # ours are means, which accumulated gradients divide once more

    def train(self, *arguments: Any, **options: Any) -> Any:
        """As in any `Trainer`; what was measured before is forgotten, and what it trains on remembered."""
        model: Any = self.model
        forget(model, [stitch.id for stitch in model.stitches if not (self._own and stitch.is_anchor)])
        rows: Any = self.train_dataset
        if hasattr(rows, "__getitem__") and len(rows) and "pixel_values" in rows[0]:
            some = (rows[number]["pixel_values"] for number in range(min(len(rows), NUM_STORED)))
            remember(model.config, [torch.stack([torch.as_tensor(x) for x in some])])
        return super().train(*arguments, **options)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The loss of what this step drew, with its logits if asked for; in evaluation, of the default stitch."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        keep_statistics(model)
        # By the step, so that a resumed run draws what an uninterrupted one does.
        stitch_ids = self.sampler.draw(self.state.global_step, self.args.process_index)
        pixel_values, labels = inputs["pixel_values"], inputs["labels"]
        if self.sampler.stitches_per_step > 1:
            # The last batch of an epoch may be smaller: what they cannot share equally is left out.
            stitch_ids = stitch_ids[: len(labels)]
            size = len(labels) - len(labels) % len(stitch_ids)
            pixel_values, labels = pixel_values[:size], labels[:size]
        logits = model(pixel_values, stitch_ids)
        loss = self.stitch_loss(logits, labels, pixel_values)
        return (loss, {"logits": logits[0]}) if return_outputs else loss

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        """All stitches of a step in one forward pass, which is what data-parallel wrappers allow per backward pass."""
        stitched: Any = model
        if training and model is self.model:
            stitched = self.accelerator.prepare(Stitches(stitched, share=self.sampler.stitches_per_step > 1))
        return super()._wrap_model(stitched, training, dataloader)


def _train_own(model: StitchableForImageClassification, rank: int, anchor_probability: float | None) -> None:
    """Give every stitch what is its own, and let gradients reach nothing else."""
    if anchor_probability is not None:
        raise ValueError("with own parameters the anchors are not trained, so they have no anchor_probability")
    for stitch in model.stitches:
        if not stitch.is_anchor:
            model.give_own(stitch.id, rank)
    model.requires_grad_(False)
    model.own.requires_grad_(True)
