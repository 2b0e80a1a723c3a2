"""Checkpoints in the authors' layout: every stitch against a composition written out after their code, quirks included.

Their code is https://github.com/ziplab/SN-Net; what is written here is a description of what it computes.
"""

import argparse
from dataclasses import replace

import pytest
import timm
import torch
from torch import nn

import stitchable
from families import FAMILIES, randomise
from stitchable import StitchableForImageClassification, conversion
from stitchable.conversion import RELEASES, convert
from stitchable.costs import update_costs
from test_costs import DEIT_STITCHES, SWIN, SWIN_STITCHES

NUM_LABELS = 5


def anchors_of(name: str) -> list[dict]:
    return FAMILIES[name].anchors


def make_anchors(name: str) -> list[nn.Module]:
    return [
        randomise(timm.create_model(a["architecture"], num_classes=NUM_LABELS, **a["kwargs"]), seed).eval()
        for seed, a in enumerate(anchors_of(name))
    ]


def linear(front: int, back: int, seed: int, conv: bool = False) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(back, front, generator=generator) / front**0.5
    weight = weight[:, :, None, None] if conv else weight
    return {"transform.weight": weight, "transform.bias": torch.randn(back, generator=generator)}


def as_swin_was(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names of Microsoft's Swin: the downsampling at the end of a stage, the classifier without a name of its own."""
    renamed = {}
    for name, tensor in state.items():
        if ".downsample." in name:
            stage = int(name.split(".")[1])
            name = name.replace(f"layers.{stage}.", f"layers.{stage - 1}.")
        renamed[name.replace("head.fc.", "head.")] = tensor
    renamed["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(3, 3, dtype=torch.int64)
    return renamed


def release(name: str, monkeypatch, **changes) -> None:
    monkeypatch.setitem(RELEASES, name, replace(RELEASES[name], **changes))


@torch.no_grad()
def test_deit_without_the_final_norm(tmp_path, monkeypatch) -> None:
    tiny, small = make_anchors("vit")
    x = torch.randn(2, 3, 32, 32)
    # Windows of two blocks, one further each: the layer of a position is its first window's.
    positions = [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (2, 1), (2, 2)]
    layer_of = [0, 0, 0, 0, 1, 1, 1]
    layers = [linear(8, 12, seed) for seed in range(2)]
    weights = {
        f"anchors.{i}.{key}": value for i, m in enumerate((tiny, small)) for key, value in m.state_dict().items()
    }
    weights |= {f"stitch_layers.0.{i}.{key}": value for i, layer in enumerate(layers) for key, value in layer.items()}
    torch.save({"model": weights, "args": argparse.Namespace(lr=0.1), "epoch": 3}, tmp_path / "their.pth")
    model = convert(tmp_path / "their.pth", "deit", anchors_of("vit"))
    assert torch.equal(model(x, stitch_id=0).logits, tiny(x))
    assert torch.equal(model(x, stitch_id=1).logits, small(x))
    assert len(model.stitches) == 2 + len(positions)
    for stitch, (j, k), number in zip(model.stitches[2:], positions, layer_of, strict=True):
        features = tiny.norm_pre(tiny.patch_drop(tiny._pos_embed(tiny.patch_embed(x))))
        for block in tiny.blocks[: j + 1]:
            features = block(features)
        features = features @ layers[number]["transform.weight"].T + layers[number]["transform.bias"]
        for block in small.blocks[k:]:
            features = block(features)
        expected = small.head(features[:, 0])  # no final norm
        torch.testing.assert_close(model(x, stitch_id=stitch.id).logits, expected, rtol=1e-4, atol=1e-5)

    model.save_pretrained(tmp_path / "ours")
    again = type(model).from_pretrained(tmp_path / "ours", stitch_id=4)
    torch.testing.assert_close(again(x).logits, model(x, stitch_id=4).logits)
    assert again.stitch.skips_neck


@torch.no_grad()
def test_swin_with_the_layer_that_their_enumeration_assigns(tmp_path, monkeypatch) -> None:
    small, large = make_anchors("swin")  # stages of 2, 2, 2 and 2, 6, 2 blocks; the last is not stitched
    release("swin", monkeypatch, stages=(0, 1))
    x = torch.randn(2, 3, 32, 32)
    # Stage 0, equal depth: (0, 1) alone has j < k. Stage 1: blocks 0, 1 are nearest to back blocks 0..2, 3..5; the
    # positions with j < k are below, and each takes the layer at its place in the list 0, 0, 0, 1, 1, 1.
    positions = [(0, 0, 1), (1, 0, 1), (1, 0, 2), (1, 1, 3), (1, 1, 4), (1, 1, 5)]
    layer_of = [0, 0, 0, 0, 1, 1]
    layers = {(0, 0): linear(8, 12, 1), (1, 0): linear(16, 24, 2), (1, 1): linear(16, 24, 3)}
    weights = {f"anchors.0.{key}": value for key, value in as_swin_was(small.state_dict()).items()}
    weights |= {f"anchors.1.{key}": value for key, value in as_swin_was(large.state_dict()).items()}
    for (stage, number), layer in layers.items():
        weights |= {f"stitch_layers.{stage}.0.{number}.{key}": value for key, value in layer.items()}
    torch.save({"model": weights}, tmp_path / "their.pth")
    model = convert(tmp_path / "their.pth", "swin", anchors_of("swin"))
    assert len(model.stitches) == 2 + len(positions)
    assert torch.equal(model(x, stitch_id=1).logits, large(x))
    for stitch, (stage, j, k), number in zip(model.stitches[2:], positions, layer_of, strict=True):
        features = small.patch_embed(x)
        for index in range(stage + 1):
            blocks = small.layers[index].blocks[: j + 1] if index == stage else small.layers[index].blocks
            features = blocks(small.layers[index].downsample(features))
        layer = layers[stage, number]
        features = features @ layer["transform.weight"].T + layer["transform.bias"]
        features = large.layers[stage].blocks[k:](features)
        for further in large.layers[stage + 1 :]:
            features = further(features)
        expected = large.forward_head(large.norm(features))
        torch.testing.assert_close(model(x, stitch_id=stitch.id).logits, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_resnets_with_convolutions_and_lists_that_begin_at_the_second_stage(tmp_path, monkeypatch) -> None:
    small, large = make_anchors("resnet")  # stages of 2, 2, 2, 1 and 2, 4, 3, 1 blocks
    x = torch.randn(2, 3, 32, 32)
    # Nearest blocks of stage 1: 0, 0, 1, 1; of stage 2: 0, 0, 1. Positions with j < k, layers by place in these lists.
    positions = [(1, 0, 1), (1, 1, 2), (1, 1, 3), (2, 0, 1), (2, 1, 2)]
    layer_of = [0, 0, 1, 0, 0]
    widths = {1: (8, 32), 2: (12, 48)}
    layers = {(stage, n): linear(*widths[stage], seed=10 * stage + n, conv=True) for stage in (1, 2) for n in (0, 1)}
    weights = {f"anchors.{i}.{k}": v for i, m in enumerate((small, large)) for k, v in m.state_dict().items()}
    for (stage, number), layer in layers.items():
        weights |= {f"stitch_layers.{stage - 1}.0.{number}.{key}": value for key, value in layer.items()}
    torch.save({"state_dict": weights}, tmp_path / "their.pth.tar")
    model = convert(tmp_path / "their.pth.tar", "resnet", anchors_of("resnet"))
    assert len(model.stitches) == 2 + len(positions)
    for stitch, (stage, j, k), number in zip(model.stitches[2:], positions, layer_of, strict=True):
        features = small.maxpool(small.act1(small.bn1(small.conv1(x))))
        stages = [small.layer1, small.layer2, small.layer3]
        for index in range(stage + 1):
            features = (stages[index][: j + 1] if index == stage else stages[index])(features)
        layer = layers[stage, number]
        features = nn.functional.conv2d(features, layer["transform.weight"], layer["transform.bias"])
        stages = [large.layer1, large.layer2, large.layer3, large.layer4]
        features = stages[stage][k:](features)
        for further in stages[stage + 1 :]:
            features = further(features)
        expected = large.forward_head(features)
        torch.testing.assert_close(model(x, stitch_id=stitch.id).logits, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_levit_by_the_order_of_its_weights(tmp_path) -> None:
    small, large = make_anchors("levit")
    x = torch.randn(2, 3, 64, 64)
    weights = {}
    for number, anchor in enumerate((small, large)):
        for place, (name, tensor) in enumerate(anchor.state_dict().items()):
            is_last = name == "head.linear.weight"
            theirs = "head.l.weight" if is_last else f"blocks.{place}.{name.split('.')[-1]}"
            weights[f"anchors.{number}.{theirs}"] = tensor
        weights[f"anchors.{number}.blocks.0.m.attention_bias_idxs"] = torch.zeros(4, 4, dtype=torch.int64)
    for stage, widths in enumerate([(8, 12), (16, 24)]):
        for index in range(2):
            layer = linear(*widths, seed=stage)
            weights |= {f"stitch_layers.{stage}.0.{index}.{key}": value for key, value in layer.items()}
    torch.save({"model": weights}, tmp_path / "their.pth")
    model = convert(tmp_path / "their.pth", "levit", anchors_of("levit"))
    for index, anchor in enumerate((small, large)):
        torch.testing.assert_close(model(x, stitch_id=index).logits, anchor(x))
    layer = model.get_stitching_layer(model.stitches[2].layers[0])
    assert torch.equal(layer.linear.weight, linear(8, 12, 0)["transform.weight"])


@pytest.mark.slow
def test_the_released_families_cost_what_the_authors_report() -> None:
    """At full size, on the meta device: FLOPs to the integer, and the layers of Swin's unpaired stage."""
    deit = stitchable.make_config(list(RELEASES["deit"].anchors))
    for entry in deit.stitches[3:]:
        entry["skips_neck"] = True
    with torch.device("meta"):
        model = StitchableForImageClassification(deit)
    update_costs(model)
    assert [stitch.flops for stitch in model.stitches[3:]] == DEIT_STITCHES

    swin = stitchable.make_config(SWIN)
    assert [entry["flops"] for entry in swin.stitches[3:]] == SWIN_STITCHES
    layers = conversion.their_layers(swin, RELEASES["swin"].stages)
    unpaired = [layers[entry["id"]] for entry in swin.stitches if layers.get(entry["id"], ("",))[0] == "2.0"]
    # 6 blocks against 18: the list 0, 0, 0, 1, 1, 1, ... against the 17 positions with j < k.
    assert unpaired == [("2.0", number // 3) for number in range(17)]


class Harmful:
    def __reduce__(self):
        return print, ("code ran",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": {"weight": torch.zeros(1)}}, "has no weights anchors.*; it has weight"),
        (
            {"model": {"anchors.0.cls_token": torch.zeros(1)}},
            r"has no weights anchors.1.\*; it has anchors.0.cls",
        ),
        ({"model": {f"anchors.{i}.a": torch.zeros(1) for i in (0, 1)}}, "the largest anchor has no classifier"),
        ({"model": {f"anchors.{i}.head.weight": torch.zeros(5, 2) for i in (0, 1)}}, "do not fit"),
        ({"model": Harmful()}, "is no checkpoint that can be read without running its code"),
        ([1, 2], "holds a list, not weights by name"),
        (b"nothing", "is no checkpoint that can be read without running its code"),
        (None, "cannot be read: .*No such file"),
    ],
)
def test_what_is_no_checkpoint_of_theirs_is_refused(content, message, tmp_path, capsys) -> None:
    path = tmp_path / "their.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(ValueError, match=message):
        convert(path, "deit", anchors_of("vit"))
    assert "code ran" not in capsys.readouterr().out


def test_a_missing_or_wrong_stitching_layer_is_named(tmp_path) -> None:
    anchors = make_anchors("vit")
    weights = {f"anchors.{i}.{k}": v for i, m in enumerate(anchors) for k, v in m.state_dict().items()}
    weights |= {f"stitch_layers.0.0.{key}": value for key, value in linear(8, 12, 0).items()}
    torch.save(weights, tmp_path / "their.pth")
    with pytest.raises(ValueError, match=r"lacks stitch_layers.0.1.transform.weight; it has 0.0.transform.weight, "):
        convert(tmp_path / "their.pth", "deit", anchors_of("vit"))
    weights |= {f"stitch_layers.0.1.{key}": value for key, value in linear(9, 12, 0).items()}
    torch.save(weights, tmp_path / "their.pth")
    with pytest.raises(ValueError, match="do not fit these anchors"):
        convert(tmp_path / "their.pth", "deit", anchors_of("vit"))
    with pytest.raises(ValueError, match="the authors released deit, swin"):
        convert(tmp_path / "their.pth", "vit")
    with pytest.raises(ValueError, match=r"do not fit|order of their FLOPs"):
        convert(tmp_path / "their.pth", "deit", anchors_of("vit")[::-1])
