"""The authors' released checkpoints (https://github.com/ziplab/SN-Net, CVPR 2023) as stitchable models.

Each stitch computes what their code computes. Where that differs from what this package would make of the same
anchors, the config says so explicitly: DeiT's stitches skip the final norm, and between stages of unequal depth some
positions use the stitching layer of another block (their enumeration pairs positions and layers by place in two lists
of different lengths).
"""

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from timm.models import swin_transformer

from stitchable.building import from_anchors
from stitchable.costs import update_costs
from stitchable.families.registry import create_model
from stitchable.model.chain import Anchor
from stitchable.model.modeling_stitchable import StitchableForImageClassification, StitchablePreTrainedModel
from stitchable.model.routes import Stitch

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Release:
    """A family that the authors released.

    Attributes:
        anchors: timm names, in the authors' order.
        stages: which they stitched; None for a plain model.
        skips_neck: whether their stitches leave out the final norm.
    """

    anchors: tuple[str, ...]
    stages: tuple[int, ...] | None = None
    skips_neck: bool = False


_SWIN = ("swin_tiny_patch4_window7_224", "swin_small_patch4_window7_224", "swin_base_patch4_window7_224")

RELEASES = {
    "deit": Release(("deit_tiny_patch16_224", "deit_small_patch16_224", "deit_base_patch16_224"), skips_neck=True),
    "swin": Release(_SWIN, stages=(0, 1, 2)),
    "resnet": Release(("resnet18", "resnet50"), stages=(1, 2)),
    "resnet_swin": Release(("resnet18", _SWIN[0]), stages=(1, 2)),
    "levit": Release(("levit_192", "levit_256"), stages=(0, 1)),
}


def convert(
    checkpoint: str | Path, family: str, anchors: Sequence[str | Mapping[str, Any]] | None = None
) -> StitchableForImageClassification:
    """A stitchable model with the weights of a checkpoint in the authors' layout.

    Args:
        checkpoint: their file (.pth): `anchors.N.*`, `stitch_layers...transform.weight` and `.bias`, alone or below
            "model" or "state_dict". It is read without running any code of it.
        family: a key of `RELEASES`.
        anchors: as for `from_anchors`, where the checkpoint's are others than the released ones.

    Raises:
        ValueError: an unknown family, a file that cannot be read safely, or one with other weights; names the first.
    """
    if family not in RELEASES:
        raise ValueError(f"the authors released {', '.join(RELEASES)}, not {family!r}")
    release, weights = RELEASES[family], _read_release(checkpoint)
    entries = [
        {"architecture": anchor} if isinstance(anchor, str) else dict(anchor) for anchor in anchors or release.anchors
    ]
    parts = [_part(weights, f"anchors.{number}.") for number in range(len(entries))]
    if not all(parts):
        raise ValueError(f"{checkpoint} has no weights anchors.{parts.index({})}.*; it has {_some(weights)}")
    num_labels = _num_labels(parts[-1], checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        for number, (entry, part) in enumerate(zip(entries, parts, strict=True)):
            # Files, so that they are read, checked and noted like any other weights of an anchor.
            entry["weights"] = f"{folder}/{Path(checkpoint).stem}-anchor-{number}.safetensors"
            save_file(_as_timm_has_it(part, entry, num_labels), entry["weights"])
        plain = from_anchors(entries, num_labels=num_labels, stages=release.stages, pretrained=True)
    order = [(entry["architecture"], entry["kwargs"]) for entry in plain.config.anchors]
    if order != [(entry["architecture"], entry.get("kwargs") or {}) for entry in entries]:
        raise ValueError(f"anchors must be given in the order of their FLOPs: {[name for name, _ in order]}")
    return _with_their_stitches(plain, release, weights, checkpoint)


def their_layers(config: Any, stages: Sequence[int] | None) -> dict[int, tuple[str, int]]:
    """The stitching layer of each stitch in the authors' enumeration.

    Returns:
        Stitch id -> (the part of their parameter names that tells the list of layers, the place in it).
    """
    shapes = [Anchor.from_dict(anchor) for anchor in config.anchors]
    stitches = [Stitch.from_dict(stitch) for stitch in config.stitches]
    stitched = list(stages) if stages is not None else [0]
    layers: dict[int, tuple[str, int]] = {}
    for place, stage in enumerate(stitched):
        for pair in range(len(shapes) - 1):
            front_depth, back_depth = shapes[pair].stages[stage], shapes[pair + 1].stages[stage]
            first = sum(shapes[pair].stages[:stage])
            members = [
                stitch
                for stitch in stitches
                if not stitch.is_anchor
                and stitch.route[0].anchor == pair
                and first < stitch.route[0].stop <= first + front_depth
            ]
            prefix = f"{place}.{pair}" if stages is not None else f"{pair}"
            ours = list(dict.fromkeys(stitch.layers[0] for stitch in members))
            for number, stitch in enumerate(members):
                if front_depth == back_depth:
                    index = ours.index(stitch.layers[0])
                else:
                    # They zip the positions with the whole list that says which front block each back block is nearest
                    # to, although positions are fewer than back blocks: all after the first that is left out are off.
                    index = number * front_depth // back_depth
                layers[stitch.id] = (prefix, index)
    return layers


def _with_their_stitches(
    plain: StitchablePreTrainedModel, release: Release, weights: Weights, source: Any
) -> StitchableForImageClassification:
    config = plain.config
    layers = their_layers(config, release.stages)
    numbers: dict[tuple[int, str, int], str] = {}
    for entry in config.stitches[len(config.anchors) :]:
        front, back = entry["route"][0][0], entry["route"][1][0]
        prefix, index = layers[entry["id"]]
        known = len({key for key in numbers if key[0] == front})
        entry["layers"] = [numbers.setdefault((front, prefix, index), f"{front}-{back}.{known}")]
        if release.skips_neck:
            entry["skips_neck"] = True
    model = StitchableForImageClassification(config)
    state_dict = {name: tensor for name, tensor in plain.state_dict().items() if name.startswith("anchors.")}
    for (_, prefix, index), name in numbers.items():
        for kind in ("weight", "bias"):
            theirs = f"stitch_layers.{prefix}.{index}.transform.{kind}"
            if theirs not in weights:
                raise ValueError(f"{source} lacks {theirs}; it has {_some(_part(weights, 'stitch_layers.'))}")
            tensor = weights[theirs]
            state_dict[f"stitching_layers.{name}.linear.{kind}"] = tensor.flatten(1) if kind == "weight" else tensor
    try:
        model.load_state_dict(state_dict)
    except RuntimeError as error:
        raise ValueError(f"the stitching layers of {source} do not fit these anchors: {error}") from error
    update_costs(model)
    return model.eval()


def _read_release(path: str | Path) -> Weights:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # their settings, a bag of values
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    except Exception as error:  # pickle and zip files have many ways to be something else
        raise ValueError(f"{path} is no checkpoint that can be read without running its code: {error}") from error
    while isinstance(content, dict) and not any(str(key).startswith("anchors.") for key in content):
        inner = next((content[key] for key in ("model", "state_dict") if key in content), None)
        if inner is None:
            raise ValueError(f"{path} has no weights anchors.*; it has {_some(content)}")
        content = inner
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not weights by name")
    return {name: tensor for name, tensor in content.items() if isinstance(tensor, torch.Tensor)}


def _part(weights: Weights, prefix: str) -> Weights:
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def _num_labels(part: Weights, source: Any) -> int:
    for name in ("head.weight", "fc.weight", "head.l.weight", "head.fc.weight", "head.linear.weight"):
        if name in part:
            return len(part[name])
    raise ValueError(f"{source}: the largest anchor has no classifier; it has {_some(part)}")


def _as_timm_has_it(part: dict[str, torch.Tensor], entry: Mapping[str, Any], num_labels: int) -> Weights:
    """An anchor's weights by timm's names."""
    with torch.device("meta"):
        model = create_model(entry["architecture"], entry.get("kwargs"), num_classes=num_labels)
    expected = model.state_dict()
    if set(expected) == set(part):
        named = part
    elif isinstance(model, timm.models.SwinTransformer):
        named = swin_transformer.checkpoint_filter_fn(part, model)
    else:
        # LeViT, which timm renamed and kept in order.
        kept = {name: tensor for name, tensor in part.items() if "attention_bias_idxs" not in name}
        if [tensor.shape for tensor in kept.values()] != [tensor.shape for tensor in expected.values()]:
            raise ValueError(f"the weights of anchor {entry['architecture']} do not fit: they are {_some(part)}")
        named = dict(zip(expected, kept.values(), strict=True))
    return {name: tensor.clone().contiguous() for name, tensor in named.items()}


def _some(names: Mapping[str, Any]) -> str:
    first = [str(name) for name in list(names)[:3]]
    return ", ".join(first) + (", ..." if len(names) > 3 else "") if first else "nothing"
