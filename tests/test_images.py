"""Images of every odd kind, through the reading of the command line, the pipeline of transformers, and the page."""

import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from datasets import Image as ImageFeature
from PIL import Image
from transformers import pipeline

from families import make
from odd_images import broken, picture, readable
from stitchable.app import load_page
from stitchable.images import read_batches, why_no_labels
from stitchable.processing import image_processor, to_rgb
from stitchable.training.data import DataError, decode

KINDS = ("grey", "black-and-white", "palette", "rgba", "16-bit", "16-bit-tiff", "animated", "1x1", "turned")
BROKEN = ("truncated", "text", "empty")
# datasets and transformers leave the file of a broken or animated image to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def in_a_folder(path: Path) -> Path:
    folder = path.with_suffix("")
    folder.mkdir()
    shutil.copy(path, folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_every_reader_sees_the_same_picture(kind, tmp_path) -> None:
    path, shown = readable(tmp_path)[kind]
    wanted = np.asarray(shown)
    assert np.array_equal(np.asarray(load_page().read_picture(path)), wanted)
    assert np.array_equal(np.asarray(decode({"image": {"bytes": path.read_bytes(), "path": None}})), wanted)
    processor = image_processor(make("vit").config, crop_pct=1.0)
    (batch,) = read_batches(str(in_a_folder(path)), processor)
    assert torch.equal(batch["pixel_values"], processor(images=shown, return_tensors="pt")["pixel_values"])


# transformers clips 16 bits of grey, as the README says.
@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("16-bit")])
def test_the_pipeline_takes_every_kind(kind, tmp_path) -> None:
    model = make("vit")
    processor = image_processor(model.config, crop_pct=1.0)
    classify = pipeline("image-classification", model=model, image_processor=processor)
    path, shown = readable(tmp_path)[kind]
    scores = {entry["label"]: entry["score"] for entry in classify(str(path))}
    with torch.inference_mode():
        logits = model(processor(images=shown, return_tensors="pt")["pixel_values"]).logits[0]
    wanted = {model.config.id2label[number]: score for number, score in enumerate(logits.softmax(-1).tolist())}
    assert scores == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_image_is_named_by_every_reader(kind, tmp_path) -> None:
    path = broken(tmp_path)[kind]
    with pytest.raises(ValueError, match="This image cannot be read: "):
        load_page().read_picture(path)
    with pytest.raises(DataError, match=f"the image {path} cannot be read: "):
        decode({"image": {"bytes": None, "path": str(path)}})
    processor = image_processor(make("vit").config, crop_pct=1.0)
    with pytest.raises(ValueError, match=rf"the image .*{kind}\.png cannot be read: "):
        list(read_batches(str(in_a_folder(path)), processor))
    classify = pipeline("image-classification", model=make("vit"), image_processor=processor)
    with pytest.raises(OSError, match=r"image file is truncated|cannot identify image file"):
        classify(str(path))


def test_floating_point_pixels_are_refused(tmp_path) -> None:
    path = broken(tmp_path)["float"]
    with pytest.raises(ValueError, match="have no known white"):
        to_rgb(ImageFeature().decode_example({"bytes": None, "path": str(path)}))
    with pytest.raises(ValueError, match="have no known white"):
        load_page().read_picture(path)


def test_more_than_sixteen_bits_are_clipped_not_wrapped() -> None:
    grey = picture().convert("L")
    high = np.asarray(grey).astype("int32") * 257
    high[0, 0] = 1 << 20
    shown = np.asarray(to_rgb(Image.fromarray(high)))
    assert shown[0, 0].tolist() == [255, 255, 255]
    assert np.array_equal(shown[1:], np.asarray(grey.convert("RGB"))[1:])


WNIDS = ["n01440764", "n01443537", "n02012849", "n03126707"]
WORDS = ["tench, Tinca tinca", "goldfish, Carassius auratus", "crane", "crane2"]


@pytest.mark.parametrize("names", [WORDS, WNIDS])
@pytest.mark.parametrize("folders", [WORDS, WNIDS])
def test_folders_of_imagenet_s_numbers_are_the_classes_of_their_words(names, folders, tmp_path) -> None:
    for number, folder in enumerate(folders):
        (tmp_path / "images" / folder).mkdir(parents=True)
        Image.new("RGB", (4, 4), (number,) * 3).save(tmp_path / "images" / folder / "1.png")
    model = make("vit", id2label=dict(enumerate(["n01484850" if names is WNIDS else "other", *reversed(names)])))
    processor = image_processor(model.config, crop_pct=1.0)
    (batch,) = read_batches(str(tmp_path / "images"), processor, config=model.config, seed=None)
    brightness = batch["pixel_values"].mean((1, 2, 3)).argsort()
    assert batch["labels"][brightness].tolist() == [4, 3, 2, 1]


def test_it_is_said_why_images_have_no_labels_for_a_model(tmp_path) -> None:
    config = make("vit", id2label=dict(enumerate(["cat", "dog", "cow", "hen", "pig"]))).config
    for place in ("known/cat", "known/pig", "strange/cat", "strange/fox", "one/cat", "none"):
        (tmp_path / place).mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (4, 4)).save(tmp_path / place / f"{number}.png")
    said = {name: why_no_labels(str(tmp_path / name), config) for name in ("known", "strange", "one", "none")}
    assert said["known"] is None
    assert "has a class 'fox' that the model does not know" in said["strange"]
    assert said["one"].startswith("all images of ") or "has no column 'label'" in said["one"]
    assert "has no column 'label'" in said["none"]


@pytest.fixture
def sorted_by_class(tmp_path) -> Path:
    """A hundred black, a hundred grey, and a hundred white images, in folders of these names."""
    for name, level in (("a black", 0), ("b grey", 128), ("c white", 255)):
        (tmp_path / "sorted" / name).mkdir(parents=True)
        for number in range(100):
            Image.new("RGB", (4, 4), (level,) * 3).save(tmp_path / "sorted" / name / f"{number:03d}.png")
    return tmp_path / "sorted"


@pytest.mark.parametrize("streaming", [False, True])
def test_the_first_images_are_a_sample_of_all_classes(streaming: bool, sorted_by_class, monkeypatch) -> None:
    if streaming:  # as a data set of the Hub is
        stream = datasets.load_dataset("imagefolder", data_dir=str(sorted_by_class), split="train", streaming=True)
        monkeypatch.setattr("stitchable.images._open_data", lambda source, split: stream)
    model = make("vit")
    processor = image_processor(model.config, crop_pct=1.0)

    def levels(**settings) -> list[float]:
        batch = next(read_batches(str(sorted_by_class), processor, batch_size=100, **settings))
        means = batch["pixel_values"].mean((1, 2, 3))
        assert torch.equal(batch["labels"], torch.searchsorted(means.unique(), means))  # they stay together
        return means.tolist()

    first = levels()
    assert sorted(20 < first.count(level) < 46 for level in set(first)) == [True] * 3
    assert levels() == first
    assert levels(seed=1) != first
    assert len(set(levels(seed=None))) == 1
