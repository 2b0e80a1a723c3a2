"""Running a cascade: a cheap stitch for every image, and dearer ones for those of which it is not sure."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_outputs import ImageClassifierOutput

from .routes import Cascade, Stage


@dataclass
class CascadeOutput(ImageClassifierOutput):
    """`logits` of the stage that answered, (N,) `stitch_ids` of these stages, and (N,) `flops` of all that ran."""

    stitch_ids: torch.Tensor | None = None
    flops: torch.Tensor | None = None


def beginnings(plans: Sequence[tuple[Any, ...]]) -> list[tuple[int, int]]:
    """For each of several sequences of steps the earlier one with which it shares most, and how many first steps."""
    found = [(0, 0)]
    for number, plan in enumerate(plans[1:], 1):
        shared = []
        for earlier in plans[:number]:
            differing = [i for i, (a, b) in enumerate(zip(earlier, plan, strict=False)) if a != b]
            shared.append(differing[0] if differing else min(len(earlier), len(plan)))
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
    answers: list[Any] = []  # of each stage: the images it was given, its logits, which of them it answers
    total: Any = 0
    for number, (stage, plan) in enumerate(zip(cascade.stages, plans, strict=True)):
        flow = starts.pop(number)
        for done, step in enumerate(plan[begins[number][1] :], begins[number][1] + 1):
            flow = model.run_step(step, flow)
            starts |= {later: flow for later, begin in enumerate(begins) if begin == (number, done) and later > number}
        own = model.run_head(plan[-1].anchor, flow.features)
        total = total + own / stage.temperature
        logits = total / (number + 1) if stage.combine == "mean" else own
        go_on = score(own, stage) < (0 if stage.threshold is None else stage.threshold)  # no score is below 0
        answers.append((images[~go_on.to(images.device)], logits[~go_on], number))
        kept = go_on.nonzero()[:, 0]
        if not len(kept):
            break
        images, total = images[kept.to(images.device)], total[kept]
        for later, start in starts.items():
            begun = plans[later][: begins[later][1]]
            starts[later] = start.select(kept, model.chains[begun[-1].anchor].context if begun else None)
    output = CascadeOutput()
    order = torch.cat([images for images, _, _ in answers]).argsort()
    stages = torch.cat([images * 0 + number for images, _, number in answers])[order]
    costs = torch.tensor([stage.flops for stage in cascade.stages], dtype=torch.float64).cumsum(0)
    ids = torch.tensor([stage.stitch for stage in cascade.stages])
    output["logits"] = torch.cat([logits.to(answers[0][1].dtype) for _, logits, _ in answers])[order.to(own.device)]
    output["stitch_ids"], output["flops"] = ids.to(order.device)[stages], costs.to(order.device)[stages]
    return output
