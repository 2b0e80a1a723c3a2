"""Weights in a file per anchor, one of stitching layers, one of own parts, of which a model reads what it needs."""

import json
import os
import re
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_SAFE_WEIGHTS_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    cached_file,
    is_peft_available,
)

WEIGHTS = ["model.safetensors", "model-*.safetensors", "model.*.safetensors", "model.safetensors.index*.json"]
"""Patterns of the files of weights, of any variant."""

_ANCHOR = re.compile(r"anchors\.(\d+)\.")
_PARTS = r"(anchor-\d+|stitching-layers|own)"
_OLD_LAYER = re.compile(r"stitching_layers\.[^.]+\.\d+\.(weight|bias)")  # when they were Linears themselves


@contextmanager
def writing(
    folder: str | os.PathLike,
    weights: Mapping[str, torch.Tensor],
    variant: str | None,
    load: Callable[[str], torch.Tensor],
) -> Iterator[None]:
    """Write the weights beside the files of a folder, which they replace when what is done meanwhile has succeeded.

    There is a file per anchor, one for the stitching layers, one for what stitches have of their own, and their index;
    weights of a single part are one file. A weight that is offloaded is got by `load` from its name.
    """
    whole, index = (_with_variant(name, variant) for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME))
    weight_map = {name: _with_variant(_shard_of(name), variant) for name in weights}
    if len(set(weight_map.values())) == 1:
        weight_map = dict.fromkeys(weights, whole)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".unfinished-") as scratch:
        for shard in sorted(set(weight_map.values())):
            tensors = {name: load(name) if x.is_meta else x for name, x in weights.items() if weight_map[name] == shard}
            content = {name: tensor.contiguous() for name, tensor in tensors.items()}
            save_file(content, Path(scratch) / shard, metadata={"format": "pt"})
        if whole not in weight_map.values():
            total = {"total_size": sum(tensor.nbytes for tensor in weights.values())}
            text = json.dumps({"metadata": total, "weight_map": weight_map}, indent=2)
            (Path(scratch) / index).write_text(text + "\n", encoding="utf-8")
        yield
        ours = _with_variant("model-X.safetensors", variant).replace(".", r"\.").replace("X", _PARTS)
        for path in folder.iterdir():
            if path.name in (whole, index) or re.fullmatch(ours, path.name):
                path.unlink()  # a file of the whole model would win over an index
        for path in Path(scratch).iterdir():
            path.replace(folder / path.name)


def find_shards(source: str | os.PathLike, is_needed: Callable[[str], bool], **hub: Any) -> dict[str, list[str]]:
    """The files of a checkpoint, downloaded if it is on the Hub, with the names of the weights that are needed of each.

    `hub` is the `variant`, and where to look (`cache_dir`, `revision`, `token` and so on). An OSError names a file that
    is missing or incomplete; a ValueError refuses an index that is none, and a checkpoint with none of the weights.
    """
    variant = hub.pop("variant", None)
    names = [_with_variant(name, variant) for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)]
    whole = _cached(source, names[0], **hub)
    index = None if whole else _cached(source, names[1], **hub)
    if whole is None and index is None:
        lacking = f"{source} has no file named {names[0]} or {names[1]}"
        raise OSError(f"{lacking}; other weights are not read: convert them to safetensors")
    weight_map = dict.fromkeys(_names_in(whole), whole) if whole else _read_index(str(index))
    wanted: dict[str, list[str]] = {}
    for name in filter(is_needed, sorted(weight_map)):
        wanted.setdefault(weight_map[name], []).append(name)
    if not wanted or any(_OLD_LAYER.fullmatch(name) for name in weight_map):
        raise ValueError(f"the weights of {source} are those of another model, or of an older stitchable")
    if whole:
        return wanted
    files = {}
    for shard, members in wanted.items():
        try:
            path = str(cached_file(source, shard, **hub))
        except OSError as error:
            raise OSError(f"{names[1]} of {source} names {shard}, which cannot be had: {error}") from error
        missing = set(members) - set(_names_in(path))
        if missing:
            raise OSError(f"{path} lacks {len(missing)} weights that {names[1]} places there, e.g. {min(missing)}")
        files[path] = members
    return files


def find_adapter(source: str | os.PathLike, **hub: Any) -> str | None:
    """The local folder of a checkpoint in which an adapter of PEFT lies beside the weights; None where there is none.

    An adapter without its weights as safetensors is an OSError; one where PEFT is not installed a ValueError.
    """
    config, weights = (_cached(source, name, **hub) for name in (ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME))
    if config is None:
        return None
    fix = f"or remove {ADAPTER_CONFIG_NAME}"
    if weights is None:
        found = f"{source} has {ADAPTER_CONFIG_NAME}, but no {ADAPTER_SAFE_WEIGHTS_NAME}"
        raise OSError(f"{found}; save the adapter again, {fix}")
    if not is_peft_available():
        raise ValueError(f"an adapter of PEFT lies in {source}; install peft, {fix}")
    return os.path.dirname(config)


def read_weights(files: Mapping[str, Collection[str]]) -> dict[str, torch.Tensor]:
    """The named tensors of safetensors files, on the CPU; nothing else of the files is read."""
    state_dict: dict[str, torch.Tensor] = {}
    for path, names in files.items():
        with safe_open(path, framework="pt") as weights:
            state_dict |= {name: weights.get_tensor(name) for name in names}
    return state_dict


def _cached(source: str | os.PathLike, name: str, **hub: Any) -> str | None:
    return cached_file(source, name, _raise_exceptions_for_missing_entries=False, **hub)


def _shard_of(name: str) -> str:
    anchor, rest = _ANCHOR.match(name), "own" if name.startswith("own.") else "stitching-layers"
    return f"model-anchor-{anchor[1]}.safetensors" if anchor else f"model-{rest}.safetensors"


def _with_variant(name: str, variant: str | None) -> str:
    stem, suffix = name.rsplit(".", 1)
    return name if variant is None else f"{stem}.{variant}.{suffix}"


def _read_index(path: str) -> dict[str, str]:
    try:
        weight_map = json.loads(Path(path).read_text(encoding="utf-8"))["weight_map"]
        outside = {shard for shard in weight_map.values() if Path(shard).name != shard}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no index of weights: {error!r}") from error
    if outside:
        raise ValueError(f"{path} is no index of weights: it names files of other folders, e.g. {min(outside)!r}")
    return dict(weight_map)


def _names_in(path: str) -> list[str]:
    try:
        with safe_open(path, framework="pt") as weights:
            return list(weights.keys())
    except SafetensorError as error:
        raise OSError(f"{path} is no complete safetensors file ({error}); download or copy it again") from error
