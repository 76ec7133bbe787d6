"""Blocks of tensors that lie in files, read by position: only their bytes, into memory of our own.

Nothing is mapped: a disk that fails is then an error with the file's name and no signal.
"""

import contextlib
import itertools
import math
import os
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

import torch

from glm45_tune.errors import CheckpointError

_passing: ContextVar[bool] = ContextVar("passing", default=False)


@contextlib.contextmanager
def passing(is_passing: bool = True) -> Iterator[None]:
    """What this thread reads in here leaves the page cache at once: the next bytes come into the same memory.

    Pages that nobody will read again evict everybody else's; and in a virtual machine the first touch of a page is a fault of
    the host, which costs more than reading it from the disk.
    """
    token = _passing.set(is_passing)
    try:
        yield
    finally:
        _passing.reset(token)


class InputFile:
    """A file that stays open for reading by position."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
            self.size = os.fstat(self._descriptor).st_size
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be opened: {error.strerror}.") from error

    def __del__(self):
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def read_into(self, buffer: memoryview, start: int) -> None:
        """Fill the buffer with the bytes from `start` on."""
        filled = 0
        while filled < len(buffer):
            try:
                count = os.preadv(self._descriptor, [buffer[filled:]], start + filled)
            except OSError as error:
                raise CheckpointError(
                    f"{self.path}: cannot be read at byte {start + filled}: {error.strerror}."
                ) from error
            if not count:
                raise CheckpointError(
                    f"{self.path}: ends at byte {start + filled}, in the middle of a tensor. Is it whole?"
                )
            filled += count
        if _passing.get():
            os.posix_fadvise(self._descriptor, start, filled, os.POSIX_FADV_DONTNEED)

    def read(self, start: int, count: int) -> bytes:
        found = bytearray(count)
        self.read_into(memoryview(found), start)
        return bytes(found)

    def announce(self, start: int, count: int) -> None:
        """These bytes will be asked for soon, in small runs."""
        os.posix_fadvise(self._descriptor, start, count, os.POSIX_FADV_WILLNEED)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """A contiguous tensor's memory, byte by byte."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def read_block(
    file: InputFile, start: int, dtype: torch.dtype, shape: tuple[int, ...], low: tuple[int, ...], high: tuple[int, ...]
) -> torch.Tensor:
    """Of a contiguous tensor of `shape` that begins at byte `start`: the block from corner `low` to corner `high`."""
    sizes = tuple(b - a for a, b in zip(low, high))
    result = torch.empty(sizes, dtype=dtype)
    if not result.numel():
        return result
    strides = [math.prod(shape[dim + 1 :]) * dtype.itemsize for dim in range(len(shape))]
    inner = len(shape)  # from this dim on the block spans the tensor: one run of bytes holds all of them
    while inner and sizes[inner - 1] == shape[inner - 1]:
        inner -= 1
    walked = max(inner - 1, 0)  # and of this one a range
    first = start + sum(a * stride for a, stride in zip(low, strides))
    memory, run = bytes_of(result), result.nbytes // math.prod(sizes[:walked])
    if len(memory) > run:
        last = sum((n - 1) * stride for n, stride in zip(sizes[:walked], strides)) + run
        file.announce(first, last)
    for number, place in enumerate(itertools.product(*map(range, sizes[:walked]))):
        offset = first + sum(index * stride for index, stride in zip(place, strides))
        file.read_into(memory[number * run : (number + 1) * run], offset)
    return result
