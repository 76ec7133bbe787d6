"""Files that somebody else made: they lie where they should, and cost no more than their size.

Nothing here runs what a file says. What is refused is one sentence, whatever the file holds.
"""

import json
import os
import stat
from pathlib import Path

from glm45_tune.errors import CheckpointError

MOST_JSON_BYTES = 64 * 2**20
"""The index of GLM-4.5 has 4 MiB."""


def short(value: object, most: int = 120) -> str:
    """A value from a file as a message shows it: on one line, cut where it is long."""
    text = value if isinstance(value, str) else repr(value)
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= most else f"{text[:most]}… ({len(text):,} characters)"


def read_bytes(path: Path, most: int = MOST_JSON_BYTES) -> bytes:
    """A regular file's bytes. Raises CheckpointError where it is none, cannot be read, or is larger than `most`."""
    try:
        # a FIFO would be waited for
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise CheckpointError(f"{path}: not a regular file.")
            if found.st_size > most:
                raise CheckpointError(f"{path}: holds {found.st_size:,} bytes; at most {most:,} are expected.")
            return file.read(most)
    except (OSError, ValueError) as error:  # a name with a zero byte is a ValueError
        raise CheckpointError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}.") from error


def parse_json(data: bytes | str, where: str) -> object:
    """A JSON value. Raises CheckpointError where it is damaged, nested too deep, or no UTF-8."""
    try:
        return json.loads(data)
    except RecursionError:
        raise CheckpointError(f"{where}: not JSON that can be read: it is nested too deep.") from None
    except ValueError as error:
        raise CheckpointError(f"{where}: not JSON: {short(str(error))}") from None


def read_json(path: Path, kind: type = dict) -> object:
    """The JSON object (or list) of a file. Raises CheckpointError."""
    value = parse_json(read_bytes(path), str(path))
    if not isinstance(value, kind):
        wanted = {dict: "object", list: "list"}[kind]
        raise CheckpointError(f"{path}: holds {type(value).__name__}; a JSON {wanted} is expected.")
    return value


def member(directory: Path, name: object, named_by: str) -> Path:
    """The file `name` of a checkpoint directory, as an index of it says. Raises CheckpointError.

    It must lie in the directory. The links of a hub's cache are followed into the blobs of the same repository.
    """
    if not isinstance(name, str) or not name or "\0" in name or len(name) > 255:
        raise CheckpointError(f"{directory}/{named_by} names a file {short(name)}; a file name is expected.")
    path = directory / name
    if not is_own(directory, path):
        raise CheckpointError(
            f"{directory}/{named_by} names {short(name)}, which does not lie in that directory. "
            "Every file of a checkpoint is expected beside its index."
        )
    if not path.is_file():
        raise CheckpointError(
            f"{directory}/{named_by} names {short(name)}, which is not in {directory}. Is the download complete?"
        )
    return path


def is_own(directory: Path, path: Path) -> bool:
    """Whether a file, its links followed, lies in the directory or in the blobs of the cache that the directory is of."""
    try:
        home, found = directory.resolve(), path.resolve()
    except (OSError, RuntimeError):  # a link to itself
        return False
    if found.is_relative_to(home):
        return True
    return home.parent.name == "snapshots" and found.is_relative_to(home.parent.parent / "blobs")
