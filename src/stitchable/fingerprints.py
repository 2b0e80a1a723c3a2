"""Recognise images again: were those that a cascade is chosen on among those that the model was trained on?"""

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from stitchable.batches import unpack_batch
from stitchable.model.configuration_stitchable import StitchableConfig

NUM_STORED = 512
"""Fingerprints that a config keeps: enough to recognise a data set, or a random half of it, without a doubt."""
_GRID = 16
_LEVELS = 8  # per unit of the normalised pixels, so that the last bits of a decoder make no difference


def fingerprints(pixel_values: torch.Tensor) -> list[str]:
    """A short hash of each image (N, C, H, W), preprocessed as for evaluation: of every so many pixels, rounded."""
    height, width = pixel_values.shape[-2:]
    pixels = pixel_values[..., :: max(1, height // _GRID), :: max(1, width // _GRID)]
    levels = (pixels.float() * _LEVELS).round().clamp(-128, 127).to(torch.int8).cpu().flatten(1).numpy()
    return [hashlib.blake2b(row.tobytes(), digest_size=6).hexdigest() for row in levels]


def remember(config: StitchableConfig, batches: Iterable[Any]) -> None:
    """Keep in `config.trained_on` what recognises the images of these batches, the first ones of a data set.

    Args:
        config: of the model that is trained on them; what it knows already stays.
        batches: as for `evaluate`, preprocessed as for an evaluation, not augmented; only as many as needed are read.
    """
    known = dict.fromkeys(getattr(config, "trained_on", None) or ())
    found: dict[str, None] = {}
    for batch in batches:
        found |= dict.fromkeys(fingerprints(unpack_batch(batch, labels="optional")[0]))
        if len(found) >= NUM_STORED:
            break
    config.trained_on = [*known, *(name for name in list(found)[:NUM_STORED] if name not in known)]


class Watch:
    """Batches that pass through, and how many of their images are known.

    Attributes:
        num_known: images whose fingerprint the config has, so far.
    """

    def __init__(self, batches: Iterable[Any], config: StitchableConfig) -> None:
        self._batches = batches
        self._known = frozenset(getattr(config, "trained_on", None) or ())
        self.num_known = 0

    @property
    def has_fingerprints(self) -> bool:
        """Whether the config says anything of what the model was trained on."""
        return bool(self._known)

    def __iter__(self) -> Iterator[Any]:
        """Yield every batch as it is."""
        for batch in self._batches:
            if self._known:
                pixel_values, _ = unpack_batch(batch, labels="optional")
                self.num_known += sum(name in self._known for name in fingerprints(pixel_values))
            yield batch
