"""What a conversion will write, known before the first byte: files of fixed bytes and pieces of HF tensors, in order.

So files can be written by any process in any order, and again after one was killed, and are always the same.
"""

import contextlib
import gc
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from glm45_tune.conversion.tensors import HfReader, cut

MAX_FILE_BYTES = 2 * 10**9


@contextlib.contextmanager
def collector_off():
    """Around work that makes hundreds of thousands of small objects and drops none: the collector would walk them again and again."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows [first, last) of an HF tensor."""

    name: str
    first: int
    last: int


@dataclass
class PlannedFile:
    """One file: its parts end to end are its bytes."""

    name: str
    parts: list[bytes | Piece] = field(default_factory=list)
    size: int = 0

    def add_bytes(self, data: bytes) -> None:
        self.parts.append(data)
        self.size += len(data)

    def add_rows(self, source: HfReader, name: str, first: int, last: int) -> None:
        """Rows of a tensor, cut so that each is read and written at once."""
        row_bytes = math.prod(source.shape(name)[1:]) * source.dtype(name).itemsize
        self.parts += [Piece(name, *rows) for rows in cut(first, last, row_bytes)]
        self.size += (last - first) * row_bytes


def literal(name: str, data: bytes) -> PlannedFile:
    """A file whose bytes are known."""
    return PlannedFile(name, [data], len(data))


def grouped(sizes: dict[str, int], limit: int) -> Iterator[list[str]]:
    """Names in their order, cut into groups of at most `limit` bytes (one alone may be larger)."""
    group: list[str] = []
    total = 0
    for name, size in sizes.items():
        if group and total + size > limit:
            yield group
            group, total = [], 0
        group.append(name)
        total += size
    if group:
        yield group
