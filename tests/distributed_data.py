"""Run by test_data.py on two processes: what each of them gets of an epoch, written down."""

import json
import sys
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import Accelerator

from families import make
from stitchable.processing import image_processor
from stitchable.training.data import TrainingLoader, load_data, make_test_loader
from stitchable.training.recipe import Augmentation, Data, Schedule


def main(folder: Path) -> None:
    """Write the training batches and gathered test labels of this process to rank-R.pt."""
    accelerator = Accelerator(cpu=True)
    datasets.config.HF_DATASETS_CACHE = folder / "cache-of-two"
    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0  # see test_data.py
    arguments = json.loads((folder / "arguments.json").read_text(encoding="utf-8"))
    found = {
        kind: batches(Data(**a["data"]), Augmentation(**a["augmentation"]), accelerator)
        for kind, a in arguments.items()
    }
    torch.save(found, folder / f"rank-{accelerator.process_index}.pt")
    accelerator.wait_for_everyone()
    accelerator.end_training()


def batches(data: Data, augmentation: Augmentation, accelerator: Accelerator) -> dict[str, Any]:
    """Augmented batches of an epoch, pixel values of one without augmentation, and the labels of the test split."""
    with accelerator.main_process_first():
        splits = load_data(data)
    config = make("vit").config
    processor = image_processor(config, crop_pct=1.0)

    def epoch(augmentation: Augmentation, number: int) -> list[dict[str, torch.Tensor]]:
        schedule = Schedule(epochs=1, batch_size=8, learning_rate=1.0, augmentation=augmentation)
        options = {"batch_size": 4, "batches_per_epoch": 5, "seed": 0, "accelerator": accelerator}
        return list(TrainingLoader(splits.train, data, schedule, config, processor, **options).epoch(number))

    test_labels = [
        label
        for batch in make_test_loader(splits.test, data, processor, 5, accelerator)
        for label in accelerator.gather_for_metrics(batch["labels"]).tolist()
    ]
    plain = torch.cat([batch["pixel_values"] for batch in epoch(Augmentation(), 0)])
    return {"batches": epoch(augmentation, 1), "plain": plain, "test_labels": test_labels}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
