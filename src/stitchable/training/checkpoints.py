"""What a run leaves on disk while it goes on, so that it can be killed at any time and resumed."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from omegaconf import OmegaConf
from safetensors import SafetensorError

from stitchable.training.agreement import RunStopped, all_or_none
from stitchable.training.recipe import Recipe


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
        """Write the state of everything that Accelerate knows, on all processes, if the main one has not done so.

        Args:
            accelerator: whose state is written.
            phase: number of the training phase.
            step: optimiser steps that the phase has done.
            results: what was measured until now; JSON types.

        Raises:
            RunStopped: it cannot be written, by one of the processes; on all of them.
        """
        target = self.folder / f"checkpoint-{phase:02d}-{step:08d}"
        partial = self.folder / f"{target.name}.partial"
        (is_there,) = broadcast_object_list([target.exists()])  # as the main process sees it
        if is_there:
            return target
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        accelerator.wait_for_everyone()
        try:
            with all_or_none():
                accelerator.save_state(str(partial))
                if accelerator.is_main_process:
                    processes = accelerator.num_processes
                    progress = {"phase": phase, "step": step, "num_processes": processes, "results": results}
                    (partial / "progress.json").write_text(json.dumps(progress, allow_nan=False), encoding="utf-8")
            with all_or_none():
                if accelerator.is_main_process:
                    os.replace(partial, target)
                    for old in sorted(self.folder.glob("checkpoint-*[0-9]"))[: -self.keep]:
                        shutil.rmtree(old)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise RunStopped(f"{target} cannot be written: {error}. {self.how_to_resume()}") from error
        return target

    def how_to_resume(self) -> str:
        """A sentence on the last good checkpoint."""
        latest = self.latest()
        return f"The last good checkpoint is {latest}; --resume goes on from it" if latest else "There is no checkpoint"


def read_progress(checkpoint: Path) -> dict[str, Any]:
    """Phase, step, number of processes and results of a checkpoint."""
    return json.loads((checkpoint / "progress.json").read_text(encoding="utf-8"))


# What may change between the parts of a run, for the same stitches go on with the same images.
_FREE = [
    *("name", "output", "trackers", "checkpoints", "evaluation", "gradient_accumulation_steps"),
    *("data.num_workers", "data.on_corrupt_image"),
]
# Not of a stream, which is dealt out to the workers: some images would come twice and others never.
_NOT_OF_STREAMS = ("data.num_workers",)


def check_same_recipe(recipe: Recipe) -> None:
    """Refuse to resume the run of another recipe.

    Raises:
        ValueError: the run folder has no run, or one with other settings (each is named).
    """
    path = recipe.run_folder / "recipe.yaml"
    if not path.exists():
        raise ValueError(f"there is no run to resume in {recipe.run_folder}")
    free = set(_FREE) - set(_NOT_OF_STREAMS if recipe.data.streaming else ())
    theirs, ours = flatten(OmegaConf.to_container(OmegaConf.load(path))), flatten(recipe.model_dump())
    differing = [
        f"{key} is {ours.get(key)!r}, was {theirs.get(key)!r}"
        for key in sorted({*ours, *theirs})
        if ours.get(key) != theirs.get(key) and not any(f"{key}.".startswith(f"{name}.") for name in free)
    ]
    if differing:
        raise ValueError(f"{recipe.run_folder} is a run of another recipe: {'; '.join(differing)}")


def check_same_processes(progress: Mapping[str, Any], num_processes: int) -> None:
    """Refuse to resume the run of a stream, which is dealt out to the processes, on another number of them.

    Raises:
        ValueError: names both numbers.
    """
    if progress["num_processes"] != num_processes:
        raise ValueError(
            f"the stream was dealt out to {progress['num_processes']} processes, so that with {num_processes} some "
            "images would come twice and others never; resume with as many as before"
        )


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
