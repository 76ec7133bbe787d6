"""Files that somebody else made: they lie where they should, and cost no more than their size.

Nothing here runs what a file says. What is refused is one sentence, whatever the file holds.
"""

import os
import reprlib
import stat
from pathlib import Path

from glm45_tune.documents import MOST_JSON_BYTES, DocumentError, parse_json
from glm45_tune.errors import CheckpointError

# what is named again and again within itself is written out to a depth alone
_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxlist, _REPR.maxtuple, _REPR.maxdict = 4, 8, 8, 8
_REPR.maxstring = _REPR.maxlong = _REPR.maxother = 100


def short(text: str, most: int = 120) -> str:
    """A text from a file as a message shows it: on one line, cut where it is long."""
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= most else f"{text[:most]}… ({len(text):,} characters)"


def shown(value: object) -> str:
    """A value from a file as a message shows it: a text in quotes, all of it cut where it is long."""
    return short(repr(value)) if isinstance(value, str) else short(_REPR.repr(value))


def read_bytes(path: Path, most: int = MOST_JSON_BYTES) -> bytes:
    """A regular file's bytes. Raises CheckpointError where it is none, cannot be read, or is larger than `most`."""
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise CheckpointError(f"{path}: not a regular file.")
            if found.st_size > most:
                raise CheckpointError(f"{path}: holds {found.st_size:,} bytes; at most {most:,} are read.")
            return file.read(most)
    except (OSError, ValueError) as error:  # a name with a zero byte is a ValueError
        raise CheckpointError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}.") from error


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a FIFO would be waited for


def read_json(path: Path) -> dict:
    """The JSON object in a file. Raises CheckpointError."""
    data = read_bytes(path)
    try:
        return parse_json(data)
    except DocumentError as error:
        raise CheckpointError(f"{path}: {error}.") from error


def member(directory: Path, name: object, by: str) -> Path:
    """The regular file `name` of a checkpoint's directory. by: which file names it. Raises CheckpointError."""
    if not isinstance(name, str) or not name or len(name) > 255 or set(name) & set("/\\\0") or name in (".", ".."):
        raise CheckpointError(
            f"{directory}/{by}: names {shown(name)} as a file; the name of a file in that directory is expected."
        )
    path = directory / name
    check_own(path)
    if not path.is_file():
        raise CheckpointError(
            f"{directory}/{by}: names {shown(name)}, which is not a file there. Is the download complete?"
        )
    return path


def check_own(path: Path) -> None:
    """Raise CheckpointError when a file is a link that leads out of its directory.

    The links of a hub's cache are followed into the blobs of the same repository.
    """
    try:
        home, found = path.parent.resolve(), path.resolve()
    except (OSError, RuntimeError) as error:  # a link to itself
        raise CheckpointError(f"{path}: a link that leads nowhere.") from error
    if found.is_relative_to(home):
        return
    # models--ORG--NAME/snapshots/REVISION/FILE
    if home.parent.name == "snapshots" and found.is_relative_to(home.parent.parent / "blobs"):
        return
    raise CheckpointError(
        f"{path}: is a link to {short(str(found), 400)}, which does not lie in that directory. "
        "Put the file itself there, or a hard link."
    )
