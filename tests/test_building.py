"""`StitchableConfig.from_anchors`: any order, agreement, defaults, and what it refuses."""

import pytest
import timm
import torch
from safetensors.torch import save_file

from families import FAMILIES, make, randomise
from stitchable import StitchableConfig, StitchableForImageClassification

DEIT = ["deit_base_patch16_224", "deit_tiny_patch16_224", "deit_small_patch16_224"]


def vit(**kwargs: object) -> dict:
    return {"architecture": "vit_tiny_patch16_224", "kwargs": {"depth": 2, "embed_dim": 12, "num_heads": 2, **kwargs}}


def test_anchors_in_any_order_are_sorted_by_flops() -> None:
    config = StitchableConfig.from_anchors(DEIT)
    assert [anchor["architecture"] for anchor in config.anchors] == [DEIT[1], DEIT[2], DEIT[0]]
    assert [anchor["depth"] for anchor in config.anchors] == [12, 12, 12]
    assert (config.num_labels, config.image_size, config.stitch_id) == (1000, [224, 224], 2)
    assert config.id2label[207].startswith("golden retriever")
    assert config.space == {
        "kernel_size": 2,
        "stride": 1,
        "stages": [0],
        "direction": "fast_to_slow",
        "nearest": True,
        "pairs": "all",
    }


def test_kwargs_reach_timm_and_travel_in_the_config(tmp_path) -> None:
    config = make("swin").config
    config.save_pretrained(tmp_path)
    again = StitchableConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert again.anchors[1]["kwargs"] == FAMILIES["swin"].large[1]


def test_an_image_size_reaches_architectures_that_fix_it() -> None:
    config = StitchableConfig.from_anchors([vit(), vit(embed_dim=16)], image_size=64, num_labels=3)
    assert config.anchors[0]["kwargs"]["img_size"] == 64
    assert config.anchors[0]["cuts"][0] == [12, 4, 4]


@pytest.mark.parametrize(
    ("anchors", "settings", "message"),
    [
        (["deit_tini_patch16_224", DEIT[0]], {}, "deit_tiny_patch16_224"),
        (["vgg11", "vgg13"], {}, r"class VGG cannot be stitched yet; supported are ConvNeXt.*register_anchor"),
        (DEIT[:1], {}, "at least two anchors, got 1"),
        (DEIT[0], {}, "at least two anchors, got 1"),
        ([DEIT[0], "deit_base_patch16_384"], {}, r"differ in image_size.*\(384, 384\)"),
        ([DEIT[0], "vit_small_patch16_224"], {}, "differ in image_mean"),
        ([DEIT[0], "deit_tiny_distilled_patch16_224"], {}, "differ in prefix tokens"),
        ([vit(), vit(in_chans=1)], {}, "differ in in_chans"),
        ([vit(num_classes=7), vit()], {}, "cannot hold .*num_classes.*num_labels"),
        ([{"name": "resnet18"}, "resnet50"], {}, "a timm name or"),
        (["resnet18", "resnet50"], {"stages": [9]}, "distinct numbers"),
        ([vit(), vit(embed_dim=16)], {"pairs": "forward", "kernel_size": 1}, "no stitch"),
        ([vit(img_size=32), vit(img_size=32)], {"image_size": 64}, "cannot take images of 3x64x64"),
        ([3, "resnet18"], {}, "the name of a timm model, got 3"),
        (vit(), {}, "at least two anchors, got 1"),
        ([vit(), vit(width=3)], {}, "timm cannot make 'vit_tiny_patch16_224' with .*width"),
        ([vit(), vit(num_heads=5)], {}, "timm cannot make"),
        (["resnet18.no_such_tag", "resnet50"], {}, "timm cannot make|has no model"),
        (["resnet18", "resnet50"], {"kernel_sise": 3}, "no setting 'kernel_sise', did you mean 'kernel_size'"),
        (["resnet18", "resnet50"], {"stages": 1}, "stages must be a list"),
        (["resnet18", "resnet50"], {"image_size": "224"}, "image_size must be pixels"),
        (["resnet18", "resnet50"], {"image_size": -32}, "image_size must be pixels"),
        (["resnet18", "resnet50"], {"num_labels": 0}, "positive number of classes, got 0"),
        (["resnet18", "resnet50"], {"num_labels": "10"}, "positive number of classes, got '10'"),
        (["resnet18", "resnet50"], {"num_labels": 10, "id2label": {0: "a"}}, "id2label names 1 classes"),
    ],
)
def test_what_cannot_be_stitched_is_refused(anchors: list, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StitchableConfig.from_anchors(anchors, **settings)


def test_anchors_with_other_classes_need_num_labels() -> None:
    anchors = ["swin_tiny_patch4_window7_224.ms_in22k", "swin_tiny_patch4_window7_224.ms_in1k"]
    with pytest.raises(ValueError, match="differ in num_labels"):
        StitchableConfig.from_anchors(anchors)
    assert StitchableConfig.from_anchors(anchors, num_labels=7).num_labels == 7


@pytest.mark.parametrize("num_labels", [4, 9])
def test_pretrained_weights_are_timms(num_labels: int, tmp_path) -> None:
    """Timm's own loading code, on weights from a file instead of the Hub."""
    family, sources = [], []
    for width in (8, 12):
        source = randomise(timm.create_model("resnet18", channels=[width] * 4, num_classes=4), seed=width)
        path = tmp_path / f"{width}.safetensors"
        save_file(source.state_dict(), path)
        overlay = {"file": str(path), "num_classes": 4}
        family.append(
            {"architecture": "resnet18", "kwargs": {"channels": [width] * 4, "pretrained_cfg_overlay": overlay}}
        )
        sources.append(source.eval())
    model = StitchableForImageClassification.from_anchors(
        family, pretrained=True, num_labels=num_labels, image_size=32, stages=[0, 1]
    ).eval()
    x = torch.randn(2, 3, 32, 32)
    for index, source in enumerate(sources):
        assert torch.equal(model.anchors[index].forward_features(x), source.forward_features(x))
        assert torch.equal(model(x, stitch_id=index).logits, source(x)) == (num_labels == 4)
    assert model.config.anchors[0]["pretrained"]
