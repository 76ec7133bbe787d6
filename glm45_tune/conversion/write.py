"""Writing planned files: each by one worker, from start to end, hashed as it is written."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from glm45_tune.conversion.blocks import bytes_of, passing
from glm45_tune.conversion.outdir import Staging, cannot_write, file_hash
from glm45_tune.conversion.plan import Piece, PlannedFile
from glm45_tune.conversion.tensors import HfReader
from glm45_tune.conversion.workers import Tick, each
from glm45_tune.errors import CheckpointError, UserError

_WRITTEN_BEHIND = 2**28  # bytes of a file that the disk may still be writing


def write_files(
    staging: Staging,
    source: HfReader,
    files: list[PlannedFile],
    workers: int,
    allow_nonfinite: bool,
    tick: Tick,
    kept: bool = False,
) -> None:
    """Write what is planned and not yet there. `tick` hears the bytes, also of what is found whole. kept: as in `write_file`.

    Raises CheckpointError for NaN or Inf unless allowed, UserError when the disk is full: before the first byte where that can
    be known. Files that are whole stay for the next start.
    """
    _check_room(staging, files)
    target = _Target(staging.path, staging.files, allow_nonfinite, kept)
    each(_write_or_keep, (target, source), files, workers, tick, lambda file, entry: staging.record(file.name, entry))


def _check_room(staging: Staging, files: list[PlannedFile]) -> None:
    wanted = sum(file.size for file in files if file.name not in staging.files)
    free = shutil.disk_usage(staging.path).free
    if wanted > free:
        raise UserError(
            f"{staging.path.parent}: {_gib(wanted)} are to be written and {_gib(free)} are free. Make room or choose another disk."
        )


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


class _Target:
    """What a worker knows of the directory that is written."""

    def __init__(self, path: Path, files: dict[str, dict], allow_nonfinite: bool, kept: bool):
        self.path, self.files, self.allow_nonfinite, self.kept = path, dict(files), allow_nonfinite, kept


def _write_or_keep(target: _Target, source: HfReader, file: PlannedFile, tick: Tick) -> dict:
    """The file's entry: size, hash, and names of tensors with NaN or Inf, if any."""
    known = target.files.get(file.name)
    path = target.path / file.name
    is_there = known and path.is_file() and path.stat().st_size == known["size"]
    if is_there and file_hash(path, tick) == known["sha256"]:
        return known
    try:
        digest, nonfinite = write_file(path, source, file, tick, target.kept)
    except OSError as error:
        raise cannot_write(path, error) from error
    if nonfinite and not target.allow_nonfinite:
        raise CheckpointError(
            f"{source.path}: {len(nonfinite)} tensor(s) hold NaN or Inf: {', '.join(nonfinite[:5])}"
            f"{', …' if len(nonfinite) > 5 else ''}. --allow-nonfinite goes on all the same."
        )
    entry: dict = {"size": file.size, "sha256": digest}
    return entry | {"nonfinite": nonfinite} if nonfinite else entry


def write_file(
    path: Path, source: HfReader, file: PlannedFile, tick: Tick = lambda size: None, kept: bool = False
) -> tuple[str, list[str]]:
    """Write one planned file. Returns its sha256 and the names of the tensors in it that hold NaN or Inf.

    While a piece is hashed and written the next is read, each in a thread. kept: it stays in the page cache, for
    somebody who reads it at once; otherwise neither it nor what it is made from does.
    """
    digest, nonfinite, written = hashlib.sha256(), {}, 0
    data_of_parts = _read(source, file, nonfinite, kept)
    path.unlink(missing_ok=True)  # whoever still writes to it, orphaned, writes to no file of this name
    with ThreadPoolExecutor(2) as threads, open(path, "wb", buffering=2**20) as output:
        ahead = threads.submit(next, data_of_parts, None)
        while (data := ahead.result()) is not None:
            ahead = threads.submit(next, data_of_parts, None)
            hashed = threads.submit(digest.update, data)
            output.write(data)
            written += len(data)
            if not kept and isinstance(
                data, memoryview
            ):  # the disk begins with what is new, and what it has is dropped
                behind = max(written - _WRITTEN_BEHIND, 0)
                os.posix_fadvise(output.fileno(), behind, written - behind, os.POSIX_FADV_DONTNEED)
            hashed.result()
            tick(len(data))
    assert written == file.size, f"{file.name}: {written} bytes where {file.size} were planned"
    return digest.hexdigest(), list(nonfinite)


def _read(source: HfReader, file: PlannedFile, nonfinite: dict[str, bool], kept: bool) -> Iterator[bytes | memoryview]:
    """The bytes of a file's parts; tensors that are not finite are noted."""
    for part in file.parts:
        if not isinstance(part, Piece):
            yield part
            continue
        with passing(not kept):
            tensor = source.read(part.name, part.first, part.last)
        if not _is_finite(tensor):
            nonfinite[part.name] = True
        yield bytes_of(tensor)


def _is_finite(tensor: torch.Tensor) -> bool:
    if tensor.dtype == torch.float8_e4m3fn:
        return not bool((tensor.view(torch.uint8) & 0x7F).eq(0x7F).any())
    # a sum that is finite proves that all are, and is ten times as fast
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())
