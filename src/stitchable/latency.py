"""Latency and memory of every stitch, predicted: each block of each anchor is timed once, and routes are added up.

So is the latency of the cascades, of their stages and the part of the images that reach each.
"""

import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.utils import logging

from stitchable.cascade_latency import latency_p95, mean_latency, send_on, steps_of_stages, verify_cascades
from stitchable.evaluation import evaluation_mode
from stitchable.model.cascades import run_cascade
from stitchable.model.chain import Flow, Part
from stitchable.model.modeling_stitchable import Step, StitchablePreTrainedModel
from stitchable.model.routes import Choice
from stitchable.timing import Clock, describe_device, measure_latencies, random_pixel_values, seconds_of

C = TypeVar("C", bound=Choice)


def calibrate(
    model: StitchablePreTrainedModel,
    *,
    batch_sizes: Sequence[int] = (1,),
    num_runs: int = 20,
    num_warmup_runs: int = 3,
    num_verified: int = 5,
) -> dict[str, Any]:
    """Predict the latency and the memory of every stitch on this device, so that they can be budgets.

    Every block of every anchor is timed where it runs, inside its anchor, and one stitching layer of each shape alone.
    The latency of a stitch is the sum over its route, plus what a call costs beyond its steps. The time that this takes
    grows with the number of blocks, not of stitches. A few stitches are then measured to tell how far off the sums are.

    `latency_ms` (milliseconds per call) and `memory_mb` (10^6 bytes: the weights of the stitch alone, and the largest
    sum of tensors alive at a time, without what kernels use inside) go into the stitch table; what they hold for, and
    the errors, into `config.latency`. Of several batch sizes, a line is fitted to the latencies of each stitch, for
    whoever has to choose the batch too: a call with n images takes a + b n milliseconds.

    The latency of a cascade is a mean: its stages have such lines too (of one batch size, through 0), and a call with n
    images takes the sum of a (1 - (1 - r)^n) + b r n over them, r being the part of the images that reach a stage. For
    one image `latency_p95_ms` says besides within which time 95 % of the calls are answered.

    Args:
        model: as it will run: device, data type, number of threads, compiled blocks or not.
        batch_sizes: images per call; `latency_ms`, `memory_mb` and the errors are those of the first.
        num_runs: timed rounds, of which the median is taken.
        num_warmup_runs: rounds before them that are not timed.
        num_verified: stitches, and as many cascades, that are measured as a whole, evenly over the FLOPs.

    Returns:
        What `config.latency` holds: "device", "threads", "dtype", "torch", "batch_size" (the first), "compiled",
        "num_runs", "median_error" and "max_error" (parts of the measured latency), "verified" {id: [predicted,
        measured] in ms}; of several batch sizes also "by_batch": {"batch_sizes": [...], "milliseconds": {id: [a, b]},
        "max_error": how far a line is from a latency that it was fitted to, as a part of this}. Where there are
        cascades, "cascades": {"median_error", "max_error", "verified" as of stitches, "stages": {id: [[r, a, b]]}}.

    Raises:
        ValueError: a number that is too small, no batch size, or one twice.
    """
    if min(*batch_sizes, 1, num_runs) < 1 or min(num_warmup_runs, num_verified) < 0:
        raise ValueError(
            "batch_sizes and num_runs must be at least 1, num_warmup_runs and num_verified at least 0, got "
            f"{list(batch_sizes)}, {num_runs}, {num_warmup_runs} and {num_verified}"
        )
    if not batch_sizes or len(set(batch_sizes)) < len(batch_sizes):
        raise ValueError(f"batch_sizes must be different numbers of images, at least one, got {list(batch_sizes)}")
    latencies, stages = {}, {}
    for size in batch_sizes:
        latencies[size], stages[size] = _predict(model, size, num_runs, num_warmup_runs, size == batch_sizes[0])
    model.config.latency = {
        **describe_device(model),
        "batch_size": batch_sizes[0],
        "compiled": any(getattr(module, "_compiled_call_impl", None) for module in model.modules()),
        "num_runs": num_runs,
        **_verify(model, batch_sizes[0], num_runs, num_verified),
        **({"by_batch": _fit_lines(latencies)} if len(batch_sizes) > 1 else {}),
        **({"cascades": _of_cascades(model, stages, num_runs, num_verified)} if model.cascades else {}),
    }
    return model.config.latency


def _predict(
    model: StitchablePreTrainedModel, batch_size: int, num_runs: int, num_warmup_runs: int, is_recorded: bool
) -> tuple[dict[int, float], dict[str, float]]:
    """Milliseconds of a call of each stitch by id, and of each stage by "CASCADE.STAGE"; records those of stitches."""
    with torch.inference_mode(), evaluation_mode(model):
        steps = _Measured(model, batch_size)
        steps.time(num_runs, num_warmup_runs)
        if is_recorded:
            steps.watch()
    latencies = {stitch.id: steps.milliseconds_of(stitch.id) for stitch in model.stitches}
    for stitch_id, latency in latencies.items() if is_recorded else ():
        model.record(stitch_id, latency_ms=round(latency, 4), memory_mb=round(steps.megabytes_of(stitch_id), 3))
    stages = {
        f"{cascade.id}.{place}": 1e3 * (steps.seconds_of_stage + sum(steps.seconds[step] for step in plan))
        for cascade in model.cascades
        for place, plan in enumerate(steps_of_stages(model, cascade))
    }
    return latencies, stages


def _verify(model: StitchablePreTrainedModel, batch_size: int, num_runs: int, number: int) -> dict[str, Any]:
    """Measure some stitches as a whole, and tell how far the predictions in the table are from that."""
    chosen = [stitch.id for stitch in _spread([stitch for stitch in model.stitches if not stitch.is_anchor], number)]
    measured = measure_latencies(model, chosen, batch_size=batch_size, num_runs=num_runs)
    verified = {
        str(stitch.id): [stitch.latency_ms or 0.0, round(1e3 * measured[stitch.id], 4)]
        for stitch in model.stitches
        if stitch.id in measured
    }
    return _errors(verified)


def _errors(verified: dict[str, list[float]]) -> dict[str, Any]:
    errors = [abs(predicted / actual - 1) for predicted, actual in verified.values()]
    return {
        "median_error": round(statistics.median(errors), 4) if errors else None,
        "max_error": round(max(errors), 4) if errors else None,
        "verified": verified,
    }


def _of_cascades(
    model: StitchablePreTrainedModel, stages: Mapping[int, Mapping[str, float]], num_runs: int, num_verified: int
) -> dict[str, Any]:
    """Predict the latency of every cascade, write it into its entry, and measure a few."""
    batch_size, *others = stages
    if others:
        fitted = _fit_lines(stages)["milliseconds"]
    else:
        fitted = {name: [0.0, round(milliseconds / batch_size, 4)] for name, milliseconds in stages[batch_size].items()}
    lines = {x.id: [fitted[f"{x.id}.{place}"] for place in range(len(x.stages))] for x in model.cascades}
    known = {
        x.id: {"latency_ms": round(mean_latency(x, lines[x.id], batch_size), 4)}
        | ({"latency_p95_ms": round(latency_p95(x, lines[x.id]), 4)} if batch_size == 1 else {})
        for x in model.cascades
    }
    earlier = [{key: value for key, value in x.items() if key not in _LATENCIES} for x in model.config.cascades]
    model.cascades = [{**entry, **known.get(entry["id"], {})} for entry in earlier]
    chosen = _spread(model.cascades, num_verified)
    return {
        **_errors(verify_cascades(model, chosen, lines, batch_size=batch_size, num_runs=num_runs)),
        "stages": {
            str(x.id): [[stage.reached, *line] for stage, line in zip(x.stages, lines[x.id], strict=True)]
            for x in model.cascades
        },
    }


_LATENCIES = ("latency_ms", "latency_p95_ms")


def _fit_lines(latencies: Mapping[int, Mapping[Any, float]]) -> dict[str, Any]:
    """Lines a + b n through milliseconds by batch size and name, by least squares of the relative errors."""
    sizes = np.array(list(latencies), dtype=np.float64)
    lines, errors = {}, []
    for name in latencies[next(iter(latencies))]:
        milliseconds = np.array([latency[name] for latency in latencies.values()])
        design = np.stack([np.ones_like(sizes), sizes], axis=1) / milliseconds[:, None]
        a, b = np.linalg.lstsq(design, np.ones_like(sizes), rcond=None)[0]
        if a < 0 or b < 0:  # by noise: of the two lines with one of them zero, the better
            alone = [design[:, [column]] for column in (0, 1)]
            fits = [np.linalg.lstsq(each, np.ones_like(sizes), rcond=None) for each in alone]
            a, b = (fits[0][0][0], 0.0) if fits[0][1][0] < fits[1][1][0] else (0.0, fits[1][0][0])
        lines[str(name)] = [round(float(a), 4), round(float(b), 4)]
        errors.append(np.abs((a + b * sizes) / milliseconds - 1).max())
    return {"batch_sizes": list(latencies), "milliseconds": lines, "max_error": round(float(max(errors)), 4)}


@dataclass(frozen=True)
class _TimedStep:
    """A step as it is run alone: its function, and its input unless that is what the step before it returned."""

    step: Step
    run: Callable[[Flow], Flow]
    input: Flow | None = None


@dataclass
class _Measured:
    """The steps of all stitches of a model, and what each costs.

    Attributes:
        seconds: of each step.
        seconds_of_call: what a call costs beyond its steps.
        seconds_of_stage: what each stage of a cascade costs beyond its steps.
        activations: bytes of the tensors that are alive at the same time while a step runs, its input included.
        weights: bytes of each step's parameters and buffers.
    """

    model: StitchablePreTrainedModel
    batch_size: int
    seconds: dict[Step, float] = field(default_factory=dict)
    seconds_of_call: float = 0.0
    seconds_of_stage: float = 0.0
    activations: dict[Step, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.pixel_values = random_pixel_values(self.model, self.batch_size)
        self.shapes = self.model.shapes
        self.chains = [self._steps_of_anchor(anchor) for anchor in self.model.chains]
        joints = [joint for stitch in self.model.stitches for joint in stitch.joints]
        # By name: a layer is shared by all positions of its window.
        self.layers = {
            joint.layer: (Step("layer", joint.back, layer=joint.layer), joint.front, joint.stop) for joint in joints
        }
        self.weights = self._weigh()

    def milliseconds_of(self, stitch_id: int) -> float:
        """Of a call of a stitch, once `time` has run."""
        return 1e3 * (self.seconds_of_call + sum(self.seconds[step] for step in self._steps_of(stitch_id)))

    def megabytes_of(self, stitch_id: int) -> float:
        """Peak of memory of a call of a stitch, once `watch` has run."""
        steps = self._steps_of(stitch_id)
        weights = sum(self.weights[step] for step in set(steps))
        return (max(self.activations[step] for step in steps) + weights) / 1e6

    def _steps_of(self, stitch_id: int) -> list[Step]:
        """With the parameters of the anchors, in the place of those of its own: they take as long."""
        return [step._replace(own=-1) for step in self.model.steps(stitch_id)]

    def time(self, num_runs: int, num_warmup_runs: int) -> None:
        """Fill `seconds`, `seconds_of_call` and `seconds_of_stage`, by medians over rounds through everything."""
        anchors = [stitch for stitch in self.model.stitches if stitch.is_anchor]
        kinds = self._kinds_of_layers()
        chains = [*self.chains, *([self._step_of_layer(names[0])] for names in kinds.values())]
        rounds: dict[Step, list[float]] = {timed.step: [] for chain in chains for timed in chain}
        beyond: list[float] = []
        of_cascade: list[float] = []
        cascades = [
            send_on(self.model, cascade, self.pixel_values, [self.batch_size] * len(cascade.stages))
            for cascade in self.model.cascades[:1]
        ]
        total = num_warmup_runs + num_runs
        for number in logging.tqdm(range(total), desc="timing the blocks of each anchor", leave=False):
            now: dict[Step, float] = {}
            for chain in chains:
                self._time_chain(chain)  # so that its weights are where they are when one stitch runs again and again
                now |= self._time_chain(chain)
            if number < num_warmup_runs:
                continue
            for step, seconds in now.items():
                rounds[step].append(seconds)
            for stitch in anchors:
                call = partial(self.model, self.pixel_values, stitch_id=stitch.id)
                beyond.append(
                    seconds_of(call, self.model.device) - sum(now[step] for step in self.model.steps(stitch.id))
                )
            for cascade in cascades:
                of_cascade.append(
                    seconds_of(partial(run_cascade, self.model, self.pixel_values, cascade), self.model.device)
                )
        self.seconds = {step: statistics.median(seconds) for step, seconds in rounds.items()}
        for names in kinds.values():
            self.seconds |= {self.layers[name][0]: self.seconds[self.layers[names[0]][0]] for name in names}
        self.seconds_of_call = max(0.0, statistics.median(beyond)) if beyond else 0.0
        for cascade in cascades:
            of_steps = sum(self.seconds[step] for plan in steps_of_stages(self.model, cascade) for step in plan)
            self.seconds_of_stage = max(0.0, statistics.median(of_cascade) - of_steps) / len(cascade.stages)

    def watch(self) -> None:
        """Fill `activations`."""
        weights = {tensor.untyped_storage()._cdata for tensor in self.model.state_dict().values()}
        for chain in [*self.chains, *([self._step_of_layer(name)] for name in self.layers)]:
            flow: Flow | None = None
            for timed in chain:
                flow = timed.input or flow
                assert flow is not None  # the first step has an input
                with _LiveBytes(weights) as live:
                    output = timed.run(flow)
                held = [held for held in tree_leaves((flow.features, flow.context)) if isinstance(held, torch.Tensor)]
                self.activations[timed.step] = live.peak + sum(tensor.nbytes for tensor in held)
                flow = output

    def _time_chain(self, chain: Sequence[_TimedStep]) -> dict[Step, float]:
        """Seconds of each step of one run."""
        clock = Clock(self.model.device)
        flow: Flow | None = None
        for timed in chain:
            flow = timed.input or flow
            assert flow is not None  # the first step has an input
            flow = clock.time(partial(timed.run, flow))
        return dict(zip((timed.step for timed in chain), clock.seconds(), strict=True))

    def _steps_of_anchor(self, anchor: int) -> list[_TimedStep]:
        """The steps of an anchor that this model holds, in order."""
        model, held = self.model, self.model.parts[anchor]
        steps, reached = [], -1  # the cut that the step before leads to
        if "stem" in held:
            step = Step("stem", anchor)
            steps.append(_TimedStep(step, partial(model.run_step, step), model.start(self.pixel_values)))
            reached = 0
        for block in sorted(part for part in held if isinstance(part, int)):
            step = Step("block", anchor, block)
            flow = None if reached == block else self._flow(anchor, block)
            steps.append(_TimedStep(step, partial(model.run_step, step), flow))
            reached = block + 1
        depth = self.shapes[anchor].depth
        last_steps = {self._steps_of(stitch.id)[-1] for stitch in model.stitches}
        for step in sorted(step for step in last_steps if step.anchor == anchor):
            flow = None if reached == depth else self._flow(anchor, depth)
            steps.append(_TimedStep(step, partial(self._run_to_logits, step), flow))
            reached = -1
        return steps

    def _run_to_logits(self, step: Step, flow: Flow) -> Flow:
        """The last step and the head, taken as one: wherever the one runs, the other follows."""
        flow = self.model.run_step(step, flow)
        return flow._replace(features=self.model.run_head(step.anchor, flow.features))

    def _step_of_layer(self, name: str) -> _TimedStep:
        step, anchor, stop = self.layers[name]
        return _TimedStep(step, partial(self.model.run_step, step), self._flow(anchor, stop))

    def _kinds_of_layers(self) -> dict[tuple, list[str]]:
        """Names of the stitching layers that do the same work, by what they map from and to."""
        kinds: dict[tuple, list[str]] = {}
        for name, (step, anchor, _) in self.layers.items():
            arguments = self.model.get_stitching_layer(name).arguments
            kinds.setdefault((anchor, step.anchor, arguments), []).append(name)
        return kinds

    def _flow(self, anchor: int, cut: int) -> Flow:
        """Zeros in the shape of what flows through a cut of an anchor, and the context that its blocks need."""
        shape = self.shapes[anchor]
        channels, height, width = shape.cuts[cut]
        size = {
            "NCHW": (channels, height, width),
            "NHWC": (height, width, channels),
            "NLC": (shape.prefix_tokens + height * width, channels),
            "UNITS": (height * width, channels),
        }[shape.layout]
        features = torch.zeros(self.batch_size, *size, device=self.model.device, dtype=self.model.dtype)
        chain, pixel_values = self.model.chains[anchor], self.model.start(self.pixel_values).pixel_values
        return chain.enter(self.model.anchors[anchor], features, pixel_values, (height, width))

    def _weigh(self) -> dict[Step, int]:
        weights = {timed.step: 0 for chain in self.chains for timed in chain}
        entered: dict[tuple[int, Part], int] = {}  # what an anchor needs beside its blocks where a stitch enters it
        for anchor, chain in self.model.chains.items():
            for name, tensor in _tensors(self.model.anchors[anchor]):
                part = chain.part_of(name)
                steps = [Step("block", anchor, part)] if isinstance(part, int) else []
                steps += [Step(kind, anchor) for kind in _STEPS_OF_PART.get(part, ())]
                for step in set(steps) & set(weights):
                    weights[step] += tensor.nbytes
                entered[anchor, part] = entered.get((anchor, part), 0) + tensor.nbytes
        for name, (step, _, _) in self.layers.items():
            layer = self.model.get_stitching_layer(name)
            weights[step] = sum(tensor.nbytes for _, tensor in _tensors(layer))
            weights[step] += entered.get((step.anchor, "context"), 0)
            weights[step] += entered.get((step.anchor, "prefix"), 0) if layer.needs_own_prefix else 0
        return weights


_STEPS_OF_PART: dict[Part, tuple[str, ...]] = {
    "stem": ("stem",),
    "prefix": ("stem",),
    "context": ("stem",),
    "head": ("neck", "bare"),
}


class _LiveBytes(TorchDispatchMode):
    """The largest sum of bytes of the tensors made inside that are alive at the same time."""

    def __init__(self, known: Collection[int]) -> None:
        super().__init__()
        self.peak = 0
        self._known = known  # storages that are there anyway, of which views are taken
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        output = func(*args, **(kwargs or {}))
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self._known:
                storage = tensor.untyped_storage()
                self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return output


def _tensors(module: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


def _spread(choices: Sequence[C], number: int) -> list[C]:
    """So many stitches or cascades, evenly over their FLOPs."""
    by_flops = sorted(choices, key=lambda choice: choice.flops or 0)
    if number >= len(by_flops):
        return by_flops
    return [by_flops[(2 * index + 1) * len(by_flops) // (2 * number)] for index in range(number)]
