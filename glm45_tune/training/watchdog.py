"""Who hangs, and where.

A thread beside each rank tells the others where the rank is. When one does not move for too long,
the first rank that can still communicate says which one it was, and all of them end.
"""

import json
import linecache
import os
import socket
import sys
import threading
import time
from datetime import timedelta

import torch.distributed as dist

# what the line of code says at which a rank waits for others, or for its own card
_WAITS = ("wait(", "all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "barrier", "send(", "recv(")
_WAITS += ("p2p_", "allreduce", "allgather", ".tolist(", ".item(", "synchronize(", ".cpu(", "backward(")


class Watchdog:
    """Entered by the main thread of a rank. `enter` is told every phase, over and over: silence is what counts."""

    def __init__(self, store: dist.Store | None, timeout_minutes: float):
        self.phase, self.step = "start", 0
        self._since, self._timeout = time.monotonic(), 60 * timeout_minutes
        self._pause = min(max(self._timeout / 10, 0.2), 15.0)
        self._store, self._rank = store, int(os.environ.get("RANK", 0))
        self._size = int(os.environ.get("WORLD_SIZE", 1))
        self._main, self._ended = threading.main_thread().ident, threading.Event()
        self._beats = 0

    def enter(self, phase: str) -> None:
        self.phase, self._since = phase, time.monotonic()

    def __enter__(self) -> "Watchdog":
        if self._store is not None:
            self._store = self._store.clone()  # a connection of the thread's own
            self._store.set_timeout(timedelta(seconds=2 * self._pause))
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *fault) -> None:
        self._ended.set()

    def _watch(self) -> None:
        self._tell()  # at once: a rank lost in the first seconds was there
        while not self._ended.wait(self._pause):
            self._tell()
            if time.monotonic() - self._since > self._timeout:
                self._end()

    def _tell(self) -> bool:
        """Put where this rank is into the store. Returns whether the store could be reached."""
        self._beats += 1
        line, is_waiting = _where(self._main)
        facts = {"beats": self._beats, "phase": self.phase, "step": self.step, "line": line, "waits": is_waiting}
        facts |= {"seconds": time.monotonic() - self._since, "host": socket.gethostname(), "pid": os.getpid()}
        try:
            self._store.set(f"watchdog/{self._rank}", json.dumps(facts))
        except RuntimeError:  # torch.distributed's errors are
            return False
        return True

    def _look(self) -> dict[int, dict]:
        """What every rank last told."""
        found = {}
        for rank in range(self._size):
            key = f"watchdog/{rank}"
            found[rank] = json.loads(self._store.get(key)) if self._store.check([key]) else {}
        return found

    def _end(self) -> None:
        """Find out who hangs, let the first rank that can speak say it, and end this process."""
        try:
            before = self._look()
            for _ in range(4):  # whoever lives tells something new meanwhile
                time.sleep(self._pause)
                self._tell()
            sentences = find_hanging(before, self._look())
            speaker = min(set(range(self._size)) - sentences.keys(), default=self._rank)
            said = [*sentences.values()]
        except RuntimeError as error:
            speaker = self._rank
            said = [f"the store of the job, beside rank 0, does not answer ({error}): its host is gone or cut off."]
        if self._ended.is_set():
            return
        if speaker == self._rank:
            said.append(
                f"Nothing went on for {self._timeout:.0f} s (train.distributed_timeout_minutes); all ranks end, and the same "
                "command goes on from the last checkpoint."
            )
            print("\n".join(said), file=sys.stderr, flush=True)
        else:
            time.sleep(2 * self._pause)  # the speaker first
        os._exit(1)


def find_hanging(before: dict[int, dict], after: dict[int, dict]) -> dict[int, str]:
    """Rank → a sentence, of the ranks that others wait for: silent ones, else those behind, else those that wait for nobody."""
    silent = {r: facts for r, facts in after.items() if facts.get("beats") == before[r].get("beats")}
    if silent:
        return {rank: _silent(rank, facts) for rank, facts in silent.items()}
    last = min(facts["step"] for facts in after.values())
    behind = {rank: facts for rank, facts in after.items() if facts["step"] == last}
    busy = {rank: facts for rank, facts in behind.items() if not facts["waits"]}
    return {rank: _busy(rank, facts, after) for rank, facts in (busy or behind).items()}


def _silent(rank: int, facts: dict) -> str:
    if not facts:
        return f"rank {rank} gave no sign of life at all: it did not start, or its host is cut off."
    return (
        f"rank {rank} gives no sign of life: its process {facts['pid']} on {facts['host']} stands still, or that host is gone or "
        f"cut off. Last seen in step {facts['step'] + 1}, {facts['phase']}, at {facts['line']}."
    )


def _busy(rank: int, facts: dict, everybody: dict[int, dict]) -> str:
    others = sorted({f"step {each['step'] + 1}, {each['phase']}" for r, each in everybody.items() if r != rank})
    return (
        f"rank {rank} hangs in step {facts['step'] + 1}, {facts['phase']}, for {facts['seconds']:.0f} s at {facts['line']} "
        f"(process {facts['pid']} on {facts['host']}). The others wait for it in {' and in '.join(others) or 'nothing'}."
    )


def _where(thread: int) -> tuple[str, bool]:
    """(file, line and function where a thread is, whether it waits there for other ranks or its card)."""
    frame = sys._current_frames().get(thread)
    if frame is None:
        return "its end", False
    code = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
    is_waiting = "torch/distributed" in frame.f_code.co_filename or any(word in code for word in _WAITS)
    return f"{frame.f_code.co_filename}:{frame.f_lineno} ({frame.f_code.co_name}: {code})", is_waiting
