"""Importing this file registers `digit_mixer_s` and `digit_mixer_m`, which is all that stitching needs."""

from digit_mixer import DigitMixer

from stitchable import Adapter, Layout, register_family

register_family(
    DigitMixer,
    Adapter(Layout.NCHW, stem=("stem",), stages=("blocks",), neck=("norm",), head=("pool", "classifier")),
    {"digit_mixer_s": {"width": 12, "depth": 4}, "digit_mixer_m": {"width": 32, "depth": 6}},
    input_size=(3, 8, 8),
    num_classes=10,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)
