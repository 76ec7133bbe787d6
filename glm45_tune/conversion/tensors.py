"""Reading a megatron tensor, or a slice of one, from the HF tensors a row names, and cutting it apart again."""

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch

from glm45_tune.conversion.names import Row
from glm45_tune.spec import ModelSpec

ALL = slice(None)
# tensors are read and written in pieces of at most this size; malloc gives memory of 32 MiB and more back to the system each
# time, and to touch it anew costs as much as to read it
PIECE_BYTES = 2**24


class HfReader(Protocol):
    """A model under its Hugging Face names, wherever it lies: an HF directory, a megatron one, one with an adapter merged.

    A reader can be pickled, which sends to another process what opens it there, not what it holds.
    """

    spec: ModelSpec
    path: Path
    config: dict  # config.json as it describes what is read

    @property
    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def read(self, name: str, first: int = 0, last: int | None = None, columns: slice = ALL) -> torch.Tensor:
        """Rows [first, last) of the tensor, and of a matrix these columns. Contiguous."""
        ...

    def stamp(self) -> object:
        """Plain values that change when what is read changes; cheap to get."""
        ...


def nbytes(source: HfReader, name: str) -> int:
    return math.prod(source.shape(name)) * source.dtype(name).itemsize


def cut(first: int, last: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    """Rows [first, last) in runs of at most PIECE_BYTES, cut at multiples of 128 rows: the same rows, the same cuts."""
    step = max(PIECE_BYTES // max(row_bytes, 1) // 128 * 128, 128)
    for start in range(first // step * step, last, step):
        yield max(start, first), min(start + step, last)


def pieces(source: HfReader, name: str) -> Iterator[tuple[int, int]]:
    """The row ranges in which a tensor is read when all of it is wanted and memory shall not hold all of it."""
    rows = source.shape(name)[0] if source.shape(name) else 1
    return cut(0, rows, nbytes(source, name) // max(rows, 1))


def row_parts(
    row: Row, first: int = 0, last: int | None = None, expert: int | None = None
) -> Iterator[tuple[str, int, int]]:
    """Rows [first, last) of the merged tensor (of one expert where the row stacks them) as (HF name, its rows from, to)."""
    names = row.hf_names(expert)
    last = row.height if last is None else last
    start = 0
    for part, lo, hi in row.pieces:
        a, b = max(first - start, 0), min(last - start, hi - lo)
        if a < b:
            yield names[part], lo + a, lo + b
        start += hi - lo


def read_row(
    row: Row, source: HfReader, first: int = 0, last: int | None = None, expert: int | None = None, columns: slice = ALL
) -> torch.Tensor:
    """Rows [first, last) and `columns` of the merged tensor (of one expert where the row stacks them), reading nothing else."""
    found = [source.read(name, lo, hi, columns) for name, lo, hi in row_parts(row, first, last, expert)]
    return found[0] if len(found) == 1 else torch.cat(found)


def split_row(row: Row, merged: torch.Tensor) -> list[torch.Tensor]:
    """The HF tensors of a merged one (one expert's where the row stacks them), in the order of `row.parts`."""
    found: list[list[torch.Tensor]] = [[] for _ in row.parts]
    for (part, _, _), piece in zip(row.pieces, merged.split([hi - lo for _, lo, hi in row.pieces])):
        found[part].append(piece)
    return [pieces[0].contiguous() if len(pieces) == 1 else torch.cat(pieces) for pieces in found]


def fingerprint(source: HfReader) -> str:
    """Tells models apart by their sizes and their final norm and first query weights, in either format; not by the directory."""
    digest = hashlib.sha256(repr(source.spec).encode())
    for name in (
        "model.norm.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.self_attn.q_proj.weight",
    ):
        digest.update(source.read(name, 0, 64).contiguous().view(-1).float().numpy().tobytes())
    return digest.hexdigest()
