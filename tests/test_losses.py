"""The loss of a step, each formula against one written out, and teachers: what they see, and which are refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import BitImageProcessor, ResNetConfig, ResNetForImageClassification

import stitchable
from stitchable import StitchableConfig
from stitchable.training import losses
from stitchable.training.losses import StitchLoss, Teacher, load_teacher

NAMES = {0: "cat", 1: "dog", 2: "eel"}
X = torch.zeros(2, 3, 8, 8)
HARD = torch.tensor([2, 0])
MIXED = torch.tensor([[0.7, 0.2, 0.1], [0.0, 0.5, 0.5]])


class Fixed(torch.nn.Module):
    """Says the same whatever it sees, and remembers what that was."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(logits)
        self.dropout = torch.nn.Dropout(0.9)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        self.seen = pixel_values
        return self.dropout(self.logits)


def logits(seed: int) -> torch.Tensor:
    return torch.randn(2, 3, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def fixed_teacher(seed: int = 9) -> Teacher:
    return Teacher(Fixed(logits(seed).detach()), torch.ones(1, 3, 1, 1), torch.zeros(1, 3, 1, 1))


def cross_entropy(values: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The mean over images of -sum of target x log(softmax)."""
    log_probabilities = values - values.exp().sum(-1, keepdim=True).log()
    return -(target * log_probabilities).sum(-1).mean()


def one_hot(labels: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    return F.one_hot(labels, 3) * (1 - smoothing) + smoothing / 3


def divergence(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """T^2 KL(teacher || student), the mean over images."""
    p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
    return temperature**2 * (p * (p / q).log()).sum(-1).mean()


def test_without_a_teacher_it_is_cross_entropy() -> None:
    torch.testing.assert_close(StitchLoss()([logits(0)], HARD, X), cross_entropy(logits(0), one_hot(HARD)))
    smoothed = StitchLoss(0.3)([logits(0)], HARD, X)
    torch.testing.assert_close(smoothed, cross_entropy(logits(0), one_hot(HARD, 0.3)))


def test_mixed_labels_are_not_smoothed_again() -> None:
    torch.testing.assert_close(StitchLoss(0.3)([logits(0)], MIXED, X), cross_entropy(logits(0), MIXED))


def test_the_networks_of_a_step_weigh_the_same() -> None:
    expected = sum(cross_entropy(logits(seed), one_hot(HARD)) for seed in range(3)) / 3
    torch.testing.assert_close(StitchLoss()([logits(0), logits(1), logits(2)], HARD, X), expected)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("labels", [HARD, MIXED])
def test_hard_distillation(alpha: float, labels: torch.Tensor) -> None:
    loss = StitchLoss(kind="hard", teacher=fixed_teacher(), alpha=alpha)([logits(0), logits(1)], labels, X)
    target = labels if labels.ndim == 2 else one_hot(labels)
    taught = one_hot(logits(9).argmax(-1))
    expected = [
        (1 - alpha) * cross_entropy(logits(seed), target) + alpha * cross_entropy(logits(seed), taught)
        for seed in (0, 1)
    ]
    torch.testing.assert_close(loss, sum(expected) / 2)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_soft_distillation(temperature: float) -> None:
    settings: dict[str, Any] = {"kind": "soft", "alpha": 0.3, "temperature": temperature}
    loss = StitchLoss(0.1, teacher=fixed_teacher(), **settings)([logits(0)], HARD, X)
    taught = divergence(logits(0), logits(9), temperature)
    torch.testing.assert_close(loss, 0.7 * cross_entropy(logits(0), one_hot(HARD, 0.1)) + 0.3 * taught)


def test_in_place_distillation() -> None:
    """The largest learns from the labels alone, the others from it alone; nothing flows back through the teacher."""
    largest, stitch, smallest = outputs = [logits(seed) for seed in range(3)]
    loss = StitchLoss(0.1, kind="in_place", temperature=2.0)(outputs, HARD, X)
    task = cross_entropy(largest, one_hot(HARD, 0.1))
    taught = [divergence(student, largest.detach(), 2.0) for student in (stitch, smallest)]
    torch.testing.assert_close(loss, (task + sum(taught)) / 3)
    (gradient,) = torch.autograd.grad(loss, largest, retain_graph=True)
    torch.testing.assert_close(gradient, torch.autograd.grad(task / 3, largest)[0])
    (gradient,) = torch.autograd.grad(loss, stitch)
    torch.testing.assert_close(gradient, torch.autograd.grad(taught[0] / 3, stitch)[0])


def test_half_precision_does_not_break_the_divergence() -> None:
    student, teacher = torch.tensor([[60000.0, 0.0, -60000.0]]).half(), torch.tensor([[0.0, 10.0, 0.0]]).half()
    loss = StitchLoss(kind="in_place")([teacher, student], torch.tensor([1]), X[:1])
    assert torch.isfinite(loss)


def test_a_teacher_stays_in_evaluation_mode_and_gets_no_gradient() -> None:
    teacher = fixed_teacher()
    assert not any(module.training for module in teacher.modules())
    teacher.train()
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    student = logits(0)
    StitchLoss(kind="soft", teacher=teacher)([student], HARD, X).backward()
    assert student.grad is not None
    assert teacher.model.logits.grad is None  # type: ignore[union-attr]
    assert torch.equal(teacher(X), logits(9))  # no dropout


STUDENTS = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7]}
TEACHERS = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3]}
TINY_RESNET = {"layers": [1, 1, 1, 1], "channels": [4, 4, 4, 4]}


def config(**settings: Any) -> StitchableConfig:
    kwargs = {"img_size": 16, "patch_size": 8, "depth": 2, "num_heads": 1}
    anchors = [{"architecture": "vit_tiny_patch16_224", "kwargs": {**kwargs, "embed_dim": width}} for width in (4, 8)]
    defaults = {"id2label": NAMES, "image_mean": STUDENTS["mean"], "image_std": STUDENTS["std"]}
    return stitchable.make_config(anchors, **{**defaults, **settings})


def normalise(images: torch.Tensor, settings: Any) -> torch.Tensor:
    mean, std = (torch.tensor(settings[key]).view(3, 1, 1) for key in ("mean", "std"))
    return (images - mean) / std


def save_teacher(folder: Path, labels: dict[int, str] | int = 3, **settings: Any) -> str:
    named = {"num_labels": labels} if isinstance(labels, int) else {"id2label": labels}
    resnet = ResNetConfig(embedding_size=4, hidden_sizes=[4, 4], depths=[1, 1], **named, **settings)
    torch.manual_seed(3)
    ResNetForImageClassification(resnet).save_pretrained(folder)
    BitImageProcessor(image_mean=TEACHERS["mean"], image_std=TEACHERS["std"]).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("labels", [3, NAMES])
def test_a_teacher_sees_images_in_its_own_normalisation(labels: Any, tmp_path) -> None:
    teacher = load_teacher(save_teacher(tmp_path, labels), config())
    images = torch.rand(2, 3, 16, 16)  # in 0..1
    model = ResNetForImageClassification.from_pretrained(tmp_path).eval()
    expected = model(normalise(images, TEACHERS)).logits
    torch.testing.assert_close(teacher(normalise(images, STUDENTS)), expected)


def test_a_timm_teacher(monkeypatch) -> None:
    """By its timm name; timm's weights are on the Hub, so random ones stand in for them."""
    students, create, asked = config(), timm.create_model, []

    def fake(name: str, pretrained: bool) -> torch.nn.Module:
        asked.append((name, pretrained))
        return create(name, num_classes=3, **TINY_RESNET)

    monkeypatch.setattr(losses.timm, "create_model", fake)
    teacher = load_teacher("resnet18.a1_in1k", students)
    assert asked == [("resnet18.a1_in1k", True)]
    images = torch.rand(2, 3, 16, 16)
    expected = teacher.model(normalise(images, timm.get_pretrained_cfg("resnet18").to_dict()))
    torch.testing.assert_close(teacher(normalise(images, STUDENTS)), expected)


def test_a_timm_teacher_in_a_folder_of_transformers(tmp_path) -> None:
    """Such as the repositories of timm on the Hub: their processor keeps mean and deviation elsewhere."""
    model = timm.create_model("resnet18", num_classes=3, **TINY_RESNET)
    settings = {
        "model_type": "timm_wrapper",
        "architecture": "resnet18",
        "num_classes": 3,
        "label_names": list(NAMES.values()),
        "model_args": TINY_RESNET,
        "pretrained_cfg": {"input_size": [3, 16, 16], "num_classes": 3, **TEACHERS},
    }
    (tmp_path / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    save_file(model.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    teacher = load_teacher(str(tmp_path), config())
    images = torch.rand(2, 3, 16, 16)
    expected = model.eval()(normalise(images, TEACHERS))
    torch.testing.assert_close(teacher(normalise(images, STUDENTS)), expected)


def test_a_teacher_of_other_classes_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="has 4 classes, the students have 3"):
        load_teacher(save_teacher(tmp_path / "four", 4), config())
    other = save_teacher(tmp_path / "other", {0: "cat", 1: "emu", 2: "eel"})
    with pytest.raises(ValueError, match="other classes: its class 1 is 'emu', the students' is 'dog'"):
        load_teacher(other, config())
    assert load_teacher(other, config(id2label={i: f"LABEL_{i}" for i in range(3)}))  # the students' have no names


@pytest.mark.parametrize("name", ["no/such-teacher", "."])
def test_a_teacher_that_cannot_be_loaded_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"the teacher '{name}' cannot be loaded: "):
        load_teacher(name, config())


def test_a_teacher_that_cannot_take_the_images_is_refused(tmp_path) -> None:
    name = save_teacher(tmp_path, num_channels=1)
    with pytest.raises(ValueError, match=r"cannot take images of 16x16: "):
        load_teacher(name, config())
