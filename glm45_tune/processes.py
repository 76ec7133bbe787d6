"""Worker processes that run nothing of the script that called us, which so needs no `if __name__ == "__main__"`.

multiprocessing's own run the caller's main module again before their work: an unguarded script would call us from there once more.
"""

import sys
import types
from multiprocessing.context import ForkServerContext, ForkServerProcess, SpawnContext, SpawnProcess


class _WithoutMain:
    def start(self) -> None:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = types.ModuleType("__main__")  # of no file: there is nothing to run again
        try:
            super().start()
        finally:
            sys.modules["__main__"] = main


class _Spawned(_WithoutMain, SpawnProcess):
    pass


class _Forked(_WithoutMain, ForkServerProcess):
    pass


class Spawn(SpawnContext):
    """As multiprocessing.get_context("spawn")."""

    Process = _Spawned


class ForkServer(ForkServerContext):
    """As multiprocessing.get_context("forkserver")."""

    Process = _Forked
