"""A reward function in a process of its own: it may raise, hang, print, exit or eat memory, and training goes on.

The process has its own empty working directory, a limit on memory, and no environment but what Python needs. It is no wall
against malice: it runs as the same user with the same network. Parent and child speak JSON, a line a message.
"""

import asyncio
import inspect
import json
import math
import os
import resource
import selectors
import subprocess
import sys
import tempfile
import time

from glm45_tune.errors import RecipeError
from glm45_tune.objectives import RewardConfig
from glm45_tune.rl import rewards

MEMORY_GIB = 8
START_SECONDS = 60
Result = tuple[float | None, str | None, str]
"""(value, None, ""), or (None, kind of fault, what was said)."""


class Worker:
    """One function and its process, started when it is first needed and again when it had to be ended."""

    def __init__(self, config: RewardConfig, timeout_seconds: float):
        self._config, self._timeout = config, timeout_seconds
        self._process: subprocess.Popen | None = None

    def evaluate(self, prompts: list[str], completions: list[str], columns: list[dict]) -> list[Result]:
        """One result for each answer. An answer that hangs costs its timeout; those behind it are asked of a new process."""
        items = list(zip(prompts, completions, columns))
        results: list[Result] = []
        while len(results) < len(items):
            try:
                fault = self._start() or self._ask(items[len(results) :], results)
            except BrokenPipeError:
                fault = ("died", "its process ended while it was spoken to")
            if fault is not None:
                self.close()
                kind, message = fault
                # a function of all answers at once has no first one that is at fault; one that does not start has none either
                failed = 1 if self._one_by_one and kind != "cannot start" else len(items) - len(results)
                results += [(None, kind, message)] * failed
        return results

    def fault(self) -> str | None:
        """Why its process cannot be started, None where it can."""
        found = self._start()
        return found and found[1]

    def _start(self) -> tuple[str, str] | None:
        """Start the process if it does not run. Returns why it could not."""
        if self._process is not None and self._process.poll() is None:
            return None
        self._one_by_one, self._batched = True, False
        self._home = tempfile.TemporaryDirectory(prefix="glm45_tune_reward_")
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "VIRTUAL_ENV") if name in os.environ}
        # the working directory last, and for a module of the user's alone: no file there stands in for a library's
        own = [os.getcwd()] if ":" in self._config.function else []
        path = os.pathsep.join([*filter(None, sys.path), *own])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "glm45_tune.rl.sandbox", self._config.model_dump_json(), str(self._timeout)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**kept, "PYTHONPATH": path, "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"},
            cwd=self._home.name,
        )
        self._buffer = b""
        hello = self._read(START_SECONDS)
        if hello is None:
            return ("cannot start", f"no word from its process within {START_SECONDS} s")
        if "error" in hello:
            return ("cannot start", hello["error"])
        self._one_by_one, self._batched = hello["one_by_one"], hello["batched"]
        return None

    def _ask(self, items: list, results: list[Result]) -> tuple[str, str] | None:
        """Append a result for each item as it comes. Returns what went wrong with the first one without."""
        self._process.stdin.write(json.dumps(items).encode() + b"\n")
        self._process.stdin.flush()
        wanted, seconds = len(results) + len(items), self._timeout * (len(items) if self._batched else 1)
        while len(results) < wanted:
            answer = self._read(seconds + 1)  # the child ends an async function itself, just before
            if answer is None:
                died = self._process.poll() is not None
                return ("died", "its process ended") if died else ("timeout", f"took longer than {seconds} s")
            results += [tuple(result) for result in answer["results"]]
        return None

    def _read(self, seconds: float) -> dict | None:
        deadline = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    return None
                part = os.read(self._process.stdout.fileno(), 1 << 20)
                if not part:
                    self._process.wait()
                    return None
                self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process.stdin.close()
            self._process.stdout.close()
            self._process = None
            self._home.cleanup()


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


def _checked(value) -> Result:
    try:
        value = float(value)
    except (TypeError, ValueError):
        return None, "no number", f"returned {value!r}"
    except OverflowError:
        return None, "not finite", "returned an integer that is too large for a float"
    return (value, None, "") if math.isfinite(value) else (None, "not finite", f"returned {value}")


def _raised(error: BaseException) -> Result:
    return None, "raised", f"{type(error).__name__}: {error}"


async def _together(function, items: list, options: dict, seconds: float) -> list[Result]:
    """An async function of every item at once, each within its time."""

    async def one(item) -> Result:
        try:
            return _checked(await asyncio.wait_for(function(*item, **options), seconds))
        except TimeoutError:
            return None, "timeout", f"took longer than {seconds} s"
        except Exception as error:  # a reward is the user's program: what it raises is counted and said
            return _raised(error)

    return list(await asyncio.gather(*map(one, items)))


def _batch(function, items: list, options: dict) -> list[Result]:
    """A function of all items in one call, async or not. One that takes too long is ended with its process."""
    try:
        found = function(*map(list, zip(*items)), **options)
        values = list(asyncio.run(found) if inspect.iscoroutine(found) else found)
    except Exception as error:  # the user's program
        return [_raised(error)] * len(items)
    if len(values) != len(items):
        return [(None, "wrong count", f"returned {len(values)} rewards for {len(items)} answers")] * len(items)
    return [_checked(value) for value in values]


def _check_call(function: object, options: dict) -> None:
    """Raises TypeError where a reward cannot be asked of it."""
    if not callable(function):
        raise TypeError(f"is {function!r}, which is no function")
    try:
        signature = inspect.signature(function)
    except ValueError:  # some that are written in C tell nobody what they take
        return
    signature.bind("", "", {}, **options)


def main(config: RewardConfig, seconds: float) -> None:
    """The child: says whether it is ready, then answers lines of items with lines of results."""
    speak = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the function prints goes nowhere

    def say(message: dict) -> None:
        speak.write(json.dumps(message) + "\n")
        speak.flush()

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_GIB << 30, MEMORY_GIB << 30))
    try:
        function = rewards.load(config.function)
        _check_call(function, config.options)
    except Exception as error:  # importing the user's module runs it
        say({"error": f"{config.function}: {type(error).__name__}: {error}"})
        return
    batched = bool(getattr(function, "batched", False))
    # an object is called by its class's __call__
    is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)
    say({"one_by_one": not (batched or is_async), "batched": batched})
    for line in sys.stdin:
        items = json.loads(line)
        if batched:
            say({"results": _batch(function, items, config.options)})
        elif is_async:
            say({"results": asyncio.run(_together(function, items, config.options, seconds))})
        else:
            for item in items:
                try:
                    result = _checked(function(*item, **config.options))
                except Exception as error:  # the user's program
                    result = _raised(error)
                say({"results": [result]})


if __name__ == "__main__":
    main(RewardConfig.model_validate_json(sys.argv[1]), float(sys.argv[2]))
