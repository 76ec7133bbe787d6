"""How a rank fails: its own words first, and those of ranks that only lost their neighbour last."""

import contextlib
import os
import sys
import time
import traceback

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from glm45_tune.errors import StoppedError, UserError, VerificationError
from glm45_tune.plan import planner, report
from glm45_tune.training.card import hardware
from glm45_tune.training.prepare import Job
from glm45_tune.training.watchdog import Watchdog

# so long a rank whose neighbour was lost leaves the word to it
_PATIENCE_SECONDS = 5.0


@contextlib.contextmanager
def told_well(job: Job, watchdog: Watchdog):
    """Around a rank's work: out of memory becomes a sentence; any other fault of a rank among several ends it at once."""
    try:
        yield
    except (UserError, StoppedError, VerificationError):
        raise
    except Exception as error:  # whatever it is, the other ranks wait for this one: it is told, and the rank ends
        rank = os.environ.get("RANK")
        if _is_out_of_memory(error):
            raise StoppedError(_out_of_memory(job, watchdog, error)) from error
        if rank is None:
            raise
        get_error_handler().record_exception(error)  # torchrun shows the earliest
        if is_echo(error):
            time.sleep(_PATIENCE_SECONDS)
        print(
            f"rank {rank} failed in step {watchdog.step + 1}, {watchdog.phase}:\n{traceback.format_exc()}",
            end="",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)  # no farewell to ranks that wait in vain


def is_echo(error: BaseException) -> bool:
    """Is this what a rank sees when another one is gone?"""
    words = ("gloo", "Connection closed by peer", "Connection reset", "Broken pipe", "NCCL")
    return isinstance(error, dist.DistError) or any(word in str(error) for word in words)


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _out_of_memory(job: Job, watchdog: Watchdog, error: Exception) -> str:
    where = f"step {watchdog.step + 1}, {watchdog.phase}"
    first = str(error).splitlines()[0] if str(error) else type(error).__name__
    try:
        advice = _advice(job)
    except (
        Exception
    ) as fault:  # advice may fail too, of memory say: the sentence about this rank must not be lost by it
        advice = f"The planner could not be asked for another layout: {type(fault).__name__}: {fault}"
    return f"rank {os.environ.get('RANK', 0)} is out of memory in {where}: {first}\n{advice}"


def _advice(job: Job) -> str:
    """The fastest layout that takes less than this one, as the planner counts."""
    cards = hardware(job)
    now = planner.plan(job.source.spec, job.recipe, job.layout, cards)
    fitting = planner.search(job.source.spec, job.recipe, cards)
    smaller = [plan for plan in fitting if plan.worst.needed < now.worst.needed]
    if not smaller:
        return f"The planner knows no layout of {cards.gpus} × {cards.card.name} that takes less: more cards, or a shorter row."
    best = smaller[0]
    return (
        f"The planner's next layout: {report.layout_text(best)}, {report.recompute_text(best)} recomputed: "
        f"{report.settings_text(best)}. The same command with it goes on from the last checkpoint."
    )
