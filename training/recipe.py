"""A recipe: everything that makes a run, as one YAML file, checked before anything is built."""

import difflib
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Data(_Section):
    """Which images."""

    dataset: Literal["digits"]
    test_fraction: float = Field(gt=0, lt=1)
    split_seed: int = 0
    crop_pct: float | None = Field(None, gt=0, le=1)
    image_mean: list[float] | None = None
    image_std: list[float] | None = None


class Anchor(_Section):
    """A timm model; `kwargs` go to `timm.create_model`."""

    architecture: str
    kwargs: dict[str, Any] = {}


class Space(_Section):
    """As in `stitchable.space.enumerate_stitches`; what is left out has its default there."""

    kernel_size: int = 2
    stride: int = 1
    stages: list[int] | None = None
    direction: Literal["fast_to_slow", "slow_to_fast", "both"] = "fast_to_slow"
    nearest: bool = True
    pairs: Literal["all", "forward"] | None = None


class Initialization(_Section):
    """Of the stitching layers. `num_samples` is in images."""

    method: Literal["least_squares", "kaiming"] = "least_squares"
    num_samples: int = Field(100, ge=1)


class Schedule(_Section):
    """AdamW with linear warm-up and cosine decay to zero.

    `batch_size` is in images per process, `affine` the strength of the augmentation `data.random_affine`, and
    `max_grad_norm` clips the norm of all gradients.
    """

    epochs: int = Field(ge=0)
    batch_size: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    weight_decay: float = Field(0.05, ge=0)
    warmup_epochs: float = Field(0, ge=0)
    affine: float = Field(0, ge=0, lt=1)
    max_grad_norm: float = Field(1.0, gt=0)


class Recipe(_Section):
    """A run: anchors, pretrained by timm or here (`pretraining`), stitched in a space, and trained together."""

    name: str
    output: str
    seed: int = 0
    data: Data
    anchors: list[Anchor] = Field(min_length=2)
    space: Space = Space()
    pretraining: Schedule | None = None
    initialization: Initialization = Initialization()
    training: Schedule


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe and change single values of it.

    Args:
        path: the YAML file.
        overrides: "key.path=value" each, the value in YAML.

    Raises:
        ValueError: no such file, no YAML, or unknown keys (the nearest is named), wrong types, values out of range, all
            with their path.
    """
    try:
        content = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"there is no recipe {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a mapping, not {type(content).__name__}")
    for override in overrides or []:
        _apply(content, override)
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        problems = "\n".join(f"  {_explain(problem)}" for problem in error.errors())
        raise ValueError(f"{path} is not a recipe:\n{problems}") from None


def _apply(content: dict[str, Any], override: str) -> None:
    path, equals, value = override.partition("=")
    if not equals:
        raise ValueError(f"an override is key.path=value, got {override!r}")
    *parents, last = path.split(".")
    for key in parents:
        content = content.setdefault(key, {})
        if not isinstance(content, dict):
            raise ValueError(f"{override!r}: {key} is a value, not a section")
    content[last] = yaml.safe_load(value)


def _explain(problem: Any) -> str:
    path = ".".join(str(part) for part in problem["loc"])
    if problem["type"] != "extra_forbidden":
        return f"{path}: {problem['msg']}, got {problem['input']!r}"
    section: Any = Recipe
    for part in problem["loc"][:-1]:
        if isinstance(part, str) and part in section.model_fields:
            section = _section_type(section.model_fields[part].annotation)
    known = list(section.model_fields)
    near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1)
    return f"{path}: unknown key" + (f", did you mean {near[0]}?" if near else f"; there are {', '.join(known)}")


def _section_type(annotation: Any) -> Any:
    """The section behind `Section`, `Section | None` or `list[Section]`."""
    candidates = [annotation, *getattr(annotation, "__args__", ())]
    return next(candidate for candidate in candidates if hasattr(candidate, "model_fields"))
