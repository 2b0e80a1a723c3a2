"""The image processor of a model: timm's evaluation transform in the words of transformers."""

import math
import os

import timm
from timm.data.transforms import str_to_pil_interp
from transformers import AutoImageProcessor, BaseImageProcessor, BitImageProcessor

from .configuration_stitchable import StitchableConfig


def load_image_processor(folder: str | os.PathLike) -> BaseImageProcessor:
    """The image processor of a checkpoint, as one of transformers.

    Code that the checkpoint names for it is not run, and not named again when it is saved.

    Raises:
        OSError: it has none.
        ValueError: it is none of transformers.
    """
    processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
    vars(processor).pop("auto_map", None)
    return processor


def image_processor(
    config: StitchableConfig, *, crop_pct: float | None = None, interpolation: str | None = None
) -> BitImageProcessor:
    """Resize the shortest edge, crop the centre, normalise, as timm evaluates the largest anchor.

    Loaded with `backend="pil"` it gives timm's pixel values, except that where an odd number of pixels is cropped away,
    transformers centres the crop one pixel further up and left.

    Args:
        config: gives image size, mean and deviation.
        crop_pct: what part of the resized image the crop keeps; timm's for the largest anchor if None.
        interpolation: "bicubic", "bilinear", ...; timm's for the largest anchor if None.

    Raises:
        ValueError: a crop_pct out of (0, 1].
    """
    timm_cfg = timm.get_pretrained_cfg(config.anchors[-1]["architecture"], allow_unregistered=True)
    crop_pct = (timm_cfg.crop_pct if timm_cfg else 1.0) if crop_pct is None else crop_pct
    interpolation = interpolation or (timm_cfg.interpolation if timm_cfg else "bicubic")
    if not 0 < crop_pct <= 1:
        raise ValueError(f"crop_pct is a part of the image and must be in (0, 1], got {crop_pct}")
    height, width = config.image_size
    return BitImageProcessor(
        size={"shortest_edge": math.floor(min(height, width) / crop_pct)},
        crop_size={"height": height, "width": width},
        resample=str_to_pil_interp(interpolation),
        image_mean=config.image_mean,
        image_std=config.image_std,
        do_convert_rgb=True,
    )
