"""An anchor as it is asked for: by a name, with a file of its weights, or as a module in hand."""

import os
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from stitchable.families.registry import create_model, describe, full_kwargs, own_architectures
from stitchable.model.operations import TimmModel

AnchorLike = str | nn.Module | Mapping[str, Any]
"""A name, a module that timm made, or a mapping of `architecture`, `kwargs`, and `weights` or `module`."""

_KEYS = ("architecture", "kwargs", "weights", "module")


@dataclass(frozen=True)
class Anchor:
    """An anchor as it was asked for.

    Attributes:
        asked_for: its name, or where timm is to look for architecture and weights, such as "hf-hub:user/name".
        name: of its architecture.
        kwargs: further arguments of its constructor.
        cfg: timm's configuration of its weights.
        weights: a file to take instead of timm's weights.
        module: a model to take them from.
    """

    asked_for: str
    name: str
    kwargs: dict[str, Any]
    cfg: dict[str, Any]
    weights: str | None
    module: nn.Module | None

    @property
    def num_classes(self) -> int:
        """Of its weights."""
        return self.cfg["num_classes"]

    @property
    def num_channels(self) -> int:
        """Of its images."""
        return self.kwargs.get("in_chans", self.cfg["input_size"][0])

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        size = self.kwargs.get("img_size", self.cfg["input_size"][1:])
        return (size, size) if isinstance(size, int) else tuple(size)

    @property
    def source(self) -> str | None:
        """Where its weights come from, in words that hold on every machine."""
        if self.module is not None:
            return None
        file = self.weights or self.cfg.get("file")
        return Path(file).name if file else self.cfg.get("hf_hub_id") or self.cfg.get("tag")


def read_anchor(anchor: AnchorLike, image_size: Any, pretrained: bool) -> Anchor:
    """What is asked for, complete.

    Args:
        anchor: as given to `make_config`.
        image_size: for architectures that fix their input size, pixels or (height, width); None for their own.
        pretrained: whether weights will be loaded.

    Raises:
        ValueError: as `make_config`.
    """
    given = _split(anchor)
    asked_for, weights, module = given["architecture"], given.get("weights"), given.get("module")
    if not pretrained and (weights or module is not None):
        named = f"weights={weights!r}" if weights else "a module with weights"
        raise ValueError(
            f"anchor {asked_for!r} has {named}, but pretrained=False asks for random ones; "
            "give pretrained=True, or leave them out"
        )
    name, kwargs, cfg = _resolve(asked_for, given["kwargs"])
    kwargs = full_kwargs(name, kwargs)
    with torch.device("meta"):
        model = create_model(name, kwargs, num_classes=None)
    describe(model)  # a family that cannot be stitched is told so before anything else
    own_cfg = {**model.pretrained_cfg, "num_classes": model.num_classes}
    cfg = cfg or own_cfg
    if weights:
        cfg["num_classes"] = _num_classes(_read_weights(weights, name), cfg)
    if module is not None:
        cfg = {**own_cfg, **(getattr(module, "pretrained_cfg", None) or {})}
        cfg["num_classes"] = _num_classes(module.state_dict(), cfg)
    if image_size is not None and cfg.get("fixed_input_size"):
        kwargs.setdefault("img_size", image_size if isinstance(image_size, int) else list(image_size))
    if module is not None:
        _check_module(module, name, kwargs, cfg["num_classes"])
    return Anchor(asked_for, name, kwargs, cfg, weights, module)


def pretrained_model(anchor: Anchor, num_labels: int | None) -> TimmModel:
    """A model with the weights of an anchor; a classifier of other classes than its own is new.

    Raises:
        ValueError: weights that cannot be had, or do not fit; names the anchor and the file.
    """
    if anchor.module is not None:
        return _filled(anchor, num_labels, anchor.module.state_dict())
    if anchor.name in own_architectures():
        if anchor.weights is None:
            raise ValueError(f"{anchor.name!r} is no model of timm and has no weights there; give a file of them")
        return _filled(anchor, num_labels, timm.models.load_state_dict(anchor.weights))
    if anchor.weights is None:
        try:
            return timm.create_model(anchor.asked_for, pretrained=True, num_classes=num_labels, **anchor.kwargs)
        except RuntimeError as error:
            raise ValueError(f"the weights of {anchor.asked_for!r} cannot be loaded: {_brief(error)}") from error
    overlay = {
        "file": anchor.weights,
        "source": None,  # timm would prefer this and the next to the file
        "state_dict": None,
        "num_classes": anchor.num_classes,  # those of the file, for only then does timm check that all its weights fit
    }
    try:
        model: TimmModel = timm.create_model(
            anchor.name,
            pretrained=True,
            num_classes=anchor.num_classes,
            pretrained_cfg_overlay=overlay,
            **anchor.kwargs,
        )
    except Exception as error:  # also what timm's conversions of foreign checkpoints stumble over
        raise ValueError(
            f"anchor {anchor.name!r}: the weights {anchor.weights!r} do not fit: {_brief(error.__cause__ or error)}"
        ) from error
    if anchor.num_classes != num_labels:
        model.reset_classifier(num_labels)
    return model


def _split(anchor: Any) -> dict[str, Any]:
    """The architecture, a copy of the kwargs, and the file or the module where there is one."""
    if isinstance(anchor, nn.Module):
        anchor = {"module": anchor}
    if not isinstance(anchor, Mapping):
        return {"architecture": anchor, "kwargs": {}}
    module, weights = anchor.get("module"), anchor.get("weights")
    if module is not None and not isinstance(module, nn.Module):
        raise ValueError(f"the module of an anchor is a torch.nn.Module, got {type(module).__name__}")
    architecture = anchor.get("architecture") or (module is not None and _architecture_of(module))
    if set(anchor) - set(_KEYS) or not architecture or (module is not None and weights is not None):
        raise ValueError(
            f"an anchor is a timm name, a module, or {{'architecture', 'kwargs', and 'weights' or 'module'}}, got a "
            f"mapping of {sorted(anchor)}"
        )
    kwargs = dict(anchor.get("kwargs") or {})
    reserved = {"num_classes", "pretrained"} & set(kwargs)
    if reserved:
        raise ValueError(f"the kwargs of an anchor cannot hold {sorted(reserved)}; give num_labels or pretrained")
    if weights is not None and not (isinstance(weights, str | os.PathLike) and Path(weights).is_file()):
        raise ValueError(
            f"anchor {architecture!r}: weights must be a checkpoint file, there is none at {str(weights)!r}"
        )
    return {
        "architecture": architecture,
        "kwargs": kwargs,
        "weights": None if weights is None else os.fspath(weights),
        "module": module,
    }


def _architecture_of(module: nn.Module) -> str:
    """What timm calls the architecture of a module, with the tag of its weights where it is not the usual one."""
    cfg = getattr(module, "pretrained_cfg", None) or {}
    name = cfg.get("architecture") if isinstance(cfg, Mapping) else None
    if not name:
        raise ValueError(
            f"nobody knows the architecture of this {type(module).__name__}, by which a checkpoint makes it again; "
            "give {'architecture': NAME, 'kwargs': {...}, 'module': module}, its name as timm's or as "
            "stitchable.register_family has it"
        )
    usual, tag = timm.get_pretrained_cfg(name, allow_unregistered=True), cfg.get("tag")
    tagged = f"{name}.{tag}"
    return tagged if tag and usual and usual.tag != tag and timm.models.is_model_pretrained(tagged) else name


def _resolve(asked_for: str, kwargs: dict[str, Any]) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """The architecture, kwargs and timm's configuration of what timm finds on the Hub or in a folder.

    A config has what is found there: a checkpoint loads without that place, and reads none.
    """
    if not isinstance(asked_for, str) or ":" not in asked_for:
        return asked_for, kwargs, {}
    found = timm.models.resolve_model_input_args(asked_for, **kwargs)
    cfg = found.pop("pretrained_cfg")
    name = found.pop("model_name")
    for key in ("pretrained_model_args", "num_classes"):  # what the weights were made with; the cfg says it too
        found.pop(key, None)
    return name, found, cfg


def _read_weights(weights: str, name: str) -> Mapping[str, torch.Tensor]:
    try:
        return timm.models.load_state_dict(weights)
    except Exception as error:  # torch, pickle and safetensors have many ways to say that a file is not theirs
        raise ValueError(f"anchor {name!r}: the weights {weights!r} cannot be read: {_brief(error)}") from error


def _num_classes(state_dict: Mapping[str, torch.Tensor], cfg: Mapping[str, Any]) -> int:
    """How many classes the classifier in a checkpoint has; the architecture's own if it goes by another name there."""
    weight = state_dict.get(f"{_classifiers(cfg)[0]}.weight")
    return cfg["num_classes"] if weight is None else len(weight)


def _classifiers(cfg: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the classifiers, of which some architectures have two."""
    names = cfg.get("classifier") or ("",)
    return (names,) if isinstance(names, str) else tuple(names)


def _check_module(module: nn.Module, name: str, kwargs: Mapping[str, Any], num_classes: int) -> None:
    """Refuse a module with other weights than its architecture has with these kwargs."""
    with torch.device("meta"):
        expected = create_model(name, kwargs, num_classes=num_classes).state_dict()
    found = module.state_dict()
    for key in dict.fromkeys([*expected, *found]):
        shapes = [tuple(weights[key].shape) if key in weights else None for weights in (found, expected)]
        if shapes[0] != shapes[1]:
            has, needs = ("no such weight" if shape is None else f"the shape {shape}" for shape in shapes)
            raise ValueError(
                f"the module in hand is no {name!r} with kwargs {dict(kwargs)}: {key} has {has} in the module, {needs} "
                "in the architecture; give what the module was made with as {'kwargs': {...}, 'module': module}"
            )


def _filled(anchor: Anchor, num_labels: int | None, state_dict: Mapping[str, torch.Tensor]) -> TimmModel:
    """A new model with these weights; a classifier of other classes is new."""
    model = create_model(anchor.name, anchor.kwargs, num_classes=num_labels)
    if anchor.num_classes != num_labels:
        own, classifiers = model.state_dict(), tuple(f"{name}." for name in _classifiers(anchor.cfg))
        state_dict = {
            name: own.get(name, value) if name.startswith(classifiers) else value for name, value in state_dict.items()
        }
    try:
        model.load_state_dict(state_dict)
    except RuntimeError as error:
        where = "the module in hand does" if anchor.weights is None else f"the weights {anchor.weights!r} do"
        raise ValueError(f"anchor {anchor.name!r}: {where} not fit: {_brief(error)}") from error
    return model


def _brief(error: BaseException) -> str:
    # An error of load_state_dict may list hundreds of names.
    return textwrap.shorten(f"{type(error).__name__}: {error}", 400)
