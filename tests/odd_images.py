"""Image files of every odd kind, the same picture in each as far as the kind can hold it."""

from pathlib import Path

import numpy as np
from PIL import Image


def picture() -> Image.Image:
    """40x40 pixels of smooth colours."""
    ramp = np.linspace(0, 255, 40)
    x, y = np.meshgrid(ramp, ramp)
    return Image.fromarray(np.stack([x, y, (x + y) / 2], axis=-1).astype("uint8"))


def readable(folder: Path) -> dict[str, tuple[Path, Image.Image]]:
    """By kind: a file, and what it shows in 8 bits of red, green and blue."""
    rgb = picture()
    grey = rgb.convert("L")
    palette = rgb.quantize(32)
    see_through = rgb.copy()
    see_through.putalpha(grey)
    high = Image.fromarray(np.asarray(grey).astype("uint16") * 257)
    dot = rgb.crop((20, 20, 21, 21))
    turned = rgb.transpose(Image.Transpose.ROTATE_90)  # and noted as to be turned back by 90 degrees clockwise
    orientation = Image.Exif()
    orientation[0x0112] = 6
    kinds = {
        "grey": ("png", grey, {}, grey.convert("RGB")),
        "black-and-white": ("png", grey.convert("1"), {}, grey.convert("1").convert("RGB")),
        "palette": ("png", palette, {}, palette.convert("RGB")),
        "rgba": ("png", see_through, {}, rgb),
        "16-bit": ("png", high, {}, grey.convert("RGB")),
        "16-bit-tiff": ("tiff", high, {}, grey.convert("RGB")),
        "animated": ("gif", palette, {"save_all": True, "append_images": [grey]}, palette.convert("RGB")),
        "1x1": ("png", dot, {}, dot),
        "turned": ("png", turned, {"exif": orientation}, rgb),
    }
    files = {}
    for kind, (suffix, image, options, shown) in kinds.items():
        path = folder / f"{kind}.{suffix}"
        image.save(path, **options)
        files[kind] = path, shown
    return files


def broken(folder: Path) -> dict[str, Path]:
    """By kind: a file that cannot be read as an image, or (line) is none to classify."""
    whole = folder / "whole.png"
    Image.effect_noise((64, 64), 80).save(whole)
    contents = {"truncated": whole.read_bytes()[:1500], "text": b"This is no image.", "empty": b""}
    for kind, content in contents.items():
        (folder / f"{kind}.png").write_bytes(content)
    Image.fromarray(np.random.default_rng(0).random((8, 8), dtype="float32")).save(folder / "float.tiff")
    Image.new("L", (20_000, 1)).save(folder / "line.png")  # of a hundred bytes
    return {**{kind: folder / f"{kind}.png" for kind in (*contents, "line")}, "float": folder / "float.tiff"}
