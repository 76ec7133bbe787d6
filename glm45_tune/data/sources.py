"""Training files, read row by row; every row has a file and a line."""

import json
from collections.abc import Iterator
from pathlib import Path

from glm45_tune.data.chat import ChatRenderer, Sample
from glm45_tune.errors import DataError


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict]]:
    """Line numbers (from 1) and objects of a JSONL file; blank lines are passed over. Raises DataError."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file.")
    with open(path, encoding="utf-8-sig") as file:
        try:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, _parse(line, path, number)
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8: {error}") from error


def _parse(line: str, path: Path, number: int) -> dict:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{path}:{number}: not JSON: {error}") from None
    if not isinstance(row, dict):
        raise DataError(f"{path}:{number}: holds {type(row).__name__}; an object is expected")
    return row


def load_samples(paths: str | list[str], renderer: ChatRenderer, seq_length: int) -> list[Sample]:
    """Every row of every file, rendered. Raises DataError listing all bad rows (the first 20 in full)."""
    samples, faults = [], []
    for path in [paths] if isinstance(paths, str) else paths:
        for line, row in read_jsonl(path):
            try:
                sample = renderer.render(row, str(path), line)
                if len(sample.input_ids) > seq_length:
                    raise DataError(
                        f"{path}:{line}: {len(sample.input_ids)} tokens exceed data.seq_length {seq_length}. "
                        "Raise it, or shorten the row"
                    )
                samples.append(sample)
            except DataError as error:
                faults.append(str(error))
    if faults:
        more = f"\n… and {len(faults) - 20} more" if len(faults) > 20 else ""
        raise DataError("\n".join(faults[:20]) + more)
    if not samples:
        raise DataError(f"{paths}: no rows.")
    return samples
