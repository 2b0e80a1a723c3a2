"""The loss of a training step: labels (hard, smoothed or mixed), and a teacher."""

from collections.abc import Sequence
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageClassification

from stitchable import StitchableConfig
from stitchable.imagenet import in_words


class StitchLoss:
    """The loss of the networks that one step runs, each weighted equally.

    Without a teacher it is cross entropy with the labels. With one, for weight alpha of the teacher,

        (1 - alpha) * cross_entropy(labels) + alpha * distillation,

    where distillation is cross entropy with the teacher's class ("hard", Touvron et al., 2021, as in section 4.2 of the
    paper) or T^2 KL(teacher / T || student / T) ("soft", Hinton et al., 2015; DeiT's code divides that by the number of
    classes too, this does not). With "in_place" the first network of the step learns from the labels and is the teacher
    of the others, which learn from it alone (Yu et al., 2020; appendix D of the paper).

    Args:
        label_smoothing: weight of the uniform distribution, for labels that are class numbers.
        kind: "hard", "soft", "in_place", or None for no teacher.
        teacher: as `load_teacher` returns it; needed for "hard" and "soft".
        alpha: weight of the teacher.
        temperature: T.
    """

    def __init__(
        self,
        label_smoothing: float = 0.0,
        *,
        kind: Literal["hard", "soft", "in_place"] | None = None,
        teacher: nn.Module | None = None,
        alpha: float = 0.5,
        temperature: float = 1.0,
    ) -> None:
        self.label_smoothing, self.kind, self.teacher = label_smoothing, kind, teacher
        self.alpha, self.temperature = alpha, temperature

    def __call__(
        self, outputs: Sequence[torch.Tensor], labels: torch.Tensor, pixel_values: torch.Tensor
    ) -> torch.Tensor:
        """The loss, a scalar.

        Args:
            outputs: logits (N, num_labels) of each network; the largest first.
            labels: class numbers (N,), or distributions (N, num_labels) where images were mixed.
            pixel_values: what the networks saw, (N, C, H, W); the teacher sees the same.
        """
        if self.kind == "in_place":
            first, *others = outputs
            losses = [self._task(first, labels)]
            losses += [self._soften(logits, first.detach()) for logits in others]
        elif self.kind is None:
            losses = [self._task(logits, labels) for logits in outputs]
        else:
            assert self.teacher is not None
            with torch.no_grad():
                target = self.teacher(pixel_values)
            distill = self._soften if self.kind == "soft" else _harden
            losses = [
                (1 - self.alpha) * self._task(logits, labels) + self.alpha * distill(logits, target)
                for logits in outputs
            ]
        return torch.stack(losses).mean()

    def _task(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if labels.ndim == 2:  # mixed labels carry their smoothing already
            return F.cross_entropy(logits, labels.to(logits.dtype))
        return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)

    def _soften(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return soften(logits, target, self.temperature)


def soften(logits: torch.Tensor, target: torch.Tensor, temperature: float) -> torch.Tensor:
    """KL divergence of a student's logits (N, num_labels) from a teacher's at a temperature T, times T^2."""
    student, teacher = (F.log_softmax(values.float() / temperature, dim=-1) for values in (logits, target))
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


def _harden(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, target.argmax(-1))


class Teacher(nn.Module):
    """A frozen classifier in evaluation mode that takes pixel values as the students see them.

    Args:
        model: pixel values to logits, or to an output that has `logits`.
        scale, shift: (1, C, 1, 1), from the students' normalisation to the teacher's.
    """

    def __init__(self, model: nn.Module, scale: torch.Tensor, shift: torch.Tensor) -> None:
        super().__init__()
        self.scale: torch.Tensor
        self.shift: torch.Tensor
        self.model = model.requires_grad_(False)
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)
        self.train(False)

    def train(self, mode: bool = True) -> "Teacher":
        """Stay in evaluation mode."""
        return super().train(False)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Logits (N, num_labels) for pixel values (N, C, H, W)."""
        output = self.model(pixel_values * self.scale + self.shift)
        return getattr(output, "logits", output)


def load_teacher(name: str, config: StitchableConfig) -> Teacher:
    """A teacher for the stitches of a config.

    Args:
        name: a timm model, whose weights timm downloads, or an image classifier of the Hub or of a folder.
        config: of the students: classes, input size, pixel normalisation.

    Raises:
        ValueError: it cannot be loaded, does not take the students' images, or has other classes.
    """
    is_timm = name.startswith("hf-hub:") or timm.is_model(name.split(".")[0])
    try:
        model, mean, std, labels = _timm_teacher(name) if is_timm else _hub_teacher(name)
    except (OSError, ValueError, RuntimeError, ImportError, KeyError) as error:
        raise ValueError(f"the teacher {name!r} cannot be loaded: {error}") from error
    ours = torch.tensor([config.image_mean, config.image_std]).view(2, 1, -1, 1, 1)
    theirs = torch.tensor([mean or config.image_mean, std or config.image_std]).view(2, 1, -1, 1, 1)
    teacher = Teacher(model, ours[1] / theirs[1], (ours[0] - theirs[0]) / theirs[1])
    num_labels = _try(teacher, name, config)
    if num_labels != config.num_labels:
        raise ValueError(f"the teacher {name!r} has {num_labels} classes, the students have {config.num_labels}")
    names: Any = config.id2label
    for i, label in (labels or {}).items():
        if _differ(label, names[i]):
            raise ValueError(
                f"the teacher {name!r} has other classes: its class {i} is {label!r}, the students' is {names[i]!r}"
            )
    return teacher


def _timm_teacher(name: str) -> tuple[nn.Module, Any, Any, dict[int, str] | None]:
    model = timm.create_model(name, pretrained=True)
    facts: Any = model.pretrained_cfg
    names = facts.get("label_names")
    labels = dict(enumerate(in_words(names))) if names else None
    return model, facts["mean"], facts["std"], labels


def _hub_teacher(name: str) -> tuple[nn.Module, Any, Any, dict[int, str] | None]:
    model = AutoModelForImageClassification.from_pretrained(name)
    processor = AutoImageProcessor.from_pretrained(name)
    settings = getattr(processor, "data_config", None)  # of a timm model in the words of transformers
    mean, std = (settings["mean"], settings["std"]) if settings else (processor.image_mean, processor.image_std)
    labels = model.config.id2label
    return model, mean, std, dict(zip(labels, in_words(list(labels.values())), strict=True))


def _try(teacher: Teacher, name: str, config: StitchableConfig) -> int:
    """The number of classes the teacher gives for an image of the students' size."""
    height, width = config.image_size
    try:
        with torch.no_grad():
            return int(teacher(torch.zeros(1, config.num_channels, height, width)).shape[-1])
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ValueError(f"the teacher {name!r} cannot take images of {height}x{width}: {error}") from error


def _differ(theirs: str, ours: str) -> bool:
    # "LABEL_3" is what transformers writes where nobody gave names.
    unnamed = theirs.startswith("LABEL_") or ours.startswith("LABEL_")
    # Of ImageNet's two cranes one is "crane2", but not to every model.
    return not unnamed and theirs != ours and {theirs, ours} != {"crane", "crane2"}
