"""Data-parallel training averages the gradients of what a step used, on two processes."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_gradients_are_those_of_the_whole_batch_on_every_process() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["tests/distributed_step.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "training")}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    match = re.search(r"processes 2 used (\d+) worst (\S+)", result.stdout)
    assert match, result.stdout + result.stderr
    assert int(match[1]) > 0
    assert float(match[2]) < 1e-5
