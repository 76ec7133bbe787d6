"""Which tokens of a packed row each context-parallel rank holds, and which keys they need: arithmetic, the same on every rank.

Every document is cut into 2 · size runs, as even as its length allows, and a rank holds one run of the front half and its
mirror image of the back half, so that all ranks do the same work under a causal mask. Lengths need not divide: no document is
padded, only a rank's tokens as a whole (tensor ranks cut them evenly). Which pair a rank holds turns with the document, so that
the spare tokens of many short documents spread over the ranks.
"""

from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import torch


@dataclass(frozen=True)
class Share:
    """One rank's part of a row: pieces, each a run of one document; first those of the front halves, then those of the back.

    Keys are gathered from all ranks into one buffer [size · longest, ...]; a piece sees its document up to its own last token,
    so the keys of all pieces end to end are `keys`, [S] places in that buffer, with edges `key_bounds`.
    """

    index: np.ndarray
    """int64 [n]: place in the row of each token held; −1 is padding, at the end, as a piece of its own."""
    bounds: list[int]
    """Edges of the pieces among the tokens held, 0 first, n last."""
    key_bounds: list[int]
    keys: torch.Tensor
    num_front: int
    """How many of `keys` belong to front pieces. Among those no place occurs twice, nor among the others."""
    longest: int
    """Tokens of the rank that holds most: what every rank contributes to the gathering."""

    def to(self, device: torch.device) -> "Share":
        return replace(self, keys=self.keys.to(device, non_blocking=True))


def shares(bounds: list[int], size: int, multiple: int) -> list[Share]:
    """Cut a row with these document edges over `size` ranks; each rank's number of tokens is a multiple of `multiple`."""
    front: list[list[tuple[int, int, int]]] = [
        [] for _ in range(size)
    ]  # rank → (document's first token, first, last + 1)
    back: list[list[tuple[int, int, int]]] = [[] for _ in range(size)]
    for number, (first, last) in enumerate(zip(bounds, bounds[1:])):
        edges = [first + (last - first) * run // (2 * size) for run in range(2 * size + 1)]
        for pair in range(size):
            rank = (pair + number) % size
            for runs, run in ((front, pair), (back, 2 * size - 1 - pair)):
                if edges[run] < edges[run + 1]:
                    runs[rank].append((first, edges[run], edges[run + 1]))
    held = [
        np.concatenate([np.arange(a, b) for _, a, b in front[rank] + back[rank]] or [np.empty(0, np.int64)])
        for rank in range(size)
    ]
    padded = [-len(index) % multiple or (0 if len(index) else multiple) for index in held]
    longest = max(len(index) + padding for index, padding in zip(held, padded))
    place = np.empty(bounds[-1], np.int64)  # token of the row → its place in the gathered buffer
    for rank, index in enumerate(held):
        place[index] = rank * longest + np.arange(len(index))
    found = []
    for rank, (index, padding) in enumerate(zip(held, padded)):
        pieces = front[rank] + back[rank]
        own = rank * longest + len(index) + np.arange(padding)
        keys = [*(place[start:b] for start, _, b in pieces), *([own] if padding else [])]
        found.append(
            Share(
                np.concatenate([index, np.full(padding, -1)]),
                list(accumulate([b - a for _, a, b in pieces] + [padding] * (padding > 0), initial=0)),
                list(accumulate(map(len, keys), initial=0)),
                torch.from_numpy(np.concatenate(keys)),
                sum(b - start for start, _, b in front[rank]),
                longest,
            )
        )
    return found
