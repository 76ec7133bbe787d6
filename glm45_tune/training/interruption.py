"""SIGTERM and SIGUSR1 (Slurm's warning before a preemption or a time limit): save after the step that runs, and end."""

import signal

import torch
import torch.distributed as dist

from glm45_tune.training import signals
from glm45_tune.training.failure import is_echo


class Interruption:
    """Remembers signals while it is entered. Used by all ranks together."""

    def __init__(self):
        self._group = dist.new_group(backend="gloo")

    def __enter__(self) -> "Interruption":
        signals.told.clear()
        self._before = signals.hear(lambda number, frame: signals.told.set())
        return self

    def __exit__(self, kind, error: BaseException | None, trace) -> None:
        signals.forget(self._before)
        is_told = signals.told.is_set()
        signals.told.clear()
        if is_told and error and is_echo(error):  # the rank that failed has spoken, and this one was to end with it
            signal.raise_signal(signal.SIGTERM)

    def agree(self, is_time: bool) -> tuple[bool, bool]:
        """(was any rank told to stop, is it time to save on the first rank), the same on every rank."""
        flags = torch.tensor([signals.told.is_set(), is_time and dist.get_rank() == 0], dtype=torch.int32)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self._group)
        must_stop, is_time = flags.bool().tolist()
        return must_stop, is_time
