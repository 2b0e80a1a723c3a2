"""Training images that come as a stream of shards, for what does not fit a disk."""

import logging
from collections.abc import Callable, Iterable, Iterator
from itertools import count, islice
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from datasets import IterableDataset
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader, get_worker_info

from stitchable.training.augmentation import Batch, collate, derive_seed, identity, read_augmented
from stitchable.training.recipe import Data
from stitchable.training.sources import DataError

logger = logging.getLogger(__name__)

SHUFFLE_BUFFER = 1000  # images among which the next is drawn, per worker


class Stream:
    """The source of a stream of shards, which are dealt out to processes, and in each of them to workers.

    A worker gives chunks of as many images as its process has in an optimiser step, the last one what is left; the
    chunks come in turns and are cut anew, so that no image is lost between workers, and the images are the same ones
    however many gradients are accumulated. A resumed epoch passes over what came before without decoding it.
    """

    def __init__(
        self,
        dataset: IterableDataset,
        data: Data,
        transform: Callable,
        batch_size: int,
        batches_per_epoch: int,
        seed: int,
        accelerator: Accelerator,
    ) -> None:
        """Arguments as of `data.make_training_loader`; `transform` makes pixel values of an image."""
        self.dataset, self.data, self.transform, self.seed = dataset, data, transform, seed
        self.batch_size, self.batches_per_epoch, self.accelerator = batch_size, batches_per_epoch, accelerator
        self.chunk_size = batch_size * accelerator.gradient_accumulation_steps

    def __call__(self, epoch: int, start: int) -> Iterator[Batch]:
        """The batches of an epoch from number `start` on."""
        batches = _cut(self._chunks(epoch, start), self.batch_size, start)
        for batch in islice(batches, self.batches_per_epoch - start):
            yield send_to_device(batch, self.accelerator.device)

    def _chunks(self, epoch: int, start: int) -> Iterator[Batch | int]:
        """Chunks without end; those passed over are numbers of images."""
        wanted = self.batch_size * self.batches_per_epoch
        came = 0
        for lap in count():
            for chunk in self._lap(epoch, lap, max(0, start * self.batch_size - came)):
                came += chunk if isinstance(chunk, int) else len(chunk["labels"])
                yield chunk
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
        process, num_processes = self.accelerator.process_index, self.accelerator.num_processes
        share = split_dataset_by_node(shuffled, process, num_processes)
        num_workers = min(self.data.num_workers, share.num_shards)
        # Workers take turns, so that of the chunks before the start each has given at least so many.
        chunks_passed = num_passed // (self.chunk_size * max(1, num_workers))
        key = (self.seed, "stream", epoch, lap, process)
        chunks = _Chunks(share, self.transform, self.data.on_corrupt_image, self.chunk_size, chunks_passed, key)
        return DataLoader(
            chunks,
            batch_size=None,
            collate_fn=identity,
            num_workers=num_workers,
            pin_memory=self.accelerator.device.type == "cuda",
            generator=torch.Generator(),
        )


class _Chunks(torch.utils.data.IterableDataset):
    """The share of a worker in chunks of `size` images; for the first `num_passed` of them only their sizes."""

    def __init__(
        self, rows: IterableDataset, transform: Callable, on_corrupt: str, size: int, num_passed: int, key: tuple
    ) -> None:
        self.rows, self.transform, self.on_corrupt = rows, transform, on_corrupt
        self.size, self.num_passed, self.key = size, num_passed, key

    def __iter__(self) -> Iterator[Batch | int]:
        info = get_worker_info()
        worker = info.id if info else 0
        rows = iter(self.rows)
        before: list[dict] = []
        for number in count():
            chunk = list(islice(rows, self.size))
            if not chunk:
                return
            yield len(chunk) if number < self.num_passed else self._augmented(chunk, before, (worker, number))
            before = chunk

    def _augmented(self, chunk: list[dict], before: list[dict], key: tuple[int, int]) -> Batch:
        """Images that cannot be read are replaced by others of the chunk, or of the one before."""
        samples = []
        for index in range(len(chunk)):
            rows = chunk[index:] + chunk[:index] + before
            samples.append(read_augmented(rows, self.transform, self.on_corrupt, (*self.key, *key, index)))
        return collate(samples)


def _cut(chunks: Iterable[Batch | int], batch_size: int, start: int) -> Iterator[Batch]:
    """Batches of `batch_size` from chunks of any size, from batch `start` on."""
    num_before = start * batch_size
    rest: Batch | None = None
    for chunk in chunks:
        length = chunk if isinstance(chunk, int) else len(chunk["labels"])
        if num_before >= length:
            num_before -= length
            continue
        assert not isinstance(chunk, int)
        chunk = {key: values[num_before:] for key, values in chunk.items()}
        num_before = 0
        rest = chunk if rest is None else {key: _join(rest[key], chunk[key]) for key in chunk}
        while len(rest["labels"]) >= batch_size:
            yield {key: values[:batch_size] for key, values in rest.items()}
            rest = {key: values[batch_size:] for key, values in rest.items()}


def _join(first: Any, second: Any) -> Any:
    return torch.cat([first, second]) if isinstance(first, torch.Tensor) else first + second
