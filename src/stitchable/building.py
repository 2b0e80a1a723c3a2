"""From anchors to a config and a model: build each on the meta device, sort by FLOPs, enumerate, count."""

import difflib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from timm.data import ImageNetInfo, infer_imagenet_subset

from stitchable.anchors import Anchor, AnchorLike, pretrained_model, read_anchor
from stitchable.costs import AnchorProfile, cost_of_stitch, profile_architecture
from stitchable.imagenet import imagenet_words
from stitchable.model.configuration_stitchable import StitchableConfig
from stitchable.model.modeling_stitchable import StitchableForImageClassification, StitchablePreTrainedModel
from stitchable.model.schema import write
from stitchable.space import Direction, Pairs, Resize, default_pairs, default_stages, enumerate_stitches


def make_config(
    anchors: Sequence[AnchorLike],
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
        anchors: in any order, the config has them sorted by FLOPs: timm names; modules in hand that timm made with no
            further arguments; or mappings with `architecture`, `kwargs` for its constructor, and, to be taken instead
            of timm's weights, either `weights`, a checkpoint file (.safetensors, .pth, .th), or `module`, a model with
            them. With a name such as "hf-hub:user/name" or "local-dir:folder", timm looks there, and the config has
            the architecture and kwargs that it finds.
        kernel_size: of the space, like the next five; `stitchable.space.enumerate_stitches` describes them.
        stride: see there.
        stages: see there.
        direction: see there.
        nearest: see there.
        pairs: see there.
        resize: see there.
        image_size: pixels, or (height, width); None means the anchors' own. Where the architecture fixes its input
            size at construction, it is built for this one.
        num_labels: classes; None means the anchors' own, of `weights` and modules those of the classifier there.
        pretrained: noted in the config as where the anchors' weights come from (of a file, its name without folders).
        config: further arguments of `StitchableConfig`, e.g. `id2label`, `image_mean`.

    Raises:
        ValueError: fewer than two anchors, an unknown or unsupported architecture, anchors that differ in input size,
            channels or classes or normalise pixels differently, a size that one of them cannot take, a space with no
            stitch, a module whose architecture is not known or that is another one, or weights that cannot be read or
            would not be used because of `pretrained=False`.
    """
    if isinstance(anchors, str | Mapping) or len(anchors) < 2:
        count = 1 if isinstance(anchors, str | Mapping) else len(anchors)
        raise ValueError(f"stitching needs at least two anchors, got {count}: {anchors!r}")
    _check_settings(config, stages, image_size)
    given = [read_anchor(anchor, image_size, pretrained) for anchor in anchors]
    common = _common_settings(given, config, num_labels, image_size)
    num_labels = common.pop("num_labels")
    images = common["image_size"], common["num_channels"]
    profiled = [(anchor, profile_architecture(anchor.name, anchor.kwargs, num_labels, *images)) for anchor in given]
    profiled.sort(key=lambda entry: entry[1].total.flops)
    rule: dict[str, Any] = {
        "kernel_size": kernel_size,
        "stride": stride,
        "stages": stages,
        "direction": direction,
        "nearest": nearest,
        "pairs": pairs,
    }
    return StitchableConfig(
        anchors=[_entry(anchor, profile, pretrained) for anchor, profile in profiled],
        **_space([profile for _, profile in profiled], rule, resize),
        num_labels_of_costs=num_labels,
        **{"stitch_id": len(profiled) - 1, **config, **common, **_labels(given, config, num_labels)},
    )


def _space(profiles: Sequence[AnchorProfile], rule: dict[str, Any], resize: Resize | None) -> dict[str, Any]:
    """The stitches with their costs, and the rule they come from, as the config has both."""
    shapes = [profile.shape for profile in profiles]
    stitches = enumerate_stitches(shapes, **rule, resize=resize)
    costs = [cost_of_stitch(stitch, profiles) for stitch in stitches]
    stages = default_stages(shapes, resize) if rule["stages"] is None else rule["stages"]
    return {
        "stitches": [
            replace(stitch, flops=cost.flops, params=cost.params).to_dict()
            for stitch, cost in zip(stitches, costs, strict=True)
        ],
        "space": {**rule, "stages": list(stages), "pairs": rule["pairs"] or default_pairs(shapes)},
        "resize": resize,
    }


def _common_settings(
    anchors: Sequence[Anchor],
    config: Mapping[str, Any],
    num_labels: int | None,
    image_size: int | Sequence[int] | None,
) -> dict[str, Any]:
    """What all anchors have to share: classes, image size, channels, and how pixels are normalised."""
    if num_labels is None and "id2label" in config:
        num_labels = len(config["id2label"])
    num_labels = _agreed([(anchor.name, anchor.num_classes) for anchor in anchors], "num_labels", num_labels)
    _check_labels(num_labels, config.get("id2label"))
    image_size = _agreed([(anchor.name, anchor.image_size) for anchor in anchors], "image_size", image_size)
    channels = [(anchor.name, anchor.num_channels) for anchor in anchors]
    return {
        "num_labels": num_labels,
        "image_size": (image_size, image_size) if isinstance(image_size, int) else tuple(image_size),
        "num_channels": _agreed(channels, "in_chans", fix=", or give kwargs={'in_chans': ...}"),
        **{
            key: _agreed([(anchor.name, tuple(anchor.cfg[timm_key])) for anchor in anchors], key, config.get(key))
            for key, timm_key in (("image_mean", "mean"), ("image_std", "std"))
        },
    }


def _labels(anchors: Sequence[Anchor], config: Mapping[str, Any], num_labels: int) -> dict[str, Any]:
    """Number and names of the classes, as a config takes them."""
    id2label = config.get("id2label") or _imagenet_labels([anchor.cfg for anchor in anchors], num_labels)
    if not id2label:
        return {"num_labels": num_labels}
    numbers = {label: number for number, label in id2label.items()}
    return {"num_labels": num_labels, "id2label": id2label, "label2id": config.get("label2id", numbers)}


def _entry(anchor: Anchor, profile: AnchorProfile, pretrained: bool) -> dict[str, Any]:
    """An anchor as the config has it."""
    return {
        "architecture": anchor.name,
        "kwargs": anchor.kwargs,
        **({"class": profile.own_class} if profile.own_class else {}),
        "pretrained": anchor.source if pretrained else None,
        "depth": profile.shape.depth,
        **write(profile.shape),
        "chain": write(profile.chain),
    }


def from_anchors(
    anchors: Sequence[AnchorLike], *, pretrained: bool = True, **settings: Any
) -> StitchableForImageClassification:
    """A stitchable model of timm models, with their weights.

    Args:
        anchors: as for `make_config`: names, modules in hand, or mappings. Modules are copied, and stay as they are.
        pretrained: whether to load weights: those of an anchor's file or module, or timm's (from the Hub); random ones
            otherwise.
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
    anchors: Sequence[AnchorLike],
    image_size: int | Sequence[int] | None = None,
) -> None:
    """Load into a model that was made of `anchors` the weights of each: of its file or module, or else timm's.

    Files by timm's own means, its conversion of checkpoints included. A classifier of other classes than the
    model's is replaced by a new one; everything else must fit.

    Args:
        model: made from the config that `make_config` made of the same anchors.
        anchors: as given to `make_config`.
        image_size: as given to `make_config`.

    Raises:
        ValueError: a file that cannot be read or holds no weights of its anchor; names both.
    """
    given = [read_anchor(anchor, image_size, pretrained=True) for anchor in anchors]
    for module, entry in zip(model.anchors, model.config.anchors, strict=True):
        # Anchors that are equal in both cost the same, so the config, whose sorting is stable, has them as given.
        anchor = next(a for a in given if (a.name, a.kwargs) == (entry["architecture"], entry["kwargs"]))
        given.remove(anchor)
        module.load_state_dict(pretrained_model(anchor, model.config.num_labels).state_dict())


def names_of_classes(anchors: Sequence[AnchorLike]) -> list[str] | None:
    """What pretrained anchors call their classes; None where they have no names that timm knows, or different classes.

    Args:
        anchors: as given to `make_config`.
    """
    given = [read_anchor(anchor, None, pretrained=True) for anchor in anchors]
    labels = _imagenet_labels([anchor.cfg for anchor in given], given[0].num_classes)
    return list(labels.values()) if labels else None


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
