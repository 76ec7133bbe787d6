"""A function of the user's in a process of its own: whatever it does, training goes on.

What a reward has: an empty working directory, a limit on memory, and no environment but what Python
needs. The function that answers turns (rl.tools) keeps the trainer's. It is no wall against malice:
it runs as the same user with the same network. Parent and child speak JSON, a line a message,
through pipes; every message is bounded in bytes and seconds. What the function starts ends with its
process, and that with the trainer (`guard.py`).
"""

import json
import math
import os
import selectors
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import glm45_tune
from glm45_tune.errors import RecipeError, ToldToStop
from glm45_tune.guard import Guarded
from glm45_tune.objectives import RewardConfig
from glm45_tune.redaction import resolved, secrets_of, without
from glm45_tune.rl import rewards
from glm45_tune.terminal import visible

MEMORY_GIB = 8
START_SECONDS = 60
_PAUSE_SECONDS = 0.2  # between looks whether a signal came
_LINE_BYTES = 1 << 20
_ITEM_BYTES = 1 << 14  # of a message for each answer in it
_PRINTED_LINES, _PRINTED_BYTES = 20, 1 << 12  # shown of what a function prints in one call
Result = tuple[float | None, str | None, str]
"""(value, None, ""), or (None, kind of fault, what was said)."""


class Gone(Exception):
    """A child that can be asked no more; kind: died, timeout, garbled, or raised."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


class Child:
    """A process with one function in it.

    Raises Gone where that cannot be started or does not answer as it must.
    """

    def __init__(self, function: str, order: dict, env: dict[str, str], cwd: str, is_told: Callable[[], bool]):
        """Start the command; order: what it is told first.

        is_told: says whether this process was told to stop. Then waiting raises ToldToStop.
        """
        self._function, self._is_told = function, is_told
        options = order.get("options", {})
        self._secrets = secrets_of(options)
        order = order | {"options": resolved(options, f"{function}: options"), "place": os.getcwd()}
        # the working directory comes last, see child.py: a json.py there is not Python's
        others = [entry for entry in sys.path if entry and os.path.abspath(entry) != os.getcwd()]
        path = os.pathsep.join([str(Path(glm45_tune.__file__).parents[1]), *others])
        self._process = Guarded(
            [sys.executable, "-P", "-m", "glm45_tune.rl.child"],
            stdin=-1,
            stdout=-1,
            stderr=-1,
            env={
                **env,
                "PYTHONPATH": path,
                "PYTHONIOENCODING": "utf-8",
                "PYTHONUNBUFFERED": "1",
                "OMP_NUM_THREADS": "1",
            },
            cwd=cwd,
        )
        assert self._process.stdin and self._process.stdout and self._process.stderr
        self._into, self._out, self._err = self._process.stdin, self._process.stdout, self._process.stderr
        for pipe in (self._into, self._out, self._err):
            os.set_blocking(pipe.fileno(), False)
        self._heard, self._printed, self._num_lines = bytearray(), bytearray(), 0
        self.say(order)

    @property
    def runs(self) -> bool:
        return self._process.poll() is None

    def say(self, message: object, seconds: float = START_SECONDS) -> None:
        data, deadline = memoryview(json.dumps(message).encode() + b"\n"), time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self._into, selectors.EVENT_WRITE)
            selector.register(self._err, selectors.EVENT_READ)  # one that prints a lot would wait for us
            while data:
                for key, _ in self._ready(selector, deadline, seconds):
                    if key.fileobj is self._err:
                        self._take_printed(selector)
                        continue
                    try:
                        data = data[os.write(key.fd, data[: 1 << 16]) :]
                    except OSError as error:
                        raise Gone("died", "its process ended while it was spoken to") from error

    def hear(self, seconds: float, most: int = _LINE_BYTES) -> dict:
        """The next message, of at most `most` bytes."""
        deadline, seen = time.monotonic() + seconds, 0
        with selectors.DefaultSelector() as selector:
            selector.register(self._out, selectors.EVENT_READ)
            selector.register(self._err, selectors.EVENT_READ)
            while (end := self._heard.find(b"\n", seen)) < 0:
                seen = len(self._heard)
                if seen > most:
                    raise Gone("garbled", f"its process wrote a message of more than {most:,} bytes")
                for key, _ in self._ready(selector, deadline, seconds):
                    if key.fileobj is self._err:
                        self._take_printed(selector)
                    elif part := os.read(key.fd, 1 << 16):
                        self._heard += part
                    else:
                        raise Gone("died", "its process ended, or closed its files")
        line = bytes(self._heard[:end])
        del self._heard[: end + 1]
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, dict):
            raise Gone("garbled", f"its process wrote what is no message of ours: {line[:80]!r}")
        return message

    def _ready(self, selector: selectors.BaseSelector, deadline: float, seconds: float) -> list:
        left = deadline - time.monotonic()
        if left <= 0:
            raise Gone("timeout", f"no word from its process within {seconds:g} s")
        if self._is_told():
            raise ToldToStop(f"{self._function} was waited for")
        return selector.select(min(left, _PAUSE_SECONDS))

    # -- what the function prints --------------------------------------------------------------------

    def _take_printed(self, selector: selectors.BaseSelector | None = None) -> bool:
        """Show what was printed, the first lines of it; the rest is read and counted.

        Returns whether there was something.
        """
        try:
            part = os.read(self._err.fileno(), 1 << 16)
        except BlockingIOError:
            return False
        if not part:
            if selector:
                selector.unregister(self._err)
            return False
        *lines, rest = (bytes(self._printed) + part).split(b"\n")
        self._printed[:] = rest[:_PRINTED_BYTES]
        for line in lines:
            self._show(line)
        return True

    def _show(self, line: bytes) -> None:
        self._num_lines += 1
        if self._num_lines <= _PRINTED_LINES:
            print(f"{self._function}: {self.hide(line[:_PRINTED_BYTES].decode(errors='replace'))}", file=sys.stderr)

    def show_rest(self) -> None:
        """Show what is still in the pipe, and begin to count anew."""
        for _ in range(100):
            if not self._take_printed():
                break
        if self._printed:
            self._show(bytes(self._printed))
        if self._num_lines > _PRINTED_LINES:
            print(f"{self._function}: … and {self._num_lines - _PRINTED_LINES:,} more lines", file=sys.stderr)
        self._printed, self._num_lines = bytearray(), 0

    def hide(self, text: str) -> str:
        """The text as it may be shown: without the secrets that the function was given."""
        return visible(without(text, self._secrets))

    def close(self) -> None:
        self._process.terminate()
        self.show_rest()
        self._process.end()


class Worker:
    """One reward and its process, started when it is needed, again where it had to be ended."""

    def __init__(self, config: RewardConfig, timeout_seconds: float, is_told: Callable[[], bool] = lambda: False):
        self._config, self._timeout, self._is_told = config, timeout_seconds, is_told
        self._child: Child | None = None
        self._one_by_one, self._batched = True, False

    def evaluate(self, prompts: list[str], completions: list[str], columns: list[dict]) -> list[Result]:
        """One result for each answer. An answer that hangs costs its timeout; those behind it are asked of a new process."""
        items = list(zip(prompts, completions, columns))
        results: list[Result] = []
        while len(results) < len(items):
            child = self._start()
            fault = self._ask(child, items[len(results) :], results) if isinstance(child, Child) else child
            if fault is not None:
                self.close()
                kind, message = fault
                # a function of all answers at once has no first one that is at fault; one that does not start has none either
                failed = 1 if self._one_by_one and kind != "cannot start" else len(items) - len(results)
                results += [(None, kind, message)] * failed
        if self._child:
            self._child.show_rest()
        return results

    def fault(self) -> str | None:
        """Why its process cannot be started, None where it can."""
        found = self._start()
        return None if isinstance(found, Child) else found[1]

    def _start(self) -> "Child | tuple[str, str]":
        """The process, started if it does not run; or why it could not be."""
        if self._child is not None and self._child.runs:
            return self._child
        self.close()
        self._one_by_one, self._batched = True, False
        self._home = tempfile.TemporaryDirectory(prefix="glm45_tune_reward_")
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "VIRTUAL_ENV") if name in os.environ}
        config = self._config
        order = {"function": config.function, "options": config.options, "seconds": self._timeout, "memory": MEMORY_GIB}
        try:
            child = self._child = Child(config.function, order, kept, self._home.name, self._is_told)
            hello = child.hear(START_SECONDS)
        except (Gone, OSError, RecipeError) as error:
            return ("cannot start", str(error))
        if "error" in hello:
            return ("cannot start", child.hide(str(hello["error"])))
        self._one_by_one, self._batched = bool(hello.get("one_by_one")), bool(hello.get("batched"))
        return child

    def _ask(self, child: Child, items: list, results: list[Result]) -> tuple[str, str] | None:
        """Append a result for each item as it comes. Returns what went wrong with the first one without."""
        wanted, seconds = len(results) + len(items), self._timeout * (len(items) if self._batched else 1)
        try:
            child.say(items)
            while len(results) < wanted:
                # the child ends an async function itself, just before
                answer = child.hear(seconds + 1, _LINE_BYTES + _ITEM_BYTES * len(items))
                results += _results(child, answer, wanted - len(results))
        except Gone as gone:
            return (gone.kind, f"took longer than {seconds} s" if gone.kind == "timeout" else str(gone))
        return None

    def close(self) -> None:
        if self._child is not None:
            self._child.close()
            self._child = None
            self._home.cleanup()


def _results(child: Child, answer: dict, most: int) -> list[Result]:
    found = answer.get("results")
    if not isinstance(found, list) or not 0 < len(found) <= most:
        raise Gone("garbled", f"its process wrote what is no message of ours: {str(answer)[:80]!r}")
    return [_result(child, entry) for entry in found]


def _result(child: Child, entry: object) -> Result:
    match entry:
        case [int() | float() as value, None, ""] if math.isfinite(value):
            return float(value), None, ""
        case [None, str() as kind, str() as message]:
            return None, kind, child.hide(message)
    raise Gone("garbled", f"its process wrote what is no result: {str(entry)[:80]!r}")


class ToolWorker:
    """The function that answers turns (rl.tools), and its process."""

    def __init__(self, function: str, timeout_seconds: float, is_told: Callable[[], bool] = lambda: False):
        self._function, self._timeout, self._is_told = function, timeout_seconds, is_told
        self._child: Child | None = None

    def ask(self, said: str, columns: dict) -> object:
        """What the function returns. Raises Gone, with words that go behind its name."""
        try:
            child = self._child
            if child is None:
                order = {"function": self._function, "is_tool": True}
                child = self._child = Child(self._function, order, dict(os.environ), os.getcwd(), self._is_told)
                hello = child.hear(START_SECONDS)
                if "error" in hello:
                    raise Gone("died", f"cannot start: {hello['error']}")
            child.say([said, columns], self._timeout)
            answer = child.hear(self._timeout, 16 * _LINE_BYTES)
            child.show_rest()
        except Gone as gone:
            self.close()
            hangs = f"took longer than {self._timeout:g} s (rl.tool_timeout_seconds)"
            raise Gone(gone.kind, hangs if gone.kind == "timeout" else str(gone)) from gone
        if "fault" in answer:
            raise Gone("raised", str(answer["fault"]))
        return answer.get("value")

    def close(self) -> None:
        if self._child is not None:
            self._child.close()
            self._child = None


def check_functions(configs: list[RewardConfig]) -> None:
    """Start every function that is not built in once. Raises RecipeError where one is not there or cannot be called so."""
    for number, config in enumerate(configs):
        if config.function in rewards.FUNCTIONS:
            continue
        worker = Worker(config, START_SECONDS)
        try:
            fault = worker.fault()
        finally:
            worker.close()
        if fault:
            said = fault.removeprefix(f"{config.function}: ")
            raise RecipeError(
                f"rl.rewards[{number}] ({config.function}): cannot start: {said}. A function (prompt, completion, columns, "
                f"**options) is expected, of a module in {os.getcwd()} or on PYTHONPATH."
            )
