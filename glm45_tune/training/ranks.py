"""The ranks of a job that nobody else starts: one process each on this machine.

They are begun by a process of their own, `python -m glm45_tune.training.ranks`. Where there is no card it imports all that a rank
needs, once, while the command prepares the job, and each rank is a fork of it: imports are most of a small run's start. A card does not
survive a fork, so there each rank is a Python of its own.
"""

import contextlib
import ctypes
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings

from glm45_tune.errors import STOPPED
from glm45_tune.training import signals


class Ranks:
    """As a context: the ranks get ready while it is open, and are ended with it."""

    def __init__(self) -> None:
        self._running = False

    def __enter__(self) -> "Ranks":
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        env.setdefault("OMP_NUM_THREADS", "1")
        command = [sys.executable, "-m", "glm45_tune.training.ranks"]
        self._before = signals.hear(lambda number, _: sys.exit(STOPPED))  # nothing has begun yet
        self._starter = subprocess.Popen(command, env=env, stdin=subprocess.PIPE)
        return self

    def run(self, count: int, arguments: list[str]) -> int:
        """Run `glm45-tune ARGUMENTS` in each of `count` ranks; when one fails the others are ended. Returns its exit code, or 0.

        SIGTERM and SIGUSR1 go on to the ranks, which save and end (see `interruption.py`).
        """
        before = signals.hear(lambda number, _: self._starter.send_signal(number))
        try:
            self._running = True
            with contextlib.suppress(BrokenPipeError):  # a starter that could not start has said why
                self._starter.stdin.write(json.dumps([count, arguments]).encode() + b"\n")
                self._starter.stdin.flush()
            code = self._starter.wait()
            if -code in signals.SIGNALS:
                return STOPPED
            if code < 0:
                print(f"the process that starts the ranks was killed by {signal.Signals(-code).name}.", file=sys.stderr)
            return code if code >= 0 else 1
        finally:
            signals.forget(before)

    def __exit__(self, *fault) -> None:
        if not self._running:
            self._starter.kill()
        with contextlib.suppress(BrokenPipeError):
            self._starter.stdin.close()  # heard by the starter, which ends the ranks
        self._starter.wait()
        signals.forget(self._before)


def _main() -> int:
    """The starter: get ready, wait for the arguments, start the ranks and see them to their end."""
    _end_with_parent()
    told: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: told.append(number))
    signals.hear(lambda number, _: told.append(number))
    import pyarrow
    import torch

    begin = _begin_python
    if not torch.cuda.device_count():
        from transformers import AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401

        import glm45_tune.training.loop  # noqa: F401

        pyarrow.array([0])  # which is when it imports pandas

        begin = _fork
        # pyarrow's allocator has a thread, and minds forks
        warnings.filterwarnings("ignore", ".* is multi-threaded, use of fork", DeprecationWarning)
        gc.freeze()  # a collection in a rank shall not walk, and so copy, what all of them share
    line = sys.stdin.buffer.readline()
    if not line:
        return 0
    count, arguments = json.loads(line)
    os.environ["WORLD_SIZE"] = str(count)
    signal.pthread_sigmask(signal.SIG_BLOCK, signals.SIGNALS)  # what comes meanwhile is heard here, and goes on to all
    ranks = {begin(rank, arguments): rank for rank in range(count)}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals.SIGNALS)
    threading.Thread(target=lambda: (os.read(0, 1), told.append(signal.SIGTERM)), daemon=True).start()
    try:
        return _wait(ranks, told)
    finally:
        _end(ranks)


def _begin_python(rank: int, arguments: list[str]) -> int:
    env = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank)}
    return subprocess.Popen([sys.executable, "-m", "glm45_tune", *arguments], env=env, preexec_fn=_become_rank).pid


def _fork(rank: int, arguments: list[str]) -> int:
    if process := os.fork():
        return process
    _become_rank()
    os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(rank)
    sys.argv[1:] = arguments
    runpy.run_module("glm45_tune", run_name="__main__", alter_sys=True)
    sys.exit()  # and not os._exit: what is to be done at exit is done


def _become_rank() -> None:
    _end_with_parent()
    for number in signals.SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals.SIGNALS)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _end_with_parent() -> None:
    """Where the system can: no rank is left on a machine whose command was killed."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _wait(ranks: dict[int, int], told: list[int]) -> int:
    """ranks: process → rank; who has ended is taken out. told: signals that came, SIGINT to the ranks too."""
    highest, is_quiet, stops = 0, False, set()
    while ranks:
        while told:
            number = told.pop(0)
            is_quiet |= number == signal.SIGINT
            stops |= {number} & set(signals.SIGNALS)
            for process in ranks if number != signal.SIGINT else ():
                os.kill(process, number)
        for process, rank in list(ranks.items()):
            ended, status = os.waitpid(process, os.WNOHANG)
            if not ended:
                continue
            del ranks[process]
            code = os.waitstatus_to_exitcode(status)
            if -code in stops:  # it was still starting: there is nothing to save, and the others end with it
                print("stopped by a signal while starting; the same command again goes on", file=sys.stderr)
                return STOPPED
            if code not in (0, 2, STOPPED) and not is_quiet:
                how = f"ended with code {code}" if code > 0 else f"was killed by {signal.Signals(-code).name}"
                print(f"rank {rank} {how}; the other ranks are stopped.", file=sys.stderr)
            if code not in (0, STOPPED):
                return code if code > 0 else 1
            highest = max(highest, code)
        time.sleep(0.05)
    return highest


def _end(ranks: dict[int, int]) -> None:
    """SIGTERM, and after ten seconds SIGKILL."""
    for process in ranks:
        os.kill(process, signal.SIGTERM)
    last = time.monotonic() + 10
    while ranks and time.monotonic() < last:
        for process in list(ranks):
            if os.waitpid(process, os.WNOHANG)[0]:
                del ranks[process]
        time.sleep(0.05)
    for process in ranks:
        os.kill(process, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(_main())
