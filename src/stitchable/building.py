"""From names of timm models to a config: build each on the meta device, sort by FLOPs, enumerate, count."""

import difflib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import nn

from stitchable.costs import cost_of_stitch, profile_architecture
from stitchable.model.anchors import create_timm_model
from stitchable.model.configuration_stitchable import StitchableConfig
from stitchable.space import Direction, Pairs, default_pairs, default_stages, enumerate_stitches


def build_config(
    anchors: Sequence[str | Mapping[str, Any]],
    *,
    kernel_size: int = 2,
    stride: int = 1,
    stages: Sequence[int] | None = None,
    direction: Direction = "fast_to_slow",
    nearest: bool = True,
    pairs: Pairs | None = None,
    image_size: int | Sequence[int] | None = None,
    num_labels: int | None = None,
    pretrained: bool = False,
    **config: Any,
) -> StitchableConfig:
    """The config of a family of timm models, its stitches enumerated and their costs counted.

    Args:
        anchors: timm names, or mappings with `architecture` and `kwargs` for `timm.create_model`; in any order, the
            config has them sorted by FLOPs.
        kernel_size: of the space, like the next five; `stitchable.space.enumerate_stitches` describes them.
        stride: see there.
        stages: see there.
        direction: see there.
        nearest: see there.
        pairs: see there.
        image_size: pixels, or (height, width); None means the anchors' own. Where the architecture fixes its input
            size at construction, it is built for this one.
        num_labels: classes; None means the anchors' own.
        pretrained: noted in the config as where the anchors' weights come from.
        config: further arguments of `StitchableConfig`, e.g. `id2label`, `image_mean`.

    Raises:
        ValueError: fewer than two anchors, an unknown or unsupported architecture, anchors that differ in input size,
            channels, classes or prefix tokens or normalise pixels differently, or a space with no stitch.
    """
    if isinstance(anchors, str | Mapping) or len(anchors) < 2:
        count = 1 if isinstance(anchors, str | Mapping) else len(anchors)
        raise ValueError(f"stitching needs at least two anchors, got {count}: {anchors!r}")
    _check_settings(config, stages, image_size)
    entries = [_entry(anchor, image_size) for anchor in anchors]
    if num_labels is None and "id2label" in config:
        num_labels = len(config["id2label"])
    num_labels = _agreed([(name, cfg.get("num_classes")) for name, _, cfg in entries], "num_labels", num_labels)
    _check_labels(num_labels, config.get("id2label"))
    image_size = _agreed([(name, _native_size(kwargs, cfg)) for name, kwargs, cfg in entries], "image_size", image_size)
    image_size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    num_channels = _agreed([(name, kwargs.get("in_chans", 3)) for name, kwargs, _ in entries], "in_chans", fix="")
    for key, timm_key in (("image_mean", "mean"), ("image_std", "std")):
        config[key] = _agreed([(name, tuple(cfg[timm_key])) for name, _, cfg in entries], key, config.get(key))

    profiled = [
        (name, kwargs, cfg, profile_architecture(name, kwargs, num_labels, image_size, num_channels))
        for name, kwargs, cfg in entries
    ]
    profiled.sort(key=lambda anchor: anchor[3].total.flops)
    profiles = [profile for *_, profile in profiled]
    _agreed([(name, profile.shape.prefix_tokens) for name, *_, profile in profiled], "prefix tokens", fix="")

    shapes = [profile.shape for profile in profiles]
    stitches = enumerate_stitches(
        shapes,
        kernel_size=kernel_size,
        stride=stride,
        stages=stages,
        direction=direction,
        nearest=nearest,
        pairs=pairs,
    )
    costs = [cost_of_stitch(stitch, profiles) for stitch in stitches]
    if "id2label" not in config and (labels := _imagenet_labels([cfg for _, _, cfg in entries], num_labels)):
        config["id2label"] = labels
    if "id2label" in config:
        config.setdefault("label2id", {label: number for number, label in config["id2label"].items()})
    else:
        config["num_labels"] = num_labels
    return StitchableConfig(
        anchors=[
            {
                "architecture": name,
                "kwargs": kwargs,
                "pretrained": (cfg.get("hf_hub_id") or cfg.get("tag")) if pretrained else None,
                **profile.shape.to_dict(),
            }
            for name, kwargs, cfg, profile in profiled
        ],
        stitches=[
            replace(stitch, flops=cost.flops, params=cost.params).to_dict()
            for stitch, cost in zip(stitches, costs, strict=True)
        ],
        space={
            "kernel_size": kernel_size,
            "stride": stride,
            "stages": list(default_stages(shapes) if stages is None else stages),
            "direction": direction,
            "nearest": nearest,
            "pairs": pairs or default_pairs(shapes),
        },
        stitch_id=config.pop("stitch_id", len(profiles) - 1),
        image_size=image_size,
        num_channels=num_channels,
        num_labels_of_costs=num_labels,
        **config,
    )


def _entry(
    anchor: str | Mapping[str, Any], image_size: int | Sequence[int] | None
) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Architecture, kwargs and timm's own configuration of its weights."""
    if isinstance(anchor, Mapping):
        unknown = set(anchor) - {"architecture", "kwargs"}
        if unknown or "architecture" not in anchor:
            raise ValueError(f"an anchor is a timm name or {{'architecture', 'kwargs'}}, got {dict(anchor)}")
        name, kwargs = anchor["architecture"], dict(anchor.get("kwargs") or {})
        reserved = {"num_classes", "pretrained"} & set(kwargs)
        if reserved:
            raise ValueError(f"the kwargs of an anchor cannot hold {sorted(reserved)}; give num_labels or pretrained")
    elif isinstance(anchor, nn.Module):
        raise ValueError("an anchor is given by its timm name and kwargs, so that a checkpoint can rebuild it")
    else:
        name, kwargs = anchor, {}
    with torch.device("meta"):
        model = create_timm_model(name, kwargs, num_classes=None)
    cfg = {**model.pretrained_cfg, "num_classes": model.num_classes}
    if image_size is not None and cfg.get("fixed_input_size"):
        kwargs.setdefault("img_size", image_size if isinstance(image_size, int) else list(image_size))
    return name, kwargs, cfg


def _native_size(kwargs: Mapping[str, Any], cfg: Mapping[str, Any]) -> tuple[int, int]:
    size = kwargs.get("img_size", cfg["input_size"][1:])
    return (size, size) if isinstance(size, int) else tuple(size)


def _check_settings(config: Mapping[str, Any], stages: Any, image_size: Any) -> None:
    known = {name for name in inspect.signature(StitchableConfig).parameters if name != "kwargs"}
    known |= {*vars(StitchableConfig()), "num_labels"}
    space = ["kernel_size", "stride", "stages", "direction", "nearest", "pairs", "pretrained"]
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
    return {index: info.index_to_description(index) for index in range(num_labels)}
