"""Claim: of the ways in which two processes can share the draws of a training, none is faster than the default.

    python benchmarks/sampling.py [--steps 71] [--rounds 3]

"same" runs one stitch on both processes, "independent" any two: there each step waits for the dearer one. The family is
DeiT's in small (12 blocks, widths 48, 96, 192; 71 stitches), the images are random: what is timed is the step, not what
it learns. The two ways take turns, round by round.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import stitchable

ROOT = Path(__file__).parents[1]
WAYS = ("same", "independent")


def main() -> None:
    """Time both ways on two processes, print and store the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=71, help="per way and round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.steps, arguments.rounds, Path(arguments.worker))
        return

    from report import write_report

    with tempfile.TemporaryDirectory() as folder:
        seconds = launch(arguments.steps, arguments.rounds, Path(folder) / "seconds.json")
    medians = {way: statistics.median(seconds[way]) for way in WAYS}
    figures = {
        "processes": 2,
        "steps": arguments.steps,
        "rounds": arguments.rounds,
        "seconds_per_step": {way: round(value, 4) for way, value in medians.items()},
        "ratio_to_same": {way: round(value / medians["same"], 3) for way, value in medians.items()},
        "rounds_seconds_per_step": seconds,
    }
    print({key: value for key, value in figures.items() if key != "rounds_seconds_per_step"})
    print(f"wrote {write_report('sampling', figures)}")


def launch(steps: int, rounds: int, result: Path) -> dict[str, list[float]]:
    """Run this file on two processes; returns seconds per step of each way, by round."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    command += [
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--num_cpu_threads_per_process",
        "1",
    ]
    command += [__file__, "--steps", str(steps), "--rounds", str(rounds), "--worker", str(result)]
    subprocess.run(command, check=True)
    return json.loads(result.read_text(encoding="utf-8"))


def work(steps: int, rounds: int, result: Path) -> None:
    """What each process does."""
    from stitchable.training.fit import Stitches
    from stitchable.training.processes import make_accelerator
    from stitchable.training.sampling import StitchSampler

    torch.manual_seed(0)
    accelerator = make_accelerator()
    kwargs = {"img_size": 32, "patch_size": 4, "depth": 12, "num_heads": 3}
    anchors = [{"architecture": "vit_tiny_patch16_224", "kwargs": {**kwargs, "embed_dim": w}} for w in (48, 96, 192)]
    model = stitchable.from_anchors(anchors, pretrained=False, num_labels=10)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    wrapped, optimizer = accelerator.prepare(Stitches(model), optimizer)
    pixel_values, labels = torch.randn(16, 3, 32, 32), torch.arange(16) % 10
    samplers = {
        way: StitchSampler(model.stitches, across_processes=way, num_processes=2, seed=0)  # type: ignore[arg-type]
        for way in WAYS
    }
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(-1, rounds):  # round -1 warms up
        for way, sampler in samplers.items():
            accelerator.wait_for_everyone()
            started = time.perf_counter()
            for step in range(steps):
                (logits,) = wrapped(pixel_values, sampler.draw(number * steps + step, accelerator.process_index))
                accelerator.backward(torch.nn.functional.cross_entropy(logits, labels))
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            accelerator.wait_for_everyone()
            if number >= 0:
                seconds[way].append((time.perf_counter() - started) / steps)
    if accelerator.is_main_process:
        result.write_text(json.dumps(seconds, allow_nan=False), encoding="utf-8")
    accelerator.end_training()


if __name__ == "__main__":
    main()
