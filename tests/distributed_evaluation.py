"""Run by test_evaluation.py on two processes: what `evaluate` returns on each, at once and resumed, as JSON."""

import json
import sys

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from families import NUM_LABELS, images, make
from stitchable import StitchableForImageClassification, evaluate
from stitchable.training import resuming
from stitchable.training.resuming import evaluate_resumably

IDS = [0, 4, 2]


def report(accelerator: Accelerator, num_images: int, batch_size: int, checkpoint: str) -> None:
    """Evaluate `num_images` samples in batches of `batch_size` per process."""
    model, x = make("vit"), images("vit", num_images)
    samples = [{"pixel_values": image, "labels": number % NUM_LABELS} for number, image in enumerate(x)]
    samples[2]["labels"] = -100
    loader = accelerator.prepare(DataLoader(samples, batch_size))

    collectives: list[int] = []
    gather = accelerator.gather
    accelerator.gather = lambda tensor: collectives.append(1) or gather(tensor)
    figures = evaluate(model, loader, IDS, accelerator=accelerator)
    accelerator.gather = gather
    assert model.stitches[4].metrics == figures[4]

    measured_before = min(2, len(loader))
    resuming._SECONDS_BETWEEN_SAVES = 0
    interrupt(model, loader, accelerator, checkpoint, measured_before)
    # Only the main process can read the file.
    path = checkpoint if accelerator.is_main_process else "/nowhere/partial"
    measured_again: list[int] = []
    measure = resuming.measure_batch
    resuming.measure_batch = lambda *arguments: measured_again.append(1) or measure(*arguments)
    resumed = evaluate_resumably(model, loader, path, IDS, accelerator=accelerator)
    resuming.measure_batch = measure

    samples[0]["labels"] = 7  # of the first process
    try:
        error = str(evaluate(model, loader, IDS, accelerator=accelerator))
    except ValueError as raised:
        error = str(raised)
    samples[0]["labels"] = 0
    sizes = accelerator.gather(torch.tensor([len(batch["labels"]) for batch in loader]).sum()[None])
    result = {
        "num_images": num_images,
        "figures": figures,
        "collectives": len(collectives),
        "measured_before": measured_before,
        "measured_again": len(measured_again),
        "resumed": resumed,
        "error": error,
        "samples": int(sizes.sum()),
    }
    print(f"RESULT {json.dumps(result)} END", flush=True)


def interrupt(
    model: StitchableForImageClassification, loader: DataLoader, accelerator: Accelerator, path: str, after: int
) -> None:
    """Start an evaluation that stops on every process once `after` batches are on disk."""
    save = resuming._Partial.save
    saved: list[int] = []

    def save_and_stop(self: resuming._Partial, rows: list[torch.Tensor]) -> None:
        save(self, rows)
        saved.append(1)
        if len(saved) == after:
            raise KeyboardInterrupt

    resuming._Partial.save = save_and_stop
    measure = resuming.measure_batch
    if not accelerator.is_main_process:
        measured: list[int] = []

        def measure_and_stop(*arguments: object) -> torch.Tensor:
            rows = measure(*arguments)
            measured.append(1)
            if len(measured) == after:
                raise KeyboardInterrupt
            return rows

        resuming.measure_batch = measure_and_stop
    try:
        evaluate_resumably(model, loader, path, IDS, accelerator=accelerator)
        raise AssertionError("it was not interrupted")
    except KeyboardInterrupt:
        resuming._Partial.save, resuming.measure_batch = save, measure


if __name__ == "__main__":
    started = Accelerator(cpu=True)
    for case in sys.argv[2:]:
        report(started, *map(int, case.split("x")), checkpoint=sys.argv[1])
    started.end_training()
