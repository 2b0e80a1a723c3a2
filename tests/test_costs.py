"""FLOPs and parameters against published figures, to the integer."""

import copy

import pytest
import timm
import torch
from torch import nn

import stitchable
from families import FAMILIES, images, make
from stitchable import StitchableConfig, StitchableForImageClassification, update_costs
from stitchable.costs import (
    Cost,
    count_flops,
    flops_of_steps,
    num_shared_steps,
    profile_anchor,
    profile_architecture,
    shared_flops,
)

DEIT = ["deit_tiny_patch16_224", "deit_small_patch16_224", "deit_base_patch16_224"]
SWIN = [f"swin_{size}_patch4_window7_224" for size in ("tiny", "small", "base")]

# fvcore's counts, as in the authors' tables of results (https://github.com/ziplab/SN-Net, stitching_*/results).
ANCHORS = {
    "deit_tiny_patch16_224": 1258411200,
    "deit_small_patch16_224": 4608338304,
    "deit_base_patch16_224": 17582740224,
    "resnet18": 1819065856,
    "resnet50": 4111512576,
    "swin_tiny_patch4_window7_224": 4509194496,
    "levit_192": 661663808,
    "levit_256": 1133412864,
}
SWIN_STITCHES = [
    *[8797436160, 15220458496, 8797436160, 14619249664, 8797436160, 8442491136, 8442491136, 8087546112, 7732601088],
    *[7732601088, 7377656064, 7022711040, 7022711040, 6667766016, 6312820992, 6312820992, 5957875968, 5602930944],
    *[5602930944, 5247985920, 4893040896, 14026420224, 13753964544, 13481508864, 13209053184, 12936597504, 12664141824],
    *[12391686144, 12119230464, 11846774784, 11574319104, 11301863424, 11029407744, 10756952064, 10484496384],
    *[10212040704, 9939585024, 9667129344],
]
RESNET_STITCHES = [
    *[3755463680, 3767505920, 3547935744, 3134686208, 2915718144, 2928161792, 2709193728, 2490225664],
]
RESNET_SWIN_STITCHES = [4095543552, 3730713856, 3375768832, 3252235520, 2897290496, 2542345472]
LEVIT_STITCHES = [1020918272, 977741824, 934565376, 812300576, 791247040, 770193504]
# Without the final norm, which the authors' DeiT stitches leave out.
DEIT_STITCHES = [
    *[4696010496, 4316862720, 4798437888, 4419290112, 4040142336, 4521717504, 4142569728, 3763421952],
    *[4244997120, 3865849344, 3486701568, 3968276736, 3589128960, 3209981184, 3691556352, 3312408576],
    *[2933260800, 3414835968, 3035688192, 2656540416, 3138115584, 2758967808, 2379820032, 2861395200],
    *[2482247424, 2103099648, 2584674816, 2205527040, 1826379264, 2307954432, 1928806656, 1549658880],
    *[2031234048, 1652086272, 17961426432, 16505958912, 18340574208, 16885106688, 15429639168, 17264254464],
    *[15808786944, 14353319424, 16187934720, 14732467200, 13276999680, 15111614976, 13656147456, 12200679936],
    *[14035295232, 12579827712, 11124360192, 12958975488, 11503507968, 10048040448, 11882655744, 10427188224],
    *[8971720704, 10806336000, 9350868480, 7895400960, 9730016256, 8274548736, 6819081216, 8653696512],
    *[7198228992, 5742761472, 7577376768, 6121909248],
]


@pytest.fixture(scope="module")
def deit() -> StitchableConfig:
    return stitchable.make_config(DEIT)


@pytest.mark.parametrize(("name", "flops"), ANCHORS.items())
def test_anchors_cost_what_fvcore_reports(name: str, flops: int) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    profile = profile_anchor(model, (224, 224))
    assert profile.total == Cost(flops, sum(parameter.numel() for parameter in model.parameters()))
    assert model.training  # left as it was


@pytest.mark.parametrize(
    ("anchors", "settings", "flops"),
    [
        (SWIN, {}, SWIN_STITCHES),
        (["resnet18", "resnet50"], {"stages": [1, 2]}, RESNET_STITCHES),
        (["resnet18", SWIN[0]], {"stages": [1, 2]}, RESNET_SWIN_STITCHES),
        (["levit_192", "levit_256"], {}, LEVIT_STITCHES),
    ],
)
def test_stitches_cost_what_the_authors_report(anchors: list[str], settings: dict, flops: list[int]) -> None:
    config = stitchable.make_config(anchors, **settings)
    assert [stitch["flops"] for stitch in config.stitches[len(anchors) :]] == flops


def test_deit_stitches_cost_what_the_authors_report_plus_the_final_norm(deit: StitchableConfig) -> None:
    for stitch, flops in zip(deit.stitches[3:], DEIT_STITCHES, strict=True):
        width = deit.anchors[stitch["route"][-1][0]]["cuts"][-1][0]
        assert stitch["flops"] == flops + 5 * 197 * width, stitch


def test_table_1_of_the_paper(deit: StitchableConfig) -> None:
    """Blocks of Ti, S, B; FLOPs in G; parameters in M of the individually trained networks.

    For (0, 6, 6) and (0, 3, 9) the paper prints 11.2 and 14.3; the authors' own results say 11124360192 and
    14353319424, and so do we (plus the final norm).
    """
    rows = [
        *[(12, 0, 0, "1.3", "5.7"), (9, 3, 0, "2.1", "10.0"), (6, 6, 0, "2.9", "14.0"), (3, 9, 0, "3.8", "18.0")],
        *[(0, 12, 0, "4.6", "22.1"), (0, 9, 3, "7.9", "38.7"), (0, 6, 6, "11.1", "54.6"), (0, 3, 9, "14.4", "70.6")],
        (0, 0, 12, "17.6", "86.6"),
    ]
    for *blocks, flops, params in rows:
        (stitch,) = [stitch for stitch in deit.stitches if _blocks(stitch) == blocks and _is_seamless(stitch)]
        assert f"{stitch['flops'] / 1e9:.1f}" == flops, stitch
        assert f"{stitch['params'] / 1e6:.1f}" == params, stitch


def _blocks(stitch: dict) -> list[int]:
    return [sum(stop - start for anchor, start, stop in stitch["route"] if anchor == index) for index in range(3)]


def _is_seamless(stitch: dict) -> bool:
    route = stitch["route"]
    return len(route) == 1 or route[0][2] == route[1][1]


def test_the_whole_model_has_the_papers_parameters(deit: StitchableConfig) -> None:
    with torch.device("meta"):
        model = StitchableForImageClassification(deit)
    assert f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f}" == "118.4"  # table 1


@pytest.mark.parametrize(
    ("module", "shape", "flops"),
    [
        (nn.Linear(3, 5), (2, 7, 3), 2 * 7 * 3 * 5),
        (nn.Conv2d(4, 6, 3, padding=1, groups=2), (1, 4, 8, 8), 8 * 8 * 6 * (4 // 2) * 9),
        (nn.LayerNorm(6), (2, 6), 5 * 12),
        (nn.LayerNorm(6, elementwise_affine=False), (2, 6), 4 * 12),
        (nn.BatchNorm2d(3).eval(), (2, 3, 4, 4), 2 * 96),
        (nn.GroupNorm(1, 4), (1, 4, 3, 3), 5 * 36),
        (nn.AdaptiveAvgPool2d(1), (1, 4, 3, 3), 36),
        (nn.Sequential(nn.GELU(), nn.Softmax(-1)), (1, 9), 0),
    ],
)
def test_closed_forms(module: nn.Module, shape: tuple[int, ...], flops: int) -> None:
    assert count_flops(module, torch.randn(shape)) == flops


def test_attention_products_are_counted() -> None:
    attention = timm.layers.Attention(8, num_heads=2)
    tokens = 5
    projections, products = tokens * 8 * (3 * 8 + 8), 2 * tokens * tokens * 8
    assert count_flops(attention, torch.randn(1, tokens, 8)) == projections + products


def test_a_stitching_layer_passed_twice_works_twice_but_is_held_once() -> None:
    model = make("vit", direction="both", kernel_size=3, stride=3)
    config = model.config
    there_and_back_and_there = [[0, 0, 1], [1, 0, 1], [0, 1, 2], [1, 1, 3]]
    entry = {"id": 99, "route": there_and_back_and_there, "layers": ["0-1.0", "1-0.0", "0-1.0"]}
    config.stitches.append(entry)
    chained = type(model)(config).eval()
    update_costs(chained)
    stitch = chained.set_stitch(99)
    extracted = chained.extract(99)
    assert stitch.params == sum(parameter.numel() for parameter in extracted.parameters())
    assert stitch.flops == count_flops(extracted, torch.randn(1, 3, 32, 32))


def test_new_classes_are_counted_again() -> None:
    model = make("vit")
    config = model.config
    model.record(4, metrics={"accuracy": 0.9})
    config.num_labels = 50
    wider = type(model)(config)
    before = wider.stitches[4]
    update_costs(wider)
    after = wider.stitches[4]
    assert after.flops - before.flops == 45 * 12
    assert after.params - before.params == 45 * (12 + 1)
    assert after.metrics == {}


@pytest.mark.parametrize(("name", "size"), [("vit", [32, 64]), ("levit", [64, 128]), ("swin", [32, 64])])
def test_images_need_not_be_square(name: str, size: list[int]) -> None:
    anchors = copy.deepcopy(FAMILIES[name].anchors)
    for anchor in anchors:
        anchor["kwargs"]["img_size"] = size
    config = stitchable.make_config(anchors, image_size=size, num_labels=3, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    assert config.anchors[0]["cuts"][0][2] == 2 * config.anchors[0]["cuts"][0][1]
    model = StitchableForImageClassification(config).eval()
    for stitch in model.stitches:
        assert count_flops(model.extract(stitch.id), torch.randn(1, 3, *size)) == stitch.flops


def test_images_of_the_wrong_size_are_named() -> None:
    with pytest.raises(ValueError, match="cannot take images of 3x32x32"):
        profile_anchor(timm.create_model("vit_tiny_patch16_224", depth=1), (32, 32))


@pytest.mark.parametrize("name", ["vit", "vit-registers", "swin", "resnet-swin", "swin-vit-registers", "vit-patches"])
def test_the_steps_of_a_stitch_and_its_head_are_what_it_costs(name: str) -> None:
    model = make(name)
    profiles = [profile_architecture(*described) for described in architectures(model.config)]
    for stitch in model.stitches:
        flops = flops_of_steps(stitch, profiles)
        back = profiles[stitch.route[-1].anchor]
        assert len(flops) == len(model.steps(stitch.id))
        assert sum(flops) + back.head.flops - back.neck_flops == stitch.flops


def architectures(config: StitchableConfig) -> list[tuple]:
    size, channels = config.image_size, config.num_channels
    return [(e["architecture"], e["kwargs"], config.num_labels, size, channels) for e in config.anchors]


@torch.no_grad()
def test_what_two_stitches_share_is_what_the_counter_finds() -> None:
    model = make("vit", nearest=False)
    ids = [stitch.id for stitch in model.stitches]
    shared = shared_flops(model, ids)
    assert shared == [list(column) for column in zip(*shared, strict=True)]
    for first in ids:
        for second in ids:
            steps = model.steps(first)[: num_shared_steps(model.steps(first), model.steps(second))]

            def run(pixel_values: torch.Tensor, steps: tuple = steps) -> torch.Tensor:
                flow = model.start(pixel_values)
                for step in steps:
                    flow = model.run_step(step, flow)
                return flow.features

            assert shared[first][second] == count_flops(run, images("vit", 1)), (first, second)
    assert shared[0][1] == 0  # two anchors share nothing
    assert shared[0][0] < model.stitches[0].flops  # the head is no step
