"""Real files of every kind: read, checked, augmented, shared by processes, and resumed in the middle of an epoch."""

import io
import json
import logging
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch.utils.data import DataLoader

import stitchable.training.data
from families import make
from stitchable.processing import image_processor
from stitchable.training.augmentation import make_image_transform, seeded
from stitchable.training.data import (
    TrainingLoader,
    decode,
    load_data,
    make_test_loader,
    sample_images,
)
from stitchable.training.recipe import Augmentation, Data, Schedule

ROOT = Path(__file__).parents[1]
CLASSES = ["ant", "bee", "cat", "dog", "eel"]
NUM_IMAGES = 40

# Loaders with workers fork a process that has threads; a machine may have fewer cores than the workers asked for.
pytestmark = [
    # A loader that stops with an error closes its queues, on which Python's thread that feeds them may be at work.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
]

AUGMENTATION = Augmentation(
    crop_scale=[0.3, 1.0], horizontal_flip=0.5, auto_augment="rand-m9-mstd0.5-inc1", random_erasing=0.5
)
MEMORY_AUGMENTATION = Augmentation(affine=0.1, padding=4, horizontal_flip=0.5)
PLAIN = Augmentation()


@pytest.fixture(autouse=True)
def _caches(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    # After a stream of parquet files datasets waits for threads of pyarrow, 5 s (https://github.com/apache/arrow/issues/45214).
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    # After an error torch waits 5 s for each worker to end, then ends it.
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)
    datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def config():
    return make("vit").config


@pytest.fixture(scope="module")
def processor(config):
    return image_processor(config, crop_pct=1.0)


def scan(number: int) -> Image.Image:
    """An image of which one grey level, in the middle, tells its number."""
    pixels = np.random.default_rng(number).integers(0, 255, (36, 40, 3)).astype("uint8")
    pixels[8:28, 8:32] = 5 * number
    return Image.fromarray(pixels)


def encoded(number: int, kind: str = "png") -> bytes:
    buffer = io.BytesIO()
    scan(number).save(buffer, kind, **({"quality": 95, "subsampling": 0} if kind == "jpeg" else {}))
    return buffer.getvalue()


def label_of(number: int) -> int:
    return number % 5


def numbers_of(pixel_values: torch.Tensor, config) -> list[int]:
    """The numbers of scans that were only resized."""
    middle = pixel_values[:, 0, 15:17, 15:17].mean((1, 2)) * config.image_std[0] + config.image_mean[0]
    return (middle * 255 / 5).round().int().tolist()


def write_folder(folder: Path) -> Data:
    for split, count in (("train", NUM_IMAGES), ("test", 12)):
        for number in range(count):
            path = folder / split / CLASSES[label_of(number)] / f"{number:03}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(number, "jpeg"))
    return Data(dataset="imagefolder", files=str(folder))


def write_parquet(folder: Path, labels: list | None = None, num_files: int = 4, broken: tuple[int, ...] = ()) -> Data:
    """Shards without features, as other tools write them: a struct of bytes and path, and labels."""
    labels = [CLASSES[label_of(number)] for number in range(NUM_IMAGES)] if labels is None else labels
    contents = [encoded(number)[: 200 if number in broken else None] for number in range(NUM_IMAGES)]
    rows = [{"bytes": content, "path": f"{number}.png"} for number, content in enumerate(contents)]
    for shard in range(num_files):
        part = slice(shard, None, num_files)
        pq.write_table(pa.table({"picture": rows[part], "kind": labels[part]}), folder / f"train-{shard}.parquet")
    pq.write_table(pa.table({"picture": rows[:12], "kind": labels[:12]}), folder / "test.parquet")
    files = {"train": str(folder / "train-*.parquet"), "test": str(folder / "test.parquet")}
    return Data(dataset="parquet", files=files, image_column="picture", label_column="kind")


def write_shards(folder: Path, num_files: int = 4) -> Data:
    def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))

    for name, numbers in [
        *((f"train-{shard}", range(shard, NUM_IMAGES, num_files)) for shard in range(num_files)),
        ("test-0", range(12)),
    ]:
        with tarfile.open(folder / f"{name}.tar", "w") as tar:
            for number in numbers:
                add(tar, f"{number:03}.cls", str(label_of(number)).encode())
                add(tar, f"{number:03}.jpg", encoded(number, "jpeg"))
                add(tar, f"{number:03}.json", json.dumps({"kind": CLASSES[label_of(number)]}).encode())
    files = {"train": str(folder / "train-*.tar"), "test": str(folder / "test-0.tar")}
    return Data(dataset="webdataset", files=files, image_column="jpg", label_column="cls", class_names=CLASSES)


def streamed(data: Data, **changes) -> Data:
    return changed(data, streaming=True, num_train_images=NUM_IMAGES, class_names=CLASSES, **changes)


def changed(data: Data, **changes) -> Data:
    return Data(**{**data.model_dump(), **changes})


def make_loader(data: Data, config, processor, augmentation=PLAIN, dataset=None, **options) -> TrainingLoader:
    smoothing = options.pop("label_smoothing", 0.0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=options.pop("gradient_accumulation_steps", 1))
    settings = {"batch_size": 6, "batches_per_epoch": 6, "seed": 0, "accelerator": accelerator, **options}
    schedule = Schedule(epochs=1, batch_size=6, learning_rate=1.0, label_smoothing=smoothing, augmentation=augmentation)
    dataset = load_data(data).train if dataset is None else dataset
    return TrainingLoader(dataset, data, schedule, config, processor, **settings)


def joined(batches) -> dict[str, torch.Tensor]:
    batches = list(batches)
    return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}


WRITERS = {"folder": write_folder, "parquet": write_parquet, "webdataset": write_shards}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", WRITERS)
def test_every_kind_of_files_gives_the_same_images_and_labels(kind, streaming, tmp_path, config, processor) -> None:
    data = WRITERS[kind](tmp_path)
    data = streamed(data) if streaming else data
    splits = load_data(data)
    assert splits.class_names == CLASSES
    assert splits.train.features["label"].names == CLASSES
    for split, count in ((splits.train, NUM_IMAGES), (splits.test, 12)):
        rows = list(split)
        assert all(set(row) == {"image", "label"} for row in rows)
        batch = joined(make_test_loader(split, data, processor, 5, Accelerator(cpu=True)))
        numbers = numbers_of(batch["pixel_values"], config)
        assert sorted(numbers) == list(range(count))
        assert batch["labels"].tolist() == [label_of(number) for number in numbers]
        assert decode(rows[3]).size == (40, 36)


def test_a_label_inside_a_mapping_of_a_webdataset(tmp_path) -> None:
    data = changed(write_shards(tmp_path), label_column="json.kind")
    for each in (data, streamed(data)):
        assert sorted(row["label"] for row in load_data(each).test) == sorted(label_of(number) for number in range(12))


def test_digits_are_real_scans_split_with_a_fixed_seed(processor) -> None:
    data = Data(dataset="digits", test_fraction=0.3333)
    first, second = load_data(data), load_data(data)
    assert (len(first.train), len(first.test)) == (1198, 599)
    assert first.test["label"][:] == second.test["label"][:]
    assert first.class_names == [str(digit) for digit in range(10)]
    assert decode(first.test[3]).size == (8, 8)
    pixels = np.array(decode(first.test[3]))
    assert pixels.shape == (8, 8, 3)
    assert 100 < pixels.max() <= 255


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"files": "/nowhere/at/all"}, "data.files: there is no folder /nowhere/at/all"),
        ({"files": {"train": "FOLDER/no-*.parquet"}}, "data.files.train: there is no file FOLDER/no-*.parquet"),
        ({"files": {"train": "FOLDER/train-*.parquet"}}, "data.files has no files for the split test, only for train"),
        ({"test_split": "test[:3", "dataset": "parquet"}, "the split test[:3 cannot be loaded"),
        ({"image_column": "pictures"}, "data.image_column: parquet has no column pictures, did you mean picture?"),
        ({"label_column": "y"}, "data.label_column: parquet has no column y; there are picture, kind"),
        ({"class_names": CLASSES[:3]}, "data.train_split train: the label 'dog' in row 3 (16 in all) is none of the 3"),
        ({"dataset": "nobody/has-this", "files": None}, "data.dataset nobody/has-this: the split train cannot be"),
        ({"dataset": "imagefolder", "files": {"train": "FOLDER/train-*", "test": "FOLDER/test*"}}, "cannot be loaded"),
    ],
)
def test_what_is_wrong_with_the_data_is_said(changes, message, tmp_path) -> None:
    data = write_parquet(tmp_path, num_files=1)
    changes = json.loads(json.dumps(changes).replace("FOLDER", str(tmp_path)))
    with pytest.raises(ValueError, match=re.escape(message.replace("FOLDER", str(tmp_path)))):
        load_data(changed(data, **changes))


@pytest.mark.parametrize(
    ("labels", "class_names", "message"),
    [
        ([0] * NUM_IMAGES, None, "does not name its classes: give data.class_names"),
        ([0] * 20 + [5] + [0] * 19, CLASSES, "the label 5 in row 20 (1 in all) is none of the 5 classes 0..4 (ant,"),
        ([-1] * NUM_IMAGES, CLASSES, "the label -1 in row 0 (40 in all)"),
        ([0, None] * 20, CLASSES, "the label None in row 1 (20 in all)"),
        ([0.5] * NUM_IMAGES, CLASSES, "labels must be whole numbers or strings, not double"),
    ],
)
def test_labels_outside_the_classes_are_found_before_training(labels, class_names, message, tmp_path) -> None:
    data = changed(write_parquet(tmp_path, labels, num_files=1), class_names=class_names)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_data(data)


@pytest.mark.parametrize("streaming", [False, True])
def test_imagenet_s_numbers_become_words(streaming, tmp_path) -> None:
    wnids = ["n01440764", "n01443537", "n02012849", "n03126707"]
    words = ["tench, Tinca tinca", "goldfish, Carassius auratus", "crane", "crane2"]
    labels = [wnids[number % 4] for number in range(NUM_IMAGES)]
    strings = write_parquet(tmp_path, labels, num_files=1)
    options = {"streaming": True, "num_train_images": NUM_IMAGES, "class_names": wnids} if streaming else {}
    for number, wnid in enumerate(wnids):
        for split in ("train", "test"):
            (tmp_path / "folder" / split / wnid).mkdir(parents=True)
            scan(number).save(tmp_path / "folder" / split / wnid / "1.png")
    folder = Data(dataset="imagefolder", files=str(tmp_path / "folder"))
    for data, number_of in ((strings, lambda number: number % 4), (folder, lambda number: number)):
        splits = load_data(changed(data, **options))
        assert splits.class_names == words
        assert [row["label"] for row in splits.train] == [number_of(number) for number, _ in enumerate(splits.train)]


@pytest.mark.parametrize("streaming", [False, True])
def test_numbers_are_taken_for_the_classes_of_the_model(streaming, tmp_path, caplog) -> None:
    data = write_parquet(tmp_path, [label_of(number) for number in range(NUM_IMAGES)], num_files=1)
    data = changed(data, **({"streaming": True, "num_train_images": NUM_IMAGES} if streaming else {}))
    splits = load_data(data, CLASSES)
    assert splits.class_names == CLASSES
    assert [row["label"] for row in splits.train] == [label_of(number) for number in range(NUM_IMAGES)]
    assert "does not name its classes; they are taken for the model's own 5" in caplog.text
    with pytest.raises(ValueError, match=r"does not name its classes: give data\.class_names"):
        load_data(data)
    if streaming:
        with pytest.raises(ValueError, match=r"the label 4, image 4\.png is none of the 4 classes"):
            list(load_data(data, CLASSES[:4]).train)
    else:
        with pytest.raises(ValueError, match=r"of which it has 5, and the model 6: give data\.class_names"):
            load_data(data, [*CLASSES, "fox"])


def test_a_column_that_holds_no_images_is_named(tmp_path) -> None:
    data = changed(write_parquet(tmp_path, [0] * NUM_IMAGES), image_column="kind", class_names=CLASSES)
    with pytest.raises(ValueError, match=r"^data.image_column: kind does not hold images"):
        load_data(data)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_label_outside_the_classes_stops_a_stream(num_workers, tmp_path, config, processor) -> None:
    data = streamed(write_parquet(tmp_path, ["ant"] * 30 + ["yak"] + ["ant"] * 9), num_workers=num_workers)
    with pytest.raises(ValueError, match=r"^data.train_split train: the label 'yak', image 30.png is none of the 5"):
        list(make_loader(data, config, processor).epoch(0))


def test_without_augmentation_training_sees_what_evaluation_sees(tmp_path, config, processor) -> None:
    data = write_folder(tmp_path)
    splits = load_data(data)
    image = decode(splits.train[7]).resize((48, 36))  # an even number of pixels is cropped away, see image_processor
    transform = make_image_transform(PLAIN, config, processor)
    expected = processor(images=[image], return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(transform(image), expected, rtol=0, atol=0.02)  # 8-bit rounding of resizing


@pytest.mark.parametrize(
    "name", ["rand-m10-n8-inc1", "rand-m9-mstd0.5-inc1", "original", "v0", "3a", "augmix-m5-w4-d2"]
)
def test_no_draw_of_timm_s_policies_fails(name, config, processor) -> None:
    """Pillow refuses to posterize to 0 bits, which timm's strongest draws ask for."""
    transform = make_image_transform(Augmentation(auto_augment=name), config, processor)
    for number in range(60):
        with seeded(number):
            assert transform(scan(3)).isfinite().all()


# The kinds of training loader, each with what it must give in an epoch.
KINDS = {
    "images": (write_folder, {}, AUGMENTATION),
    "in_memory": (write_folder, {"in_memory": True}, MEMORY_AUGMENTATION),
    "stream": (
        write_parquet,
        {"streaming": True, "num_train_images": NUM_IMAGES, "class_names": CLASSES},
        AUGMENTATION,
    ),
}


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_resumed_anywhere_is_the_same_bit_for_bit(kind, num_workers, tmp_path, config, processor) -> None:
    write, changes, augmentation = KINDS[kind]
    augmentation = augmentation.model_copy(update={"mixup": 0.8, "cutmix": 1.0})
    data = changed(write(tmp_path), num_workers=num_workers, **changes)
    dataset = load_data(data).train
    loader = make_loader(data, config, processor, augmentation, dataset, label_smoothing=0.1)
    torch.manual_seed(1)
    whole = list(loader.epoch(1))
    state = torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())  # nothing is drawn from the generators of the model
    assert len(whole) == loader.batches_per_epoch == 6
    again = make_loader(data, config, processor, augmentation, dataset, label_smoothing=0.1)
    next(again.epoch(0))
    for start in (0, 3, 5):
        rest = list(again.epoch(1, start))
        assert len(rest) == 6 - start
        for batch, expected in zip(rest, whole[start:], strict=True):
            torch.testing.assert_close(batch, expected, rtol=0, atol=0)
    assert not torch.equal(joined(again.epoch(2))["labels"], joined(whole)["labels"])
    labels = joined(whole)["labels"]
    assert labels.shape == (36, 5)
    torch.testing.assert_close(labels.sum(1), torch.ones(36))


@pytest.mark.parametrize("kind", ["images", "in_memory"])
def test_workers_do_not_change_an_epoch_but_seeds_do(kind, tmp_path, config, processor) -> None:
    write, changes, augmentation = KINDS[kind]
    data = changed(write(tmp_path), **changes)
    dataset = load_data(data).train
    options = [(0, 0), (2, 0), (0, 1)]
    first, second, other = (
        joined(make_loader(changed(data, num_workers=n), config, processor, augmentation, dataset, seed=seed).epoch(0))
        for n, seed in options
    )
    torch.testing.assert_close(second, first, rtol=0, atol=0)
    assert not torch.equal(first["labels"], other["labels"])


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("kind", ["images", "stream"])
def test_accumulated_gradients_do_not_change_an_epoch(kind, num_workers, tmp_path, config, processor) -> None:
    """Half a batch at a time are the same images, augmented in the same ways."""
    write, changes, augmentation = KINDS[kind]
    data = changed(write(tmp_path), num_workers=num_workers, **changes)
    dataset = load_data(data).train
    whole = joined(make_loader(data, config, processor, augmentation, dataset).epoch(1))
    options = {"batch_size": 3, "batches_per_epoch": 12, "gradient_accumulation_steps": 2}
    halves = make_loader(data, config, processor, augmentation, dataset, **options)
    torch.testing.assert_close(joined(halves.epoch(1)), whole, rtol=0, atol=0)
    rest = {key: values[18:] for key, values in whole.items()}
    torch.testing.assert_close(joined(halves.epoch(1, 6)), rest, rtol=0, atol=0)


@pytest.mark.parametrize("num_workers", [0, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_has_every_image_once(kind, num_workers, tmp_path, config, processor) -> None:
    write, changes, _ = KINDS[kind]
    data = changed(write(tmp_path), num_workers=num_workers, **changes)
    loader = make_loader(data, config, processor, batch_size=8, batches_per_epoch=5)
    for epoch in range(2):
        batch = joined(loader.epoch(epoch))
        numbers = numbers_of(batch["pixel_values"], config)
        assert sorted(numbers) == list(range(NUM_IMAGES))
        assert numbers != sorted(numbers)
        assert batch["labels"].tolist() == [label_of(number) for number in numbers]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_a_resumed_stream_passes_over_is_not_decoded(num_workers, tmp_path, config, processor) -> None:
    """All images are broken: whatever is decoded stops the epoch, and 4 of 6 batches are not."""
    data = write_parquet(tmp_path, num_files=2, broken=tuple(range(NUM_IMAGES)))
    rows = load_data(streamed(data)).train
    read = []
    passed = stitchable.training.data._Pieces(rows, lambda *arguments: read.append(arguments), 1, (0,))
    assert next(iter(passed)) == 32
    assert not read
    with pytest.raises(ValueError, match="cannot be read"):
        list(make_loader(streamed(data, num_workers=num_workers), config, processor).epoch(0, 4))


def test_a_stream_that_is_too_short_says_so(tmp_path, config, processor, caplog) -> None:
    data = streamed(write_parquet(tmp_path))
    with pytest.raises(ValueError, match=r"data.num_train_images is 40, .* needs 60, but only 40 came"):
        list(make_loader(data, config, processor, batches_per_epoch=10).epoch(0))
    # A little short, as a share of one process may be: it begins again, and says that.
    loader = make_loader(data, config, processor, batches_per_epoch=7)
    with caplog.at_level(logging.WARNING):
        whole = list(loader.epoch(0))
    assert "gave 40 of 42" in caplog.text
    assert len(whole) == 7
    torch.testing.assert_close(list(loader.epoch(0, 6)), whole[6:], rtol=0, atol=0)


def test_repeats_show_fewer_images_in_different_ways(tmp_path, config, processor) -> None:
    data = write_folder(tmp_path)
    dataset = load_data(data).train
    loader = make_loader(data, config, processor, Augmentation(repeats=3), dataset)
    for batch in loader.epoch(0):
        numbers = numbers_of(batch["pixel_values"], config)
        assert numbers[0:3] == numbers[:1] * 3
        assert numbers[3:6] == numbers[3:4] * 3
    augmented = AUGMENTATION.model_copy(update={"repeats": 3})
    batch = next(make_loader(data, config, processor, augmented, dataset).epoch(0))
    assert not torch.equal(batch["pixel_values"][0], batch["pixel_values"][1])
    assert batch["labels"][:3].unique().numel() == 1


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_corrupt_image_is_replaced_and_counted_or_stops_the_run(
    kind, num_workers, tmp_path, config, processor, caplog
) -> None:
    write, changes, _ = KINDS[kind]
    broken = (7, 21)
    if write is write_folder:
        data = write(tmp_path)
        for number in broken:
            (path,) = tmp_path.glob(f"train/*/{number:03}.jpg")
            path.write_bytes(path.read_bytes()[:300])
    else:
        data = write(tmp_path, broken=broken)
    data = changed(data, num_workers=num_workers, on_corrupt_image="skip", **changes)
    loader = make_loader(data, config, processor, batch_size=8, batches_per_epoch=5)
    with caplog.at_level(logging.WARNING):
        batch = joined(loader.epoch(0))
    numbers = numbers_of(batch["pixel_values"], config)
    assert batch["labels"].tolist() == [label_of(number) for number in numbers]
    assert len(numbers) == NUM_IMAGES
    assert set(numbers) == set(range(NUM_IMAGES)) - set(broken)
    assert loader.num_corrupt == 2
    warnings = [record.message for record in caplog.records if "another image takes its place" in record.message]
    assert len(warnings) == 2
    assert kind == "in_memory" or any(re.search(r"\b0*7\.(jpg|png)", warning) for warning in warnings)
    list(loader.epoch(0, 4))
    assert 2 <= loader.num_corrupt <= 4

    with pytest.raises(ValueError, match=r"^the image .*\b0*(7|21)\.(jpg|png).* cannot be read: .*") as caught:
        list(make_loader(changed(data, on_corrupt_image="stop"), config, processor, batches_per_epoch=6).epoch(0))
    assert "Traceback" not in str(caught.value)


def test_a_corrupt_test_image_is_left_out_or_stops_the_run(tmp_path, config, processor, caplog) -> None:
    data = write_folder(tmp_path)
    (path,) = tmp_path.glob("test/*/004.jpg")
    path.write_bytes(b"no image at all")
    for in_memory in (False, True):
        skipping = changed(data, on_corrupt_image="skip", in_memory=in_memory)
        batch = joined(make_test_loader(load_data(skipping).test, skipping, processor, 5, Accelerator(cpu=True)))
        (wrong,) = (batch["labels"] == -100).nonzero().flatten().tolist()
        assert not batch["pixel_values"][wrong].any()
        assert sorted(numbers_of(batch["pixel_values"], config)[:wrong]) != []
        assert str(path) in caplog.text
        caplog.clear()
    with pytest.raises(ValueError, match=re.escape(str(path))):
        list(make_test_loader(load_data(data).test, data, processor, 5, Accelerator(cpu=True)))


def test_samples_are_different_images_and_their_number_is_kept(tmp_path, config, processor) -> None:
    data = changed(write_parquet(tmp_path, broken=(2,)), on_corrupt_image="skip")
    for each in (data, streamed(data)):
        dataset = load_data(each).train
        first, second, other = (joined_samples(dataset, each, processor, 39, seed, config) for seed in (0, 0, 1))
        assert first == second != other
        assert sorted(first) == [number for number in range(NUM_IMAGES) if number != 2]
        with pytest.raises(ValueError, match="40 sample images are asked for, but there are only 39"):
            list(sample_images(dataset, each, processor, 40, 0))


def joined_samples(dataset, data, processor, number, seed, config) -> list[int]:
    return numbers_of(torch.cat(list(sample_images(dataset, data, processor, number, seed))), config)


@pytest.mark.parametrize(
    ("augmentation", "options", "message"),
    [
        (Augmentation(mixup=1.0), {"batch_size": 5}, "gives each process 5 at a time: make that even"),
        (Augmentation(auto_augment="rand-x9"), {}, "augmentation.auto_augment 'rand-x9': timm refuses it"),
        (PLAIN, {"batches_per_epoch": 7}, "an epoch of 42 images is asked for, but there are only 40"),
    ],
)
def test_what_a_loader_cannot_do_is_said_when_it_is_made(augmentation, options, message, tmp_path, config, processor):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_loader(write_folder(tmp_path), config, processor, augmentation, **options)


def test_two_processes_share_the_epoch_of_one(tmp_path, config, processor) -> None:
    arguments = {}
    for kind, (write, changes, augmentation) in KINDS.items():
        (tmp_path / kind).mkdir()
        data = changed(write(tmp_path / kind), **changes)
        mixed = augmentation.model_copy(update={"mixup": 0.8})
        arguments[kind] = {"data": data.model_dump(), "augmentation": mixed.model_dump()}
    (tmp_path / "arguments.json").write_text(json.dumps(arguments), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["tests/distributed_data.py", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    found = [torch.load(tmp_path / f"rank-{rank}.pt") for rank in range(2)]
    options = {"batch_size": 4, "batches_per_epoch": 10}
    for kind in KINDS:
        assert found[0][kind]["test_labels"] == found[1][kind]["test_labels"]
        assert sorted(found[0][kind]["test_labels"]) == sorted(label_of(number) for number in range(12))
        # Every image in one of the processes; of a stream, in which one depends on how many processes there are.
        numbers = [number for rank in found for number in numbers_of(rank[kind]["plain"], config)]
        assert sorted(numbers) == list(range(NUM_IMAGES))
        if kind != "stream":
            data, mixed = Data(**arguments[kind]["data"]), Augmentation(**arguments[kind]["augmentation"])
            whole = list(make_loader(data, config, processor, mixed, **options).epoch(1))
            for rank in range(2):
                torch.testing.assert_close(found[rank][kind]["batches"], whole[rank::2], rtol=0, atol=0)


def test_a_test_loader_is_a_dataloader_that_accelerate_knows(tmp_path, processor) -> None:
    accelerator = Accelerator(cpu=True)
    data = changed(write_folder(tmp_path), in_memory=True)
    loader = make_test_loader(load_data(data).test, data, processor, 5, accelerator)
    assert isinstance(loader, DataLoader)
    whole = list(loader)
    assert [len(batch["labels"]) for batch in whole] == [5, 5, 2]
    rest = list(accelerator.skip_first_batches(loader, 1))
    torch.testing.assert_close(rest, whole[1:], rtol=0, atol=0)
