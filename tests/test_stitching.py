"""Stitching layers between any two layouts."""

import pytest
import timm
import torch
from timm.models.resnet import ResNet
from timm.models.vgg import VGG

from families import images, make
from stitchable import Adapter, Layout, StitchableConfig, StitchableForImageClassification, register_anchor
from stitchable.model import anchors as anchors_module
from stitchable.model.stitching import StitchingLayer

GRID = (3, 5)


def features(layout: Layout, channels: int) -> torch.Tensor:
    x_NCHW = torch.randn(2, channels, *GRID, generator=torch.Generator().manual_seed(0))
    return {
        Layout.NCHW: x_NCHW,
        Layout.NHWC: x_NCHW.permute(0, 2, 3, 1),
        Layout.NLC: x_NCHW.flatten(2).transpose(1, 2),
    }[layout]


@pytest.mark.parametrize("target", Layout)
@pytest.mark.parametrize("source", Layout)
def test_every_pair_of_layouts_is_a_1x1_convolution(source: Layout, target: Layout) -> None:
    layer = StitchingLayer(4, 6, source, target, GRID)
    convolution = torch.nn.Conv2d(4, 6, 1)
    convolution.load_state_dict({"weight": layer.weight[:, :, None, None], "bias": layer.bias})
    expected_NCHW = convolution(features(Layout.NCHW, 4))
    expected = {
        Layout.NCHW: expected_NCHW,
        Layout.NHWC: expected_NCHW.permute(0, 2, 3, 1),
        Layout.NLC: expected_NCHW.flatten(2).transpose(1, 2),
    }[target]
    torch.testing.assert_close(layer(features(source, 4)), expected)


def test_prefix_tokens_are_carried_along() -> None:
    layer = StitchingLayer(4, 6, Layout.NLC, Layout.NLC, GRID)
    x = torch.randn(2, 1 + 15, 4)
    torch.testing.assert_close(layer(x), x @ layer.weight.T + layer.bias)


def test_cnn_to_vit_without_class_token() -> None:
    """Layouts NCHW to NLC in a whole model; the space of such mixed families is written by hand."""
    cnn = make("resnet").config
    vit = make("vit-no-class-token").config
    # ResNet's cut 4 (two stages done, 8x8 pixels halved to 4x4) meets the ViT's grid of 4x4.
    stitches = [
        {"id": 0, "route": [[0, 0, 7]]},
        {"id": 1, "route": [[1, 0, 3]]},
        {"id": 2, "route": [[0, 0, 4], [1, 1, 3]], "layers": ["0-1.0"]},
        {"id": 3, "route": [[1, 0, 2], [0, 3, 7]], "layers": ["1-0.0"]},
    ]
    config = StitchableConfig(
        anchors=[cnn.anchors[0], vit.anchors[0]], stitches=stitches, image_size=[32, 32], num_labels=5
    )
    model = StitchableForImageClassification(config).eval()
    x = images("vit")
    resnet, transformer = model.anchors
    x_NCHW = resnet.layer2(resnet.layer1(resnet.maxpool(resnet.act1(resnet.bn1(resnet.conv1(x))))))
    x_NLC = model.get_stitching_layer("0-1.0")(x_NCHW)
    expected = transformer.forward_head(transformer.norm(transformer.blocks[2](transformer.blocks[1](x_NLC))))
    assert torch.equal(model(x, stitch_id=2).logits, expected)
    assert model(x, stitch_id=3).logits.shape == (2, 5)


@torch.no_grad()
def test_one_can_register_an_architecture_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anchors_module, "_ADAPTERS", dict(anchors_module._ADAPTERS))
    family = [{"architecture": name, "kwargs": {}} for name in ("vgg11", "vgg13")]
    with pytest.raises(ValueError, match="VGG cannot be stitched yet"):
        StitchableConfig.from_anchors(family)
    register_anchor(VGG, Adapter(Layout.NCHW, stem=(), stages=("features",)))
    config = StitchableConfig.from_anchors(family, image_size=32, num_labels=3)
    model = StitchableForImageClassification(config).eval()
    x = torch.randn(1, 3, 32, 32)
    twin = timm.create_model("vgg13", num_classes=3)
    twin.load_state_dict(model.anchors[1].state_dict())
    assert torch.equal(model(x, stitch_id=1).logits, twin.eval()(x))
    stitch = model.stitches[-1]
    assert torch.equal(model.extract(stitch.id)(x).logits, model(x, stitch_id=stitch.id).logits)


def test_a_subclass_with_a_forward_of_its_own_is_not_taken_for_its_parent() -> None:
    class Twisted(ResNet):
        def forward_features(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer4(self.layer3(self.layer1(x)))

    twisted = Twisted.__new__(Twisted)
    with pytest.raises(ValueError, match="class Twisted cannot be stitched yet"):
        anchors_module.find_adapter(twisted)
