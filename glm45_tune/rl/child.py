"""The other side of `sandbox.py`: a process that holds one function of the user's.

It is told what to load, says whether it is ready, and answers lines of JSON with lines of JSON.
"""

import asyncio
import inspect
import json
import math
import os
import resource
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TextIO

from glm45_tune.rl import rewards

if TYPE_CHECKING:
    from glm45_tune.rl.sandbox import Result

_LONGEST_MESSAGE = 2000


def _checked(value) -> "Result":
    try:
        value = float(value)
    except (TypeError, ValueError):
        return None, "no number", f"returned {value!r}"[:_LONGEST_MESSAGE]
    except OverflowError:
        return None, "not finite", "returned an integer that is too large for a float"
    return (value, None, "") if math.isfinite(value) else (None, "not finite", f"returned {value}")


def _raised(error: BaseException) -> "Result":
    return None, "raised", _described(error)


def _described(error: BaseException) -> str:
    """The error with the line of the user's module that it came through last."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [
        f
        for f in frames
        if os.path.dirname(f.filename) != os.path.dirname(__file__) and "site-packages" not in f.filename
    ]
    own = [frame for frame in own if not frame.filename.startswith((sys.prefix, sys.base_prefix, "<"))] or own
    where = f" ({own[-1].filename}:{own[-1].lineno}, {own[-1].name})" if own else ""
    return f"{type(error).__name__}: {error}"[:_LONGEST_MESSAGE] + where


async def _together(function, items: list, options: dict, seconds: float) -> "list[Result]":
    """An async function of every item at once, each within its time."""

    async def one(item) -> "Result":
        try:
            return _checked(await asyncio.wait_for(function(*item, **options), seconds))
        except TimeoutError:
            return None, "timeout", f"took longer than {seconds} s"
        except Exception as error:  # a reward is the user's program: what it raises is counted and said
            return _raised(error)

    return list(await asyncio.gather(*map(one, items)))


def _batch(function, items: list, options: dict) -> "list[Result]":
    """A function of all items in one call, async or not.

    One that takes too long is ended with its process.
    """
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


def _reward(order: dict, say: Callable[[dict], None], lines: Iterator[str]) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (order["memory"] << 30, order["memory"] << 30))
    options, seconds = order["options"], order["seconds"]
    try:
        function = rewards.load(order["function"])
        _check_call(function, options)
    except Exception as error:  # importing the user's module runs it
        say({"error": f"{order['function']}: {type(error).__name__}: {error}"[:_LONGEST_MESSAGE]})
        return
    batched = bool(getattr(function, "batched", False))
    # an object is called by its class's __call__
    is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)
    say({"one_by_one": not (batched or is_async), "batched": batched})
    for line in lines:
        items = json.loads(line)
        if batched:
            say({"results": _batch(function, items, options)})
        elif is_async:
            say({"results": asyncio.run(_together(function, items, options, seconds))})
        else:
            for item in items:
                try:
                    result = _checked(function(*item, **options))
                except Exception as error:  # the user's program
                    result = _raised(error)
                say({"results": [result]})


def _tool(order: dict, say: Callable[[dict], None], lines: Iterator[str]) -> None:
    try:
        function = rewards.load(order["function"])
    except Exception as error:  # importing the user's module runs it
        say({"error": f"{type(error).__name__}: {error}"[:_LONGEST_MESSAGE]})
        return
    say({})
    for line in lines:
        try:
            value = function(*json.loads(line))
        except Exception as error:  # the user's program
            say({"fault": f"raised {_described(error)}"})
            continue
        try:
            say({"value": value})
        except (TypeError, ValueError, RecursionError):
            say({"fault": f"returned {type(value).__name__} {str(value)[:80]!r}, which JSON cannot hold"})


def _main() -> None:
    """The pipes become this module's alone: what the function reads or prints is something else."""
    lines: TextIO = os.fdopen(os.dup(0), encoding="utf-8")
    speak: TextIO = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)

    def say(message: dict) -> None:
        speak.write(json.dumps(message) + "\n")
        speak.flush()

    order = json.loads(lines.readline())
    sys.path.append(order["place"])  # where the command is typed; no file there stands in for a library's
    (_tool if order.get("is_tool") else _reward)(order, say, iter(lines.readline, ""))


if __name__ == "__main__":
    _main()
