"""Which samples share a row, and which rows make an optimizer step: arithmetic that every rank repeats by itself."""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np


class Rows(Sequence):
    """Which samples each row holds: rows[i] is a list of sample indices. Two flat arrays, so a million rows are no burden."""

    def __init__(self, members: np.ndarray, edges: np.ndarray):
        """members int [samples], row by row; edges int [rows + 1]: row i is members[edges[i] : edges[i + 1]]."""
        self._members, self._edges = members, edges

    @classmethod
    def single(cls, count: int) -> "Rows":
        """One sample a row."""
        return cls(np.arange(count), np.arange(count + 1))

    def of_groups(self, size: int) -> "Rows":
        """The same rows where each of these samples stands for `size` that follow each other."""
        members = self._members[:, None].astype(np.int64) * size + np.arange(size)
        return Rows(members.reshape(-1), np.asarray(self._edges) * size)

    def __len__(self) -> int:
        return len(self._edges) - 1

    def __getitem__(self, index: int) -> list[int]:
        index = range(len(self))[index]
        return self._members[self._edges[index] : self._edges[index + 1]].tolist()


def pack(lengths: np.ndarray | list[int], row_length: int) -> Rows:
    """Group samples into rows of at most `row_length` tokens, best fit, longest first.

    lengths: tokens of each sample, none above row_length. Every sample is in one row, none is cut. The same input gives the
    same rows everywhere (ties go by index).
    """
    lengths = np.asarray(lengths, np.int64)
    assert not len(lengths) or 0 < lengths.min() <= lengths.max() <= row_length, (
        "a sample is empty or longer than a row"
    )
    order = np.argsort(-lengths, kind="stable")
    row_of = array("i")  # of each sample in `order`
    by_space: dict[int, list[int]] = {}  # free tokens → rows that have just that many
    num_rows = open_spaces = (
        0  # bit s is set where by_space[s] has rows: the tightest fit is the lowest bit from the length on
    )
    for length in _plain(lengths[order]):
        fitting = open_spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            row = by_space[space].pop()
            if not by_space[space]:
                open_spaces &= ~(1 << space)
        else:
            space, row = row_length, num_rows
            num_rows += 1
        row_of.append(row)
        if space > length:
            by_space.setdefault(space - length, []).append(row)
            open_spaces |= 1 << (space - length)
    rows = np.frombuffer(row_of, np.int32) if num_rows else np.empty(0, np.int32)
    members = order[np.argsort(rows, kind="stable")]
    return Rows(members, np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=num_rows))]))


def _plain(values: np.ndarray) -> Iterator[int]:
    """The array's values as Python's integers, a few at a time."""
    for first in range(0, len(values), 1 << 16):
        yield from values[first : first + (1 << 16)].tolist()


@dataclass(frozen=True)
class BatchPlan:
    """The order of rows over a whole run, a function of the seed alone: a step number is all that resume needs.

    Each epoch is shuffled anew and its last step takes what is left, so no row is lost or seen twice.
    """

    num_rows: int
    global_batch_size: int
    micro_batch_size: int
    data_parallel_size: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return ceil(self.num_rows / self.global_batch_size)

    @property
    def num_microbatches(self) -> int:
        return self.global_batch_size // (self.micro_batch_size * self.data_parallel_size)

    def rows_of_step(self, step: int) -> list[int]:
        """Row indices of a step (from 0), all ranks'. Fewer than global_batch_size at the end of an epoch."""
        epoch, step = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng((self.seed, epoch)).permutation(self.num_rows)
        return order[step * self.global_batch_size :][: self.global_batch_size].tolist()

    def microbatches(self, step: int, data_parallel_rank: int) -> list[list[int]]:
        """The rows of each of a rank's micro batches; some may be empty at the end of an epoch, on every rank the same number."""
        return self.share(self.rows_of_step(step), data_parallel_rank)

    def share(self, rows: list, data_parallel_rank: int) -> list[list]:
        """Of a step's rows (indices, or what they hold) those of each of a rank's micro batches."""
        size = self.micro_batch_size
        firsts = range(data_parallel_rank * size, self.global_batch_size, size * self.data_parallel_size)
        return [rows[first : first + size] for first in firsts]
