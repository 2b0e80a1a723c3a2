"""Stitches trained together by the Trainer of transformers, for those who live there."""

from typing import Any

import torch
from torch import nn
from transformers import Trainer

from stitchable.training.losses import StitchLoss
from stitchable.training.sampling import StitchSampler


class StitchTrainer(Trainer):
    """A `transformers.Trainer` that draws a stitch for each optimiser step; it evaluates the model's default stitch.

    Args:
        sampler: what is drawn; of all stitches, each equally likely, if None.
        stitch_loss: of what was drawn; cross entropy, with the `label_smoothing_factor` of the arguments, if None.
        arguments: those of `transformers.Trainer`.

    Raises:
        ValueError: a sandwich on several processes, whose wrapper allows one forward pass per backward pass.
    """

    def __init__(
        self,
        *arguments: Any,
        sampler: StitchSampler | None = None,
        stitch_loss: StitchLoss | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*arguments, **options)
        model: Any = self.model
        self.sampler = sampler or StitchSampler(model.stitches, num_processes=self.args.world_size, seed=self.args.seed)
        self.stitch_loss = stitch_loss or StitchLoss(self.args.label_smoothing_factor)
        if self.args.world_size > 1 and len(self.sampler.draw(0)) > 1:
            raise ValueError("StitchTrainer runs one stitch per step on several processes; a sandwich needs train.py")
        self.model_accepts_loss_kwargs = False  # ours are means, which accumulated gradients divide once more

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The loss of what this step drew, with the outputs if asked for; in evaluation, of the default stitch."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # By the step, so that a resumed run draws what an uninterrupted one does.
        stitch_ids = self.sampler.draw(self.state.global_step, self.args.process_index)
        outputs = [model(pixel_values=inputs["pixel_values"], stitch_id=stitch_id) for stitch_id in stitch_ids]
        loss = self.stitch_loss([output.logits for output in outputs], inputs["labels"], inputs["pixel_values"])
        return (loss, outputs[0]) if return_outputs else loss
