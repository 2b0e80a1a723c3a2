"""Running a cascade: a cheap stitch for every image, and dearer ones for those of which it is not sure."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from transformers.modeling_outputs import ImageClassifierOutput

from .routes import Cascade, Stage


@dataclass
class CascadeOutput(ImageClassifierOutput):
    """`logits` of the stage that answered, (N,) `stitch_ids` of these stages, and (N,) `flops` of all that ran."""

    stitch_ids: torch.Tensor | None = None
    flops: torch.Tensor | None = None


def num_shared_steps(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How many steps two stitches begin with alike."""
    alike = takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))
    return sum(1 for _ in alike)


def beginnings(plans: Sequence[tuple[Any, ...]]) -> list[tuple[int, int]]:
    """For each of several sequences of steps the earlier one with which it shares most, and how many first steps."""
    found = [(0, 0)]
    for number, plan in enumerate(plans[1:], 1):
        shared = [num_shared_steps(earlier, plan) for earlier in plans[:number]]
        found.append((shared.index(max(shared)), max(shared)))
    return found


def score(logits: torch.Tensor, stage: Stage) -> torch.Tensor:
    """How sure a stage is of its images, (N, classes) to (N,): the largest probability, or its lead over the second."""
    best = (logits.float() / stage.temperature).softmax(-1).topk(2).values
    return best[:, 0] - best[:, 1] if stage.score == "margin" else best[:, 0]


def run_cascade(model: Any, pixel_values: torch.Tensor, cascade: Cascade) -> CascadeOutput:
    """Answer each image by the first stage whose score reaches its threshold.

    Only the others go on, from the features where the next stage parts from the one with which it shares most.
    """
    plans = [model.steps(stage.stitch) for stage in cascade.stages]
    begins = beginnings(plans)
    images = torch.arange(len(pixel_values), device=pixel_values.device)  # those that no stage has answered
    starts = {number: model.start(pixel_values) for number, (_, shared) in enumerate(begins) if not shared}
    stages, logits, total = torch.zeros_like(images), torch.empty(0), torch.zeros(())
    for number, (stage, plan) in enumerate(zip(cascade.stages, plans, strict=True)):
        flow = starts.pop(number)
        for done, step in enumerate(plan[begins[number][1] :], begins[number][1] + 1):
            flow = model.run_step(step, flow)
            starts |= {later: flow for later, begin in enumerate(begins) if begin == (number, done) and later > number}
        own = model.run_head(plan[-1].anchor, flow.features)
        total = total.to(own.device) + own / stage.temperature
        answer = total / (number + 1) if stage.combine == "mean" else own
        if len(images) < len(stages):
            answer = logits.index_copy(0, images.to(logits.device), answer.to(logits))
        logits, stages = answer, stages.index_fill(0, images, number)
        if stage.threshold is None:
            break
        kept = (score(own, stage) < stage.threshold).nonzero()[:, 0]
        if not len(kept):
            break
        if len(kept) < len(images):
            images, total = images[kept.to(images.device)], total[kept]
            for later, start in starts.items():
                begun = plans[later][: begins[later][1]]
                starts[later] = start.select(kept, model.chains[begun[-1].anchor].per_image if begun else False)
    output, costs = CascadeOutput(logits=logits), [stage.flops for stage in cascade.stages]
    output["stitch_ids"] = torch.tensor([stage.stitch for stage in cascade.stages], device=stages.device)[stages]
    kind = torch.float32 if stages.device.type == "mps" else torch.float64  # which Apple's GPUs lack
    output["flops"] = torch.tensor(costs, dtype=kind, device=stages.device).cumsum(0)[stages]
    return output
