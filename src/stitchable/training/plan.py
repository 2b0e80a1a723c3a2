"""What a recipe asks for, checked before anything is downloaded: stitches to draw, batches, optimisers, the model."""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator

from stitchable import Stitch, StitchableForImageClassification, from_anchors, make_config
from stitchable.building import names_of_classes
from stitchable.families.registry import run_modules
from stitchable.model.routes import find_stitch
from stitchable.training.augmentation import make_image_transform, make_mixup
from stitchable.training.data import make_processor
from stitchable.training.optimization import make_optimizer, make_scheduler
from stitchable.training.processes import is_sharded
from stitchable.training.recipe import Recipe
from stitchable.training.sampling import StitchSampler


def check_plan(recipe: Recipe, accelerator: Accelerator) -> None:
    """Build the config on the meta device, to refuse what cannot be built before anything is downloaded."""
    run_modules(recipe.modules)
    config = make_config(**_settings(recipe, recipe.data.class_names or ["?"] * 10))
    stitches = [Stitch.from_dict(stitch) for stitch in config.stitches]
    for name in ("sampling", "evaluation"):
        for stitch_id in getattr(recipe, name).stitches or []:
            try:
                find_stitch(stitches, stitch_id)
            except ValueError as error:
                raise ValueError(f"{name}.stitches: {error}") from None
    if is_sharded(accelerator):
        _check_sharded(recipe)
    if recipe.training.trainable == "own" and accelerator.num_processes > 1:
        raise ValueError(
            f"training.trainable own: a stitch is taught by one process, and there are {accelerator.num_processes}; "
            "run one, each on stitches of its own (sampling.stitches), or stitchable.training.own.teach_stitches"
        )
    make_sampler(recipe, stitches, accelerator.num_processes)
    processor = make_processor(recipe.data, config)
    for name, schedule in recipe.schedules().items():
        micro = micro_batch_size(schedule.batch_size, accelerator, f"{name}.batch_size")
        if name == "training" and micro % recipe.sampling.stitches_per_step:
            raise ValueError(
                f"training.batch_size={schedule.batch_size} gives each process {micro} images at a time, which "
                f"sampling.stitches_per_step={recipe.sampling.stitches_per_step} does not divide"
            )
        try:
            optimizer = make_optimizer([{"params": [torch.nn.Parameter(torch.zeros(1))]}], schedule)
            make_scheduler(optimizer, schedule, steps_per_epoch=1)
            make_mixup(schedule, config.num_labels, micro)
            if not recipe.data.in_memory:
                make_image_transform(schedule.augmentation, config, processor)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


def _check_sharded(recipe: Recipe) -> None:
    if recipe.evaluation.every:
        raise ValueError("evaluation.every: sharded weights are measured at the end only")
    if recipe.sampling.across_processes != "same":
        raise ValueError("sampling.across_processes: with FSDP every process must run the same stitch")
    for name, schedule in recipe.schedules().items():
        if schedule.clip == "agc":
            raise ValueError(f"{name}.clip agc needs whole weights on every process")


def make_sampler(recipe: Recipe, stitches: Sequence[Stitch], num_processes: int) -> StitchSampler:
    """The sampler of the joint training."""
    settings = recipe.sampling.model_dump(exclude={"stitches"})
    stitch_ids = recipe.sampling.stitches or [stitch.id for stitch in stitches]
    if recipe.training.trainable != "all":
        # An anchor has nothing to learn then.
        settings["anchor_probability"] = None
        stitch_ids = [i for i in stitch_ids if not find_stitch(stitches, i).is_anchor]
    return StitchSampler(stitches, stitch_ids, **settings, num_processes=num_processes, seed=recipe.seed)


def check_sizes(recipe: Recipe, num_images: int) -> None:
    """Refuse batches and samples that the training images cannot fill."""
    wanted = {f"{name}.batch_size": schedule.batch_size for name, schedule in recipe.schedules().items()}
    if recipe.initialization.method == "least_squares":
        wanted["initialization.num_samples"] = recipe.initialization.num_samples
    for name, number in wanted.items():
        if number > num_images:
            raise ValueError(f"{name}={number}, but there are only {num_images} training images")


def micro_batch_size(batch_size: int, accelerator: Accelerator, name: str = "batch_size") -> int:
    """Images of one process and backward pass, of `batch_size` of an optimiser step; they must be equally many."""
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
    return from_anchors(**_settings(recipe, class_names))


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
