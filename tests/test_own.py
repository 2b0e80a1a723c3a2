"""What belongs to one stitch alone: it changes nothing else, and is the same wherever the stitch goes."""

import copy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime
import peft
import pytest
import torch
from accelerate import cpu_offload
from safetensors.torch import load_file

import stitchable
from families import FAMILIES, WITH_STREAMS, images, make, randomise
from stitchable import StitchableConfig, StitchableForImageClassification
from stitchable.evaluation import run_stitches
from stitchable.export import export_onnx
from stitchable.model.own import is_norm
from stitchable.model.routes import Cascade, Stage, Stitch
from stitchable.model.schema import write

Model = StitchableForImageClassification
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}


@torch.no_grad()
def logits_of(model: Model, name: str) -> dict[int, torch.Tensor]:
    return {stitch.id: model(images(name), stitch_id=stitch.id).logits for stitch in model.stitches}


def with_own(name: str, number: int = 3, rank: int = 2) -> tuple[Model, list[int]]:
    """A model of which the first stitches that are no anchors have random parameters of their own."""
    model = make(name)
    ids = [stitch.id for stitch in model.stitches if not stitch.is_anchor][:number]
    for stitch_id in ids:
        model.give_own(stitch_id, rank)
    randomise(model.own, 5)
    return model, ids


@pytest.mark.parametrize("name", [*FAMILIES, *WITH_STREAMS])
@torch.no_grad()
def test_what_is_its_own_changes_one_stitch_and_is_extracted_exactly(name: str) -> None:
    model = make(name)
    before, weights = logits_of(model, name), copy.deepcopy(model.state_dict())
    ids = [stitch.id for stitch in model.stitches if not stitch.is_anchor][:2]
    for stitch_id in ids:
        model.give_own(stitch_id, 2)
    for stitch_id, logits in logits_of(model, name).items():  # nothing is added at first
        torch.testing.assert_close(logits, before[stitch_id], **CLOSE)
    randomise(model.own, 5)
    after = logits_of(model, name)
    for stitch_id in before:
        assert torch.equal(before[stitch_id], after[stitch_id]) == (stitch_id not in ids)
    for stitch_id in ids:
        alone = model.extract(stitch_id)
        assert alone.stitch.own is None
        assert not len(alone.own)
        torch.testing.assert_close(alone(images(name)).logits, after[stitch_id], **CLOSE)
    for stitch_id, logits in run_stitches(model, images(name), list(before)):  # shared beginnings stay right
        torch.testing.assert_close(logits, after[stitch_id], **CLOSE)
    assert all(torch.equal(model.state_dict()[key], weights[key]) for key in weights)


@torch.no_grad()
def test_it_is_the_composition_written_out() -> None:
    model, (stitch_id, *_) = with_own("resnet", 1)
    stitch, own = model.stitches[stitch_id], model.own[str(stitch_id)]
    front, back = stitch.route
    small, large = (copy.deepcopy(model.anchors[index]) for index in (front.anchor, back.anchor))
    for name, key in own.places.items():
        assert name.startswith(f"anchors.{back.anchor}.")
        parent, _, attribute = name.removeprefix(f"anchors.{back.anchor}.").rpartition(".")
        setattr(large.get_submodule(parent), attribute, own.norms[key])
    x, layer = images("resnet"), model.get_stitching_layer(stitch.layers[0]).linear
    x = small.maxpool(small.act1(small.bn1(small.conv1(x))))
    blocks = [[b for stage in (m.layer1, m.layer2, m.layer3, m.layer4) for b in stage] for m in (small, large)]
    for block in blocks[0][: front.stop]:
        x = block(x)
    update = own.layers[stitch.layers[0].replace(".", "-")]
    rows = x.permute(0, 2, 3, 1)
    weight = update.down if update.up is None else update.up @ update.down
    x = (rows @ (layer.weight + weight).T + layer.bias + update.bias).permute(0, 3, 1, 2)
    for block in blocks[1][back.start :]:
        x = block(x)
    torch.testing.assert_close(model(images("resnet"), stitch_id=stitch_id).logits, large.forward_head(x), **CLOSE)


def test_only_norms_behind_the_first_joint_are_its_own() -> None:
    model, (stitch_id, *_) = with_own("vit", 1)
    (_, stop), back = model.stitches[stitch_id].route[0][1:], model.stitches[stitch_id].route[1]
    blocks = range(back.start, back.stop)
    names = {f"anchors.1.blocks.{block}.{norm}" for block in blocks for norm in ("norm1", "norm2")}
    assert set(model.own[str(stitch_id)].places) == {*names, "anchors.1.norm"}
    own = [step.own for step in model.steps(stitch_id)]
    assert own == [-1] * (1 + stop) + [stitch_id] * (len(own) - 1 - stop)
    assert all(isinstance(norm, torch.nn.LayerNorm) for norm in model.own[str(stitch_id)].norms.values())
    assert not is_norm(model.anchors[1].blocks[0])


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_it_is_saved_in_a_shard_of_its_own_and_loaded_in_part(name: str, tmp_path: Path) -> None:
    model, ids = with_own(name)
    expected = logits_of(model, name)
    model.save_pretrained(tmp_path)
    shard = load_file(tmp_path / "model-own.safetensors")
    assert set(shard) == {key for key in model.state_dict() if key.startswith("own.")}
    whole = Model.from_pretrained(tmp_path)
    assert [stitch.own for stitch in whole.stitches] == [stitch.own for stitch in model.stitches]
    for stitch_id, logits in logits_of(whole, name).items():
        torch.testing.assert_close(logits, expected[stitch_id], **CLOSE)
    part = Model.from_pretrained(tmp_path, stitch_id=ids[1])
    assert set(part.own) == {str(ids[1])}
    torch.testing.assert_close(logits_of(part, name)[ids[1]], expected[ids[1]], **CLOSE)
    anchor = Model.from_pretrained(tmp_path, stitch_id=1)
    assert not len(anchor.own)
    torch.testing.assert_close(logits_of(anchor, name)[1], expected[1], **CLOSE)
    for stitch_id in ids:
        whole.give_own(stitch_id, None)
    whole.save_pretrained(tmp_path)
    assert not (tmp_path / "model-own.safetensors").exists()


@torch.no_grad()
def test_a_cascade_of_such_stitches_is_extracted_with_them() -> None:
    model, ids = with_own("vit", 2)
    a, b = sorted(ids, key=lambda stitch_id: model.stitches[stitch_id].flops or 0)
    stages = (Stage(a, 1.0, "max_probability", 0.3), Stage(b, 1.0))
    model.cascades = [write(Cascade(0, stages, 1.0, 2.0))]
    x = images("vit", 16)
    given, alone = model(x, cascade=0), model.extract(cascade=0)
    assert set(alone.own) == {str(a), str(b)}
    assert set(given.stitch_ids.tolist()) == {a, b}
    torch.testing.assert_close(alone(x).logits, given.logits, **CLOSE)
    for index, stitch_id in enumerate(given.stitch_ids.tolist()):
        torch.testing.assert_close(given.logits[index], model(x, stitch_id=stitch_id).logits[index], **CLOSE)


def test_it_is_exported(tmp_path: Path) -> None:
    model, (stitch_id, *_) = with_own("resnet", 1)
    session = onnxruntime.InferenceSession(export_onnx(model, tmp_path / "onnx", [stitch_id])[stitch_id])
    (logits,) = session.run(None, {"pixel_values": images("resnet").numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), logits_of(model, "resnet")[stitch_id], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["vit", "resnet", "levit"])
@torch.no_grad()
def test_it_follows_weights_wherever_they_go(name: str) -> None:
    """Views share tensors: whether those are replaced, or what they hold is, a stitch must run what extract takes."""
    model, (stitch_id, *_) = with_own(name, 1)
    x = images(name)

    def check(same_as: torch.Tensor | None = None) -> None:
        given = model(x.to(model.dtype), stitch_id=stitch_id).logits
        torch.testing.assert_close(given, model.extract(stitch_id)(x.to(model.dtype)).logits, rtol=1e-3, atol=1e-4)
        assert same_as is None or torch.equal(given, same_as)

    check()
    model.double()
    check()
    model.to("meta").to_empty(device="cpu")  # parameters are other objects now
    other, _ = with_own(name, 1)
    randomise(other, 9).double()
    model.load_state_dict(other.state_dict())
    model.load_state_dict(randomise(other, 11).state_dict(), assign=True)
    other.train().eval()  # LeViT keeps what it computes of its weights
    model.train().eval()
    for module, source in zip(model.modules(), other.modules(), strict=True):
        for key, buffer in source.named_buffers(recurse=False):  # those that no checkpoint holds
            module.register_buffer(key, buffer, persistent=key not in module._non_persistent_buffers_set)
    check(other(x.double(), stitch_id=stitch_id).logits)
    twin = copy.deepcopy(model)
    expected = twin(x.double(), stitch_id=stitch_id).logits
    randomise(model, 13)
    model.train().eval()
    check()
    assert torch.equal(twin(x.double(), stitch_id=stitch_id).logits, expected)  # it shares nothing with the other


def test_training_mode_is_followed() -> None:
    model, (stitch_id, *_) = with_own("vit", 1)
    model.anchors[1].blocks[-1].drop_path1 = torch.nn.Dropout(0.9).eval()
    x = images("vit")
    assert torch.equal(model(x, stitch_id=stitch_id).logits, model(x, stitch_id=stitch_id).logits)
    model.train()
    assert not torch.equal(model(x, stitch_id=stitch_id).logits, model(x, stitch_id=stitch_id).logits)


@torch.no_grad()
def test_threads_run_different_stitches_at_the_same_time() -> None:
    model, ids = with_own("resnet", 6)
    expected = logits_of(model, "resnet")
    with ThreadPoolExecutor(8) as pool:
        run = partial(model, images("resnet"))
        for _ in range(5):
            jobs = {stitch_id: pool.submit(run, stitch_id=stitch_id) for stitch_id in [*expected, *ids]}
            for stitch_id, job in jobs.items():
                assert torch.equal(job.result().logits, expected[stitch_id])


@torch.no_grad()
def test_compiled_blocks_are_shared_and_run_its_norms() -> None:
    model, ids = with_own("vit", 3)
    expected, compiled = logits_of(model, "vit"), []
    model.compile_blocks(backend=lambda graph, _: compiled.append(1) or graph.forward)
    for anchor in (0, 1):
        model(images("vit"), stitch_id=anchor)
    number = len(compiled)
    assert number
    for stitch_id, logits in logits_of(model, "vit").items():
        torch.testing.assert_close(logits, expected[stitch_id], **CLOSE)
    assert len(compiled) == number  # the blocks of a stitch's own share the code of the anchors'
    assert torch.equal(model.extract(ids[0])(images("vit")).logits, model.extract(ids[0])(images("vit")).logits)


@torch.no_grad()
def test_offloaded_weights_run_its_norms_and_are_not_extracted() -> None:
    for name in ("vit", "resnet", "convnext"):
        model, ids = with_own(name)
        expected = logits_of(model, name)
        offloaded = cpu_offload(model, execution_device=torch.device("cpu"))
        for stitch_id in expected:
            torch.testing.assert_close(
                offloaded(images(name), stitch_id=stitch_id).logits, expected[stitch_id], **CLOSE
            )
        with pytest.raises(ValueError, match="offloaded"):
            offloaded.extract(ids[0])


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@torch.no_grad()
def test_adapters_of_peft_hold_for_it_too() -> None:
    model, (stitch_id, *_) = with_own("vit", 1)
    before = logits_of(model, "vit")[stitch_id]
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", init_lora_weights=False))
    given = adapted(images("vit"), stitch_id=stitch_id).logits
    assert not torch.allclose(given, before, atol=1e-3)
    with pytest.raises(ValueError, match="cannot be taken over exactly"):
        adapted.base_model.model.extract(stitch_id)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(images("vit"), stitch_id=stitch_id).logits, given, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(merged.extract(stitch_id)(images("vit")).logits, given, rtol=1e-3, atol=1e-4)


def test_what_was_replaced_is_refused() -> None:
    model, (stitch_id, *_) = with_own("vit", 1)
    x, block = images("vit"), model.anchors[1].blocks[-1]
    model.anchors[1].blocks[-1] = copy.deepcopy(block)
    with pytest.raises(ValueError, match="was replaced, so a stitch with norms of its own cannot run it"):
        model(x, stitch_id=stitch_id)
    model.anchors[1].blocks[-1] = block
    block.forward = partial(type(block).forward, block)
    with pytest.raises(ValueError, match="the forward of a Block was replaced"):
        model(x, stitch_id=stitch_id)
    model(x, stitch_id=1)


def test_bad_input() -> None:
    model, (stitch_id, *_) = with_own("vit", 1)
    with pytest.raises(ValueError, match="stitch 0 is an anchor, without a joint"):
        model.give_own(0, 2)
    with pytest.raises(ValueError, match="rank of what a stitch has of its own must be at least 1, got 0"):
        model.give_own(stitch_id, 0)
    with pytest.raises(ValueError, match=r"stitch 2 has Own\(rank=2\) already, not Own\(rank=3\)"):
        model.give_own(stitch_id, 3)
    with pytest.raises(ValueError, match="out of range"):
        model.give_own(99, 2)
    entry = model.stitches[stitch_id].to_dict()
    with pytest.raises(ValueError, match=r"a stitch.own has no 'ranks'; did you mean 'rank'\?"):
        Stitch.from_dict({**entry, "own": {"ranks": 3}})


def test_a_family_without_norms_is_refused() -> None:
    config = stitchable.make_config(["resmlp_12_224", "resmlp_24_224"], pretrained=False)
    with torch.device("meta"):
        model = Model(config)
    with pytest.raises(ValueError, match="stitch 2: there is no norm behind its first joint"):
        model.give_own(2, 2)


def test_a_block_before_and_behind_the_joint_is_refused() -> None:
    model = make("vit", direction="both")
    forward, backward = (
        next(stitch for stitch in model.stitches if stitch.layers and stitch.layers[0].startswith(pair))
        for pair in ("0-1", "1-0")
    )
    route = ((0, 0, 2), (1, 1, 2), (0, 1, 3))
    stitch = replace(forward, id=99, route=route, layers=(forward.layers[0], backward.layers[0])).to_dict()
    config = StitchableConfig(
        **{**model.config.to_dict(), "stitches": [{**stitch, "own": {"rank": 2}}], "stitch_id": 99}
    )
    with pytest.raises(ValueError, match=r"anchors.0.blocks.1.norm1 is run before and behind"):
        Model(config)


def test_the_size_of_what_is_its_own() -> None:
    """DeiT-Ti/S/B, 71 stitches: what all of them have of their own, of the default rank, is below 2 % of the rest."""
    from stitchable.training.own import Teaching

    names = [f"deit_{size}_patch16_224" for size in ("tiny", "small", "base")]
    config = stitchable.make_config(names, pretrained=False)
    for entry in config.stitches[3:]:
        entry["own"] = {"rank": Teaching.rank}
    with torch.device("meta"):
        model = Model(config)
    own = sum(parameter.numel() for parameter in model.own.parameters())
    assert len(model.own) == 68
    assert 0.01 < own / sum(p.numel() for n, p in model.named_parameters() if not n.startswith("own.")) < 0.02
