"""What a batch is: any of the forms that data loaders give images and labels in."""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch


def unpack_batch(batch: Any, labels: Literal["required", "optional"]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Pixel values (N, C, H, W) and class numbers (N,) of a batch.

    Args:
        batch: a mapping with "pixel_values" and "labels" or "label", as loaders for transformers and data sets of
            `datasets` give it; or a sequence (images, labels, ...), as loaders of torchvision's data sets give it; or
            images alone. Images and labels may be tensors, arrays or lists.
        labels: "optional" gives None in the place of labels that are missing or no class numbers, such as the
            distributions of mixed images.

    Raises:
        ValueError: there are no such images or labels; says what a batch must hold and what it holds.
    """
    if isinstance(batch, Mapping):
        if "pixel_values" not in batch:
            raise ValueError(
                f"a batch must hold 'pixel_values', it has {sorted(batch)}; the image processor makes them of images"
            )
        given = batch.get("label") if batch.get("labels") is None else batch["labels"]
        images = batch["pixel_values"]
        held = f"it has {sorted(batch)}"
    elif isinstance(batch, tuple | list):
        images, given = (*batch, None, None)[:2]
        held = f"it is a {type(batch).__name__} of {len(batch)}"
    else:
        images, given = batch, None
        held = f"it is {_in_words(batch)}"
    pixel_values = _to_tensor(images)
    if pixel_values is None or pixel_values.ndim != 4:
        raise ValueError(f"pixel values must be batches of images (N, C, H, W), got {_in_words(images)}")
    numbers = _class_numbers(given, len(pixel_values), held)
    if isinstance(numbers, torch.Tensor):
        return pixel_values, numbers
    if labels == "required":
        raise ValueError(numbers)
    return pixel_values, None


def _class_numbers(labels: Any, num_images: int, held: str) -> torch.Tensor | str:
    """Labels as a tensor of integers, or what is wrong with them."""
    if labels is None:
        return f"a batch must hold 'labels', or be a pair (images, labels); {held}"
    numbers = _to_tensor(labels)
    wanted = f"labels must be class numbers (N,), got {_in_words(labels)}"
    if numbers is None:
        return f"{wanted}; the config's label2id has the numbers of names"
    if numbers.ndim == 2:
        return f"{wanted}; labels.argmax(-1) makes them of one row per image"
    if numbers.ndim != 1:
        return wanted
    if numbers.is_floating_point() or numbers.is_complex() or numbers.dtype == torch.bool:
        return f"{wanted} in {numbers.dtype}; labels.long() converts them"
    if len(numbers) != num_images:
        return f"a batch holds {num_images} images but {len(numbers)} labels"
    return numbers.long()


def _to_tensor(values: Any) -> torch.Tensor | None:
    """Numbers in whatever form as a tensor; None for what is no regular array of numbers."""
    if isinstance(values, torch.Tensor):
        return values
    leaf = values
    while isinstance(leaf, tuple | list) and leaf:
        leaf = leaf[0]
    try:
        if isinstance(leaf, torch.Tensor):
            return torch.stack(list(values))
        # Others, such as Pillow's images, become arrays too, but not such as a model expects.
        is_numeric = isinstance(leaf, np.ndarray | np.number | int | float)
        return torch.tensor(np.asarray(values)) if is_numeric else None
    except (TypeError, ValueError, RuntimeError):
        return None


def _in_words(value: Any) -> str:
    if isinstance(value, torch.Tensor | np.ndarray):
        return f"{'a tensor' if isinstance(value, torch.Tensor) else 'an array'} of shape {tuple(value.shape)}"
    if isinstance(value, tuple | list) and value:
        return f"a {type(value).__name__} of {len(value)}, first {_in_words(value[0])}"
    return type(value).__name__
