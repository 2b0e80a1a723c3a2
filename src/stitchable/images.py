"""Batches of images from a folder or a data set of the Hub, preprocessed as a model wants them."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, Dataset, Image, IterableDataset, load_dataset
from transformers import BaseImageProcessor

from stitchable.imagenet import in_words
from stitchable.model.configuration_stitchable import StitchableConfig
from stitchable.processing import to_rgb

SHUFFLE_BUFFER = 1000
"""Images of a stream, from several of its shards at a time, among which the next is drawn."""


def read_batches(
    source: str,
    processor: BaseImageProcessor,
    *,
    config: StitchableConfig | None = None,
    split: str | None = None,
    image_column: str = "image",
    label_column: str = "label",
    batch_size: int = 64,
    seed: int | None = 0,
) -> Iterator[dict[str, torch.Tensor]]:
    """Batches {"pixel_values"}, and {"labels"} where they are known, shuffled.

    Args:
        source: a folder of images (of one folder per class, where labels are wanted), or the id of a data set on the
            Hub, which is streamed.
        processor: the image processor of the model.
        config: of the model, whose classes the labels are; None where only images are asked for: labels are then what
            the data call them, if they have classes.
        split: of the data set; None for the only one.
        image_column: of a data set of the Hub.
        label_column: of a data set of the Hub.
        batch_size: images per batch.
        seed: of the order. Folders, and many data sets, are sorted by class, so that their first images are no sample
            of them. None keeps the order, for whoever reads all: a stream then fills no buffer first.

    Raises:
        ValueError: nothing is there, several splits of which none was chosen, a column is missing, classes or labels
            that are not the model's, or an image that cannot be read; names it.
    """
    dataset = _open_data(source, split)
    if dataset.features is None:
        dataset = dataset._resolve_features()  # of a stream that tells its columns only by its first rows
    # Images alone may lie in folders of any name.
    has_classes = isinstance(dataset.features.get(label_column), ClassLabel)
    wanted = [image_column, label_column] if config or has_classes else [image_column]
    missing = [name for name in wanted if name not in dataset.features]
    if missing:
        raise ValueError(f"{source} has no column {missing[0]!r}; it has {', '.join(dataset.features)}")
    if not isinstance(dataset.features[image_column], Image):
        raise ValueError(f"the column {image_column!r} of {source} does not hold images")
    numbers = _numbers(source, dataset.features[label_column], config) if config else None
    read_label = partial(_number, numbers=numbers) if config else _own_number
    # Decoded by us, so that an image which cannot be read is met where it can be named.
    dataset = dataset.select_columns(wanted).cast_column(image_column, Image(decode=False))
    place = "in row {}"
    if seed is not None:
        dataset, place = _shuffled(dataset, seed), "number {} of the shuffled ones"
    return _batches(dataset, processor, wanted, read_label, batch_size, place)


def why_no_labels(
    source: str, config: StitchableConfig, *, split: str | None = None, label_column: str = "label"
) -> str | None:
    """Why data have no labels that are a model's classes; None where they have.

    Args:
        source: as for `read_batches`, like the others.
        config: see there.
        split: see there.
        label_column: see there.
    """
    dataset = _open_data(source, split)
    features = (dataset if dataset.features is not None else dataset._resolve_features()).features
    feature = features.get(label_column)
    if feature is None:
        return f"{source} has no column {label_column!r}"
    if isinstance(feature, ClassLabel) and len(feature.names) < 2:
        return f"all images of {source} lie in one folder"
    try:
        _numbers(source, feature, config)
    except ValueError as error:
        return str(error)
    return None


def _open_data(source: str, split: str | None) -> Any:
    is_folder = Path(source).is_dir()
    if not is_folder and (Path(source).exists() or source.count("/") != 1 or source.startswith((".", "/"))):
        raise ValueError(f"{source} is neither a folder of images nor the id of a data set on the Hub")
    options = {"path": "imagefolder", "data_dir": str(Path(source).absolute())} if is_folder else {"path": source}
    try:
        found = load_dataset(**options, split=split, streaming=not is_folder)
    except (OSError, ValueError) as error:  # of datasets' own, such as EmptyDatasetError
        raise ValueError(f"{source}: no images can be loaded: {error}") from error
    if isinstance(found, dict):
        if len(found) > 1:
            raise ValueError(f"{source} has the splits {', '.join(found)}; choose one")
        (found,) = found.values()
    return found


def _numbers(source: str, feature: Any, config: StitchableConfig) -> list[int] | None:
    """The model's number of each of the data's classes; None where the labels are numbers already."""
    if not isinstance(feature, ClassLabel):
        return None
    labels = config.label2id or {}
    known = dict(zip(in_words(list(labels)), map(int, labels.values()), strict=True))
    names = in_words(feature.names)
    if set(names) <= set(known):
        return [known[name] for name in names]
    if len(names) == config.num_labels and set(known) == {f"LABEL_{i}" for i in range(len(known))}:
        return list(range(len(names)))  # the model's classes have no names
    strange = next(name for name in names if name not in known)
    examples = ", ".join(list(known)[:3])
    raise ValueError(f"{source} has a class {strange!r} that the model does not know; its classes are {examples}, ...")


def _shuffled(dataset: Dataset | IterableDataset, seed: int) -> Dataset | IterableDataset:
    if isinstance(dataset, IterableDataset):
        return dataset.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
    return dataset.shuffle(seed=seed, keep_in_memory=True)  # no file for the order in the user's cache


def _batches(
    dataset: Any,
    processor: BaseImageProcessor,
    columns: list[str],
    read_label: Callable[[Any], int],
    batch_size: int,
    place: str,
) -> Iterator[dict[str, torch.Tensor]]:
    image_column, *label_columns = columns
    decoder = Image()
    for first, rows in enumerate(dataset.iter(batch_size=batch_size)):
        images = []
        for index, row in enumerate(rows[image_column]):
            name = (row or {}).get("path") or place.format(first * batch_size + index)
            try:
                with decoder.decode_example(row) as image:  # an animation keeps its file open
                    images.append(to_rgb(image))
            except Exception as error:  # decoders raise whatever they like
                raise ValueError(f"the image {name} cannot be read: {error or type(error).__name__}") from error
        batch = {"pixel_values": processor(images=images, return_tensors="pt")["pixel_values"]}
        for column in label_columns:
            batch["labels"] = torch.tensor([read_label(label) for label in rows[column]])
        yield batch


def _number(label: Any, numbers: list[int] | None) -> int:
    # Data sets whose labels are secret have -1 there, which would be the last class of a list.
    if type(label) is not int or label < 0 or (numbers is not None and label >= len(numbers)):
        raise ValueError(f"the label {label!r} is none of the classes; choose a split whose labels are known")
    return label if numbers is None else numbers[label]


def _own_number(label: int | None) -> int:
    return -1 if label is None else label
