"""The processes of a run: how they start, and what they tell each other so that none waits for one that stopped."""

import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import DistributedType, broadcast, get_cpu_distributed_information, parse_flag_from_env
from torch import distributed, nn

PATIENCE = timedelta(days=1)  # with what one process does for all: a data set is downloaded, every stitch timed


class RunStopped(RuntimeError):
    """The run cannot or shall not go on; the message says why, and from where it can be resumed."""


@contextmanager
def all_or_none(patiently: bool = False) -> Iterator[None]:
    """A part of a run that all processes finish or none: what goes wrong on one of them stops all.

    The others would wait for the one that has stopped, in the next thing that they do together. Within the part itself
    they must do nothing together; where it ends, each waits for all.

    Args:
        patiently: wait for up to a day, where one process has much to do; otherwise as long as for any other message,
            10 minutes on GPUs and 30 on CPUs.

    Raises:
        RunStopped: something went wrong on another process, or its own error on the process where it did.
    """
    several = distributed.is_available() and distributed.is_initialized()
    group = distributed.new_group(timeout=PATIENCE) if several and patiently else None
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    problem = None if error is None else str(error) or type(error).__name__
    problems = [problem]
    if several:
        problems = [None] * distributed.get_world_size()
        distributed.all_gather_object(problems, problem, group)  # type: ignore[arg-type]
    if group is not None:
        distributed.destroy_process_group(group)
    if error is not None:
        raise error
    for process, problem in enumerate(problems):
        if problem is not None:
            raise RunStopped(f"process {process} stopped: {problem}")


def start_processes() -> None:
    """Start the processes that `accelerate launch --cpu --num_processes N` was asked for, in place of this one.

    Accelerate leaves that to MPI: without it, the launcher starts a single process and says nothing. The number stands
    only on its command line.
    """
    # MASTER_ADDR is set for several processes, WORLD_SIZE (or MPI's) by what really starts them.
    several = "MASTER_ADDR" in os.environ and get_cpu_distributed_information().world_size == 1
    if not (several and os.environ.get("ACCELERATE_USE_CPU") == "True") or "WORLD_SIZE" in os.environ:
        return
    launcher = " ".join(psutil.Process().parent().cmdline())
    match = re.search(r"--num[_-]processes[ =](\d+)", launcher)
    machines = re.search(r"--num[_-]machines[ =](\d+)", launcher)
    if match is None or (machines and int(machines[1]) > 1):
        raise ValueError("accelerate launch starts one process on a CPU; use torchrun for several, or several machines")
    del os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", match[1]]
    os.execv(sys.executable, [*torchrun, *_program(), *sys.argv[1:]])


def _program() -> list[str]:
    """What Python was told to run: a script, or a module (-m), whose folder must not come first on the path."""
    module = sys.modules["__main__"].__spec__
    return [sys.argv[0]] if module is None else ["-m", module.name.removesuffix(".__main__")]


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether a process holds only a part of the weights (FSDP)."""
    return accelerator.distributed_type == DistributedType.FSDP


def make_accelerator(
    trackers: Sequence[str] = (), folder: Path | None = None, gradient_accumulation_steps: int = 1
) -> Accelerator:
    """An Accelerator for steps that use a part of the parameters, on whatever the launcher started.

    Raises:
        ValueError: a tracker that is not installed, DeepSpeed, FSDP without a GPU, or several processes that would not
            train together.
    """
    installed = {str(tracker) for tracker in get_available_trackers()}
    for tracker in trackers:
        if tracker not in installed:
            known = ", ".join(sorted(LOGGER_TYPE_TO_CLASS))
            raise ValueError(f"the tracker {tracker!r} is not installed; Accelerate knows {known}")
    # DDP must be told that a step leaves parameters out, or it silently stops averaging gradients.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    # Without a GPU, Accelerate makes a process group of torchrun's processes only if told to stay on the CPU.
    on_cpu = num_processes > 1 and not torch.accelerator.is_available()
    accelerator = Accelerator(
        cpu=on_cpu,
        gradient_accumulation_steps=gradient_accumulation_steps,
        kwargs_handlers=[unused],
        log_with=list(trackers) or None,
        project_dir=folder,
    )
    if accelerator.num_processes != num_processes:
        raise ValueError(f"{num_processes} processes were started, but Accelerate sees {accelerator.num_processes}")
    if parse_flag_from_env("ACCELERATE_USE_FSDP") and not is_sharded(accelerator):
        raise ValueError("FSDP is asked for, but Accelerate shards weights only on GPUs; here, choose MULTI_CPU")
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise ValueError("DeepSpeed is not supported; for weights shared out over processes take FSDP")
    return accelerator


@torch.no_grad()
def share(model: nn.Module) -> None:
    """Give every process the weights and statistics of the main one."""
    for tensor in model.state_dict().values():
        tensor.copy_(broadcast(tensor))
