"""Two processes on the CPU (gloo): a step that uses a part of the parameters averages its gradients, and only its."""

import os
import re
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent


def launch(script: str, *launcher: str) -> str:
    """What a script of this folder prints on two processes."""
    command = [sys.executable, *launcher, str(TESTS / script)]
    path = os.pathsep.join([str(TESTS), str(TESTS.parent / "training")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=240)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_step_that_uses_a_part_averages_its_gradients() -> None:
    # Accelerate itself would start one process only on a CPU; `plan.start_processes` starts both, by torchrun.
    launcher = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1"]
    output = launch("distributed_step.py", *launcher)
    printed = re.search(r"processes 2 used (\d+), (\d+) of (\d+) worst (\S+) moved (\d+)", output)
    assert printed, output
    used, third, total, worst, moved = printed.groups()
    assert 0 < int(used) < int(total)
    assert 0 < int(third) < 0.4 * int(total)
    assert float(worst) < 1e-5
    assert int(moved) > 0
