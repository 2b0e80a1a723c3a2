"""What the processes of a run tell each other, so that none decides alone and none waits for one that has stopped."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from torch import distributed

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
