"""Importing this file makes the CIFAR-10 ResNets anchors, which is all that stitching needs."""

from cifar_resnet import CifarResNet

from stitchable import Adapter, Layout, register_anchor

register_anchor(
    CifarResNet,
    Adapter(Layout.NCHW, stem=("conv1", "bn1", "act1"), stages=("layer1", "layer2", "layer3")),
    example="cifar_resnet20",
)
