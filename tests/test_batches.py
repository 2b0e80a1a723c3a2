"""The forms of batches that loaders give, through everything that reads batches."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from families import images, make
from stitchable import evaluate, initialize_stitches
from stitchable.batches import unpack_batch
from stitchable.training.resuming import evaluate_resumably

NUM_IMAGES = 40
X, LABELS = images("vit", NUM_IMAGES), torch.arange(NUM_IMAGES) % 5
PICTURES = [Image.new("RGB", (32, 32))] * 2


def data_set() -> Dataset:
    return Dataset.from_dict({"pixel_values": X.numpy(), "label": LABELS.tolist()})


FORMS = {
    "mapping": lambda: [{"pixel_values": X[:7], "labels": LABELS[:7]}, {"pixel_values": X[7:], "labels": LABELS[7:]}],
    "label": lambda: [{"pixel_values": X, "label": LABELS}],
    "list of labels": lambda: [{"pixel_values": X, "labels": LABELS.tolist()}],
    "lists of tensors": lambda: [{"pixel_values": list(X), "labels": list(LABELS)}],
    "arrays": lambda: [{"pixel_values": X.numpy(), "labels": LABELS.numpy().astype("uint8")}],
    "pairs of torchvision": lambda: DataLoader(TensorDataset(X, LABELS), 15),
    "pairs with a list": lambda: [(X, LABELS.tolist())],
    "triples": lambda: [(X, LABELS, "what else there is")],
    "datasets": lambda: data_set().iter(15),
    "datasets in torch": lambda: data_set().with_format("torch").iter(15),
    "datasets in numpy": lambda: data_set().with_format("numpy").iter(15),
}


@pytest.fixture(scope="module")
def expected():
    """Figures and a fitted weight from plain batches."""
    model = make("vit")
    figures = evaluate(model, FORMS["mapping"]())
    initialize_stitches(model, FORMS["mapping"](), num_samples=NUM_IMAGES)
    return figures, model.get_stitching_layer("0-1.0").linear.weight


@pytest.mark.parametrize("form", FORMS)
def test_evaluation_and_least_squares_take_the_same_batches(form: str, expected) -> None:
    model = make("vit")
    for stitch_id, figures in evaluate(model, FORMS[form]()).items():
        assert figures == pytest.approx(expected[0][stitch_id], rel=1e-5)
    initialize_stitches(model, FORMS[form](), num_samples=NUM_IMAGES)
    torch.testing.assert_close(model.get_stitching_layer("0-1.0").linear.weight, expected[1], rtol=1e-4, atol=1e-5)


def test_a_resumed_evaluation_takes_pairs(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("stitchable.training.resuming._SECONDS_BETWEEN_SAVES", 0)
    model, pairs = make("vit"), [(X[:15], LABELS[:15].tolist()), (X[15:], LABELS[15:].tolist())]
    broken = [pairs[0], (X[15:], ["a"] * 25)]
    with pytest.raises(ValueError, match="labels must be class numbers"):
        evaluate_resumably(model, broken, tmp_path / "partial")
    assert evaluate_resumably(model, pairs, tmp_path / "partial") == evaluate(model, pairs)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (X, r"must hold 'labels', or be a pair \(images, labels\); it is a tensor of shape \(40, 3, 32, 32\)"),
        ((X,), r"or be a pair \(images, labels\); it is a tuple of 1"),
        ((X, None), r"or be a pair \(images, labels\); it is a tuple of 2"),
        ({"pixel_values": X, "targets": LABELS}, r"must hold 'labels', .*it has \['pixel_values', 'targets'\]"),
        ((X, LABELS.float()), r"class numbers \(N,\), .* in torch.float32; labels.long\(\) converts them"),
        ((X, torch.eye(5)[LABELS]), r"got a tensor of shape \(40, 5\); labels.argmax\(-1\) makes them"),
        ((X, LABELS == 1), r"class numbers \(N,\), got a tensor of shape \(40,\) in torch.bool"),
        ((X, torch.tensor(3)), r"class numbers \(N,\), got a tensor of shape \(\)"),
        ((X, ["cat"] * 40), "got a list of 40, first str; the config's label2id has the numbers of names"),
        ((X, [1, None]), r"labels must be class numbers \(N,\), got a list of 2, first int"),
        ((X, LABELS[:39]), "a batch holds 40 images but 39 labels"),
    ],
)
def test_labels_that_are_no_class_numbers_are_named_where_they_are_needed(batch, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(make("vit"), [batch])
    pixel_values, labels = unpack_batch(batch, labels="optional")
    assert torch.equal(pixel_values, X)
    assert labels is None


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"image": PICTURES, "label": [0, 1]}, r"'pixel_values', it has \['image', 'label'\]; the image processor"),
        ({"pixel_values": PICTURES, "label": [0, 1]}, r"images \(N, C, H, W\), got a list of 2, first Image"),
        ((X[0], 1), r"images \(N, C, H, W\), got a tensor of shape \(3, 32, 32\)"),
        ((np.zeros((3, 32, 32)), 1), r"images \(N, C, H, W\), got an array of shape \(3, 32, 32\)"),
        (([X[0], X[1, :, 1:]], [0, 1]), r"got a list of 2, first a tensor of shape \(3, 32, 32\)"),
        ((), "got NoneType"),
        ("text", "got str"),
    ],
)
def test_images_that_are_no_pixel_values_are_named(batch, message: str) -> None:
    for labels in ("required", "optional"):
        with pytest.raises(ValueError, match=message):
            unpack_batch(batch, labels=labels)
