"""What a run leaves on disk while it goes on, so that it can be killed at any time and resumed."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from omegaconf import OmegaConf
from safetensors import SafetensorError

from recipe import Recipe


class RunStopped(RuntimeError):
    """The run cannot or shall not go on; the message says why, and from where it can be resumed."""


class Checkpoints:
    """Numbered folders written by Accelerate: model, optimiser, scaler, random states, registered objects.

    A checkpoint is written beside its place and renamed when it is complete, and older ones are removed only then: a
    crash at any moment leaves the last good one.

    Args:
        folder: where they are.
        keep: how many of the last to keep.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def latest(self) -> Path | None:
        """The newest complete checkpoint."""
        return max(self.folder.glob("checkpoint-*[0-9]"), default=None)

    def save(self, accelerator: Accelerator, phase: int, step: int, results: Mapping[str, Any]) -> Path:
        """Write the state of everything that Accelerate knows, on all processes.

        Args:
            accelerator: whose state is written.
            phase: number of the training phase.
            step: optimiser steps that the phase has done.
            results: what was measured until now; JSON types.

        Raises:
            RunStopped: it cannot be written.
        """
        target = self.folder / f"checkpoint-{phase:02d}-{step:08d}"
        partial = self.folder / f"{target.name}.partial"
        if target.exists():
            return target
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        accelerator.wait_for_everyone()
        try:
            accelerator.save_state(str(partial))
            if accelerator.is_main_process:
                progress = {"phase": phase, "step": step, "results": results}
                (partial / "progress.json").write_text(json.dumps(progress, allow_nan=False), encoding="utf-8")
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise RunStopped(f"{target} cannot be written: {error}. {self.how_to_resume()}") from error
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            os.replace(partial, target)
            for old in sorted(self.folder.glob("checkpoint-*[0-9]"))[: -self.keep]:
                shutil.rmtree(old)
        accelerator.wait_for_everyone()
        return target

    def how_to_resume(self) -> str:
        """A sentence on the last good checkpoint."""
        latest = self.latest()
        return f"The last good checkpoint is {latest}; --resume goes on from it" if latest else "There is no checkpoint"


def read_progress(checkpoint: Path) -> dict[str, Any]:
    """Phase, step and results of a checkpoint."""
    return json.loads((checkpoint / "progress.json").read_text(encoding="utf-8"))


# What may change between the parts of a run, for it changes no weight.
_FREE = ("name", "output", "trackers", "checkpoints", "evaluation", "gradient_accumulation_steps")
_FREE += ("data.num_workers", "data.on_corrupt_image")


def check_same_recipe(recipe: Recipe) -> None:
    """Refuse to resume the run of another recipe.

    Raises:
        ValueError: the run folder has no run, or one with other settings (each is named).
    """
    path = recipe.run_folder / "recipe.yaml"
    if not path.exists():
        raise ValueError(f"there is no run to resume in {recipe.run_folder}")
    theirs, ours = flatten(OmegaConf.to_container(OmegaConf.load(path))), flatten(recipe.model_dump())
    differing = [
        f"{key} is {ours.get(key)!r}, was {theirs.get(key)!r}"
        for key in sorted({*ours, *theirs})
        if ours.get(key) != theirs.get(key) and not any(f"{key}.".startswith(f"{free}.") for free in _FREE)
    ]
    if differing:
        raise ValueError(f"{recipe.run_folder} is a run of another recipe: {'; '.join(differing)}")


def check_no_run(recipe: Recipe) -> None:
    """Refuse to begin where another run is.

    Raises:
        ValueError: the run folder holds one.
    """
    folder = recipe.run_folder
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds an unfinished or finished run; go on with --resume, or choose another output")


def write_recipe(recipe: Recipe) -> None:
    """Leave the recipe in the run folder, for `check_same_recipe`."""
    recipe.run_folder.mkdir(parents=True, exist_ok=True)
    (recipe.run_folder / "recipe.yaml").write_text(
        OmegaConf.to_yaml(OmegaConf.create(recipe.model_dump())), encoding="utf-8"
    )


def flatten(content: Any, prefix: str = "") -> dict[str, Any]:
    """Settings by their path, "training.epochs"."""
    if not isinstance(content, dict) or not content:
        return {prefix: content}
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat.update(flatten(value, f"{prefix}.{key}" if prefix else str(key)))
    return flat
