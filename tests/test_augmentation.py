"""Random transforms of batches, and the keys that decide every draw."""

import random

import numpy as np
import torch

from stitchable.training.augmentation import derive_seed, random_affine, random_crop, seeded


def test_keys_decide_and_the_global_generators_are_put_back() -> None:
    def draw(*key: int) -> list[float]:
        with seeded(*key):
            return [float(torch.rand(())), float(np.random.rand()), random.random()]

    torch.manual_seed(3)
    np.random.seed(3)
    expected = float(torch.rand(())), float(np.random.rand())
    torch.manual_seed(3)
    np.random.seed(3)
    assert draw(1, 2) == draw(1, 2)
    assert all(first != second for first, second in zip(draw(1, 2), draw(2, 1), strict=True))
    assert (float(torch.rand(())), float(np.random.rand())) == expected
    assert derive_seed(1, 12) != derive_seed(11, 2)


def test_random_affine_moves_a_little_and_zero_strength_nothing() -> None:
    x = torch.rand(6, 3, 8, 8)
    generator = torch.Generator().manual_seed(0)
    torch.testing.assert_close(random_affine(x, 0.0, generator), x)
    moved = random_affine(x, 0.1, generator)
    assert not torch.allclose(moved, x)
    assert (moved - x).abs().mean() < (x.flip(0) - x).abs().mean()


def test_random_crop_is_a_window_of_the_padded_image() -> None:
    x, fill = torch.rand(50, 3, 6, 5), torch.tensor([-1.0, -2.0, -3.0])
    cropped = random_crop(x, 2, fill, torch.Generator().manual_seed(0))
    padded = fill.view(1, 3, 1, 1).repeat(50, 1, 10, 9)
    padded[:, :, 2:8, 2:7] = x
    places = []
    for image, result in zip(padded, cropped, strict=True):
        windows = {(i, j): image[:, i : i + 6, j : j + 5] for i in range(5) for j in range(5)}
        places += [place for place, window in windows.items() if torch.equal(window, result)]
    assert len(places) == 50
    assert len(set(places)) > 15
