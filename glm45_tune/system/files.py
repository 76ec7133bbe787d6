"""Files that are whole or absent: the staged write, the hash of a file, the lock."""

import contextlib
import errno
import fcntl
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file beside `path`, sync it and rename it. On failure the earlier file stays and nothing is left beside it."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(beside, "wb") as file:
            file.write(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise


def file_hash(path: Path) -> str:
    """Return the sha256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def lock(descriptor: int) -> bool:
    """Take the exclusive lock of an open file. Returns False where the file system has none.

    Raises BlockingIOError when another process holds it. The lock ends with the descriptor or the process.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
            raise
        return False
    return True


@contextlib.contextmanager
def locked_directory(path: Path) -> Iterator[bool]:
    """Hold the lock of a directory itself, which may be read-only. Yields False when it cannot be had."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            held = lock(descriptor)
        except BlockingIOError:
            held = False
        yield held
    finally:
        os.close(descriptor)


def append_whole(path: Path, content: str) -> None:
    """Add to a file's end, or on failure leave it as it was: a full disk leaves no half of a line."""
    data = content.encode("utf-8", "surrogatepass")
    with open(path, "ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        try:
            if file.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            file.truncate(end)
            raise
