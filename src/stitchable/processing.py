"""Images of any kind as the image processors take them."""

import numpy as np
from PIL import Image

from stitchable.model.preprocessing import image_processor

__all__ = ["image_processor", "to_rgb"]


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
