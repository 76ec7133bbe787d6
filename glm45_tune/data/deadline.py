"""A limit on the time of what a foreign program, such as a chat template, takes."""

import threading
from collections.abc import Callable

SECONDS = 10.0


def in_time(work: Callable, seconds: float = SECONDS):
    """The result of `work`. Raises TimeoutError after so many seconds; what then still runs ends with the process."""
    ended: list = []

    def run() -> None:
        try:
            ended.append((work(), None))
        except Exception as error:  # raised below, where it is waited for
            ended.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not ended:
        raise TimeoutError(f"it takes longer than {seconds:g} s")
    result, error = ended[0]
    if error is not None:
        raise error
    return result
