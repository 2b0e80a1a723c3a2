"""Loaders of training and test images.

A training batch is a function of (seed, epoch, its number), so that a run resumed in the middle of an epoch sees what
it would have seen. Three kinds of training data end in one `TrainingLoader`: images read one by one, images kept in
memory as tensors, and streams.
"""

import logging
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset, IterableDataset
from torch.utils.data import BatchSampler, DataLoader, Sampler
from tqdm.auto import tqdm
from transformers import BitImageProcessor

from stitchable import StitchableConfig
from stitchable.metrics import IGNORED
from stitchable.processing import image_processor
from stitchable.training.augmentation import (
    Batch,
    BatchAugmentation,
    collate,
    derive_seed,
    identity,
    make_image_transform,
    make_mixup,
    read_augmented,
    seeded,
)
from stitchable.training.recipe import Data, Schedule
from stitchable.training.sources import DataError, Images, decode
from stitchable.training.streams import SHUFFLE_BUFFER, Stream

logger = logging.getLogger(__name__)

Source = Callable[[int, int], Iterator[Batch]]  # (epoch, start) -> the batches of one process, from number `start` on

MAX_REPLACEMENTS = 100  # unreadable images in a row, after which the data set is taken to be broken


class TrainingLoader:
    """Batches of this process, any epoch, from any batch on.

    Attributes:
        batches_per_epoch: of this process.
        num_corrupt: images that could not be read and were replaced so far, on this process.
    """

    def __init__(
        self, source: Source, batches_per_epoch: int, mix: Callable | None, seed: int, accelerator: Accelerator
    ) -> None:
        """`mix` is timm's Mixup or None; it draws by seed, epoch, and number of the batch of all processes."""
        self.batches_per_epoch = batches_per_epoch
        self.num_corrupt = 0
        self._source, self._mix, self._seed = source, mix, seed
        self._process, self._num_processes = accelerator.process_index, accelerator.num_processes
        self._named: set[str] = set()

    def state_dict(self) -> dict[str, int]:
        """What a checkpoint holds: the count, for the rest is drawn anew from the seed."""
        return {"num_corrupt": self.num_corrupt}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on counting (on the main process, whose count a checkpoint holds)."""
        self.num_corrupt = state["num_corrupt"] if self._process == 0 else 0

    def epoch(self, epoch: int, start: int = 0) -> Iterator[dict[str, torch.Tensor]]:
        """The batches {"pixel_values", "labels"} of an epoch on the accelerator's device, from number `start` on.

        Raises:
            ValueError: an image that cannot be read, with data.on_corrupt_image "stop"; of a stream, a label that is
                none of the classes, or too few images.
        """
        for number, batch in enumerate(self._source(epoch, start), start):
            self._count(batch.pop("corrupt"))
            if self._mix is not None:
                with seeded(self._seed, "mix", epoch, number * self._num_processes + self._process):
                    batch["pixel_values"], batch["labels"] = self._mix(batch["pixel_values"], batch["labels"])
            yield batch

    def _count(self, corrupt: list[str | None]) -> None:
        for problem in filter(None, corrupt):
            self.num_corrupt += 1
            if problem not in self._named:
                self._named.add(problem)
                logger.warning("%s; another image takes its place", problem)


def make_processor(data: Data, config: StitchableConfig) -> BitImageProcessor:
    """The evaluation transform that a recipe's data ask for."""
    return image_processor(config, crop_pct=data.crop_pct, interpolation=data.interpolation)


def make_training_loader(
    dataset: Images,
    data: Data,
    schedule: Schedule,
    config: StitchableConfig,
    processor: BitImageProcessor,
    *,
    batch_size: int,
    batches_per_epoch: int,
    seed: int,
    accelerator: Accelerator,
) -> TrainingLoader:
    """Shuffled, augmented, sharded batches for training.

    Args:
        dataset: the split, as `load_data` returns it.
        data: how it is read.
        schedule: gives augmentation and label smoothing (which is applied here only where labels are mixed).
        config: gives image size, mean, deviation and the number of classes.
        processor: the evaluation transform, which is where images in memory begin.
        batch_size: images of a batch, per process and without accumulation of gradients.
        batches_per_epoch: of each process.
        seed: of order and augmentation.
        accelerator: its processes share the images of an epoch.

    Raises:
        ValueError: too few images, an odd batch to be mixed, an unknown augmentation.
    """
    mix = make_mixup(schedule, config.num_labels, batch_size)
    # Images in memory are augmented by batches, others one by one.
    transform = None if data.in_memory else make_image_transform(schedule.augmentation, config, processor)
    if isinstance(dataset, IterableDataset):
        assert transform is not None  # a stream is not in memory
        stream: Source = Stream(dataset, data, transform, batch_size, batches_per_epoch, seed, accelerator)
        return TrainingLoader(stream, batches_per_epoch, mix, seed, accelerator)
    num_draws = batch_size * batches_per_epoch * accelerator.num_processes
    if num_draws > len(dataset):
        raise ValueError(f"an epoch of {num_draws} images is asked for, but there are only {len(dataset)}")
    if transform is None:
        pixels = _in_memory(dataset, data, processor, accelerator)
        items: Any = _AugmentedBatches(pixels, BatchAugmentation(schedule.augmentation, config), seed)
    else:
        items = _AugmentedImages(dataset, transform, data.on_corrupt_image, seed)
    sampler = _Draws(len(dataset), num_draws, schedule.augmentation.repeats, seed)
    source = _Finite(items, sampler, batch_size, data.num_workers, accelerator)
    return TrainingLoader(source, batches_per_epoch, mix, seed, accelerator)


def make_test_loader(
    dataset: Images, data: Data, processor: BitImageProcessor, batch_size: int, accelerator: Accelerator
) -> DataLoader:
    """Batches {"pixel_values", "labels"} of a split in order, prepared by the accelerator.

    With data.on_corrupt_image "skip", an image that cannot be read is zeros with the label -100.

    Args:
        dataset: the split, as `load_data` returns it.
        data: how it is read.
        processor: the evaluation transform.
        batch_size: images per batch and process.
        accelerator: its processes share the batches.
    """
    if data.in_memory and isinstance(dataset, Dataset):
        pixels = _in_memory(dataset, data, processor, accelerator)
        return accelerator.prepare(DataLoader(pixels, batch_size, collate_fn=identity, generator=torch.Generator()))
    return accelerator.prepare(_evaluation_loader(dataset, data, processor, batch_size, accelerator))


def sample_images(
    dataset: Images, data: Data, processor: BitImageProcessor, num_samples: int, seed: int
) -> Iterator[torch.Tensor]:
    """Pixel values (N, C, H, W) of `num_samples` different images in batches, transformed as in evaluation.

    Every process draws the same ones. Images that cannot be read are left out where data.on_corrupt_image is "skip".

    Raises:
        ValueError: there are not so many images.
    """
    to_batch = _Evaluation(processor, data.on_corrupt_image)
    batch_size = min(num_samples, 100)
    generator = torch.Generator().manual_seed(derive_seed(seed, "samples"))
    if isinstance(dataset, IterableDataset):
        shuffled = dataset.shuffle(seed=derive_seed(seed, "samples") % 2**32, buffer_size=SHUFFLE_BUFFER)
        loader = DataLoader(shuffled, batch_size, collate_fn=to_batch, generator=generator)
    else:
        order = torch.randperm(len(dataset), generator=generator).tolist()
        loader = DataLoader(_Rows(dataset), batch_size, sampler=order, collate_fn=to_batch, generator=generator)
    missing = num_samples
    for batch in loader:
        pixel_values = batch["pixel_values"][batch["labels"] != IGNORED][:missing]
        missing -= len(pixel_values)
        if len(pixel_values):
            yield pixel_values
        if missing == 0:
            return
    raise ValueError(f"{num_samples} sample images are asked for, but there are only {num_samples - missing}")


# Images that have numbers: read one by one, or kept in memory.


class _Draws(Sampler):
    """The draws (epoch, position in the epoch, index of the image) of all processes, from position `start` on."""

    def __init__(self, num_images: int, num_draws: int, repeats: int, seed: int) -> None:
        self.num_images, self.num_draws, self.repeats, self.seed = num_images, num_draws, repeats, seed
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return self.num_draws - self.start

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", self.epoch))
        order = torch.randperm(self.num_images, generator=generator).repeat_interleave(self.repeats)
        for position, index in enumerate(order[self.start : self.num_draws].tolist(), self.start):
            yield self.epoch, position, index


class _Finite:
    """The source of a data set whose items are drawn by `_Draws`; Accelerate deals out the batches to the processes."""

    def __init__(
        self, items: Any, sampler: _Draws, batch_size: int, num_workers: int, accelerator: Accelerator
    ) -> None:
        self.sampler, self.draws_per_batch = sampler, batch_size * accelerator.num_processes
        loader = DataLoader(
            items,
            batch_sampler=BatchSampler(sampler, batch_size, drop_last=True),
            collate_fn=identity if isinstance(items, _AugmentedBatches) else collate,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=accelerator.device.type == "cuda",
            generator=torch.Generator(),  # else the global one is drawn from, once more in a run that is resumed
        )
        self.loader = prepare_data_loader(
            loader,
            device=accelerator.device,
            num_processes=accelerator.num_processes,
            process_index=accelerator.process_index,
            put_on_device=True,
        )

    def __call__(self, epoch: int, start: int) -> Iterator[Batch]:
        self.sampler.epoch, self.sampler.start = epoch, start * self.draws_per_batch
        return iter(self.loader)


class _AugmentedImages(torch.utils.data.Dataset):
    """Draws -> images, read and augmented one by one."""

    def __init__(self, dataset: Dataset, transform: Callable, on_corrupt: str, seed: int) -> None:
        self.rows, self.transform, self.on_corrupt, self.seed = _Rows(dataset), transform, on_corrupt, seed

    def __getitem__(self, draw: tuple[int, int, int]) -> Batch:
        epoch, position, index = draw
        others = ((index + step) % len(self.rows) for step in range(min(MAX_REPLACEMENTS, len(self.rows))))
        key = (self.seed, "image", epoch, position)
        return read_augmented((self.rows[other] for other in others), self.transform, self.on_corrupt, key)


class _Rows(torch.utils.data.Dataset):
    """The rows of a data set, each with its number."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.dataset[index], "row": index}


class _InMemory(torch.utils.data.Dataset):
    """Preprocessed images, indexed a batch at a time."""

    def __init__(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> None:
        self.pixel_values, self.labels = pixel_values, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> Batch:
        chosen = torch.tensor(indices)
        return {"pixel_values": self.pixel_values[chosen], "labels": self.labels[chosen]}


class _AugmentedBatches(torch.utils.data.Dataset):
    """Lists of draws -> batches of images in memory, augmented as a whole."""

    def __init__(self, images: _InMemory, augment: BatchAugmentation, seed: int) -> None:
        self.images, self.augment, self.seed = images, augment, seed
        readable = (images.labels != IGNORED).nonzero().flatten()
        if not len(readable):
            raise DataError("none of the images can be read")
        # An image that cannot be read is replaced by the next one that can be.
        places = torch.searchsorted(readable, torch.arange(len(images))) % len(readable)
        self.replacements = readable[places].tolist()

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, draws: list[tuple[int, int, int]]) -> Batch:
        epoch, position, _ = draws[0]
        indices = [self.replacements[index] for _, _, index in draws]
        batch = self.images.__getitems__(indices)
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "batch", epoch, position))
        batch["pixel_values"] = self.augment(batch["pixel_values"], generator)
        pairs = zip(draws, indices, strict=True)
        batch["corrupt"] = [
            None if index == draw[2] else f"the image in row {draw[2]} cannot be read" for draw, index in pairs
        ]
        return batch


_KEPT: WeakKeyDictionary[Dataset, tuple[str, _InMemory]] = WeakKeyDictionary()  # for every training of a run, once


def _in_memory(dataset: Dataset, data: Data, processor: BitImageProcessor, accelerator: Accelerator) -> _InMemory:
    transform = processor.to_json_string()
    if dataset not in _KEPT or _KEPT[dataset][0] != transform:
        loader = _evaluation_loader(dataset, data, processor, 256, accelerator)
        progress = tqdm(loader, desc="preprocessing", disable=not accelerator.is_main_process)
        batches = [(batch["pixel_values"], batch["labels"]) for batch in progress]
        _KEPT[dataset] = transform, _InMemory(*map(torch.cat, zip(*batches, strict=True)))
    return _KEPT[dataset][1]


# Evaluation.


def _evaluation_loader(
    dataset: Images, data: Data, processor: BitImageProcessor, batch_size: int, accelerator: Accelerator
) -> DataLoader:
    streamed = isinstance(dataset, IterableDataset)
    return DataLoader(
        dataset if streamed else _Rows(dataset),
        batch_size,
        collate_fn=_Evaluation(processor, data.on_corrupt_image),
        num_workers=min(data.num_workers, dataset.num_shards) if streamed else data.num_workers,
        pin_memory=accelerator.device.type == "cuda",
        generator=torch.Generator(),
    )


class _Evaluation:
    """Rows -> a batch as the image processor makes it."""

    def __init__(self, processor: BitImageProcessor, on_corrupt: str) -> None:
        self.processor, self.on_corrupt = processor, on_corrupt

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        images = []
        labels = torch.tensor([row["label"] for row in rows])
        for index, row in enumerate(rows):
            try:
                images.append(decode(row))
            except DataError as error:
                if self.on_corrupt == "stop":
                    raise
                logger.warning("%s; it is left out", error)
                labels[index] = IGNORED
        size = self.processor.crop_size
        pixel_values = torch.zeros(len(rows), len(self.processor.image_mean), size["height"], size["width"])
        if images:
            pixel_values[labels != IGNORED] = self.processor(images=images, return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixel_values, "labels": labels}
