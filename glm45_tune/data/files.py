"""Files of every kind, read row by row: each row with its line, or with the reason why it cannot be read."""

import csv
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import zstandard

from glm45_tune.errors import DataError

_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt")
_PACKED = (".gz", ".zst")
# columns of a .csv that may hold JSON: always, or where it is messages (any other JSON there is the text to learn)
_JSON = ("messages", "conversations", "history", "tools", "rejected_messages")
_ANSWERS = ("prompt", "completion", "output", "response", "chosen", "rejected")
_SWITCHES = ("label", "enable_thinking")
_MOST_EXPANDED = 100  # times its size is what a packed .json or .txt may unpack to


def most_row_bytes() -> int:
    """The longest line or cell that is read: a damaged or hostile file could hold one that fills the memory."""
    return int(float(os.environ.get("GLM45_TUNE_MAX_ROW_MIB", 32)) * 2**20)


# what lies in a folder of data and holds no rows
_NOT_ROWS = re.compile(
    r"(licen[cs]e|copying|notice|readme|requirements|changelog|citation)\b.*|"
    r"(dataset_infos?|dataset_dict|state|config|package|package-lock|tokenizer.*|special_tokens_map|generation_config)\.json",
    re.IGNORECASE,
)


def files_of(source: str) -> list[Path]:
    """The files a source names: itself, or those of a folder that hold rows, sorted (see `left_out_of`). Raises DataError."""
    path = Path(source)
    if path.is_dir():
        if not (found := _in_folder(path)[0]):
            raise DataError(f"{path}: no {', '.join(_SUFFIXES)} files of rows in this folder.")
        return found
    if not path.is_file():
        raise DataError(f"{path}: {'is not a regular file' if path.exists() else 'no such file'}.")
    if _kind(path) not in _SUFFIXES:
        raise DataError(
            f"{path}: unknown kind of file; allowed: {', '.join(_SUFFIXES)}, also with {' or '.join(_PACKED)}."
        )
    return [path]


def left_out_of(source: str) -> list[Path]:
    """Files of a folder that are not read as rows: hidden ones, what tools keep there, and plain text beside other kinds."""
    path = Path(source)
    return _in_folder(path)[1] if path.is_dir() else []


def _in_folder(folder: Path) -> tuple[list[Path], list[Path]]:
    """The files of a folder that hold rows, and those beside them."""
    rows, beside = [], []
    for file in sorted(file for file in folder.rglob("*") if file.is_file() and _kind(file) in _SUFFIXES):
        is_hidden = any(part.startswith((".", "__MACOSX")) for part in file.relative_to(folder).parts)
        (beside if is_hidden or _NOT_ROWS.fullmatch(file.name) else rows).append(file)
    if any(_kind(file) != ".txt" for file in rows):  # a text beside rows is a note about them
        beside += [file for file in rows if _kind(file) == ".txt"]
        rows = [file for file in rows if _kind(file) != ".txt"]
    return rows, sorted(beside)


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


class _Zst(io.RawIOBase):
    """What a .zst unpacks to, frame by frame. Raises EOFError in a frame without its end, which zstandard.open lets pass."""

    def __init__(self, file: io.BufferedReader):
        self._file, self._frame, self._packed, self._made = file, None, b"", b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._made:
            # so little of a hostile file unpacks to 32 MiB at most
            self._packed = self._packed or self._file.read(1 << 10)
            if not self._packed:
                if self._frame:
                    raise EOFError("Compressed file ended before the end-of-stream marker was reached")
                return 0
            self._frame = self._frame or zstandard.ZstdDecompressor().decompressobj()
            self._made, self._packed = memoryview(self._frame.decompress(self._packed)), self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        count = min(len(buffer), len(self._made))
        buffer[:count], self._made = self._made[:count], self._made[count:]
        return count


def read_rows(
    path: Path, behind: int = 0, read: Callable[[int], object] = int
) -> Iterator[tuple[int, dict | DataError]]:
    """(line, row) of a file, a DataError in place of a row that cannot be read. Lines count from 1; of .json and .parquet, rows.

    .csv has a header; of .txt the whole file is one text. behind: begin after this line. read: is told of bytes as they are read.
    Raises DataError where a file cannot be read to its end: how many rows are lost nobody knows; it is never one bad row.
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
        DataError,
    ) as error:
        raise DataError(
            f"{path}:{line + 1}: the file cannot be read on: {str(error).rstrip('.')}. Mend it or leave it "
            "out; data.on_bad_row skips rows, never the rest of a file.",
            place=(str(path), line + 1),
        ) from None


def _open(path: Path, read: Callable[[int], object]):
    """The file, unpacked; of .csv, .json and .txt its text."""
    file = io.BufferedReader(_Watched(path, read), 1 << 17)
    if path.suffix == ".gz":
        file = gzip.open(file, "rb")
    elif path.suffix == ".zst":
        file = io.BufferedReader(_Zst(file), 1 << 17)
    if _kind(path) in (".jsonl", ".parquet"):
        return file
    if path.suffix in _PACKED and _kind(path) != ".csv":
        file = io.BytesIO(_unpacked(file, _MOST_EXPANDED * path.stat().st_size + most_row_bytes()))
    return io.TextIOWrapper(file, encoding="utf-8-sig", newline="" if _kind(path) == ".csv" else None)


def _unpacked(file: io.BufferedIOBase, most: int) -> bytes:
    """All that a packed file holds. Raises DataError where it is so much more than its size that it was made to be."""
    found = bytearray()
    while piece := file.read(1 << 20):
        found += piece
        if len(found) > most:
            raise DataError(
                f"it unpacks to more than {most:,} bytes, far beyond its size. Unpack it yourself if that is right"
            )
    return bytes(found)


def as_row(value: object) -> dict | DataError:
    """The value, or what is wrong with it as a row."""
    return value if isinstance(value, dict) else DataError(f"holds {type(value).__name__}; an object is expected")


def _lines(file) -> Iterator:
    """The lines of a file. Raises DataError where one is longer than a row may be."""
    most = most_row_bytes()
    while line := file.readline(most + 1):
        if len(line) > most:
            raise DataError(
                f"its next line is longer than {most / 2**20:g} MiB. Raise GLM45_TUNE_MAX_ROW_MIB if that is right"
            )
        yield line


def _jsonl(file, behind: int) -> Iterator:
    for number, line in enumerate(_lines(file), start=1):
        if number > behind and line.strip():
            try:
                yield number, as_row(json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8")))
            except UnicodeDecodeError as error:
                yield (
                    number,
                    DataError(f"not UTF-8, which is expected: {error.reason} at byte {error.start} of the line"),
                )
            except (ValueError, RecursionError) as error:
                yield number, DataError(f"not JSON: {error}")


def _json(file) -> Iterator:
    try:
        document = json.load(file)
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON: {error}") from None
    if not isinstance(document, list):
        raise DataError(
            f"it holds {type(document).__name__}; a list of rows is expected (or one row a line, as .jsonl)"
        )
    for number, row in enumerate(document, start=1):
        yield number, as_row(row)


def _csv(file) -> Iterator:
    before = csv.field_size_limit(most_row_bytes())  # it is of the whole process, and ends with this file
    try:
        yield from _csv_rows(csv.DictReader(_lines(file)))
    finally:
        csv.field_size_limit(before)


def _csv_rows(reader: csv.DictReader) -> Iterator:
    names = reader.fieldnames or []
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise DataError(f"its header has the column {twice[0]!r} more than once; every column needs a name of its own")
    for row in reader:
        if None in row:
            yield reader.line_num, DataError("has more cells than the header: quote a cell that holds a comma")
        else:
            yield reader.line_num, {key: _cell(key, value) for key, value in row.items() if value}


def _cell(column: str, text: str) -> object:
    """What a cell means: text, unless its column may hold more."""
    if column in _SWITCHES:
        return {"true": True, "false": False}.get(text.strip().lower(), text)
    if column not in (*_JSON, *_ANSWERS) or text.lstrip()[:1] not in ("[", "{"):
        return text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text  # that begins with a bracket
    return value if column in _JSON or _is_messages(value) else text


def _is_messages(value: object) -> bool:
    """Told from an answer that is JSON: {"role": "admin"} may well be one."""
    found = [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, dict)]
    says = {"content", "value", "tool_calls", "reasoning_content"}
    return any({"role", "from"} & item.keys() and says & item.keys() for item in found)


def _txt(file) -> Iterator:
    text = file.read()
    if text.strip():
        yield 1, {"text": text}


def _parquet(file) -> Iterator:
    number = 0
    for batch in pyarrow.parquet.ParquetFile(file).iter_batches(1024):
        for row in batch.to_pylist():
            number += 1
            yield number, without_made_up(row)


def without_made_up(row: dict) -> dict:
    """A row of a columnar file: Arrow gives every struct all fields of its type, and a null one was not in the row.

    A column that is null in a row, and a null in a list, are the row's own.
    """
    return {key: _without_nulls(value) for key, value in row.items()}


def _without_nulls(value):
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
