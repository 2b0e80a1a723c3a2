"""Which stitch a training step runs. Every draw comes from a generator of its own, so that a run can be replayed."""

import random
from collections.abc import Iterator, Sequence


class UniformSampler:
    """Each stitch equally likely, step by step (algorithm 1, line 5, of Pan et al., CVPR 2023).

    Processes that share the seed draw the same stitch, so that a data-parallel step averages gradients of one network.
    """

    def __init__(self, stitch_ids: Sequence[int], seed: int) -> None:
        """Draw from `stitch_ids`, which must not be empty."""
        if not stitch_ids:
            raise ValueError("there is no stitch to draw")
        self.stitch_ids = list(stitch_ids)
        self._random = random.Random(seed)

    def __iter__(self) -> Iterator[int]:
        """Stitch ids without end."""
        while True:
            yield self._random.choice(self.stitch_ids)
