"""How far long work is, where a person looks on."""

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def bar(what: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A bar on the terminal, nothing elsewhere; yields a function that takes how many more bytes are done.

    total: bytes in all; None where nobody knows, and things are counted instead.
    """
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    from glm45_tune.console import Terminal

    known = (DownloadColumn(True), TransferSpeedColumn(), TimeRemainingColumn())
    unknown = (TextColumn("{task.completed:,}"), TimeElapsedColumn())
    console = Terminal(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), *(unknown if total is None else known))
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        yield lambda size: progress.advance(task, size)
