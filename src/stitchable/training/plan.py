"""What a recipe asks for before its first image is read: processes, models of one's own, the model; checked early."""

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import DistributedType, get_cpu_distributed_information, parse_flag_from_env

import stitchable
from stitchable import Stitch, StitchableForImageClassification
from stitchable.building import names_of_classes
from stitchable.families.registry import run_modules
from stitchable.model.routes import find_stitch
from stitchable.training.augmentation import make_image_transform, make_mixup
from stitchable.training.data import make_processor
from stitchable.training.optimization import make_optimizer, make_scheduler
from stitchable.training.recipe import Recipe
from stitchable.training.sampling import StitchSampler


def start_processes() -> None:
    """Start the processes that `accelerate launch --cpu --num_processes N` was asked for, in place of this one.

    Accelerate leaves that to MPI: without it, the launcher starts a single process and says nothing. The number stands
    only on its command line.

    Raises:
        ValueError: it does not stand there either.
    """
    # MASTER_ADDR is set for several processes, WORLD_SIZE (or MPI's) by what really starts them.
    several = "MASTER_ADDR" in os.environ and get_cpu_distributed_information().world_size == 1
    if not (several and os.environ.get("ACCELERATE_USE_CPU") == "True") or "WORLD_SIZE" in os.environ:
        return
    launcher = " ".join(psutil.Process().parent().cmdline())
    match = re.search(r"--num[_-]processes[ =](\d+)", launcher)
    machines = re.search(r"--num[_-]machines[ =](\d+)", launcher)
    if match is None or (machines and int(machines[1]) > 1):
        raise ValueError("accelerate launch starts one process on a CPU; use torchrun for several, or several machines")
    del os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", match[1]]
    os.execv(sys.executable, [*torchrun, *_program(), *sys.argv[1:]])


def _program() -> list[str]:
    """What Python was told to run: a script, or a module (-m), whose folder must not come first on the path."""
    module = sys.modules["__main__"].__spec__
    return [sys.argv[0]] if module is None else ["-m", module.name.removesuffix(".__main__")]


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether a process holds only a part of the weights (FSDP)."""
    return accelerator.distributed_type == DistributedType.FSDP


def make_accelerator(
    trackers: Sequence[str] = (), folder: Path | None = None, gradient_accumulation_steps: int = 1
) -> Accelerator:
    """An Accelerator for steps that use a part of the parameters, on whatever the launcher started.

    Args:
        trackers: by Accelerate's names.
        folder: where trackers that write files do so.
        gradient_accumulation_steps: backward passes per optimiser step.

    Raises:
        ValueError: a tracker that is not installed, DeepSpeed, FSDP without a GPU, or several processes that would not
            train together.
    """
    installed = {str(tracker) for tracker in get_available_trackers()}
    for tracker in trackers:
        if tracker not in installed:
            known = ", ".join(sorted(LOGGER_TYPE_TO_CLASS))
            raise ValueError(f"the tracker {tracker!r} is not installed; Accelerate knows {known}")
    # DDP must be told that a step leaves parameters out, or it silently stops averaging gradients.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    # Without a GPU, Accelerate makes a process group of torchrun's processes only if told to stay on the CPU.
    on_cpu = num_processes > 1 and not torch.accelerator.is_available()
    accelerator = Accelerator(
        cpu=on_cpu,
        gradient_accumulation_steps=gradient_accumulation_steps,
        kwargs_handlers=[unused],
        log_with=list(trackers) or None,
        project_dir=folder,
    )
    if accelerator.num_processes != num_processes:
        raise ValueError(f"{num_processes} processes were started, but Accelerate sees {accelerator.num_processes}")
    if parse_flag_from_env("ACCELERATE_USE_FSDP") and not is_sharded(accelerator):
        raise ValueError("FSDP is asked for, but Accelerate shards weights only on GPUs; here, choose MULTI_CPU")
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise ValueError("DeepSpeed is not supported; for weights shared out over processes take FSDP")
    return accelerator


def check_plan(recipe: Recipe, accelerator: Accelerator) -> None:
    """Build the config on the meta device, to refuse what cannot be built before anything is downloaded.

    Raises:
        ValueError: names the setting.
    """
    run_modules(recipe.modules)
    config = stitchable.make_config(**_settings(recipe, recipe.data.class_names or ["?"] * 10))
    stitches = [Stitch.from_dict(stitch) for stitch in config.stitches]
    during = recipe.evaluation.during
    for name, ids in (
        ("sampling.stitches", recipe.sampling.stitches),
        ("evaluation.stitches", recipe.evaluation.stitches),
        ("evaluation.during", during if isinstance(during, list) else None),
    ):
        for stitch_id in ids or []:
            try:
                find_stitch(stitches, stitch_id)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
    if is_sharded(accelerator):
        _check_sharded(recipe)
    make_sampler(recipe, stitches, accelerator.num_processes)
    processor = make_processor(recipe.data, config)
    for name, schedule in (("pretraining", recipe.pretraining), ("training", recipe.training)):
        if schedule is None:
            continue
        micro = micro_batch_size(schedule.batch_size, accelerator, f"{name}.batch_size")
        try:
            optimizer = make_optimizer([{"params": [torch.nn.Parameter(torch.zeros(1))]}], schedule)
            make_scheduler(optimizer, schedule, steps_per_epoch=1)
            make_mixup(schedule, config.num_labels, micro)
            if not recipe.data.in_memory:
                make_image_transform(schedule.augmentation, config, processor)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


def _check_sharded(recipe: Recipe) -> None:
    schedules = {"pretraining": recipe.pretraining, "training": recipe.training}
    refused: dict[str, Any] = {
        "evaluation.every: sharded weights are measured at the end only": recipe.evaluation.every,
        "sampling.across_processes: with FSDP every process must run the same stitch": (
            recipe.sampling.across_processes != "same"
        ),
    }
    for name, schedule in schedules.items():
        if schedule:
            refused[f"{name}.ema_decay needs whole weights on every process"] = schedule.ema_decay
            refused[f"{name}.clip agc needs whole weights on every process"] = schedule.clip == "agc"
    for reason, is_asked in refused.items():
        if is_asked:
            raise ValueError(reason)


def make_sampler(recipe: Recipe, stitches: Sequence[Stitch], num_processes: int) -> StitchSampler:
    """The sampler of the joint training.

    Raises:
        ValueError: there is nothing to draw.
    """
    settings = recipe.sampling.model_dump(exclude={"stitches"})
    stitch_ids = recipe.sampling.stitches or [stitch.id for stitch in stitches]
    if recipe.training.trainable == "stitching_layers":
        # An anchor has nothing to learn then.
        stitch_ids = [i for i in stitch_ids if not find_stitch(stitches, i).is_anchor]
    return StitchSampler(stitches, stitch_ids, **settings, num_processes=num_processes, seed=recipe.seed)


def check_sizes(recipe: Recipe, num_images: int) -> None:
    """Refuse batches and samples that the training images cannot fill.

    Raises:
        ValueError: names the setting, what it is, and what is possible.
    """
    wanted: dict[str, int] = {"training.batch_size": recipe.training.batch_size}
    if recipe.pretraining:
        wanted["pretraining.batch_size"] = recipe.pretraining.batch_size
    if recipe.initialization.method == "least_squares":
        wanted["initialization.num_samples"] = recipe.initialization.num_samples
    for name, number in wanted.items():
        if number > num_images:
            raise ValueError(f"{name}={number}, but there are only {num_images} training images")


def micro_batch_size(batch_size: int, accelerator: Accelerator, name: str = "batch_size") -> int:
    """Images of one process and backward pass, of `batch_size` of an optimiser step.

    Raises:
        ValueError: they cannot be shared equally.
    """
    parts = accelerator.num_processes * accelerator.gradient_accumulation_steps
    if batch_size % parts:
        raise ValueError(
            f"{name}={batch_size} images cannot be shared equally by {accelerator.num_processes} processes with "
            f"{accelerator.gradient_accumulation_steps} accumulated gradients each; take a multiple of {parts}"
        )
    return batch_size // parts


def names_of_anchors(recipe: Recipe) -> list[str] | None:
    """What the pretrained anchors call their classes; None where they have no names, or are random."""
    return names_of_classes(_settings(recipe, [])["anchors"]) if recipe.pretrained else None


def make_model(recipe: Recipe, class_names: Sequence[str]) -> StitchableForImageClassification:
    """The stitchable model of a recipe, its anchors pretrained or random."""
    return stitchable.from_anchors(**_settings(recipe, class_names))


def _settings(recipe: Recipe, class_names: Sequence[str]) -> dict[str, Any]:
    return {
        "anchors": [anchor.model_dump(exclude_none=True) for anchor in recipe.anchors],
        "pretrained": recipe.pretrained,
        "id2label": dict(enumerate(class_names)),
        "image_size": recipe.data.image_size,
        "image_mean": recipe.data.image_mean,
        "image_std": recipe.data.image_std,
        **recipe.space.model_dump(),
    }
