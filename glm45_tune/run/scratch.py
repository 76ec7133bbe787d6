"""Room for large files while a run is evaluated: removed at its end, at SIGTERM, and after a kill at the next start."""

import contextlib
import hashlib
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from glm45_tune.errors import UserError
from glm45_tune.system.files import locked_directory


def _place(run: Path) -> tuple[Path, str]:
    """Where a run's scratch directories are, and how their names begin."""
    if os.access(run, os.W_OK):
        return run, ".eval_"
    key = hashlib.sha256(str(run.resolve()).encode("utf-8", "surrogateescape")).hexdigest()[:12]
    return Path(tempfile.gettempdir()), f"glm45_tune_eval_{os.getuid()}_{key}_"


def sweep(run: Path) -> None:
    """Remove scratch directories whose process is gone."""
    if run.is_dir():
        with contextlib.suppress(OSError), locked_directory(run) as nobody_begins:
            if nobody_begins:
                _remove_left(run)


def _remove_left(run: Path) -> None:
    place, front = _place(run)
    for left in place.glob(f"{front}*"):
        if left.is_dir() and not left.is_symlink():
            with contextlib.suppress(OSError), locked_directory(left) as is_ours:
                if is_ours:
                    shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def scratch(run: Path) -> Iterator[Path]:
    """Yield an empty directory beside the run's files, or in the temporary directory when the run is read-only."""
    place, front = _place(run)
    try:
        with locked_directory(run):  # nobody sweeps between the making and the lock
            _remove_left(run)
            holder = Path(tempfile.mkdtemp(prefix=front, dir=place))
            held = contextlib.ExitStack()
            held.enter_context(locked_directory(holder))
    except OSError as error:
        raise UserError(f"{place}: cannot be written to ({error.strerror}). Make room, or set TMPDIR.") from error
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number)) if is_main else None
    try:
        yield holder
    finally:
        if is_main:
            signal.signal(signal.SIGTERM, before)
        shutil.rmtree(holder, ignore_errors=True)
        held.close()
