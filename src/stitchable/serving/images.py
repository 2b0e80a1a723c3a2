"""From the bytes that a client sent to pixel values, with limits on what they may be."""

import io
import tempfile
from collections.abc import Callable

import torch
from PIL import Image
from transformers import AutoImageProcessor, BaseImageProcessor

from stitchable.processing import upright

MAX_BYTES = 10 * 2**20
MAX_PIXELS = 32_000_000
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")  # others of Pillow's start programs, or nobody sends them


class TooLarge(ValueError):
    """An image with more bytes or pixels than the server takes."""


def reader(processor: BaseImageProcessor) -> Callable[[bytes], torch.Tensor]:
    """A function from an image file to pixel values (C, H, W), safe in threads.

    It preprocesses with Pillow whichever way the checkpoint says: one image is ready sooner so than with PyTorch, whose
    threads the model needs at the same time.
    """
    with tempfile.TemporaryDirectory() as folder:
        processor.save_pretrained(folder)
        with_pillow = AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)

    def read(content: bytes) -> torch.Tensor:
        return with_pillow(images=decode(content), return_tensors="pt")["pixel_values"][0]

    return read


def decode(content: bytes) -> Image.Image:
    """An image file in RGB, turned as its EXIF data say; of an animation the first frame.

    Raises:
        TooLarge: too many bytes or pixels.
        ValueError: no image, or one that cannot be read.
    """
    if not content:
        raise ValueError("the body is empty; send the bytes of an image")
    if len(content) > MAX_BYTES:
        raise TooLarge(f"an image may have {MAX_BYTES / 2**20:.0f} MiB, this one has {len(content) / 2**20:.1f}")
    try:
        with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
            _check_size(*image.size)
            return upright(image)
    except (TooLarge, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise TooLarge(str(error)) from error
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"the body is no image; send one of {', '.join(_FORMATS)}") from error
    except Exception as error:  # decoders raise whatever they like: OSError, SyntaxError, struct.error, ...
        raise ValueError(f"the image cannot be read: {error or type(error).__name__}") from error


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise TooLarge(f"an image may have {MAX_PIXELS:,} pixels, this one has {width}x{height}")
