"""Two processes on the CPU (gloo): a step that uses a part of the parameters averages its gradients, and only its.

And none of them decides alone, or waits for one that has stopped.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent


def launch(script: str, *launcher: str, arguments: tuple[object, ...] = ()) -> str:
    """What a script of this folder prints on two processes."""
    command = [sys.executable, *launcher, str(TESTS / script), *map(str, arguments)]
    path = os.pathsep.join(str(folder) for folder in (TESTS, TESTS.parent / "src"))
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


def test_what_one_process_meets_stops_both_and_what_one_decides_holds_for_both(tmp_path) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    lines = launch("distributed_agreement.py", *launcher, arguments=(tmp_path,)).splitlines()
    assert lines[0] == "time-out 0:30:00 | time-out 0:30:00"  # torch's own
    assert lines[1] == lines[2] == "RunStopped: process 1 stopped: no such weights | OSError: no such weights"
    unwritten = "RunStopped: {}/checkpoint-00-00000001 cannot be written: {}[Errno 20] Not a directory: "
    assert lines[3] == "checkpoints ['checkpoint-00-00000000'] | checkpoints ['checkpoint-00-00000000.partial']"
    first, second = lines[4].split(" | ")
    assert first.startswith(unwritten.format("elsewhere", "process 1 stopped: "))
    assert second.startswith(unwritten.format("/dev/null/checkpoints", ""))
    bad = "stitches: weights are not finite. There is no checkpoint"
    assert lines[5] == f"RunStopped: process 1 stopped: {bad} | RunStopped: {bad}"

    # Of the run with a relative output, everything is where the main process was started.
    assert (tmp_path / "0" / "run" / "config.json").exists()
    (checkpoint,) = (tmp_path / "0" / "run-run").glob("checkpoint-*")
    assert checkpoint.name == "checkpoint-00-00000005"
    states = sorted(path.name for path in checkpoint.glob("random_states_*"))
    assert states == ["random_states_0.pkl", "random_states_1.pkl"]
    assert [path.name for path in (tmp_path / "1").iterdir()] == ["checkpoints"]
