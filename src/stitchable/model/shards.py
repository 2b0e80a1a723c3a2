"""Weights in one file per anchor and one for the stitching layers, of which a model reads only what it needs."""

import json
import os
import re
from collections.abc import Collection, Mapping
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

_OLD_LAYER = re.compile(r"stitching_layers\.[^.]+\.\d+\.(weight|bias)")  # when they were Linears themselves
_SHARD = r"model-(anchor-\d+|stitching-layers)"


def split_weights(folder: str | os.PathLike, variant: str | None = None) -> None:
    """Replace the `model.safetensors` of a folder by a file per anchor, one for the stitching layers, and their index.

    Weights of a single part stay one file. Whenever this is interrupted, the folder holds a complete checkpoint.
    """
    folder = Path(folder)
    whole, index = (folder / _with_variant(name, variant) for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME))
    if not whole.exists():  # such as an adapter, which transformers saves in its own way
        return
    pattern = re.compile(_with_variant(f"{_SHARD}.safetensors", variant).replace(".", r"\."))
    stale = {path for path in folder.iterdir() if pattern.fullmatch(path.name)} | {index}
    with safe_open(whole, framework="pt") as weights:
        names = list(weights.keys())
        weight_map = {name: _with_variant(_shard_of(name), variant) for name in names}
        if len(set(weight_map.values())) > 1:
            total_size = 0
            for shard in sorted(set(weight_map.values())):
                tensors = {name: weights.get_tensor(name) for name in names if weight_map[name] == shard}
                save_file(tensors, folder / shard, metadata={"format": "pt"})
                total_size += sum(tensor.nbytes for tensor in tensors.values())
            content = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
            index.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            stale -= {index, *(folder / shard for shard in weight_map.values())}
            stale |= {whole}  # it would win over the index
    for path in stale:
        path.unlink(missing_ok=True)


def find_shards(source: str | os.PathLike, needed: Collection[str], **hub: Any) -> dict[str, list[str]]:
    """The files of a checkpoint that hold the `needed` weights, downloaded if it is on the Hub.

    Args:
        source: a folder, or the id of a repository on the Hub.
        needed: names of weights.
        hub: `variant`, and where to look: `cache_dir`, `force_download`, `local_files_only`, `proxies`, `token`,
            `revision`, `subfolder`.

    Returns:
        Path of each file -> the names that are needed of it.

    Raises:
        OSError: no safetensors, a file that the index names is not there, or one that is no complete safetensors file.
        ValueError: an index that is none, or a checkpoint that holds none of the weights.
    """
    variant = hub.pop("variant", None)
    stored: set[str] = set()
    names = [_with_variant(name, variant) for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)]
    whole = cached_file(source, names[0], _raise_exceptions_for_missing_entries=False, **hub)
    if whole is not None:
        stored = set(_names_in(whole))
        files = {whole: sorted(stored & set(needed))}
    else:
        index = cached_file(source, names[1], _raise_exceptions_for_missing_entries=False, **hub)
        if index is None:
            raise OSError(
                f"{source} has no file named {names[0]} or {names[1]}; other weights, such as pytorch_model.bin, are "
                "not read: convert them to safetensors where they come from"
            )
        weight_map = _read_index(index)
        stored = set(weight_map)
        wanted: dict[str, list[str]] = {}
        for name in sorted(set(needed) & set(weight_map)):
            wanted.setdefault(weight_map[name], []).append(name)
        files = {_fetch(source, shard, names[1], **hub): members for shard, members in wanted.items()}
        for path, members in files.items():
            missing = set(members) - set(_names_in(path))
            if missing:
                raise OSError(f"{path} lacks {len(missing)} weights that {names[1]} places there, e.g. {min(missing)}")
    old = next((name for name in stored if _OLD_LAYER.fullmatch(name)), None)
    if old:
        raise ValueError(
            f"{source} was saved by an older stitchable, whose stitching layers have other names ({old!r} is "
            f"'{'.linear.'.join(old.rsplit('.', 1))}' now); make it again, or rename these weights in its files"
        )
    if not any(files.values()):
        raise ValueError(f"the weights of {source} are those of another model: it has none of this model's")
    return files


def find_adapter(source: str | os.PathLike, **hub: Any) -> str | None:
    """The local folder of a checkpoint in which an adapter of PEFT lies beside the weights; None where there is none.

    Args:
        source: a folder, or the id of a repository on the Hub.
        hub: as for `find_shards`, without `variant`.

    Raises:
        OSError: the configuration of an adapter without its weights as safetensors.
        ValueError: an adapter, but no PEFT, without which transformers would leave it out.
    """
    hub["_raise_exceptions_for_missing_entries"] = False
    config = cached_file(source, ADAPTER_CONFIG_NAME, **hub)
    if config is None:
        return None
    if cached_file(source, ADAPTER_SAFE_WEIGHTS_NAME, **hub) is None:
        raise OSError(
            f"{source} has {ADAPTER_CONFIG_NAME}, but no {ADAPTER_SAFE_WEIGHTS_NAME}; save the adapter again, or "
            f"remove {ADAPTER_CONFIG_NAME}"
        )
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
    anchor = re.match(r"anchors\.(\d+)\.", name)
    return f"model-anchor-{anchor[1]}.safetensors" if anchor else "model-stitching-layers.safetensors"


def _with_variant(name: str, variant: str | None) -> str:
    stem, suffix = name.rsplit(".", 1)
    return name if variant is None else f"{stem}.{variant}.{suffix}"


def _fetch(source: str | os.PathLike, shard: str, index: str, **hub: Any) -> str:
    try:
        path = cached_file(source, shard, **hub)
    except OSError as error:
        raise OSError(f"{index} of {source} names {shard}, which cannot be had: {error}") from error
    assert path is not None  # else it raises
    return path


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
