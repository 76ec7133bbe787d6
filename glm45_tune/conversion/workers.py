"""Many pieces of work over a few readers, in this process or shared among several."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

import torch

from glm45_tune.errors import UserError
from glm45_tune.processes import ForkServer

Tick = Callable[[int], None]
_ENOUGH_FOR_ONE = 2**32  # bytes below which starting processes takes longer than the work


def default_workers(total_bytes: int) -> int:
    """How many processes share the work when nothing is said."""
    return 1 if total_bytes < _ENOUGH_FOR_ONE else min(os.cpu_count() or 1, 8)


def each(function: Callable, readers: tuple, tasks: list, workers: int, tick: Tick, then: Callable) -> None:
    """then(task, function(*readers, task, tick)) for every task, as they end.

    With several workers each opens the readers anew; `tick` hears here what it is told there. The first exception ends all.
    """
    if workers <= 1 or len(tasks) <= 1:
        for task in tasks:
            then(task, function(*readers, task, tick))
        return
    context = ForkServer()
    context.set_forkserver_preload([__name__, function.__module__])
    done, stop = context.Value("q", 0), context.Event()
    pool = ProcessPoolExecutor(min(workers, len(tasks)), context, _enter, (function, readers, done, stop))
    told = 0
    try:
        waiting = {pool.submit(_work, task): task for task in tasks}
        while waiting:
            ended, _ = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
            tick(done.value - told)
            told = done.value
            for future in ended:
                then(waiting.pop(future), future.result())
    except BrokenProcessPool as error:
        raise UserError(
            "A worker process ended abruptly: killed, or out of memory? Start the same command again, perhaps with fewer "
            "--workers; what is whole is kept."
        ) from error
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


class _Stopped(Exception):
    """Another worker failed, or the user interrupted."""


_state: tuple = ()


def _enter(function: Callable, readers: tuple, done, stop) -> None:
    global _state
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it and says stop
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    _state = function, readers, done, stop


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _work(task):
    function, readers, done, stop = _state

    def tick(size: int) -> None:
        if stop.is_set():
            raise _Stopped
        with done.get_lock():
            done.value += size

    return function(*readers, task, tick)
