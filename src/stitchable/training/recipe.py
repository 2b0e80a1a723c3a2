"""A recipe: everything that makes a run, as one YAML file, checked before anything is downloaded or built."""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from yaml import YAMLError

Fraction = Annotated[float, Field(ge=0, le=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Data(_Section):
    """Which images, how they are read, and the evaluation transform (which becomes the saved image processor).

    Attributes:
        dataset: "digits" (scikit-learn's), a data set of the Hub, or a loader of `datasets` for files of your own:
            "imagefolder", "parquet", "webdataset".
        files: for a loader, a folder, or a glob or list of files per split.
        train_split, test_split: names of splits; slices such as "train[:5000]" work as in `datasets`.
        image_column, label_column: names of the two columns.
        class_names: the classes, where the data set does not name them; if null, labels that are numbers are the
            pretrained anchors' classes, where they know as many.
        streaming: read shards as they come, for what does not fit a disk; needs `num_train_images`.
        num_train_images: images of an epoch, where the data set cannot tell.
        in_memory: preprocess once and keep all pixel values, for small images; augmentation is then that of tensors.
        on_corrupt_image: whether an image that cannot be read stops the run, or is replaced by another and counted.
        num_workers: processes that read and augment, per training process.
        test_fraction: of "digits", which has no test part.
        image_size: pixels; the anchors' own if null.
        crop_pct, interpolation, image_mean, image_std: of the evaluation transform; the anchors' own if null.
    """

    dataset: str
    files: str | dict[str, str | list[str]] | None = None
    train_split: str = "train"
    test_split: str = "test"
    image_column: str = "image"
    label_column: str = "label"
    class_names: list[str] | None = None
    streaming: bool = False
    num_train_images: int | None = Field(None, ge=1)
    in_memory: bool = False
    on_corrupt_image: Literal["stop", "skip"] = "stop"
    num_workers: int = Field(0, ge=0)
    test_fraction: float = Field(1 / 3, gt=0, lt=1)
    image_size: int | None = Field(None, ge=1)
    crop_pct: float | None = Field(None, gt=0, le=1)
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] | None = None
    image_mean: list[float] | None = None
    image_std: list[float] | None = None

    @property
    def name(self) -> str:
        """What to call the test images: the data set, or the folder where files of your own are."""
        if not isinstance(self.files, dict):
            return Path(self.files or "").name or self.dataset
        given = self.files.get(re.split(r"[\[:]", self.test_split)[0], "")
        return Path(given if isinstance(given, str) else given[0]).parent.name or self.dataset

    @model_validator(mode="after")
    def _check(self) -> "Data":
        if self.dataset in LOADERS and self.files is None:
            raise ValueError(
                f"dataset {self.dataset} reads files of your own: give files, a folder or a glob per split"
            )
        if self.dataset == "digits" and (self.files is not None or self.streaming):
            raise ValueError("the digits come with scikit-learn: they have no files and cannot be streamed")
        if self.streaming and self.in_memory:
            raise ValueError("streaming and in_memory exclude each other")
        if self.streaming and self.num_train_images is None:
            raise ValueError("a stream does not know its length: give num_train_images, the images of an epoch")
        if self.num_train_images is not None and not self.streaming:
            raise ValueError("num_train_images is for streaming; to train on a part, slice train_split: 'train[:5000]'")
        return self


LOADERS = ("imagefolder", "parquet", "webdataset")


class Anchor(_Section):
    """A timm model; `kwargs` go to `timm.create_model`, `weights` is a checkpoint file to load instead of timm's."""

    architecture: str
    kwargs: dict[str, Any] = {}
    weights: str | None = None


class Space(_Section):
    """As in `stitchable.space.enumerate_stitches`; what is left out has its default there."""

    kernel_size: int = 2
    stride: int = 1
    stages: list[int] | None = None
    direction: Literal["fast_to_slow", "slow_to_fast", "both"] = "fast_to_slow"
    nearest: bool = True
    pairs: Literal["all", "forward"] | None = None
    resize: Literal["bilinear"] | None = None


class Initialization(_Section):
    """Of the stitching layers. `num_samples` is in images."""

    method: Literal["least_squares", "kaiming"] = "least_squares"
    num_samples: int = Field(100, ge=1)


class Augmentation(_Section):
    """Of training images: timm's transforms (https://timm.fast.ai), or, with `data.in_memory`, of whole batches.

    Attributes:
        crop_scale: smallest and largest part of the area that a random resized crop keeps; [1, 1] resizes only.
        horizontal_flip: probability.
        auto_augment: timm's string, such as "rand-m9-mstd0.5-inc1" for RandAugment.
        random_erasing: probability of a hole, filled with noise.
        repeats: copies of an image in a batch, each augmented in its own way (Hoffer et al., 2020); an epoch keeps its
            length and so shows 1/repeats of the images.
        mixup, cutmix: the alpha of their Beta distributions, 0 for none; where both are on, half the batches are cut.
        affine: with `data.in_memory`: largest angle in radians, change of size, and shift as a part of half the image.
        padding: with `data.in_memory`: pixels by which an image is padded before a random crop of its size.
    """

    crop_scale: list[float] | None = Field(None, min_length=2, max_length=2)
    horizontal_flip: Fraction = 0.0
    auto_augment: str | None = None
    random_erasing: Fraction = 0.0
    interpolation: Literal["bilinear", "bicubic", "random"] = "bicubic"
    repeats: int = Field(1, ge=1)
    mixup: float = Field(0.0, ge=0)
    cutmix: float = Field(0.0, ge=0)
    affine: float = Field(0.0, ge=0, lt=1)
    padding: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _check(self) -> "Augmentation":
        if self.crop_scale and not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"crop_scale must be two parts of the area, the smaller first, got {self.crop_scale}")
        return self

    @property
    def mixes(self) -> bool:
        """Whether labels become mixtures of two classes."""
        return self.mixup > 0 or self.cutmix > 0


class Schedule(_Section):
    """One training: epochs, batch, optimiser and learning rates by the names of timm's factories.

    Attributes:
        epochs: passes over the training images.
        batch_size: images of one optimiser step, all processes and accumulated gradients together.
        optimizer: as in `timm.optim.create_optimizer_v2`; `optimizer_options` go to it, such as momentum or betas.
        learning_rate: at its peak, of the stitching layers; of the anchors `anchor_learning_rate_scale` times that.
        warmup_learning_rate, min_learning_rate: where the linear warm-up begins and the cosine, by steps, ends.
        weight_decay: none on biases, norms, and what the anchors' authors leave out (`no_weight_decay` in timm).
        clip: gradients by their norm, or adaptively by unit ("agc"), at `clip_at`; no clipping if null.
        batch_norms: "keep" normalises by the running statistics that the anchors came with and leaves them as they are,
            "update" by those of each batch, which run on; if null, what is `pretrained` keeps its own.
        label_smoothing: weight of the uniform distribution in the targets.
        trainable: everything, the stitching layers alone (figure 9 c of the paper), or what is each stitch's "own": one
            after the other they are taught by their back anchors for so many epochs, by Adam in one cycle up to the
            learning rate; the anchors stay as they are. What is said of the optimiser, warm-up and decay has no effect.
    """

    epochs: int = Field(ge=0)
    batch_size: int = Field(ge=1)
    optimizer: str = "adamw"
    optimizer_options: dict[str, Any] = {}
    learning_rate: float = Field(gt=0)
    anchor_learning_rate_scale: float = Field(1.0, ge=0)
    warmup_epochs: float = Field(0, ge=0)
    warmup_learning_rate: float = Field(0.0, ge=0)
    min_learning_rate: float = Field(0.0, ge=0)
    weight_decay: float = Field(0.05, ge=0)
    clip: Literal["norm", "agc"] | None = None
    clip_at: float = Field(1.0, gt=0)
    batch_norms: Literal["keep", "update"] | None = None
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    trainable: Literal["all", "stitching_layers", "own"] = "all"
    augmentation: Augmentation = Augmentation()

    @model_validator(mode="after")
    def _check(self) -> "Schedule":
        if 0 < self.epochs <= self.warmup_epochs:
            raise ValueError(f"warmup_epochs is {self.warmup_epochs}, but the whole training has {self.epochs} epochs")
        if self.augmentation.mixes and self.batch_size % 2:
            raise ValueError(f"mixup and cutmix mix pairs of images, so batch_size must be even, not {self.batch_size}")
        return self


class Sampling(_Section):
    """Which stitch a step of the joint training runs.

    Attributes:
        method: "uniform" (the paper), "flops_groups" (SN-Netv2: a group of stitches of like cost, then one of it), or
            "sandwich" (a stitch together with the anchors it connects).
        flops_gap: FLOPs by which the stitches of a group may lie above its cheapest.
        order: "independent" draws (the paper), or shuffled "rounds" in which each comes once.
        stitches_per_step: how many are drawn; stitch j of k takes the images at the positions i of the batch of each
            process with i mod k = j.
        anchor_probability: that an anchor is drawn, not one of the others; null draws anchors like all stitches.
            Where `trainable` leaves the anchors as they are, none is drawn.
        across_processes: the "same" stitches everywhere, or "independent" ones, as the authors' code draws them.
        stitches: ids to draw from; all of them if null. One id trains that network alone.
    """

    method: Literal["uniform", "flops_groups", "sandwich"] = "uniform"
    flops_gap: float = Field(1e9, ge=0)
    order: Literal["independent", "rounds"] = "independent"
    stitches_per_step: int = Field(1, ge=1)
    anchor_probability: Fraction | None = None
    across_processes: Literal["same", "independent"] = "same"
    stitches: list[int] | None = Field(None, min_length=1)


class Distillation(_Section):
    """A teacher for every stitch of the joint training.

    Attributes:
        kind: "soft" (Kullback-Leibler divergence at `temperature`) or "hard" (cross entropy with the teacher's class,
            Touvron et al., 2021), from `teacher`; or "in_place", from the largest network of a sandwich step.
        teacher: a timm model with weights, or an image classifier of the Hub or of a folder.
        alpha: weight of the teacher; the labels keep 1 - alpha.
    """

    kind: Literal["soft", "hard", "in_place"]
    teacher: str | None = None
    alpha: Fraction = 0.5
    temperature: float = Field(1.0, gt=0)

    @model_validator(mode="after")
    def _check(self) -> "Distillation":
        if (self.teacher is None) != (self.kind == "in_place"):
            raise ValueError(f"kind {self.kind} " + ("needs a teacher" if self.teacher is None else "has no teacher"))
        return self


class Evaluation(_Section):
    """What is measured: `stitches` at the end, all of them if null; the anchors `every` so many epochs meanwhile.

    With `cascades`, the best cascades of these stitches are found on the test images too, in another pass.
    """

    batch_size: int = Field(512, ge=1)
    every: int | None = Field(None, ge=1)
    stitches: list[int] | None = Field(None, min_length=1)
    cascades: bool = False
    throughput: bool = True


class Checkpoints(_Section):
    """How often, in optimiser steps, a run that may be resumed is written down, and how many of the last are kept."""

    every: int | None = Field(None, ge=1)
    keep: int = Field(2, ge=1)


class Recipe(_Section):
    """A run: anchors, pretrained by timm or here (`pretraining`), stitched in a space, and trained together.

    Attributes:
        name: of the model, as in its card.
        license: of the trained weights, as the Hub writes it; None where nothing is said.
        output: the folder of the finished Hub repository; what a run needs meanwhile is beside it, in OUTPUT-run.
        seed: of everything drawn at random.
        modules: Python files to run first, which register models of your own with timm and stitchable.
        pretrained: whether the anchors begin with timm's weights (or their `weights`), or with random ones.
        pretraining: trains each anchor alone on the data before they are stitched.
        trackers: by the names of Accelerate, such as tensorboard, wandb.
        gradient_accumulation_steps: backward passes that share the batch of an optimiser step, where a process cannot
            take its part of it at once. Only batch norms, the pairs of mixup and what is drawn for a batch as a whole
            (drop path, augmentation in memory) see the smaller batches.
    """

    name: str
    output: str
    license: str | None = None
    seed: int = 0
    modules: list[str] = []
    data: Data
    anchors: list[Anchor] = Field(min_length=2)
    pretrained: bool = True
    space: Space = Space()
    pretraining: Schedule | None = None
    initialization: Initialization = Initialization()
    training: Schedule
    sampling: Sampling = Sampling()
    distillation: Distillation | None = None
    evaluation: Evaluation = Evaluation()
    checkpoints: Checkpoints = Checkpoints()
    trackers: list[str] = ["tensorboard"]
    gradient_accumulation_steps: int = Field(1, ge=1)

    @property
    def run_folder(self) -> Path:
        """Checkpoints, draws and logs of the run."""
        return Path(f"{self.output}-run")

    @model_validator(mode="after")
    def _check(self) -> "Recipe":
        if not self.pretrained and any(anchor.weights for anchor in self.anchors):
            raise ValueError("anchors.weights are given, but pretrained is false")
        if self.distillation and self.distillation.kind == "in_place" and self.sampling.method != "sandwich":
            raise ValueError(
                "distillation.kind in_place needs sampling.method sandwich: its teacher is the larger anchor"
            )
        if self.training.trainable == "own" and (self.distillation or self.gradient_accumulation_steps > 1):
            raise ValueError(
                "training.trainable own: the back anchors teach, a whole batch at a time; leave out distillation and "
                "gradient_accumulation_steps"
            )
        for name, schedule in self.schedules().items():
            _check_augmentation(name, schedule.augmentation, self.data)
            schedule.batch_norms = schedule.batch_norms or ("keep" if self.pretrained else "update")
        return self

    def schedules(self) -> dict[str, Schedule]:
        """The trainings that are asked for, by the name of their section."""
        return ({"pretraining": self.pretraining} if self.pretraining else {}) | {"training": self.training}


def _check_augmentation(name: str, augmentation: Augmentation, data: Data) -> None:
    of_images = {"crop_scale", "auto_augment", "random_erasing"}
    of_tensors = {"affine", "padding"}
    given = {key for key in of_images | of_tensors if getattr(augmentation, key)}
    wrong = given & (of_images if data.in_memory else of_tensors)
    if wrong:
        word = "is" if data.in_memory else "is not"
        raise ValueError(f"{name}.augmentation.{min(wrong)} cannot be used where data.in_memory {word} true")
    if data.streaming and augmentation.repeats > 1:
        raise ValueError(f"{name}.augmentation.repeats needs a data set that is not streamed")


def recipes() -> dict[str, Path]:
    """The recipes that the package brings: name, such as "digits" or "ablations/sandwich" -> file."""
    installed = Path(__file__).with_name("recipes")
    # In an editable installation they lie where the repository keeps them.
    folder = installed if installed.exists() else Path(__file__).parents[3] / "training" / "recipes"
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))}


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and change single values of it.

    Args:
        path: a YAML file or the name of one of `recipes()`; its `base`, if it has one, is a recipe beside it whose
            values hold where it says nothing.
        overrides: "key.path=value" each, the value in YAML; `anchors.0.architecture=...` reaches into lists.

    Raises:
        ValueError: no such recipe or key (the nearest is named), no YAML, wrong types, values out of range, or
            impossible combinations, all with their path.
    """
    config = _read(_find(path))
    for override in overrides:
        _apply(config, override)
    try:
        content = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise ValueError(f"{path}: {_first_line(error)}") from None
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        problems = "\n".join(f"  {_explain(problem)}" for problem in error.errors())
        raise ValueError(f"{path} is not a recipe:\n{problems}") from None


def _find(path: str | Path) -> Path:
    ours = recipes()
    if str(path) in ours and not Path(path).is_file():
        return ours[str(path)]
    if isinstance(path, str) and not Path(path).suffix and not Path(path).exists():
        near = difflib.get_close_matches(path, ours, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(ours)}"
        raise ValueError(f"there is no recipe {path}: {hint} Files of your own end in .yaml")
    return Path(path)


def _read(path: Path, seen: tuple[Path, ...] = ()) -> DictConfig:
    if path.resolve() in seen:
        raise ValueError(f"{path} is its own base")
    try:
        config = OmegaConf.load(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"there is no recipe {path}: {getattr(error, 'strerror', None) or error}") from None
    except (YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
    if not isinstance(config, DictConfig):
        raise ValueError(f"{path} must hold a mapping of keys to values")
    base = config.pop("base", None)
    if base is None:
        return config
    return OmegaConf.merge(_read(path.parent / str(base), (*seen, path.resolve())), config)  # type: ignore[return-value]


def _apply(config: DictConfig, override: str) -> None:
    path, equals, value = override.partition("=")
    if not equals or not path:
        raise ValueError(f"an override is key.path=value, got {override!r}")
    try:
        parsed = OmegaConf.from_dotlist([f"value={value}"]).value
        OmegaConf.update(config, path, parsed, merge=False, force_add=True)
    except (YAMLError, OmegaConfBaseException, ValueError, TypeError, IndexError) as error:
        raise ValueError(f"the override {override!r} cannot be applied: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0]


def _explain(problem: Any) -> str:
    path = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "value_error":  # of a check of ours, which says it all
        return f"{path}: {problem['ctx']['error']}" if path else str(problem["ctx"]["error"])
    if problem["type"] != "extra_forbidden":
        return f"{path}: {problem['msg']}" + ("" if problem["type"] == "missing" else f", got {problem['input']!r}")
    section: Any = Recipe
    for part in problem["loc"][:-1]:
        if isinstance(part, str) and part in section.model_fields:
            section = _section_type(section.model_fields[part].annotation)
    known = list(section.model_fields)
    near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1)
    return f"{path}: unknown key" + (f", did you mean {near[0]}?" if near else f"; there are {', '.join(known)}")


def _section_type(annotation: Any) -> Any:
    """The section behind `Section`, `Section | None` or `list[Section]`."""
    if get_origin(annotation) in (Union, UnionType, list):
        return next(section for inner in get_args(annotation) if (section := _section_type(inner)))
    return annotation if hasattr(annotation, "model_fields") else None
