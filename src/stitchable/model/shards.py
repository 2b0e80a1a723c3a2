"""Weights in a file per anchor, one of stitching layers, one of own parts, of which a model reads what it needs."""

import json
import os
import re
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
    weights of a single part are one file.

    Args:
        folder: made where it does not exist.
        weights: by name.
        variant: of `save_pretrained`.
        load: what loads a weight by name that is offloaded.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    whole, index = (_with_variant(name, variant) for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME))
    weight_map = {name: _with_variant(_shard_of(name), variant) for name in weights}
    if len(set(weight_map.values())) == 1:
        weight_map = dict.fromkeys(weights, whole)
    finished: dict[Path, str] = {}
    try:
        for shard in sorted(set(weight_map.values())):
            finished[folder / f"{shard}.unfinished"] = shard
            tensors = {name: load(name) if x.is_meta else x for name, x in weights.items() if weight_map[name] == shard}
            content = {name: tensor.contiguous() for name, tensor in tensors.items()}
            save_file(content, folder / f"{shard}.unfinished", metadata={"format": "pt"})
        if len(finished) > 1:
            finished[folder / f"{index}.unfinished"] = index
            total = {"total_size": sum(tensor.nbytes for tensor in weights.values())}
            text = json.dumps({"metadata": total, "weight_map": weight_map}, indent=2)
            (folder / f"{index}.unfinished").write_text(text + "\n", encoding="utf-8")
        yield
        ours = re.compile(
            re.escape(_with_variant("model-X.safetensors", variant)).replace("X", r"(anchor-\d+|stitching-layers|own)")
        )
        for path in [*folder.iterdir(), folder / whole, folder / index]:
            if (path.name in (whole, index) or ours.fullmatch(path.name)) and path.name not in finished.values():
                path.unlink(missing_ok=True)  # a file of the whole model would win over an index
        for path, name in finished.items():
            path.replace(folder / name)
    finally:
        for path in finished:
            path.unlink(missing_ok=True)


def find_shards(source: str | os.PathLike, is_needed: Callable[[str], bool], **hub: Any) -> dict[str, list[str]]:
    """The files of a checkpoint that hold the weights that are needed, downloaded if it is on the Hub.

    Args:
        source: a folder, or the id of a repository on the Hub.
        is_needed: whether a weight of this name is needed.
        hub: `variant`, and where to look: `cache_dir`, `revision`, `token` and so on.

    Returns:
        Path of each file -> the names that are needed of it.

    Raises:
        OSError: no safetensors, a file that the index names is not there, or one that is no complete safetensors file.
        ValueError: an index that is none, or a checkpoint that holds none of the weights.
    """
    variant = hub.pop("variant", None)
    names = [_with_variant(name, variant) for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)]
    whole = cached_file(source, names[0], _raise_exceptions_for_missing_entries=False, **hub)
    index = None if whole else cached_file(source, names[1], _raise_exceptions_for_missing_entries=False, **hub)
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

    Raises:
        OSError: the configuration of an adapter without its weights as safetensors.
        ValueError: an adapter, but no PEFT, without which transformers would leave it out.
    """
    files = (ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME)
    config, weights = (cached_file(source, x, _raise_exceptions_for_missing_entries=False, **hub) for x in files)
    if config is None:
        return None
    if weights is None:
        raise OSError(f"{source} has {files[0]}, but no {files[1]}; save the adapter again, or remove {files[0]}")
    if not is_peft_available():
        raise ValueError(f"an adapter of PEFT lies in {source}; install peft, or remove {ADAPTER_CONFIG_NAME}")
    return os.path.dirname(config)


def read_weights(files: Mapping[str, Collection[str]]) -> dict[str, torch.Tensor]:
    """The named tensors of safetensors files, on the CPU; nothing else of the files is read."""
    state_dict: dict[str, torch.Tensor] = {}
    for path, names in files.items():
        with safe_open(path, framework="pt") as weights:
            state_dict |= {name: weights.get_tensor(name) for name in names}
    return state_dict


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
