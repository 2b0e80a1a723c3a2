"""Stitching layers between any two layouts, prefix tokens and grids."""

import pytest
import torch
import torch.nn.functional as F
from timm.models.resnet import ResNet

from families import images, make
from stitchable import Layout, StitchableConfig, StitchableForImageClassification
from stitchable.families.registry import find_adapter
from stitchable.model.stitching import Side, StitchingLayer

GRID = (3, 5)
LAYOUTS = (Layout.NCHW, Layout.NHWC, Layout.NLC)


def features(layout: Layout, channels: int) -> torch.Tensor:
    x_NCHW = torch.randn(2, channels, *GRID, generator=torch.Generator().manual_seed(0))
    return in_layout(x_NCHW, layout)


def in_layout(x_NCHW: torch.Tensor, layout: Layout) -> torch.Tensor:
    return {
        Layout.NCHW: x_NCHW,
        Layout.NHWC: x_NCHW.permute(0, 2, 3, 1),
        Layout.NLC: x_NCHW.flatten(2).transpose(1, 2),
    }[layout]


def layer_of(
    source: Layout, target: Layout, *, grids: tuple = (GRID, GRID), tokens: tuple = (0, 0), carried: tuple = ()
) -> StitchingLayer:
    return StitchingLayer(Side(4, source, grids[0], tokens[0]), Side(6, target, grids[1], tokens[1]), carried)


@pytest.mark.parametrize("target", LAYOUTS)
@pytest.mark.parametrize("source", LAYOUTS)
def test_every_pair_of_layouts_is_a_1x1_convolution(source: Layout, target: Layout) -> None:
    layer = layer_of(source, target)
    convolution = torch.nn.Conv2d(4, 6, 1)
    convolution.load_state_dict({"weight": layer.linear.weight[:, :, None, None], "bias": layer.linear.bias})
    expected = in_layout(convolution(features(Layout.NCHW, 4)), target)
    given = layer(features(source, 4))
    torch.testing.assert_close(given, expected)
    assert given.is_contiguous()


def test_prefix_tokens_are_carried_along() -> None:
    layer = layer_of(Layout.NLC, Layout.NLC, tokens=(1, 1), carried=(0,))
    x = torch.randn(2, 1 + 15, 4)
    torch.testing.assert_close(layer(x), x @ layer.linear.weight.T + layer.linear.bias)


def test_prefix_tokens_that_the_target_lacks_are_left_out() -> None:
    layer = layer_of(Layout.NLC, Layout.NHWC, tokens=(2, 0))
    x = torch.randn(2, 2 + 15, 4)
    expected = (x[:, 2:] @ layer.linear.weight.T + layer.linear.bias).unflatten(1, GRID)
    torch.testing.assert_close(layer(x), expected)


def test_prefix_tokens_that_the_source_lacks_are_the_targets_own() -> None:
    # A class token and a register, from a front with a class and a distillation token.
    layer = layer_of(Layout.NLC, Layout.NLC, tokens=(2, 2), carried=(0, None))
    x, own = torch.randn(3, 2 + 15, 4), torch.randn(1, 2, 6)
    mapped = x @ layer.linear.weight.T + layer.linear.bias
    expected = torch.cat([mapped[:, :1], own[:, 1:].expand(3, -1, -1), mapped[:, 2:]], dim=1)
    torch.testing.assert_close(layer(x, own), expected)
    with pytest.raises(ValueError, match="back anchor's own prefix tokens"):
        layer(x)


@pytest.mark.parametrize("grids", [((6, 10), (3, 5)), ((3, 5), (6, 10)), ((7, 7), (4, 4))])
def test_resizing_is_bilinear_and_commutes_with_the_map(grids: tuple) -> None:
    layer = layer_of(Layout.NLC, Layout.NCHW, grids=grids, tokens=(1, 0))
    height, width = grids[0]
    x = torch.randn(2, 1 + height * width, 4)
    x_NCHW = x[:, 1:].transpose(1, 2).unflatten(2, grids[0])
    mapped = F.conv2d(x_NCHW, layer.linear.weight[:, :, None, None], layer.linear.bias)
    expected = F.interpolate(mapped, size=grids[1], mode="bilinear", align_corners=False)
    torch.testing.assert_close(layer(x), expected)


def test_cnn_to_vit_without_class_token() -> None:
    """Layouts NCHW to NLC in a whole model, whose routes are written by hand."""
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


def test_a_subclass_with_a_forward_of_its_own_is_not_taken_for_its_parent() -> None:
    class Twisted(ResNet):
        def forward_features(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer4(self.layer3(self.layer1(x)))

    twisted = Twisted.__new__(Twisted)
    with pytest.raises(ValueError, match="class Twisted cannot be stitched yet"):
        find_adapter(twisted)
