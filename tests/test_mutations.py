"""A config.json that somebody changed loads and works, or is refused with the place where it is wrong."""

import copy
import json
import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from families import images, make
from stitchable import StitchableForImageClassification

WRONG = [None, "x", "", -1, 0, 1, 2.5, 10**30, True, [], [1], ["x"], {}, {"a": 1}]
PER_CONFIG = 75


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of every value, of lists the first and the last member."""
    if path:
        yield path
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*path, key))
    elif isinstance(value, list) and value:
        for index in sorted({0, len(value) - 1}):
            yield from places(value[index], (*path, index))


def changed(config: dict, path: tuple, value: Any) -> dict:
    config = copy.deepcopy(config)
    owner = config
    for key in path[:-1]:
        owner = owner[key]
    owner[path[-1]] = value
    return config


@torch.no_grad()
def works_or_says_why(folder: Path, x: torch.Tensor) -> str | None:
    """What is wrong with a checkpoint, or None if each of its stitches runs."""
    try:
        model = StitchableForImageClassification.from_pretrained(folder)
    except ValueError as error:
        return str(error)
    for stitch in model.stitches:
        assert model(x, stitch_id=stitch.id).logits.shape == (2, model.config.num_labels)
    return None


@pytest.mark.parametrize("name", ["vit", "resnet-swin", "deit-distilled"])
def test_a_mutated_config_works_or_says_where_it_is_wrong(name: str, tmp_path: Path) -> None:
    model, x = make(name), images(name)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    mutations = [(path, value) for path in places(config) for value in WRONG]
    refused = 0
    for path, value in random.Random(0).sample(mutations, PER_CONFIG):
        (tmp_path / "config.json").write_text(json.dumps(changed(config, path, value)), encoding="utf-8")
        names = [key for key in path if isinstance(key, str)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a newer version, weights that are new
            wrong = works_or_says_why(tmp_path, x)
        refused += wrong is not None
        assert wrong is None or any(key in wrong for key in names), f"{path} = {value!r}: {wrong}"
    assert refused > PER_CONFIG / 2


@pytest.mark.parametrize(
    ("path", "value", "place"),
    [
        (("anchors",), None, "anchors"),
        (("anchors", 0, "stages"), "x", r"anchors\[0\]\.stages must be a list, got 'x'"),
        (("stitches",), [1], r"stitches\[0\] must be a mapping of id, route"),
        (("stitches", 0, "flops"), "12", r"stitches\[0\]\.flops must be a number, got '12'"),
        (("stitches", 0, "metrics"), None, r"stitches\[0\]\.metrics must be a mapping by name, got None"),
        (("stitches", 0, "skips_neck"), "no", r"stitches\[0\]\.skips_neck must be true or false, got 'no'"),
        (("image_size",), 224, "image_size must be a list of 2, got 224"),
        (("left_out",), ["x"], r"left_out\[0\] must be an integer, got 'x'"),
        (("stitchable_version",), 1, "stitchable_version must be text, got 1"),
        (("id2label",), [], r"id2label must be a mapping by name, got \[\]"),
        (("dtype",), ["x"], "dtype must be the name of a data type of torch"),
        (("anchors", 1, "chain", "blocks"), [], r"anchors\[1\]\.chain: a chain has at least one block"),
        (("anchors", 0, "prefix_tokens"), -1, r"anchors\[0\]: -1 prefix_tokens"),
    ],
)
def test_what_used_to_crash_is_refused_by_its_place(path: tuple, value: Any, place: str, tmp_path: Path) -> None:
    make("vit").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["stitches"][0].setdefault("metrics", {})
    file.write_text(json.dumps(changed(config, path, value)), encoding="utf-8")
    with pytest.raises(ValueError, match=place):
        StitchableForImageClassification.from_pretrained(tmp_path)
