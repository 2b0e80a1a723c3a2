"""Augmentation of images (timm's transforms), of whole batches in memory, and of pairs; all drawn from keys.

What is drawn depends on a key alone, such as (seed, epoch, position in the epoch): neither on the number of processes
and workers, nor on an interruption.
"""

import hashlib
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image as PILImage
from timm.data import Mixup, auto_augment, create_transform
from torchvision import transforms
from transformers import BitImageProcessor

from stitchable import StitchableConfig
from stitchable.training.recipe import Augmentation, Schedule


def derive_seed(*key: int | str) -> int:
    """A number of 64 bits that looks random, the same one for the same key."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")


@contextmanager
def seeded(*key: int | str) -> Iterator[None]:
    """Seed the global generators that timm's transforms and Mixup draw from, and put them back afterwards."""
    states = random.getstate(), np.random.get_bit_generator(), torch.get_rng_state()  # type: ignore[attr-defined]
    seed = derive_seed(*key)
    random.seed(seed)
    # A tenth of the time that the state of numpy's own takes.
    np.random.set_bit_generator(np.random.PCG64(seed))  # type: ignore[attr-defined]
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_bit_generator(states[1])  # type: ignore[attr-defined]
        torch.set_rng_state(states[2])


def make_image_transform(
    augmentation: Augmentation, config: StitchableConfig, processor: BitImageProcessor
) -> Callable[[PILImage.Image], torch.Tensor]:
    """The training transform of timm: an image in RGB -> normalised pixel values (3, H, W).

    Without a crop_scale the image is resized and cropped as in evaluation, by `processor`.
    """
    height, width = config.image_size
    try:
        transform = create_transform(
            (3, height, width),
            is_training=True,
            scale=augmentation.crop_scale,  # type: ignore[arg-type]
            hflip=augmentation.horizontal_flip,
            color_jitter=None,  # type: ignore[arg-type]
            auto_augment=augmentation.auto_augment,
            re_prob=augmentation.random_erasing,
            re_mode="pixel",
            interpolation=augmentation.interpolation,
            mean=tuple(config.image_mean),
            std=tuple(config.image_std),
        )
    except (AssertionError, KeyError, ValueError, NotImplementedError, AttributeError) as error:
        raise ValueError(
            f"augmentation.auto_augment {augmentation.auto_augment!r}: timm refuses it: {error!r}"
        ) from error
    for operation in _operations(transform):
        if operation.aug_fn is auto_augment.posterize:
            operation.aug_fn = _posterize
    if augmentation.crop_scale is None:
        resample = PILImage.Resampling(processor.resample).name.lower()
        resize = transforms.Resize(processor.size["shortest_edge"], transforms.InterpolationMode(resample))
        transform.transforms[0] = transforms.Compose([resize, transforms.CenterCrop((height, width))])
    return transform


def _operations(transform: transforms.Compose) -> Iterator[auto_augment.AugmentOp]:
    """What RandAugment, AutoAugment or AugMix draw from."""
    for step in transform.transforms:
        yield from getattr(step, "ops", [])
        for policy in getattr(step, "policy", []):
            yield from policy


def _posterize(image: PILImage.Image, bits: int, **options: Any) -> PILImage.Image:
    """Black where no bits are kept, as in older Pillow; newer ones raise, which stops a run at a rare strong draw."""
    return auto_augment.posterize(image, bits, **options) if bits > 0 else image.point(lambda value: 0)


class BatchAugmentation:
    """Affine, random crop after padding, and flip of whole batches of pixel values (N, C, H, W)."""

    def __init__(self, augmentation: Augmentation, config: StitchableConfig) -> None:
        """The config gives mean and deviation, and with them what black is after normalisation."""
        self.augmentation = augmentation
        self.black = -torch.tensor(config.image_mean) / torch.tensor(config.image_std)

    def __call__(self, pixel_values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Augmented copies, each image drawn for itself."""
        if self.augmentation.affine:
            pixel_values = random_affine(pixel_values, self.augmentation.affine, generator)
        if self.augmentation.padding:
            pixel_values = random_crop(pixel_values, self.augmentation.padding, self.black, generator)
        if self.augmentation.horizontal_flip:
            flipped = torch.rand(len(pixel_values), generator=generator) < self.augmentation.horizontal_flip
            pixel_values = torch.where(flipped.view(-1, 1, 1, 1), pixel_values.flip(-1), pixel_values)
        return pixel_values


def random_affine(pixel_values: torch.Tensor, strength: float, generator: torch.Generator) -> torch.Tensor:
    """Each image (N, C, H, W) turned, scaled and shifted at random, its border repeated.

    `strength` is the largest angle in radians, relative change of size, and shift as a part of half the image.
    """
    angle, scale, right, down = (2 * torch.rand(4, len(pixel_values), generator=generator) - 1) * strength
    cosine, sine = (1 + scale) * angle.cos(), (1 + scale) * angle.sin()
    matrices = torch.stack([cosine, -sine, right, sine, cosine, down], dim=1).view(-1, 2, 3)
    grid = torch.nn.functional.affine_grid(matrices, list(pixel_values.shape), align_corners=False)
    return torch.nn.functional.grid_sample(pixel_values, grid, padding_mode="border", align_corners=False)


def random_crop(
    pixel_values: torch.Tensor, padding: int, fill: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Each image (N, C, H, W) padded by `padding` pixels of the colour `fill` (C,) and cut to its size at random."""
    number, _, height, width = pixel_values.shape
    padded = fill.view(1, -1, 1, 1).repeat(number, 1, height + 2 * padding, width + 2 * padding)
    padded[:, :, padding : padding + height, padding : padding + width] = pixel_values
    tops, lefts = torch.randint(2 * padding + 1, (2, number), generator=generator)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # (N, C, tops, lefts, H, W), a view
    return windows[torch.arange(number), :, tops, lefts]


def make_mixup(schedule: Schedule, num_labels: int | None, batch_size: int) -> Mixup | None:
    """Mixup and CutMix of timm for the pairs of a batch, or None: labels become distributions (N, num_labels)."""
    augmentation = schedule.augmentation
    if not augmentation.mixes:
        return None
    if batch_size % 2:
        raise ValueError(
            f"augmentation.mixup and cutmix mix pairs of images, but batch_size {schedule.batch_size} gives each "
            f"process {batch_size} at a time: make that even"
        )
    return Mixup(
        mixup_alpha=augmentation.mixup,
        cutmix_alpha=augmentation.cutmix,
        label_smoothing=schedule.label_smoothing,
        num_classes=num_labels,
    )
