"""Latency of cascades, predicted from that of their stages and the part of the images that reach each."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch

from stitchable.evaluation import evaluation_mode
from stitchable.model.cascades import beginnings, run_cascade, score
from stitchable.model.modeling_stitchable import Step, StitchablePreTrainedModel
from stitchable.model.routes import Cascade
from stitchable.timing import random_pixel_values, seconds_of

Lines = Sequence[Sequence[float]]
"""Of each stage [a, b]: it takes a + b n milliseconds where n of the images of a call reach it."""

_TEMPERATURE = 100.0
"""At which no score is 1, so that a threshold of 1 sends every image on."""


def steps_of_stages(model: StitchablePreTrainedModel, cascade: Cascade) -> list[tuple[Step, ...]]:
    """What each stage runs: its stitch, from where it parts from an earlier one; timed as those of the anchors are."""
    plans = [model.steps(stage.stitch) for stage in cascade.stages]
    return [
        tuple(step._replace(own=-1) for step in plan[shared:])
        for plan, (_, shared) in zip(plans, beginnings(plans), strict=True)
    ]


def mean_latency(cascade: Cascade, lines: Lines, batch_size: int) -> float:
    """Milliseconds of a call with n images on average: of each stage a (1 - (1 - r)^n) + b r n, with r who reach it."""
    stages = zip(cascade.stages, lines, strict=True)
    return sum(a * (1 - (1 - stage.reached) ** batch_size) + b * stage.reached * batch_size for stage, (a, b) in stages)


def latency_p95(cascade: Cascade, lines: Lines) -> float:
    """Milliseconds within which 95 % of the calls with one image are answered."""
    total, goes_on = 0.0, [stage.reached for stage in cascade.stages[1:]] + [0.0]
    for (a, b), part in zip(lines, goes_on, strict=True):
        total += a + b
        if part <= 0.05:
            break
    return total


def verify_cascades(
    model: StitchablePreTrainedModel,
    cascades: Sequence[Cascade],
    lines: Mapping[int, Lines],
    *,
    batch_size: int,
    num_runs: int,
) -> dict[str, list[float]]:
    """Measure calls of cascades in which so many images reach each stage as do on average.

    A call with one image is measured once for each stage that may answer it, and these are weighted; of a call with
    more, each stage gets its part of them, to a whole image.

    Returns:
        By id [predicted, measured] milliseconds of these calls.
    """
    pixel_values, verified = random_pixel_values(model, batch_size), {}
    with torch.inference_mode(), evaluation_mode(model):
        for cascade in cascades:
            sums = [0.0, 0.0]
            for weight, counts in _calls(cascade, batch_size):
                stages = zip(lines[cascade.id], counts, strict=True)
                predicted = sum(a + b * number for (a, b), number in stages if number)
                forced = send_on(model, cascade, pixel_values, counts)
                call = partial(run_cascade, model, pixel_values, forced)
                call()
                seconds = [seconds_of(call, model.device) for _ in range(num_runs)]
                for place, milliseconds in enumerate((predicted, 1e3 * statistics.median(seconds))):
                    sums[place] += weight * milliseconds
            verified[str(cascade.id)] = [round(milliseconds, 4) for milliseconds in sums]
    return verified


def _calls(cascade: Cascade, batch_size: int) -> list[tuple[float, list[int]]]:
    """Kinds of calls, the part of each, and how many images reach each stage in it."""
    reached = [stage.reached for stage in cascade.stages]
    if batch_size > 1:
        return [(1.0, [round(batch_size * part) for part in reached])]
    stops = [here - after for here, after in zip(reached, [*reached[1:], 0.0], strict=True)]
    return [(part, [1] * (1 + at) + [0] * (len(stops) - 1 - at)) for at, part in enumerate(stops)]


def send_on(model: StitchablePreTrainedModel, cascade: Cascade, images: torch.Tensor, counts: Sequence[int]) -> Cascade:
    """The same, but with thresholds at which so many of these images reach each stage, and so take part in it."""
    stages = []
    for stage, here, after in zip(cascade.stages[:-1], counts, counts[1:], strict=False):
        threshold = 1.0 if after == here else 0.0
        decides = replace(stage, temperature=_TEMPERATURE, threshold=threshold)
        if 0 < after < here:
            features, anchor = model.run_features(images, stage.stitch)
            scores = score(model.run_head(anchor, features), decides)
            threshold = float(scores.sort().values[after])
            decides, images = replace(decides, threshold=threshold), images[scores.to(images.device) < threshold]
        stages.append(decides)
    return replace(cascade, stages=(*stages, cascade.stages[-1]))
