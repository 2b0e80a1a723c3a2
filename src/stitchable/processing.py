"""Images of any kind as the image processors take them, and the image processor of a model."""

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import timm
from PIL import Image, ImageOps
from timm.data.transforms import str_to_pil_interp
from transformers import AutoImageProcessor, BaseImageProcessor, BitImageProcessor
from transformers.utils import IMAGE_PROCESSOR_NAME, cached_file, logging

from stitchable.model.configuration_stitchable import StitchableConfig
from stitchable.model.modeling_stitchable import StitchablePreTrainedModel

logger = logging.get_logger(__name__)

_MAX_ASPECT_RATIO = 50  # a line of a million pixels, a few bytes of a file, would be resized to 224 times as many
_save_pretrained = StitchablePreTrainedModel.save_pretrained


def save_pretrained(
    self: StitchablePreTrainedModel,
    save_directory: str | os.PathLike,
    is_main_process: bool = True,
    *args: Any,
    **kwargs: Any,
) -> None:
    """As the model's own, and where the folder has no image processor then, with that of the checkpoint or timm's."""
    _save_pretrained(self, save_directory, is_main_process, *args, **kwargs)
    if is_main_process and not (Path(save_directory) / IMAGE_PROCESSOR_NAME).exists():
        _save_image_processor(self, Path(save_directory))


def _save_image_processor(model: StitchablePreTrainedModel, folder: Path) -> None:
    """That of the checkpoint the model was loaded from, but for names of code; else timm's for the largest anchor."""
    where, settings = {**model.hub_arguments, "_raise_exceptions_for_missing_entries": False}, dict[str, Any]()
    try:
        path = cached_file(model.name_or_path, IMAGE_PROCESSOR_NAME, **where) if model.name_or_path else None
        settings = json.loads(Path(path).read_text(encoding="utf-8")) if path else {}
    except (OSError, ValueError):
        logger.warning(f"{model.name_or_path} is no longer there, or its image processor is none")
    if isinstance(settings, dict) and "image_processor_type" in settings:
        settings.pop("auto_map", None)
        (folder / IMAGE_PROCESSOR_NAME).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    else:
        image_processor(model.config).save_pretrained(folder)


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


def upright(image: Image.Image) -> Image.Image:
    """An image in RGB, turned as its EXIF data say; of an animation the first frame.

    Raises:
        ValueError: it is a line more than a picture.
    """
    if max(image.size) > _MAX_ASPECT_RATIO * min(image.size):
        raise ValueError(f"one side is more than {_MAX_ASPECT_RATIO} times the other")
    return to_rgb(ImageOps.exif_transpose(image))


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any kind with 8 bits of red, green and blue.

    Of 16 bits of grey the upper eight are kept; `Image.convert` alone turns all that is brighter than 255 white. What
    lies below transparent pixels shows, as in the pipeline of transformers.

    Raises:
        ValueError: floating-point pixels, of which nobody knows what is white.
    """
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, which have no known white")
    if image.mode.startswith("I"):  # Pillow's "I" has 32 bits, and holds 16-bit files of some formats
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype("uint8"))
    return image.convert("RGB")
