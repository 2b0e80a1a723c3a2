"""Where the images of a recipe come from: two splits with "image" and "label", checked before anything is trained."""

import difflib
import glob
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, load_dataset
from datasets.exceptions import DatasetsError
from PIL import Image as PILImage

from stitchable.imagenet import in_words
from stitchable.processing import to_rgb
from stitchable.training.recipe import Data

logger = logging.getLogger(__name__)

Images: TypeAlias = Dataset | IterableDataset


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
    """The image of a row in RGB, turned as its EXIF data say.

    Raises:
        DataError: it cannot be read; says which image that is, and why.
    """
    try:
        with Image().decode_example(row["image"]) as image:  # an animation keeps its file open
            return to_rgb(image)
    except Exception as error:  # decoders raise whatever they like: OSError, SyntaxError, struct.error, ...
        raise DataError(f"the image {describe(row)} cannot be read: {error or type(error).__name__}") from error


def describe(row: Mapping[str, Any]) -> str:
    """What to call the image of a row: its file, or its number in the split."""
    path = (row["image"] or {}).get("path")
    if "row" in row:
        return f"in row {row['row']}" + (f" ({path})" if path else "")
    return path or "without a name"


def _digits(data: Data) -> dict[str, Dataset]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    # 17 grey levels (0..16) as 8-bit pixels.
    images = [PILImage.fromarray((scan * 255 / 16).round().astype("uint8")) for scan in digits.images]
    features = Features({"image": Image(), "label": ClassLabel(names=[str(name) for name in digits.target_names])})
    dataset = Dataset.from_dict({"image": images, "label": digits.target.tolist()}, features=features)
    split = dataset.train_test_split(data.test_fraction, seed=data.split_seed, stratify_by_column="label")
    return {"train_split": split["train"], "test_split": split["test"]}


def _load(data: Data, split: str) -> Images:
    options = {} if data.files is None else _files(data, split)
    try:
        return load_dataset(data.dataset, data.config, split=split, streaming=data.streaming, **options)
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
    return dataset.map(_Inner(outer, inner), features=Features(features))


class _Inner:
    """Takes a value out of a mapping in a column."""

    def __init__(self, outer: str, inner: str) -> None:
        self.outer, self.inner = outer, inner

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return {f"{self.outer}.{self.inner}": row[self.outer][self.inner]}


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
        return dataset.map(_Number(names, title), features=features)
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


class _Number:
    """The number of a class, of a row of a stream."""

    def __init__(self, names: list[str], title: str) -> None:
        self.names, self.title = names, title
        self.numbers = {name: number for number, name in enumerate(names)}

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        label = row["label"]
        number = label if isinstance(label, int) else self.numbers.get(label, -1)
        if not 0 <= number < len(self.names):
            raise DataError(_outside(self.title, label, self.names, f", image {describe(row)}"))
        return {"label": number}


def _outside(title: str, label: Any, names: list[str], where: str) -> str:
    known = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
    return f"{title}: the label {label!r}{where} is none of the {len(names)} classes 0..{len(names) - 1} ({known})"
