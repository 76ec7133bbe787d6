"""Reading a megatron tensor, or a slice of one, from the HF tensors a row names, and cutting it apart again."""

from pathlib import Path
from typing import Protocol

import torch

from glm45_tune.conversion.names import Row
from glm45_tune.spec import ModelSpec

ALL = slice(None)


class HfReader(Protocol):
    """A model under its Hugging Face names, wherever it lies: an HF directory, a megatron one, one with an adapter merged."""

    spec: ModelSpec
    path: Path

    @property
    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def read(self, name: str, first: int = 0, last: int | None = None, columns: slice = ALL) -> torch.Tensor:
        """Rows [first, last) of the tensor, and of a matrix these columns."""
        ...


def read_row(
    row: Row, source: HfReader, first: int = 0, last: int | None = None, expert: int | None = None, columns: slice = ALL
) -> torch.Tensor:
    """Rows [first, last) and `columns` of the merged tensor (of one expert where the row stacks them), reading nothing else."""
    names = row.hf_names(expert)
    last = sum(part.shape[0] for part in row.parts) if last is None else last
    found, start = [], 0
    for part, lo, hi in row.pieces:
        a, b = max(first - start, 0), min(last - start, hi - lo)
        if a < b:
            found.append(source.read(names[part], lo + a, lo + b, columns))
        start += hi - lo
    return found[0] if len(found) == 1 else torch.cat(found)


def split_row(row: Row, merged: torch.Tensor) -> list[torch.Tensor]:
    """The HF tensors of a merged one (one expert's where the row stacks them), in the order of `row.parts`."""
    found: list[list[torch.Tensor]] = [[] for _ in row.parts]
    for (part, _, _), piece in zip(row.pieces, merged.split([hi - lo for _, lo, hi in row.pieces])):
        found[part].append(piece)
    return [pieces[0].contiguous() if len(pieces) == 1 else torch.cat(pieces) for pieces in found]
