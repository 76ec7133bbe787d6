"""What becomes of a sample that is longer than a row."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, slots=True)
class Tokens:
    """A rendered conversation: ids int32 [n], mask float32 [n].

    `head` tokens come first and belong to every piece ([gMASK]<sop>, tools, system). `turns` are
    the places where a new user turn begins, the first right behind the head.
    """

    ids: np.ndarray
    mask: np.ndarray
    head: int
    turns: list[int]


@dataclass(frozen=True, slots=True)
class Fitted:
    """What became of a row's conversations: pieces within a row of training, counts by reason, and why some are left out."""

    pieces: list[Tokens]
    counts: Counter
    left_out: list[str] = field(default_factory=list)


def why_left_out(length: int, head: int, limit: int, policy: str) -> str:
    """Why `fit` gave no piece of a conversation."""
    if policy != "drop" and head >= limit:
        return f"left out: its tools and system message alone take {head:,} tokens, and a row has room for {limit:,}"
    return f"left out: {length:,} tokens, and a row has room for {limit:,}"


def fit(tokens: Tokens, limit: int, policy: str) -> list[Tokens]:
    """Cut a conversation into pieces of at most `limit` tokens.

    policy "truncate" leaves out the oldest turns, then what is too long at the end; "split" makes
    as many pieces as are needed, each with the head; "drop" gives none.
    """
    if len(tokens.ids) <= limit:
        return [tokens]
    if policy == "drop" or tokens.head >= limit:
        return []
    pieces = _pieces(tokens, limit)
    if policy == "split":
        return pieces
    # whole turns from the end, as many as fit; when the last turn alone is too long, its beginning
    starts = [start for start in tokens.turns if tokens.head + len(tokens.ids) - start <= limit]
    first = starts[0] if starts else max(tokens.turns, default=tokens.head)
    return [cut(tokens, first, min(len(tokens.ids), first + limit - tokens.head))]


def cut(tokens: Tokens, first: int, last: int) -> Tokens:
    """Return the head and the tokens [first, last).

    The role token that begins a turn is trained for the answer before it. That answer is not there,
    so the token is not trained.
    """
    ids, mask = (np.concatenate((x[: tokens.head], x[first:last])) for x in (tokens.ids, tokens.mask))
    if tokens.head < first < last and first in tokens.turns:
        mask[tokens.head] = 0
    return Tokens(ids, mask, tokens.head, [tokens.head])


def _pieces(tokens: Tokens, limit: int) -> list[Tokens]:
    """Turns gathered while they fit, each with the token that ends its answer; a turn that does not fit by itself is cut."""

    def closed(end: int) -> int:
        """Where an answer has its end: the role token of the next turn, where it is trained."""
        return end + bool(end < len(tokens.ids) and tokens.mask[end] > 0)

    room, pieces = limit - tokens.head, []
    edges = sorted({tokens.head, *tokens.turns, len(tokens.ids)})
    first = tokens.head
    for start, end in zip(edges, edges[1:]):
        if closed(end) - first <= room:
            continue
        if start > first:
            pieces.append(cut(tokens, first, closed(start)))
            first = start
        while closed(end) - first > room:
            pieces.append(cut(tokens, first, first + room))
            first += room
    if first < len(tokens.ids):
        pieces.append(cut(tokens, first, len(tokens.ids)))
    return pieces
