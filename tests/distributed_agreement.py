"""Run by test_distributed.py on two processes, each in a working directory of its own: what one decides or meets."""

import os
import sys
from pathlib import Path

import torch
from torch import distributed

from families import make
from stitchable.training.books import Books, Checkpoints
from stitchable.training.fit import Phase
from stitchable.training.processes import RunStopped, all_or_none, make_accelerator
from stitchable.training.recipe import Schedule, load_recipe
from stitchable.training.train import run

RECIPE = Path(__file__).parents[1] / "training" / "recipes" / "digits.yaml"
SHORT = ["pretraining=null", "data.test_fraction=0.8", "training.epochs=1", "training.warmup_epochs=0", "trackers=[]"]
SHORT += ["evaluation.throughput=false", "evaluation.stitches=[0,1]", "initialization.num_samples=20"]


def main(folder: Path) -> None:
    """Print, on the main process, what became of what one of the processes met, and of a run with a relative output."""
    accelerator = make_accelerator()
    rank = accelerator.process_index
    here = folder / str(rank)
    here.mkdir()
    os.chdir(here)
    group = distributed.distributed_c10d._get_default_group()
    print_all(f"time-out {group._get_backend(torch.device('cpu')).options._timeout}")

    for patiently in (False, True):
        try:
            with all_or_none(patiently):
                if rank == 1:
                    raise OSError("no such weights")
        except (RunStopped, OSError) as error:
            print_all(f"{type(error).__name__}: {error}")

    model = make("vit")
    phase = Phase(0, "stitches", Schedule(epochs=1, batch_size=2, learning_rate=1.0), None, None)
    # Each writes where the other cannot see it; the main one alone then has a checkpoint, which is not written again.
    books = Books(accelerator, Checkpoints(Path("checkpoints"), keep=2), None, Path())
    for _ in range(2):
        books.save(phase, model, 0)
    print_all(f"checkpoints {[path.name for path in Path('checkpoints').glob('*')]}")

    # The second process cannot write where it is told to; then its weights alone are not finite.
    books.checkpoints = Checkpoints(Path("/dev/null/checkpoints" if rank else "elsewhere"), keep=2)
    for number in (0.0, float("nan")):
        with torch.no_grad():
            next(model.parameters()).fill_(number if rank else 0.0)
        try:
            books.save(phase, model, 1)
        except RunStopped as error:
            print_all(f"RunStopped: {error}")
    assert not list(Path().glob("elsewhere/*"))

    # The last step's checkpoint is also that of the end of the phase: asked for twice.
    run(load_recipe(RECIPE, [*SHORT, "output=run", "checkpoints.every=5"]))


def print_all(line: str) -> None:
    """What both processes say, in their order."""
    lines: list[str] = [""] * distributed.get_world_size()
    distributed.all_gather_object(lines, line)
    if distributed.get_rank() == 0:
        print(" | ".join(lines), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
