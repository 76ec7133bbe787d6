"""Which samples share a row, and which rows make an optimizer step: arithmetic that every rank repeats by itself."""

from dataclasses import dataclass
from math import ceil

import numpy as np


def pack(lengths: list[int], row_length: int) -> list[list[int]]:
    """Group samples into rows of at most `row_length` tokens, best fit, longest first.

    lengths: tokens of each sample, none above row_length. Returns sample indices by row; every sample once, none is cut.
    The same input gives the same rows everywhere (ties go by index).
    """
    rows: list[list[int]] = []
    by_space: dict[int, list[int]] = {}  # free tokens → rows that have just that many
    open_spaces = 0  # bit s is set where by_space[s] has rows: the tightest fit is the lowest bit from the length on
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        assert 0 < length <= row_length, f"sample {index} has {length} tokens, a row {row_length}"
        fitting = open_spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            row = by_space[space].pop()
            if not by_space[space]:
                open_spaces &= ~(1 << space)
        else:
            space, row = row_length, len(rows)
            rows.append([])
        rows[row].append(index)
        if space > length:
            by_space.setdefault(space - length, []).append(row)
            open_spaces |= 1 << (space - length)
    return rows


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
        rows = self.rows_of_step(step)
        size = self.micro_batch_size
        firsts = range(data_parallel_rank * size, self.global_batch_size, size * self.data_parallel_size)
        return [rows[first : first + size] for first in firsts]
