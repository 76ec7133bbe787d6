"""Output directories appear under their final name only when they are whole, and what a killed job left is taken up again."""

import contextlib
import errno
import fcntl
import hashlib
import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import glm45_tune
from glm45_tune.errors import CheckpointError, UserError, VerificationError
from glm45_tune.foreign import read_json

MARKER = "glm45_tune.json"
# adds files to a directory before it appears
Beside = Callable[[Path], None]

_READ_BYTES = 2**23
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def nothing(directory: Path) -> None:
    """The Beside that adds none."""


def check_free(output: Path, kind: str, *inputs: str | Path) -> None:
    """Raise UserError unless `output` may be written: not there, empty, or of the same kind, written by us and nothing else in it.

    inputs: what the result is made from; it is never replaced by the result.
    """
    if output.exists() and not output.is_dir():
        raise UserError(f"{output}: exists and is a file. Choose another output directory.")
    for path in map(Path, inputs):
        if path.resolve() in output.resolve().parents and "files" in (read_marker(path) or {}):
            raise UserError(
                f"{output}: lies in {path}, which the result is made from. Choose another output directory."
            )
    if not output.is_dir() or not any(output.iterdir()):
        return
    for path in map(Path, inputs):
        if output.resolve() in (path.resolve(), *path.resolve().parents):
            raise UserError(
                f"{output}: is, or holds, {path}, which the result is made from. Choose another output directory."
            )
    found = read_marker(output)
    if found is None:
        raise UserError(
            f"{output}: exists, is not empty and holds no {MARKER}, so it is not ours to replace. Choose another."
        )
    if found.get("kind") != kind:
        raise UserError(
            f"{output}: holds a {found.get('kind')!r}, which a {kind!r} does not replace. Choose another output directory."
        )
    ours = {MARKER, *(Path(name).parts[0] for name in found.get("files", {}))}
    if others := sorted(entry.name for entry in output.iterdir() if entry.name not in {*ours, ".DS_Store"}):
        raise UserError(
            f"{output}: replacing it would also remove {', '.join(others[:3])}, which we did not write. Move that away, or choose "
            "another output directory."
        )


def read_marker(directory: Path) -> dict | None:
    """What glm45_tune.json says, None where there is none or it is not whole."""
    try:
        found = read_json(directory / MARKER)
    except CheckpointError:
        return None
    files = found.get("files", {})
    return found if isinstance(files, dict) and all(_is_entry(*item) for item in files.items()) else None


def _is_entry(name: str, entry: object) -> bool:
    """Is this a file of the directory, with its size and hash?"""
    if not isinstance(entry, dict) or Path(name).is_absolute() or ".." in Path(name).parts:
        return False
    return (type(entry.get("size")), type(entry.get("sha256"))) == (int, str) and isinstance(
        entry.get("nonfinite", []), list
    )


def nonfinite(directory: Path) -> list[str]:
    """The tensors with NaN or Inf that were written there all the same."""
    return [name for entry in (read_marker(directory) or {})["files"].values() for name in entry.get("nonfinite", [])]


def file_hash(path: Path, tick: Callable[[int], None] = lambda size: None) -> str:
    """sha256 of a file; `tick` hears the bytes read."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        buffer = memoryview(bytearray(_READ_BYTES))
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            tick(count)
    return digest.hexdigest()


class Staging:
    """A directory on its way: `NAME.partial`, whose marker says which files are whole."""

    def __init__(self, path: Path, marker: dict):
        self.path, self._marker = path, marker

    @property
    def files(self) -> dict[str, dict]:
        """Name → size and sha256 of every file that is whole."""
        return self._marker["files"]

    def record(self, name: str, entry: dict) -> None:
        """The file is whole; a later start of the same job keeps it."""
        self.files[name] = entry
        self.write_marker()

    def write_marker(self) -> None:
        text = json.dumps(self._marker, indent=2, ensure_ascii=False, sort_keys=True) + "\n"
        beside = self.path / f".{MARKER}"
        beside.write_text(text, encoding="utf-8")
        beside.rename(self.path / MARKER)

    def finish(self) -> None:
        """Record the files that nobody recorded, and forget those that are gone."""
        present = [path for path in sorted(self.path.rglob("*")) if path.is_file() and path.name != MARKER]
        names = {str(path.relative_to(self.path)): path for path in present}
        for name in self.files.keys() - names.keys():
            del self.files[name]
        for name in names.keys() - self.files.keys():
            self.files[name] = {"size": names[name].stat().st_size, "sha256": file_hash(names[name])}
        self.write_marker()


@contextlib.contextmanager
def resumable(output: str | Path, kind: str, *inputs: str | Path, job: object, **facts: object) -> Iterator[Staging]:
    """Yield a directory to fill; on success it becomes `output`, with a marker that holds `kind`, versions, `facts` and hashes.

    job: plain values that decide every byte. Where the same job was cut off, its directory is yielded again with the files
    that were whole; another job's is removed. None: begin anew each time, and leave nothing behind.
    """
    output = Path(output)
    if output.is_symlink():
        output = output.resolve()  # what it points to is replaced, and the link stays
    if output.name in ("", ".."):
        raise UserError(
            f"{output}: a directory is not replaced from inside. Name the output by its path from elsewhere."
        )
    check_free(output, kind, *inputs)
    versions = {"glm45_tune": glm45_tune.__version__, "torch": importlib.metadata.version("torch")}
    marker = {"kind": kind, "versions": versions, **facts, "files": {}}
    if job is not None:
        marker["job"] = hashlib.sha256(json.dumps([marker, job]).encode()).hexdigest()
    path, old = output.with_name(output.name + ".partial"), output.with_name(output.name + ".replaced")
    for beside in (path, old):
        if beside.exists() and read_marker(beside) is None and not (beside.is_dir() and not any(beside.iterdir())):
            raise UserError(
                f"{beside}: is in the way and holds no {MARKER}, so it is not ours to remove. Move it away."
            )
    try:
        path.mkdir(parents=True, exist_ok=True)
        with _locked(path):
            found = read_marker(path) or {}
            if job is not None and found.get("job") == marker["job"]:
                marker["files"] = found["files"]
            _clear(path, marker["files"])
            staging = Staging(path, marker)
            yield from _filled(staging, keep=job is not None)
            shutil.rmtree(old, ignore_errors=True)
            if output.exists():  # moved before it is removed, so that no half of it is ever seen
                output.rename(old)
            path.rename(output)
            shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise cannot_write(path, error) from error


def _filled(staging: Staging, keep: bool) -> Iterator[Staging]:
    try:
        staging.write_marker()
        yield staging
        staging.finish()
    except BaseException as error:
        if not keep or not staging.files or isinstance(error, VerificationError):
            shutil.rmtree(staging.path, ignore_errors=True)
        raise


@contextlib.contextmanager
def whole(output: str | Path, kind: str, *inputs: str | Path, **facts: object) -> Iterator[Path]:
    """Yield a directory to fill; on success it becomes `output`. On failure nothing appears there and what stood there stays."""
    with resumable(output, kind, *inputs, job=None, **facts) as staging:
        yield staging.path


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"{path}: another process is writing it. Wait for it, or choose another output directory."
            ) from error
        yield
    finally:
        os.close(descriptor)


def _clear(path: Path, kept: dict) -> None:
    """Remove what is not among the kept files; the marker, which makes the directory ours, last."""
    for entry in sorted(path.iterdir(), key=lambda entry: entry.name == MARKER):
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name not in kept and (entry.name != MARKER or not kept):
            entry.unlink()


def cannot_write(path: Path, error: OSError) -> UserError:
    """What a failed write means to the user."""
    if error.errno in _NO_ROOM:
        return UserError(
            f"{error.filename or path}: cannot grow: {error.strerror}. Make room and start the same command again: "
            "it goes on with the files that are whole."
        )
    return UserError(f"{error.filename or path}: {error.strerror}.")
