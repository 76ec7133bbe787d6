"""Files of every kind, read row by row: each row with its line, or with the reason why it cannot be read."""

import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import zstandard

from glm45_tune.errors import DataError

_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt")
_PACKED = (".gz", ".zst")
csv.field_size_limit(sys.maxsize)  # a cell may hold a whole document


def files_of(source: str) -> list[Path]:
    """The files a source names: itself, or all known ones of a folder, sorted. Raises DataError."""
    path = Path(source)
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.is_file() and _kind(file) in _SUFFIXES)
        if not found:
            raise DataError(f"{path}: no {', '.join(_SUFFIXES)} files in this folder.")
        return found
    if not path.is_file():
        raise DataError(f"{path}: no such file.")
    if _kind(path) not in _SUFFIXES:
        raise DataError(f"{path}: unknown kind of file; allowed: {', '.join(_SUFFIXES)}, also with {' or '.join(_PACKED)}.")
    return [path]


def _kind(path: Path) -> str:
    return path.with_suffix("").suffix if path.suffix in _PACKED else path.suffix


class _Watched(io.FileIO):
    """A file that tells how many of its bytes were read."""

    def __init__(self, path: Path, read: Callable[[int], object]):
        super().__init__(path)
        self._tell_read = read

    def readinto(self, buffer) -> int:
        count = super().readinto(buffer)
        self._tell_read(count)
        return count

    def readall(self) -> bytes:
        content = super().readall()
        self._tell_read(len(content))
        return content


def read_rows(path: Path, behind: int = 0, read: Callable[[int], object] = int) -> Iterator[tuple[int, dict | DataError]]:
    """(line, row) of a file, a DataError in place of a row that cannot be read. Lines count from 1; of .json and .parquet, rows.

    .csv has a header; of .txt the whole file is one text. behind: begin after this line. read: is told of bytes as they are read.
    """
    if behind and _kind(path) != ".jsonl":
        yield from ((line, row) for line, row in read_rows(path, 0, read) if line > behind)
        return
    kind, line = _kind(path), 0
    reader = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".txt": _txt, ".parquet": _parquet}[kind]
    try:
        with _open(path, read) as file:
            for line, row in reader(file, behind) if kind == ".jsonl" else reader(file):
                yield line, row
    except (
        UnicodeDecodeError,
        csv.Error,
        EOFError,
        OSError,
        zlib.error,
        zstandard.ZstdError,
        pyarrow.ArrowException,
    ) as error:
        yield line + 1, DataError(f"the file cannot be read on: {error}")


def _open(path: Path, read: Callable[[int], object]):
    """The file, unpacked; of .csv, .json and .txt its text."""
    file = io.BufferedReader(_Watched(path, read), 1 << 17)
    if path.suffix == ".gz":
        file = gzip.open(file, "rb")
    elif path.suffix == ".zst":
        file = io.BufferedReader(zstandard.open(file, "rb"))
    if _kind(path) in (".jsonl", ".parquet"):
        return file
    return io.TextIOWrapper(file, encoding="utf-8-sig", newline="" if _kind(path) == ".csv" else None)


def as_row(value: object) -> dict | DataError:
    """The value, or what is wrong with it as a row."""
    return value if isinstance(value, dict) else DataError(f"holds {type(value).__name__}; an object is expected")


def _jsonl(file, behind: int) -> Iterator:
    for number, line in enumerate(file, start=1):
        if number > behind and line.strip():
            try:
                yield number, as_row(json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8")))
            except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
                yield number, DataError(f"not JSON: {error}")


def _json(file) -> Iterator:
    try:
        document = json.load(file)
    except (ValueError, RecursionError) as error:
        yield 1, DataError(f"not JSON: {error}")
        return
    if not isinstance(document, list):
        yield 1, DataError(f"holds {type(document).__name__}; a list of rows is expected (or one row a line, as .jsonl)")
        return
    for number, row in enumerate(document, start=1):
        yield number, as_row(row)


def _csv(file) -> Iterator:
    reader = csv.DictReader(file)
    for row in reader:
        if None in row:
            yield reader.line_num, DataError("has more cells than the header: quote a cell that holds a comma")
        else:
            yield reader.line_num, _without_empty_cells(row)


def _without_empty_cells(row: dict) -> dict:
    """An empty cell is an absent field; a cell that holds a JSON list or object is one."""
    found = {}
    for key, value in row.items():
        if value in (None, ""):
            continue
        if value[0] in "[{":
            try:
                value = json.loads(value)
            except ValueError:
                pass  # text that begins with a bracket
        found[key] = value
    return found


def _txt(file) -> Iterator:
    text = file.read()
    if text.strip():
        yield 1, {"text": text}


def _parquet(file) -> Iterator:
    number = 0
    for batch in pyarrow.parquet.ParquetFile(file).iter_batches(1024):
        for row in batch.to_pylist():
            number += 1
            yield number, without_nulls(row)


def without_nulls(value):
    """Arrow gives every struct all fields of its type; a null one was not in the row."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value
