"""Weights by part: a model that is loaded for one stitch or a budget reads, and needs, only its own files."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from families import images, make, randomise
from stitchable import StitchableForImageClassification
from stitchable.model import shards

SHARDS = ["model-anchor-0.safetensors", "model-anchor-1.safetensors", "model-stitching-layers.safetensors"]
INDEX = "model.safetensors.index.json"


def files_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if "safetensors" in path.name)


@pytest.fixture
def model():
    return make("vit")


@pytest.mark.parametrize("name", ["vit", "deit-distilled", "swin", "resnet", "levit-conv", "convnext"])
def test_a_stitch_loaded_alone_computes_the_same_and_holds_nothing_else(name: str, tmp_path) -> None:
    model, x = make(name), images(name)
    model.save_pretrained(tmp_path)
    assert files_of(tmp_path) == [*SHARDS, INDEX]
    for stitch in (model.stitches[0], model.stitches[2], model.stitches[-1]):
        alone, info = StitchableForImageClassification.from_pretrained(
            tmp_path, stitch_id=stitch.id, output_loading_info=True
        )
        assert not any(info.values()), info
        assert [other.id for other in alone.stitches] == [stitch.id] == [alone.stitch.id]
        assert sum(parameter.numel() for parameter in alone.parameters()) == stitch.params
        assert alone.state_dict().keys() == model.extract(stitch.id).state_dict().keys()
        assert not alone.training
        assert alone.name_or_path == str(tmp_path)
        with torch.no_grad():
            # Not to the bit: PyTorch's convolutions on a CPU round by the alignment of memory.
            torch.testing.assert_close(alone(x).logits, model(x, stitch_id=stitch.id).logits)


def test_up_to_a_cost(model, tmp_path) -> None:
    model.record(6, metrics={"accuracy": 0.9})
    model.save_pretrained(tmp_path)
    bound = sorted(stitch.flops for stitch in model.stitches)[4]
    cheap = AutoModelForImageClassification.from_pretrained(tmp_path, max_flops=bound)
    expected = [stitch for stitch in model.stitches if stitch.flops <= bound]
    assert list(cheap.stitches) == expected
    assert 6 in [stitch.id for stitch in expected]
    assert cheap.stitch.id == 6  # the default of the checkpoint costs more; the best measured one takes its place
    with torch.no_grad():
        for stitch in expected:
            x = images("vit")
            assert torch.equal(cheap(x, stitch_id=stitch.id).logits, model(x, stitch_id=stitch.id).logits)

    both = AutoModel.from_pretrained(tmp_path, max_flops=bound, stitch_id=0)
    assert (both.stitch.id, both.stitches) == (0, tuple(expected))
    everything = AutoModel.from_pretrained(tmp_path, max_flops=1e12)
    assert (everything.stitch.id, everything.config.left_out) == (1, [])


def test_what_was_left_out_is_refused_by_name(model, tmp_path) -> None:
    model.save_pretrained(tmp_path)
    alone = StitchableForImageClassification.from_pretrained(tmp_path, stitch_id=4)
    alone.save_pretrained(tmp_path / "alone")
    again = StitchableForImageClassification.from_pretrained(tmp_path / "alone")
    for partial in (alone, again, model.extract(4), again.extract()):
        for call in (partial.set_stitch, partial.extract, lambda i, m=partial: m(images("vit"), stitch_id=i)):
            with pytest.raises(ValueError, match="stitch 5 was left out of this model, which has stitch 4 only"):
                call(5)
        with pytest.raises(ValueError, match="stitch_id 9 is out of range"):
            partial.set_stitch(9)
        assert partial.config.left_out == [0, 1, 2, 3, 5, 6, 7, 8]

    for arguments, message in [
        ({"stitch_id": 9}, "stitch_id 9 is out of range"),
        ({"stitch_id": "4"}, "stitch_id must be an integer, got '4'"),
        ({"max_flops": 10}, "no stitch is within flops <= 10; the cheapest is, by flops stitch 0"),
        ({"max_flops": "much"}, "the budget flops must be a positive number, got 'much'"),
        ({"max_flops": model.stitches[0].flops, "stitch_id": 1}, "stitch_id 1 is beyond max_flops"),
    ]:
        for load in (AutoConfig.from_pretrained, StitchableForImageClassification.from_pretrained):
            with pytest.raises(ValueError, match=message):
                load(tmp_path, **arguments)


def test_files_of_other_parts_are_not_needed(model, tmp_path) -> None:
    model.save_pretrained(tmp_path)
    (tmp_path / SHARDS[1]).unlink()
    (tmp_path / SHARDS[2]).write_bytes(b"not even opened")
    alone = StitchableForImageClassification.from_pretrained(tmp_path, stitch_id=0, dtype=torch.float16)
    assert alone.dtype == torch.float16
    torch.testing.assert_close(
        alone(images("vit")).logits.float(), model(images("vit"), stitch_id=0).logits, rtol=0.05, atol=0.05
    )
    with pytest.raises(OSError, match=SHARDS[1]):
        StitchableForImageClassification.from_pretrained(tmp_path, stitch_id=4)


def test_stitching_layers_of_an_older_version_are_refused(tmp_path: Path) -> None:
    model = make("vit")
    model.save_pretrained(tmp_path)
    old = {
        name.replace(".linear.", ".") if name.startswith("stitching") else name: tensor
        for name, tensor in model.state_dict().items()
    }
    for path in tmp_path.glob("model*"):
        path.unlink()
    save_file(old, tmp_path / "model.safetensors", metadata={"format": "pt"})
    reason = "those of another model, or of an older stitchable"
    with pytest.raises(ValueError, match=reason):
        StitchableForImageClassification.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=reason):
        StitchableForImageClassification.from_pretrained(tmp_path, stitch_id=4)


def test_saving_again_leaves_no_files_of_before(model, tmp_path) -> None:
    for saved, expected in [(model, [*SHARDS, INDEX]), (model.extract(0), ["model.safetensors"])] * 2:
        saved.save_pretrained(tmp_path)
        assert files_of(tmp_path) == expected
        loaded = StitchableForImageClassification.from_pretrained(tmp_path)
        assert loaded.state_dict().keys() == saved.state_dict().keys()


def test_variants_lie_side_by_side(model, tmp_path) -> None:
    model.save_pretrained(tmp_path)
    half = make("vit").to(torch.bfloat16)
    half.save_pretrained(tmp_path, variant="bf16")
    named = ["model-anchor-0.bf16.safetensors", "model-anchor-1.bf16.safetensors"]
    assert set(files_of(tmp_path)) == {
        *(*SHARDS, INDEX, *named, "model-stitching-layers.bf16.safetensors", "model.safetensors.index.bf16.json")
    }
    for arguments in ({}, {"stitch_id": 4}):
        loaded = StitchableForImageClassification.from_pretrained(tmp_path, variant="bf16", **arguments)
        assert loaded.dtype == torch.bfloat16
        assert torch.equal(loaded(images("vit"), stitch_id=4).logits, half(images("vit"), stitch_id=4).logits)


def test_saving_without_a_variant_leaves_the_variant_alone(model, tmp_path) -> None:
    model.save_pretrained(tmp_path, variant="a")
    model.save_pretrained(tmp_path)
    for arguments in ({}, {"variant": "a"}):
        loaded = StitchableForImageClassification.from_pretrained(tmp_path, **arguments)
        assert torch.equal(loaded(images("vit")).logits, model(images("vit")).logits)


def test_a_config_of_ones_own_can_be_restricted_too(model, tmp_path) -> None:
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    alone = StitchableForImageClassification.from_pretrained(tmp_path, config=config, stitch_id=4)
    assert [stitch.id for stitch in alone.stitches] == [4]
    assert alone.config.name_or_path == str(tmp_path)
    assert alone.extract().name_or_path == str(tmp_path)
    assert len(config.stitches) == 9


def test_options_of_a_push_reach_it(model, tmp_path, monkeypatch) -> None:
    pushed = []
    monkeypatch.setattr(type(model), "push_to_hub", lambda self, repo_id, **options: pushed.append((repo_id, options)))
    options = {"private": True, "revision": "dev", "create_pr": True, "commit_message": "x", "token": "t"}
    model.save_pretrained(tmp_path / "name", push_to_hub=True, **options)
    model.save_pretrained(tmp_path / "name", False, push_to_hub=True, repo_id="other")  # not the main process
    assert pushed == [("name", options)]


def test_an_interrupted_save_leaves_the_checkpoint_of_before(model, tmp_path, monkeypatch) -> None:
    model.save_pretrained(tmp_path)
    expected, before = model(images("vit")).logits, files_of(tmp_path)
    written = []

    def fail_at_the_second(*arguments, **kwargs) -> None:
        written.append(arguments)
        if len(written) == 2:
            raise OSError("No space left on device")
        save_file(*arguments, **kwargs)

    randomise(model, seed=5)
    monkeypatch.setattr(shards, "save_file", fail_at_the_second)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(tmp_path)
    assert files_of(tmp_path) == before
    loaded = StitchableForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded(images("vit")).logits, expected)


def test_weights_are_written_once_and_a_model_is_made_once(model, tmp_path, monkeypatch) -> None:
    written, made = [], []
    monkeypatch.setattr(shards, "save_file", lambda x, *rest, **kw: written.extend(x) or save_file(x, *rest, **kw))
    model.save_pretrained(tmp_path)
    assert sorted(written) == sorted(model.state_dict())
    init = StitchableForImageClassification.__init__
    monkeypatch.setattr(StitchableForImageClassification, "__init__", lambda *args: made.append(1) or init(*args))
    StitchableForImageClassification.from_pretrained(tmp_path)
    StitchableForImageClassification.from_pretrained(tmp_path, stitch_id=4)
    assert len(made) == 2


def truncate(folder: Path) -> None:
    content = (folder / SHARDS[1]).read_bytes()
    (folder / SHARDS[1]).write_bytes(content[: len(content) // 2])


def replace_by_another_models(folder: Path) -> None:
    weights = load_file(folder / SHARDS[0])
    (folder / INDEX).unlink()
    save_file({f"backbone.{name}": weight for name, weight in weights.items()}, folder / "model.safetensors")


def drop_a_weight(folder: Path) -> None:
    weights = load_file(folder / SHARDS[1])
    weights.pop("anchors.1.blocks.0.norm1.bias")
    save_file(weights, folder / SHARDS[1], metadata={"format": "pt"})


def point_outside(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    index["weight_map"]["anchors.1.cls_token"] = "../../secret.safetensors"
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")


DAMAGES = [
    (truncate, OSError, f"{SHARDS[1]} is no complete safetensors file .*; download or copy it again"),
    (lambda folder: (folder / SHARDS[1]).write_bytes(b""), OSError, f"{SHARDS[1]} is no complete safetensors file"),
    (lambda folder: (folder / SHARDS[1]).unlink(), OSError, f"{INDEX} of .* names {SHARDS[1]}, which cannot be had"),
    (replace_by_another_models, ValueError, "the weights of .* are those of another model"),
    (drop_a_weight, OSError, f"{SHARDS[1]} lacks 1 weights that {INDEX} places there, e.g. anchors.1.blocks.0.norm1"),
    (point_outside, ValueError, "is no index of weights: it names files of other folders, e.g. '../../secret"),
    (
        lambda folder: (folder / INDEX).write_text("{}", encoding="utf-8"),
        ValueError,
        "is no index of weights: KeyError",
    ),
    (
        lambda folder: (folder / INDEX).write_text('{"weight_map": []}', encoding="utf-8"),
        ValueError,
        "is no index of weights",
    ),
    (lambda folder: (folder / INDEX).write_bytes(b"\xff{"), ValueError, "is no index of weights: UnicodeDecodeError"),
    (lambda folder: (folder / INDEX).unlink(), OSError, "no file named model.safetensors"),
    (lambda folder: (folder / "config.json").unlink(), ValueError, "no config.json of a stitchable"),
]


@pytest.mark.parametrize("arguments", [{}, {"stitch_id": 4}], ids=["whole", "in part"])
@pytest.mark.parametrize(("damage", "error", "message"), DAMAGES)
def test_a_damaged_checkpoint_is_refused_by_name(damage, error, message, arguments, model, tmp_path) -> None:
    model.save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(error, match=message):
        StitchableForImageClassification.from_pretrained(tmp_path, **arguments)
