"""Run by test_trainer.py on one process or on two: a StitchTrainer of the same images and draws, written down."""

import os
import sys
from pathlib import Path

from transformers import TrainingArguments

from families import images, make
from stitchable.training.trainer import StitchTrainer


def main(folder: Path, k: int) -> None:
    """Train for three steps, each on four images of all processes, evaluate, and save what the main process has."""
    rows = [{"pixel_values": pixels, "labels": number % 5} for number, pixels in enumerate(images("vit", 8))]
    options = {"max_steps": 3, "optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 1e-2}
    options |= {"per_device_train_batch_size": 4 // int(os.environ["WORLD_SIZE"])}
    arguments = TrainingArguments(str(folder), use_cpu=True, report_to=[], disable_tqdm=True, **options)
    training = StitchTrainer(make("vit"), arguments, train_dataset=rows, eval_dataset=rows, stitches_per_step=k)
    training.train()
    loss = training.evaluate()["eval_loss"]
    training.save_model()
    if training.is_world_process_zero():
        print("processes", arguments.world_size, "loss", loss, flush=True)
    training.accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
