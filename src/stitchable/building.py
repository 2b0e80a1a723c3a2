"""From names of timm models to a config: build each on the meta device, sort by FLOPs, enumerate, count."""

import difflib
import inspect
import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import nn

from stitchable.costs import cost_of_stitch, profile_architecture
from stitchable.families.registry import (
    create_model,
    describe,
    full_kwargs,
    own_architectures,
)
from stitchable.imagenet import imagenet_words
from stitchable.model.configuration_stitchable import StitchableConfig
from stitchable.model.modeling_stitchable import StitchableForImageClassification, StitchablePreTrainedModel
from stitchable.model.operations import TimmModel
from stitchable.space import Direction, Pairs, Resize, default_pairs, default_stages, enumerate_stitches


def make_config(
    anchors: Sequence[str | Mapping[str, Any]],
    *,
    kernel_size: int = 2,
    stride: int = 1,
    stages: Sequence[int] | None = None,
    direction: Direction = "fast_to_slow",
    nearest: bool = True,
    pairs: Pairs | None = None,
    resize: Resize | None = None,
    image_size: int | Sequence[int] | None = None,
    num_labels: int | None = None,
    pretrained: bool = False,
    **config: Any,
) -> StitchableConfig:
    """The config of a family of timm models, its stitches enumerated and their costs counted.

    Args:
        anchors: timm names, or mappings with `architecture`, `kwargs` for its constructor and `weights`, a
            checkpoint file (.safetensors, .pth, .th) to take instead of timm's weights; in any order, the config has
            them sorted by FLOPs. With a name such as "hf-hub:user/name" or "local-dir:folder", timm looks there, and
            the config has the architecture and kwargs that it finds.
        kernel_size: of the space, like the next five; `stitchable.space.enumerate_stitches` describes them.
        stride: see there.
        stages: see there.
        direction: see there.
        nearest: see there.
        pairs: see there.
        resize: see there.
        image_size: pixels, or (height, width); None means the anchors' own. Where the architecture fixes its input
            size at construction, it is built for this one.
        num_labels: classes; None means the anchors' own, those of the classifier in the file where they have `weights`.
        pretrained: noted in the config as where the anchors' weights come from (of a file, its name without folders).
        config: further arguments of `StitchableConfig`, e.g. `id2label`, `image_mean`.

    Raises:
        ValueError: fewer than two anchors, an unknown or unsupported architecture, anchors that differ in input size,
            channels or classes or normalise pixels differently, a size that one of them cannot take, a space with no
            stitch, or `weights` that cannot be read or would not be used because of `pretrained=False`.
    """
    if isinstance(anchors, str | Mapping) or len(anchors) < 2:
        count = 1 if isinstance(anchors, str | Mapping) else len(anchors)
        raise ValueError(f"stitching needs at least two anchors, got {count}: {anchors!r}")
    _check_settings(config, stages, image_size)
    entries = [_read_anchor(anchor, image_size, pretrained) for anchor in anchors]
    if num_labels is None and "id2label" in config:
        num_labels = len(config["id2label"])
    num_labels = _agreed([(anchor.name, anchor.num_classes) for anchor in entries], "num_labels", num_labels)
    _check_labels(num_labels, config.get("id2label"))
    image_size = _agreed([(anchor.name, anchor.image_size) for anchor in entries], "image_size", image_size)
    image_size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    channels = [(anchor.name, anchor.num_channels) for anchor in entries]
    num_channels = _agreed(channels, "in_chans", fix=", or give kwargs={'in_chans': ...}")
    for key, timm_key in (("image_mean", "mean"), ("image_std", "std")):
        config[key] = _agreed([(anchor.name, tuple(anchor.cfg[timm_key])) for anchor in entries], key, config.get(key))

    profiled = [
        (anchor, profile_architecture(anchor.name, anchor.kwargs, num_labels, image_size, num_channels))
        for anchor in entries
    ]
    profiled.sort(key=lambda entry: entry[1].total.flops)
    profiles = [profile for _, profile in profiled]
    shapes = [profile.shape for profile in profiles]
    stitches = enumerate_stitches(
        shapes,
        kernel_size=kernel_size,
        stride=stride,
        stages=stages,
        direction=direction,
        nearest=nearest,
        pairs=pairs,
        resize=resize,
    )
    costs = [cost_of_stitch(stitch, profiles) for stitch in stitches]
    if "id2label" not in config and (labels := _imagenet_labels([anchor.cfg for anchor in entries], num_labels)):
        config["id2label"] = labels
    if "id2label" in config:
        config.setdefault("label2id", {label: number for number, label in config["id2label"].items()})
    else:
        config["num_labels"] = num_labels
    return StitchableConfig(
        anchors=[
            {
                "architecture": anchor.name,
                "kwargs": anchor.kwargs,
                **({"class": profile.own_class} if profile.own_class else {}),
                "pretrained": anchor.source if pretrained else None,
                **profile.shape.to_dict(),
                "chain": profile.chain.to_dict(),
            }
            for anchor, profile in profiled
        ],
        stitches=[
            replace(stitch, flops=cost.flops, params=cost.params).to_dict()
            for stitch, cost in zip(stitches, costs, strict=True)
        ],
        space={
            "kernel_size": kernel_size,
            "stride": stride,
            "stages": list(default_stages(shapes, resize) if stages is None else stages),
            "direction": direction,
            "nearest": nearest,
            "pairs": pairs or default_pairs(shapes),
        },
        resize=resize,
        stitch_id=config.pop("stitch_id", len(profiles) - 1),
        image_size=image_size,
        num_channels=num_channels,
        num_labels_of_costs=num_labels,
        **config,
    )


def from_anchors(
    anchors: Sequence[str | Mapping[str, Any]], *, pretrained: bool = True, **settings: Any
) -> StitchableForImageClassification:
    """A stitchable model of timm models, with their weights.

    Args:
        anchors: timm names, or mappings with `architecture`, `kwargs` for its constructor and `weights`, a checkpoint
            file (.safetensors, .pth, .th) to load instead of timm's weights; in any order.
        pretrained: whether to load weights: an anchor's `weights`, or timm's (from the Hub); random ones otherwise.
        settings: as in `make_config`. With a `num_labels` that is not the anchors' own, the classifiers are new, as
            with `from_pretrained` of any classifier.

    Raises:
        ValueError: as `make_config`, or weights that do not fit their anchor.
    """
    model = StitchableForImageClassification(make_config(anchors, pretrained=pretrained, **settings))
    if pretrained:
        load_anchors(model, anchors, settings.get("image_size"))
    return model


def load_anchors(
    model: StitchablePreTrainedModel,
    anchors: Sequence[str | Mapping[str, Any]],
    image_size: int | Sequence[int] | None = None,
) -> None:
    """Load into a model that was made of `anchors` the weights of each: from its file where it names one, or timm's.

    Either way by timm's own means, its conversion of checkpoints included. A classifier of other classes than the
    model's is replaced by a new one; everything else must fit.

    Args:
        model: made from the config that `make_config` made of the same anchors.
        anchors: as given to `make_config`.
        image_size: as given to `make_config`.

    Raises:
        ValueError: a file that cannot be read or holds no weights of its anchor; names both.
    """
    given = [_read_anchor(anchor, image_size, pretrained=True) for anchor in anchors]
    for module, entry in zip(model.anchors, model.config.anchors, strict=True):
        # Anchors that are equal in both cost the same, so the config, whose sorting is stable, has them as given.
        anchor = next(a for a in given if (a.name, a.kwargs) == (entry["architecture"], entry["kwargs"]))
        given.remove(anchor)
        module.load_state_dict(_pretrained_model(anchor, model.config.num_labels).state_dict())


def names_of_classes(anchors: Sequence[str | Mapping[str, Any]]) -> list[str] | None:
    """What pretrained anchors call their classes; None where they have no names that timm knows, or different classes.

    Args:
        anchors: as given to `build_config`.
    """
    given = [_read_anchor(anchor, None, pretrained=True) for anchor in anchors]
    labels = _imagenet_labels([anchor.cfg for anchor in given], given[0].num_classes)
    return list(labels.values()) if labels else None


@dataclass(frozen=True)
class _Anchor:
    """An anchor as it was asked for: `cfg` is timm's configuration of its weights, `weights` a file to take instead."""

    asked_for: str  # the name, or where timm is to look for architecture and weights, such as "hf-hub:user/name"
    name: str
    kwargs: dict[str, Any]
    cfg: dict[str, Any]
    weights: str | None

    @property
    def num_classes(self) -> int:
        return self.cfg["num_classes"]

    @property
    def num_channels(self) -> int:
        return self.kwargs.get("in_chans", self.cfg["input_size"][0])

    @property
    def image_size(self) -> tuple[int, int]:
        size = self.kwargs.get("img_size", self.cfg["input_size"][1:])
        return (size, size) if isinstance(size, int) else tuple(size)

    @property
    def source(self) -> str | None:
        """Where its weights come from, in words that hold on every machine."""
        file = self.weights or self.cfg.get("file")
        return Path(file).name if file else self.cfg.get("hf_hub_id") or self.cfg.get("tag")


def _read_anchor(anchor: str | Mapping[str, Any], image_size: int | Sequence[int] | None, pretrained: bool) -> _Anchor:
    asked_for, kwargs, weights = _split(anchor)
    if weights and not pretrained:
        raise ValueError(
            f"anchor {asked_for!r} has weights={weights!r}, but pretrained=False asks for random ones; "
            "give pretrained=True, or leave weights out"
        )
    name, kwargs, cfg = _resolve(asked_for, kwargs)
    kwargs = full_kwargs(name, kwargs)
    with torch.device("meta"):
        model = create_model(name, kwargs, num_classes=None)
    describe(model)  # a family that cannot be stitched is told so before anything else
    cfg = cfg or {**model.pretrained_cfg, "num_classes": model.num_classes}
    if weights:
        cfg["num_classes"] = _classes_in_file(weights, name, cfg)
    if image_size is not None and cfg.get("fixed_input_size"):
        kwargs.setdefault("img_size", image_size if isinstance(image_size, int) else list(image_size))
    return _Anchor(asked_for, name, kwargs, cfg, weights)


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


def _split(anchor: str | Mapping[str, Any]) -> tuple[str, dict[str, Any], str | None]:
    """Architecture, a copy of the kwargs, and the file of the weights."""
    if isinstance(anchor, nn.Module):
        raise ValueError("an anchor is given by its timm name and kwargs, so that a checkpoint can rebuild it")
    if not isinstance(anchor, Mapping):
        return anchor, {}, None
    if set(anchor) - {"architecture", "kwargs", "weights"} or "architecture" not in anchor:
        raise ValueError(f"an anchor is a timm name or {{'architecture', 'kwargs', 'weights'}}, got {dict(anchor)}")
    kwargs, weights = dict(anchor.get("kwargs") or {}), anchor.get("weights")
    reserved = {"num_classes", "pretrained"} & set(kwargs)
    if reserved:
        raise ValueError(f"the kwargs of an anchor cannot hold {sorted(reserved)}; give num_labels or pretrained")
    if weights is not None and not (isinstance(weights, str | os.PathLike) and Path(weights).is_file()):
        raise ValueError(
            f"anchor {anchor['architecture']!r}: weights must be a checkpoint file, there is none at {str(weights)!r}"
        )
    return anchor["architecture"], kwargs, None if weights is None else os.fspath(weights)


def _classes_in_file(weights: str, name: str, cfg: Mapping[str, Any]) -> int:
    """How many classes the classifier in a checkpoint has; the architecture's own if it goes by another name there."""
    try:
        state_dict = timm.models.load_state_dict(weights)
    except Exception as error:  # torch, pickle and safetensors have many ways to say that a file is not theirs
        raise ValueError(f"anchor {name!r}: the weights {weights!r} cannot be read: {_brief(error)}") from error
    classifier = cfg.get("classifier")
    weight = state_dict.get(f"{classifier if isinstance(classifier, str) else (classifier or ('',))[0]}.weight")
    return cfg["num_classes"] if weight is None else len(weight)


def _pretrained_model(anchor: _Anchor, num_labels: int | None) -> TimmModel:
    if anchor.name in own_architectures():
        if anchor.weights is None:
            raise ValueError(f"{anchor.name!r} is no model of timm and has no weights there; give a file of them")
        return _own_model(anchor, num_labels)
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


def _own_model(anchor: _Anchor, num_labels: int | None) -> TimmModel:
    """A registered model with the weights of its file; a classifier of other classes is new."""
    model = create_model(anchor.name, anchor.kwargs, num_classes=num_labels)
    state_dict = timm.models.load_state_dict(str(anchor.weights))
    classifier = f"{anchor.cfg['classifier']}."
    if anchor.num_classes != num_labels:
        own = model.state_dict()
        state_dict = {
            name: own.get(name, value) if name.startswith(classifier) else value for name, value in state_dict.items()
        }
    try:
        model.load_state_dict(state_dict)
    except RuntimeError as error:
        raise ValueError(
            f"anchor {anchor.name!r}: the weights {anchor.weights!r} do not fit: {_brief(error)}"
        ) from error
    return model


def _brief(error: BaseException) -> str:
    # An error of load_state_dict may list hundreds of names.
    return textwrap.shorten(f"{type(error).__name__}: {error}", 400)


def _check_settings(config: Mapping[str, Any], stages: Any, image_size: Any) -> None:
    known = {name for name in inspect.signature(StitchableConfig).parameters if name != "kwargs"}
    known |= {*vars(StitchableConfig()), "num_labels"}
    space = ["kernel_size", "stride", "stages", "direction", "nearest", "pairs", "resize", "pretrained"]
    for name in config:
        if name not in known:
            near = difflib.get_close_matches(name, [*known, *space], n=1)
            raise ValueError(f"there is no setting {name!r}" + (f", did you mean {near[0]!r}?" if near else ""))
    if stages is not None and not isinstance(stages, Sequence):
        raise ValueError(f"stages must be a list of stage numbers, got {stages!r}")
    sizes = [image_size] if isinstance(image_size, int) else image_size
    if sizes is not None and (
        isinstance(sizes, str)
        or not isinstance(sizes, Sequence)
        or len(sizes) > 2
        or any(type(size) is not int or size < 1 for size in sizes)
    ):
        raise ValueError(f"image_size must be pixels or (height, width) in pixels, got {image_size!r}")


def _check_labels(num_labels: Any, id2label: Mapping[int, str] | None) -> None:
    if type(num_labels) is not int or num_labels < 1:
        hint = "; these anchors have no classifier of their own" if num_labels == 0 else ""
        raise ValueError(f"num_labels must be a positive number of classes, got {num_labels!r}{hint}; give num_labels")
    if id2label is not None and len(id2label) != num_labels:
        raise ValueError(f"num_labels is {num_labels}, but id2label names {len(id2label)} classes")


def _agreed(values: Sequence[tuple[str, Any]], name: str, chosen: Any = None, fix: str | None = None) -> Any:
    """What the user chose, or else what all anchors have in common."""
    if chosen is not None:
        return chosen
    if len({value for _, value in values}) > 1:
        listed = ", ".join(f"{anchor} {value}" for anchor, value in values)
        fix = f", or give {name}" if fix is None else fix
        raise ValueError(f"the anchors differ in {name}: {listed}. Choose anchors that agree{fix}")
    return values[0][1]


def _imagenet_labels(cfgs: Sequence[Mapping[str, Any]], num_labels: int) -> dict[int, str] | None:
    """Class names where the anchors were pretrained on a data set whose names timm knows."""
    subset, *others = {infer_imagenet_subset(dict(cfg)) for cfg in cfgs}
    if others or subset is None:
        return None
    info = ImageNetInfo(subset)
    if info.num_classes() != num_labels:
        return None
    words = imagenet_words()
    return {index: words[number] for index, number in enumerate(info.label_names())}
