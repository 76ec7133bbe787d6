"""SIGTERM and SIGUSR1, by which a run is told to stop."""

import signal
import threading
from collections.abc import Callable

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
told = threading.Event()
"""Set while a run that was told to stop has not ended yet, see `interruption.py`."""


def hear(handler: Callable) -> dict:
    """Have a handler called at these signals. → what was called before, for `forget`.

    Python lets the main thread alone do so: in another one nothing changes, and the program's own handlers stay.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.signal(number, handler) for number in SIGNALS}


def forget(before: dict) -> None:
    """Put back what `hear` replaced."""
    for number, handler in before.items():
        signal.signal(number, handler)
