"""Images of a recipe: two splits, checked before anything is trained, and loaders of training and test batches.

What an epoch shows depends on (seed, epoch, position in it) alone, so that a run resumed in the middle of an epoch sees
what it would have seen. Images that have numbers are drawn by number. A stream is read again from the beginning of its
epoch, without decoding what was seen: the state that `datasets` keeps of a stream leaves out what its shuffle buffer
held, so that going on from it would show other images.
"""

import difflib
import glob
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, load_dataset
from datasets.distributed import split_dataset_by_node
from datasets.exceptions import DatasetsError
from PIL import Image as PILImage
from torch.utils.data import DataLoader, get_worker_info
from tqdm.auto import tqdm
from transformers import BitImageProcessor

from stitchable import StitchableConfig
from stitchable.imagenet import in_words
from stitchable.metrics import IGNORED
from stitchable.processing import image_processor, to_rgb
from stitchable.training.augmentation import BatchAugmentation, derive_seed, make_image_transform, make_mixup, seeded
from stitchable.training.recipe import Data, Schedule

logger = logging.getLogger(__name__)

Images: TypeAlias = Dataset | IterableDataset
# "pixel_values" (N, C, H, W), "labels" (N,), and in training "corrupt": of each image what is wrong with it, or None.
Batch: TypeAlias = dict[str, Any]

SHUFFLE_BUFFER = 1000  # images of a stream among which the next is drawn, per worker
PIECE = 32  # images that a worker of a stream gives at a time
MAX_REPLACEMENTS = 100  # unreadable images in a row, after which the data set is taken to be broken


class DataError(ValueError):
    """Data that cannot be used; raised in a worker process, it reaches the user without the worker's traceback."""

    def __init__(self, message: str) -> None:
        """`message` may be the traceback that a DataLoader makes of a worker's error."""
        super().__init__(message.rsplit("DataError: ", 1)[-1].strip())


@dataclass
class Splits:
    """Columns "image" (not decoded: {"bytes", "path"}) and "label" (a `ClassLabel`) of both splits, and its names.

    Where the data name ImageNet's classes by their numbers in WordNet, `class_names` has them in words.
    """

    train: Images
    test: Images
    class_names: list[str]


def load_data(data: Data, own_names: Sequence[str] | None = None) -> Splits:
    """The two splits of a recipe's data set.

    "digits" is the test part of the UCI "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak, 1998; CC BY
    4.0) as scikit-learn ships it: 1,797 scans of 8x8 pixels in 17 grey levels, written by 13 people.

    Args:
        data: that section of a recipe. The labels of a stream are checked as they come, others here.
        own_names: the classes that the model knows. Labels that are numbers are taken for theirs, where there are as
            many and neither the data nor the recipe name them.

    Raises:
        DataError: a ValueError: missing files, an unknown data set or split, no such column, no class names, or labels
            that are none of the classes.
    """
    names = {"train_split": data.train_split, "test_split": data.test_split}
    splits = _digits(data) if data.dataset == "digits" else {key: _load(data, name) for key, name in names.items()}
    splits = {key: _two_columns(split, data) for key, split in splits.items()}
    classes = _class_names(splits["train_split"], data, own_names)
    train, test = (_numbered(splits[key], classes, f"data.{key} {names[key]}") for key in names)
    return Splits(train, test, in_words(classes))


def decode(row: Mapping[str, Any]) -> PILImage.Image:
    """The image of a row in RGB; a `DataError` says which one cannot be read, and why."""
    try:
        with Image().decode_example(row["image"]) as image:  # an animation keeps its file open
            return to_rgb(image)
    except Exception as error:  # decoders raise whatever they like: OSError, SyntaxError, struct.error, ...
        raise DataError(f"the image {_describe(row)} cannot be read: {error or type(error).__name__}") from error


def _describe(row: Mapping[str, Any]) -> str:
    """What to call the image of a row: its file, or its number in the split."""
    path = (row["image"] or {}).get("path")
    if "row" in row:
        return f"in row {row['row']}" + (f" ({path})" if path else "")
    return path or "without a name"


class TrainingLoader:
    """Shuffled and augmented batches of this process, any epoch, from any batch on.

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

    Attributes:
        num_corrupt: images that could not be read and were replaced so far, on this process.

    Raises:
        ValueError: too few images, an odd batch to be mixed, an unknown augmentation.
    """

    def __init__(
        self,
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
    ) -> None:
        self.dataset, self.data, self.seed, self.accelerator = dataset, data, seed, accelerator
        self.batch_size, self.batches_per_epoch = batch_size, batches_per_epoch
        self.num_corrupt = 0
        self._named: set[str] = set()
        self._mix = make_mixup(schedule, config.num_labels, batch_size)
        self._repeats = schedule.augmentation.repeats
        num_draws = batch_size * batches_per_epoch * accelerator.num_processes
        if isinstance(dataset, Dataset) and num_draws > len(dataset):
            raise ValueError(f"an epoch of {num_draws} images is asked for, but there are only {len(dataset)}")
        if data.in_memory:  # augmented by batches, others one by one
            assert isinstance(dataset, Dataset)  # as `Data` has checked
            pixels = _in_memory(dataset, data, processor, accelerator)
            self._items: Any = _AugmentedBatches(pixels, BatchAugmentation(schedule.augmentation, config), seed)
        else:
            transform = make_image_transform(schedule.augmentation, config, processor)
            self._read = partial(_read_augmented, transform=transform, on_corrupt=data.on_corrupt_image)
            self._items = None if isinstance(dataset, IterableDataset) else _AugmentedImages(dataset, self._read, seed)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[dict[str, torch.Tensor]]:
        """The batches {"pixel_values", "labels"} of an epoch on the accelerator's device, from number `start` on.

        Raises:
            ValueError: an image that cannot be read, with data.on_corrupt_image "stop"; of a stream, a label that is
                none of the classes, or too few images.
        """
        batches = self._by_number(epoch, start) if self._items is not None else self._of_stream(epoch, start)
        rank, num_processes = self.accelerator.process_index, self.accelerator.num_processes
        for number, batch in enumerate(batches, start):
            self._count(batch.pop("corrupt"))
            batch = send_to_device(batch, self.accelerator.device)
            if self._mix is not None:
                with seeded(self.seed, "mix", epoch, number * num_processes + rank):
                    batch["pixel_values"], batch["labels"] = self._mix(batch["pixel_values"], batch["labels"])
            yield batch

    def _by_number(self, epoch: int, start: int) -> Iterable[Batch]:
        """Batches of draws (epoch, position in the epoch, number of the image), dealt out to the processes."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", epoch))
        order = torch.randperm(len(self.dataset), generator=generator).repeat_interleave(self._repeats).tolist()
        rank, num_processes, size = self.accelerator.process_index, self.accelerator.num_processes, self.batch_size
        draws = (
            [(epoch, position, order[position]) for position in range(number * size, (number + 1) * size)]
            for number in range(start * num_processes + rank, self.batches_per_epoch * num_processes, num_processes)
        )
        collate = _identity if self.data.in_memory else _collate
        return _loader(self._items, self.data, self.accelerator, batch_sampler=draws, collate_fn=collate)

    def _of_stream(self, epoch: int, start: int) -> Iterator[Batch]:
        """Batches of what the workers give in turns, so that none is lost between them."""
        samples = self._samples(epoch, start * self.batch_size)
        for _ in range(start, self.batches_per_epoch):
            yield _collate(list(islice(samples, self.batch_size)))

    def _samples(self, epoch: int, num_passed: int) -> Iterator[Batch]:
        """Images of a stream without end, after the first `num_passed` of the epoch."""
        wanted, came = self.batch_size * self.batches_per_epoch, 0
        for lap in count():
            for piece in self._lap(epoch, lap, max(0, num_passed - came)):
                length = piece if isinstance(piece, int) else len(piece["labels"])
                for index in range(max(0, num_passed - came), length):
                    yield {key: values[index] for key, values in piece.items()}
                came += length
            # Shards are not of one size, and with several processes the share of one may be a little short.
            if lap or came < 0.9 * wanted:
                raise DataError(
                    f"data.num_train_images is {self.data.num_train_images}, of which each of "
                    f"{self.accelerator.num_processes} processes needs {wanted}, but only {came} came"
                )
            logger.warning("the stream gave %d of %d images of an epoch; it begins again", came, wanted)

    def _lap(self, epoch: int, lap: int, num_passed: int) -> DataLoader:
        seed = derive_seed(self.seed, "order", epoch, lap) % 2**32
        shuffled = self.dataset.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
        rank = self.accelerator.process_index
        share = split_dataset_by_node(shuffled, rank, self.accelerator.num_processes)
        # Workers take turns, so that of what comes before the start each gives at least so many pieces.
        num_workers = min(self.data.num_workers, share.num_shards)
        pieces = _Pieces(
            share, self._read, num_passed // (PIECE * max(1, num_workers)), (self.seed, "stream", epoch, lap, rank)
        )
        return _loader(pieces, self.data, self.accelerator, batch_size=None, collate_fn=_identity)

    def _count(self, corrupt: list[str | None]) -> None:
        for problem in filter(None, corrupt):
            self.num_corrupt += 1
            if problem not in self._named:
                self._named.add(problem)
                logger.warning("%s; another image takes its place", problem)


def make_processor(data: Data, config: StitchableConfig) -> BitImageProcessor:
    """The evaluation transform that a recipe's data ask for."""
    return image_processor(config, crop_pct=data.crop_pct, interpolation=data.interpolation)


def make_test_loader(
    dataset: Images,
    data: Data,
    processor: BitImageProcessor,
    batch_size: int,
    accelerator: Accelerator,
    *,
    shared: bool = True,
) -> DataLoader:
    """Batches {"pixel_values", "labels"} of a split in order, which the processes share unless each is to get all.

    With data.on_corrupt_image "skip", an image that cannot be read is zeros with the label -100.
    """
    if data.in_memory and isinstance(dataset, Dataset):
        pixels = _in_memory(dataset, data, processor, accelerator)
        loader = DataLoader(pixels, batch_size, collate_fn=_identity, generator=torch.Generator())
    else:
        loader = _evaluation_loader(dataset, data, processor, batch_size, accelerator)
    return accelerator.prepare(loader) if shared else loader


def sample_images(
    dataset: Images, data: Data, processor: BitImageProcessor, num_samples: int, seed: int
) -> Iterator[torch.Tensor]:
    """Pixel values (N, C, H, W) of `num_samples` different images in batches, transformed as in evaluation.

    Every process draws the same ones. Images that cannot be read are left out where data.on_corrupt_image is "skip".
    """
    to_batch = partial(_evaluation_batch, processor=processor, on_corrupt=data.on_corrupt_image)
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


# Training images: read one by one, kept in memory, or streamed.


def _loader(items: Any, data: Data, accelerator: Accelerator, **options: Any) -> DataLoader:
    stream = getattr(items, "rows", items)
    num_workers = min(data.num_workers, stream.num_shards) if isinstance(stream, IterableDataset) else data.num_workers
    return DataLoader(
        items,
        num_workers=num_workers,
        pin_memory=accelerator.device.type == "cuda",
        generator=torch.Generator(),  # else the global one is drawn from, once more in a run that is resumed
        **options,
    )


def _read_augmented(rows: Iterable[dict], key: tuple[int | str, ...], transform: Callable, on_corrupt: str) -> Batch:
    """The first of the rows that can be read, augmented by draws of the key; the others are there to replace it.

    "corrupt" is then what is wrong with the first row, or None. Where `on_corrupt` is "stop" there is no replacement.
    """
    problem = None
    for row in rows:
        try:
            image = decode(row)
        except DataError as error:
            if on_corrupt == "stop":
                raise
            problem = problem or str(error)
            continue
        with seeded(*key):
            return {"pixel_values": transform(image), "labels": row["label"], "corrupt": problem}
    raise DataError(f"{problem}, nor any of the images that could take its place")


def _collate(samples: list[Batch]) -> Batch:
    return {
        "pixel_values": torch.stack([sample["pixel_values"] for sample in samples]),
        "labels": torch.tensor([sample["labels"] for sample in samples]),
        "corrupt": [sample["corrupt"] for sample in samples],
    }


def _identity(batch: Any) -> Any:
    """For loaders whose items are batches already."""
    return batch


class _Rows(torch.utils.data.Dataset):
    """The rows of a data set, each with its number."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.dataset[index], "row": index}


class _AugmentedImages(torch.utils.data.Dataset):
    """Draws -> images, read and augmented one by one."""

    def __init__(self, dataset: Dataset, read: Callable, seed: int) -> None:
        self.numbered, self.read, self.seed = _Rows(dataset), read, seed

    def __getitem__(self, draw: tuple[int, int, int]) -> Batch:
        epoch, position, index = draw
        length = len(self.numbered)
        others = (self.numbered[(index + step) % length] for step in range(min(MAX_REPLACEMENTS, length)))
        return self.read(others, (self.seed, "image", epoch, position))


class _Pieces(torch.utils.data.IterableDataset):
    """The share of a worker of a stream in pieces; of the first `num_passed` of them only the number of images."""

    def __init__(self, rows: IterableDataset, read: Callable, num_passed: int, key: tuple[int | str, ...]) -> None:
        self.rows, self.read, self.num_passed, self.key = rows, read, num_passed, key

    def __iter__(self) -> Iterator[Batch | int]:
        info = get_worker_info()
        worker = info.id if info else 0
        rows, before = iter(self.rows), list[dict]()
        for number in count():
            piece = list(islice(rows, PIECE))
            if not piece:
                return
            if number < self.num_passed:
                yield len(piece)
            else:
                # What cannot be read is replaced by another image of the piece, or of the one before.
                others = [piece[index:] + piece[:index] + before for index in range(len(piece))]
                yield _collate([self.read(o, (*self.key, worker, number, i)) for i, o in enumerate(others)])
            before = piece


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

    def __getitems__(self, draws: list[tuple[int, int, int]]) -> Batch:
        epoch, position, _ = draws[0]
        indices = [self.replacements[index] for _, _, index in draws]
        batch = self.images.__getitems__(indices)
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "batch", epoch, position))
        batch["pixel_values"] = self.augment(batch["pixel_values"], generator)
        batch["corrupt"] = [
            None if index == draw[2] else f"the image in row {draw[2]} cannot be read"
            for draw, index in zip(draws, indices, strict=True)
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
    to_batch = partial(_evaluation_batch, processor=processor, on_corrupt=data.on_corrupt_image)
    rows = dataset if isinstance(dataset, IterableDataset) else _Rows(dataset)
    return _loader(rows, data, accelerator, batch_size=batch_size, collate_fn=to_batch)


def _evaluation_batch(rows: list[dict], processor: BitImageProcessor, on_corrupt: str) -> dict[str, torch.Tensor]:
    """A batch as the image processor makes it of rows."""
    images = []
    labels = torch.tensor([row["label"] for row in rows])
    for index, row in enumerate(rows):
        try:
            images.append(decode(row))
        except DataError as error:
            if on_corrupt == "stop":
                raise
            logger.warning("%s; it is left out", error)
            labels[index] = IGNORED
    size = processor.crop_size
    pixel_values = torch.zeros(len(rows), len(processor.image_mean), size["height"], size["width"])
    if images:
        pixel_values[labels != IGNORED] = processor(images=images, return_tensors="pt")["pixel_values"]
    return {"pixel_values": pixel_values, "labels": labels}


# Where images come from.


def _digits(data: Data) -> dict[str, Dataset]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    # 17 grey levels (0..16) as 8-bit pixels.
    images = [PILImage.fromarray((scan * 255 / 16).round().astype("uint8")) for scan in digits.images]
    features = Features({"image": Image(), "label": ClassLabel(names=[str(name) for name in digits.target_names])})
    dataset = Dataset.from_dict({"image": images, "label": digits.target.tolist()}, features=features)
    split = dataset.train_test_split(data.test_fraction, seed=0, stratify_by_column="label")
    return {"train_split": split["train"], "test_split": split["test"]}


def _load(data: Data, split: str) -> Images:
    options = {} if data.files is None else _files(data, split)
    try:
        return load_dataset(data.dataset, split=split, streaming=data.streaming, **options)
    except (OSError, ValueError, DatasetsError) as error:
        reason = str(error.__cause__ or error)
        raise DataError(f"data.dataset {data.dataset}: the split {split} cannot be loaded: {reason}") from error


def _files(data: Data, split: str) -> dict[str, Any]:
    """The arguments of `load_dataset`; paths are made absolute, and those with `://` in them left alone."""
    if isinstance(data.files, str):
        if "://" in data.files:
            return {"data_dir": data.files}
        if not Path(data.files).is_dir():
            raise DataError(f"data.files: there is no folder {data.files} (single files: one glob or list per split)")
        return {"data_dir": str(Path(data.files).absolute())}
    assert data.files is not None
    base = re.split(r"[\[:]", split)[0]
    if base not in data.files:
        raise DataError(f"data.files has no files for the split {base}, only for {', '.join(data.files)}")
    given = data.files[base]
    return {"data_files": {base: [_pattern(path, base) for path in ([given] if isinstance(given, str) else given)]}}


def _pattern(path: str, split: str) -> str:
    if "://" in path:
        return path
    if not glob.glob(path, recursive=True):
        raise DataError(f"data.files.{split}: there is no file {path}")
    return str(Path(path).absolute() / "**") if Path(path).is_dir() else str(Path(path).absolute())


def _two_columns(dataset: Images, data: Data) -> Images:
    if dataset.features is None:
        dataset = dataset._resolve_features()  # of a stream that tells its columns only by its first rows
    # Decoding is left to us, so that an image which cannot be decoded is met where it can be named and replaced. It is
    # turned off before all else: some steps on a stream would decode an image and encode it again.
    for name, feature in dataset.features.items():
        if isinstance(feature, Image) or name == data.image_column:
            try:
                dataset = dataset.cast_column(name, Image(decode=False))
            except (TypeError, ValueError, pa.ArrowException) as error:
                raise DataError(f"data.image_column: {name} does not hold images but {feature}") from error
    dataset = _unnested(dataset, data.label_column)
    columns = list(dataset.features)
    for key in ("image_column", "label_column"):
        if getattr(data, key) not in columns:
            near = difflib.get_close_matches(getattr(data, key), columns, n=1)
            hint = f", did you mean {near[0]}?" if near else f"; there are {', '.join(columns)}"
            raise DataError(f"data.{key}: {data.dataset} has no column {getattr(data, key)}{hint}")
    dataset = dataset.select_columns([data.image_column, data.label_column])
    for old, new in ((data.image_column, "image"), (data.label_column, "label")):
        dataset = dataset if old == new else dataset.rename_column(old, new)
    return dataset


def _unnested(dataset: Images, column: str) -> Images:
    """A value inside a column of mappings as a column of its own, such as json.label of a webdataset."""
    outer, _, inner = column.partition(".")
    features = dict(dataset.features)
    if column in features or not isinstance(features.get(outer), dict) or inner not in features[outer]:
        return dataset
    features[column] = features[outer][inner]
    return dataset.map(partial(_take, outer=outer, inner=inner), features=Features(features))


def _take(row: dict[str, Any], outer: str, inner: str) -> dict[str, Any]:
    return {f"{outer}.{inner}": row[outer][inner]}


def _class_names(train: Images, data: Data, own_names: Sequence[str] | None) -> list[str]:
    feature = train.features["label"]
    if isinstance(feature, ClassLabel):
        names = data.class_names or feature.names
        if len(names) != feature.num_classes:
            raise DataError(
                f"data.class_names has {len(names)} names, but {data.dataset} {feature.num_classes} classes"
            )
        return list(names)
    if data.class_names is not None:
        return data.class_names
    if not data.streaming and feature.dtype in ("string", "large_string"):
        return sorted(set(train.unique("label")) - {None})
    problem = f"{data.dataset} does not name its classes"
    if own_names and "int" in feature.dtype:
        # How many classes a stream has is known when it ends; a label beyond the names stops it.
        num_classes = len(own_names) if data.streaming else 1 + max(set(train.unique("label")) - {None}, default=-1)
        if num_classes == len(own_names):
            logger.warning("%s; they are taken for the model's own %d", problem, num_classes)
            return list(own_names)
        problem += f", of which it has {num_classes}, and the model {len(own_names)}"
    raise DataError(f"{problem}: give data.class_names")


def _numbered(dataset: Images, names: list[str], title: str) -> Images:
    """Labels as numbers of classes, every one of which is checked."""
    feature = ClassLabel(names=names)
    if isinstance(dataset, IterableDataset):
        features = Features({"image": Image(decode=False), "label": feature})
        return dataset.map(partial(_number, names=names, title=title), features=features)
    labels = dataset.select_columns("label").with_format("arrow")[:]["label"].combine_chunks()
    if pa.types.is_string(labels.type) or pa.types.is_large_string(labels.type):
        numbers = pc.index_in(labels, pa.array(names, labels.type))
    elif pa.types.is_integer(labels.type):
        numbers = labels
    else:
        raise DataError(f"{title}: labels must be whole numbers or strings, not {labels.type}")
    numbers = numbers.cast(pa.int64()).fill_null(-1).to_numpy(zero_copy_only=False)
    wrong = np.flatnonzero((numbers < 0) | (numbers >= len(names)))
    if len(wrong):
        raise DataError(
            _outside(title, labels[int(wrong[0])].as_py(), names, f" in row {wrong[0]} ({len(wrong)} in all)")
        )
    if dataset.features["label"] == feature:
        return dataset
    # Not cast_column, which would write a second copy of all images.
    return dataset.remove_columns("label").add_column("label", numbers, feature=feature)


def _number(row: dict[str, Any], names: list[str], title: str) -> dict[str, Any]:
    """The number of a class, of a row of a stream."""
    label = row["label"]
    number = label if isinstance(label, int) else names.index(label) if label in names else -1
    if not 0 <= number < len(names):
        raise DataError(_outside(title, label, names, f", image {_describe(row)}"))
    return {"label": number}


def _outside(title: str, label: Any, names: list[str], where: str) -> str:
    known = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
    return f"{title}: the label {label!r}{where} is none of the {len(names)} classes 0..{len(names) - 1} ({known})"
