"""Anchors that differ in stages, grids, sizes and prefix tokens; what cannot be joined."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

import stitchable
from families import images, make
from stitchable import Layout, StitchableConfig, StitchableForImageClassification
from stitchable.initialization import rows_of
from stitchable.model.routes import AnchorShape, Cut, carried_tokens
from stitchable.model.stitching import Side
from stitchable.space import enumerate_stitches

DIRECTIONS = ("fast_to_slow", "slow_to_fast")
PIXELS = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "num_labels": 5}


def config(*anchors: str, **settings) -> StitchableConfig:
    return stitchable.make_config(list(anchors), **PIXELS, **settings)


def staged(*stages: tuple[int, int]) -> AnchorShape:
    """A hierarchical anchor: (blocks, height of the grid) of each stage."""
    cuts = [Cut(8, 2 * stages[0][1], 2 * stages[0][1])]
    for depth, size in stages:
        cuts += [Cut(8, size, size)] * depth
    return AnchorShape(tuple(depth for depth, _ in stages), tuple(cuts), "NCHW")


def plain(depth: int, size: int, *names: str) -> AnchorShape:
    return AnchorShape((depth,), (Cut(8, size, size),) * (depth + 1), "NLC", len(names), names)


def joints(*anchors: AnchorShape, **settings) -> set[tuple[int, int, int, int]]:
    stitches = enumerate_stitches(anchors, **settings)[len(anchors) :]
    return {(s.route[0].anchor, s.route[0].stop, s.route[1].anchor, s.route[1].start) for s in stitches}


def test_a_cnn_and_a_vit_meet_on_their_common_grid() -> None:
    cnn, vit = staged((2, 56), (2, 28), (2, 14), (2, 7)), plain(4, 14, "cls_token")
    # Blocks 4 and 5 of the CNN leave 14x14, so cuts 5 and 6; each meets the two blocks of the ViT nearest to it.
    assert joints(cnn, vit) == {(0, 5, 1, 0), (0, 5, 1, 1), (0, 6, 1, 2), (0, 6, 1, 3)}
    # Back again: the CNN's stage begins with its downsampling (cut 4, 28x28), which no cut of the ViT meets.
    assert joints(cnn, vit, direction="slow_to_fast") == {(1, 3, 0, 5), (1, 4, 0, 5)}


def test_hierarchies_of_different_lengths_meet_grid_by_grid() -> None:
    levit, swin = staged((2, 14), (2, 7)), staged((2, 56), (2, 28), (2, 14), (2, 7))
    assert joints(levit, swin) == {(0, 1, 1, 5), (0, 3, 1, 7)}
    assert joints(levit, swin, stages=[0]) == {(0, 1, 1, 5)}
    # Three anchors: each pair where it meets.
    three = joints(levit, swin, plain(2, 14))
    assert {(front, back) for front, _, back, _ in three} == {(0, 1), (1, 2)}


def test_stages_of_single_blocks_are_joined_at_their_ends() -> None:
    small, large = staged((1, 16), (1, 8), (1, 4)), staged((1, 16), (3, 8), (1, 4))
    assert joints(small, large) == {(0, 1, 1, 1), (0, 2, 1, 2), (0, 2, 1, 3)}


def test_resizing_joins_the_nearest_stages_but_never_before_a_downsampling() -> None:
    with pytest.raises(ValueError, match=r"meet nowhere.*14x14 and 7x7.*resize='bilinear'"):
        joints(plain(2, 14), plain(2, 7))
    assert joints(plain(2, 14), plain(2, 7), resize="bilinear") == joints(plain(2, 7), plain(2, 7))
    cnn, vit = staged((2, 60), (2, 30), (2, 15)), plain(2, 16)
    assert joints(cnn, vit, resize="bilinear") == {(0, 5, 1, 0), (0, 5, 1, 1), (0, 6, 1, 0), (0, 6, 1, 1)}
    assert joints(cnn, vit, resize="bilinear", direction="slow_to_fast") == {(1, 1, 0, 5), (1, 2, 0, 5)}


def test_resizing_meets_on_the_same_stages_in_both_directions() -> None:
    small, large = staged((2, 14), (2, 7)), staged((2, 16), (2, 10))
    forth, back = (joints(small, large, resize="bilinear", stages=[1], direction=d) for d in DIRECTIONS)
    assert forth
    assert back
    # Two stages of one anchor may be nearest to the same stage of the other.
    assert {
        stop for _, stop, _, _ in joints(staged((2, 28), (2, 14)), staged((2, 12), (2, 7), (2, 3)), resize="bilinear")
    } == {
        1,
        3,
    }


def test_least_squares_pairs_tokens_by_name() -> None:
    x = torch.randn(2, 2 + 16, 3)
    side = Side(3, Layout.NLC, (4, 4), 2)
    rows = rows_of(x, side, (1, 0), (4, 4)).unflatten(0, (2, 18))
    assert torch.equal(rows, x[:, [1, 0, *range(2, 18)]])


def test_prefix_tokens_are_matched_by_name() -> None:
    registers = plain(2, 4, "reg_token", "reg_token")
    distilled = plain(2, 4, "cls_token", "dist_token")
    both = plain(2, 4, "cls_token", "reg_token", "reg_token", "reg_token")
    assert carried_tokens(distilled, both) == (0, None, None, None)
    assert carried_tokens(registers, both) == (None, 0, 1, None)
    assert carried_tokens(both, distilled) == (0, None)
    assert carried_tokens(both, staged((1, 4))) == ()
    # Configs written before names were kept.
    unnamed = AnchorShape((1,), (Cut(8, 4, 4),) * 2, "NLC", prefix_tokens=1)
    assert carried_tokens(unnamed, unnamed) == (0,)


def test_sizes_are_brought_together_or_refused() -> None:
    made = config("deit_tiny_patch16_224", "test_convnext", image_size=96)
    assert [anchor["kwargs"] for anchor in made.anchors] == [{}, {"img_size": 96}]
    assert made.anchors[1]["cuts"][0][1:] == [6, 6]
    with pytest.raises(ValueError, match=r"differ in image_size: deit_tiny_patch16_224 \(224, 224\), test_convnext"):
        config("deit_tiny_patch16_224", "test_convnext")
    with pytest.raises(ValueError, match=r"'efficientformer_l1': .* cannot take images of 3x256x256"):
        config("efficientformer_l1", "resnet18", image_size=256)
    with pytest.raises(ValueError, match=r"vit_tiny_patch16_224.* (multiple|divisible)|cannot take images of 3x10x10"):
        config("vit_tiny_patch16_224", "resnet18", image_size=10)


def test_mask_units_meet_only_mask_units() -> None:
    with pytest.raises(ValueError, match="order of mask units"):
        config("hiera_tiny_224", "deit_tiny_patch16_224", image_size=224, resize="bilinear")


def test_tokens_that_no_one_can_provide_are_refused() -> None:
    """PiT's class token has the width of its first stage; a later one can only be entered by who brings one."""
    pit, cnn = config("pit_ti_224", "pit_xs_224", image_size=64), make("resnet").config
    anchors = [{**pit.anchors[0]}, cnn.anchors[0]]
    depths, cuts = [anchor["depth"] for anchor in anchors], [anchor["cuts"] for anchor in anchors]
    stop, start = next(
        (stop, start)
        for start in range(3, depths[0])
        for stop in range(1, depths[1] + 1)
        if cuts[0][start][1:] == cuts[1][stop][1:]
    )
    stitches = [
        {"id": 0, "route": [[0, 0, depths[0]]]},
        {"id": 1, "route": [[1, 0, depths[1]]]},
        {"id": 2, "route": [[1, 0, stop], [0, start, depths[0]]], "layers": ["1-0.0"]},
    ]
    made = StitchableConfig(anchors=anchors, stitches=stitches, image_size=[64, 64], num_labels=5)
    with pytest.raises(ValueError, match=r"stitches.2.: .*needs 1 prefix tokens .* channels of its stem"):
        StitchableForImageClassification(made)


@torch.no_grad()
def test_every_stitch_of_a_mixed_family_is_independent_of_the_others_in_its_batch() -> None:
    """Own class tokens and contexts are per image: a batch of two gives what two batches of one give."""
    for name in ("resnet-vit", "swin-vit-registers", "vit-patches"):
        model, x = make(name), images(name)
        for stitch in model.stitches:
            alone = torch.cat([model(x[i : i + 1], stitch_id=stitch.id).logits for i in range(2)])
            torch.testing.assert_close(model(x, stitch_id=stitch.id).logits, alone, rtol=1e-4, atol=1e-5)


def test_weights_of_another_input_size_are_resampled_as_timm_does(tmp_path: Path) -> None:
    name, kwargs = "vit_tiny_patch16_224", {"patch_size": 8, "depth": 2, "num_heads": 2, "num_classes": 5}
    files = {}
    for width, size in ((8, 32), (12, 48)):
        torch.manual_seed(width)
        files[width] = tmp_path / f"{width}.safetensors"
        save_file(timm.create_model(name, img_size=size, embed_dim=width, **kwargs).state_dict(), files[width])
    del kwargs["num_classes"]
    anchors = [
        {"architecture": name, "kwargs": {**kwargs, "embed_dim": width}, "weights": file}
        for width, file in files.items()
    ]
    model = stitchable.from_anchors(anchors, image_size=48, **PIXELS).eval()
    overlay = {"file": str(files[8]), "num_classes": 5}
    twin = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=5, img_size=48, embed_dim=8, **kwargs
    ).eval()
    x = torch.randn(2, 3, 48, 48)
    assert twin.pos_embed.shape[1] == 37
    assert torch.equal(model(x, stitch_id=0).logits, twin(x))
