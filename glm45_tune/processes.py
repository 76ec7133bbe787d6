"""Worker processes that run nothing of the script that called us, which so needs no `if __name__ == "__main__"`.

multiprocessing's own run the caller's main module again before their work: an unguarded script would call us from there once more.
"""

import contextlib
import os
import sys
import types
from collections.abc import Iterator
from multiprocessing import resource_tracker
from multiprocessing.context import ForkServerContext, ForkServerProcess, SpawnContext, SpawnProcess
from pathlib import Path

_ROOT = str(Path(__file__).parents[1])


def python(module: str) -> list[str]:
    """The command that runs a module of ours. Nothing is imported from the working directory, as `python -m` would.

    Where this package was found it is found last, for one that is not installed.
    """
    start = f"import sys; sys.path.append({_ROOT!r}); import runpy; "
    return [sys.executable, "-P", "-c", f"{start}runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"]


@contextlib.contextmanager
def _safe_path() -> Iterator[None]:
    """A Python that is started in here looks for nothing in the working directory."""
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONSAFEPATH"]
        else:
            os.environ["PYTHONSAFEPATH"] = before


class _WithoutMain:
    def start(self) -> None:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = types.ModuleType("__main__")  # of no file: there is nothing to run again
        try:
            with _safe_path():
                super().start()
        finally:
            sys.modules["__main__"] = main


class _Spawned(_WithoutMain, SpawnProcess):
    pass


class _Forked(_WithoutMain, ForkServerProcess):
    pass


class _Tracked:
    def __init__(self) -> None:
        super().__init__()
        with _safe_path():
            resource_tracker.ensure_running()  # a Python of its own, which the first lock would start


class Spawn(_Tracked, SpawnContext):
    """As multiprocessing.get_context("spawn")."""

    Process = _Spawned


class ForkServer(_Tracked, ForkServerContext):
    """As multiprocessing.get_context("forkserver")."""

    Process = _Forked
