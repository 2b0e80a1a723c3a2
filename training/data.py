"""Data sets as `datasets.DatasetDict` with "image" and "label", and loaders of preprocessed batches."""

import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from PIL import Image as PILImage
from torch.utils.data import DataLoader, TensorDataset

from recipe import Data


def load_data(data: Data) -> DatasetDict:
    """The splits "train" and "test" of a recipe's data set.

    "digits" is the test part of the UCI "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak, 1998; CC BY
    4.0) as scikit-learn ships it: 1,797 scans of 8x8 pixels in 17 grey levels, written by 13 people.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    # 17 grey levels (0..16) as 8-bit pixels.
    images = [PILImage.fromarray((scan * 255 / 16).round().astype("uint8")) for scan in digits.images]
    features = Features({"image": Image(), "label": ClassLabel(names=[str(name) for name in digits.target_names])})
    dataset = Dataset.from_dict({"image": images, "label": digits.target.tolist()}, features=features)
    return dataset.train_test_split(data.test_fraction, seed=data.split_seed, stratify_by_column="label")


def preprocess(dataset: Dataset, processor) -> TensorDataset:
    """Run the image processor over a data set that fits in memory, once: pixel values (N, C, H, W) and labels (N,)."""
    pixel_values = [
        processor(images=batch["image"], return_tensors="pt")["pixel_values"] for batch in dataset.iter(batch_size=256)
    ]
    return TensorDataset(torch.cat(pixel_values), torch.tensor(dataset["label"]))


def random_subset(dataset: TensorDataset, number: int, seed: int) -> TensorDataset:
    """`number` different images, drawn with a generator of their own."""
    chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:number]
    return TensorDataset(*(tensor[chosen] for tensor in dataset.tensors))


def make_loader(dataset: TensorDataset, batch_size: int, *, affine: float | None = None, seed: int = 0) -> DataLoader:
    """Batches {"pixel_values", "labels"}.

    Args:
        dataset: as `preprocess` returns it.
        batch_size: images per batch and process.
        affine: for training: shuffle, drop the last incomplete batch, and apply `random_affine` of this strength.
        seed: of the shuffling.
    """

    def collate(samples: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
        pixel_values = torch.stack([sample[0] for sample in samples])
        labels = torch.stack([sample[1] for sample in samples])
        return {"pixel_values": random_affine(pixel_values, affine) if affine else pixel_values, "labels": labels}

    if affine is None:
        return DataLoader(dataset, batch_size, collate_fn=collate)
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(dataset, batch_size, shuffle=True, drop_last=True, generator=generator, collate_fn=collate)


def random_affine(pixel_values: torch.Tensor, strength: float) -> torch.Tensor:
    """Each image (N, C, H, W) turned, scaled and shifted at random, its border repeated.

    Args:
        pixel_values: normalised images.
        strength: largest angle in radians, relative change of size, and shift as a part of half the image.
    """
    angle, scale, right, down = (2 * torch.rand(4, len(pixel_values)) - 1) * strength
    cosine, sine = (1 + scale) * angle.cos(), (1 + scale) * angle.sin()
    matrices = torch.stack([cosine, -sine, right, sine, cosine, down], dim=1).view(-1, 2, 3)
    grid = torch.nn.functional.affine_grid(matrices, list(pixel_values.shape), align_corners=False)
    return torch.nn.functional.grid_sample(pixel_values, grid, padding_mode="border", align_corners=False)
