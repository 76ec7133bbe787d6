"""Preference rows: two answers behind one prompt, rendered side by side.

In a corpus a pair is two samples, the chosen one first; `Pairs` reads them together. Trained is what the assistant says where
the two conversations differ, with the tokens that end its turns.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from glm45_tune.data.chat import ChatRenderer, Sample
from glm45_tune.data.length import Fitted, Tokens, cut, why_left_out
from glm45_tune.errors import DataError


@dataclass(frozen=True, slots=True)
class Pair:
    """Both samples begin with the same `prompt` tokens, none of which is trained."""

    chosen: Sample
    rejected: Sample
    prompt: int


class Pairs(Sequence):
    """The pairs of a corpus that a PairRenderer made: Pairs(corpus.samples)[i] is a Pair."""

    def __init__(self, samples: Sequence[Sample]):
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples) // 2

    def __getitem__(self, index: int) -> Pair:
        index = range(len(self))[index]
        chosen, rejected = self._samples[2 * index], self._samples[2 * index + 1]
        return Pair(chosen, rejected, _shared(chosen, rejected))

    def lengths(self) -> np.ndarray:
        """Tokens of both, int64 [pairs, 2]: chosen, rejected."""
        return self._samples.lengths().reshape(-1, 2)


def _shared(chosen: Sample, rejected: Sample) -> int:
    """How many tokens both begin with, before anything is trained."""
    firsts = [int(np.argmax(sample.loss_mask > 0)) for sample in (chosen, rejected)]
    size = min(firsts)
    differs = chosen.input_ids[:size] != rejected.input_ids[:size]
    return int(np.argmax(differs)) if differs.any() else size


class PairRenderer(ChatRenderer):
    """Renders preference rows; each gives two samples, chosen and rejected, or none when it is dropped."""

    kind, per_row = "preference", 2

    def _tokens(self, row: dict) -> Fitted:
        if self.options.overlong == "split":
            raise DataError("a pair cannot be split: data.overlong is to be error, drop or truncate")
        (chosen, tools, thinking), (rejected, _, _) = self._checked(row), self._checked(row, "rejected_messages")
        sides = [chosen, rejected]
        # what of it may be trained in other rows does not matter: what both share is not trained at all
        said = ([{**message, "weight": None} for message in messages] for messages in sides)
        shared = next((n for n, (a, b) in enumerate(zip(*said)) if a != b), min(map(len, sides)))
        if not shared:
            raise DataError("chosen and rejected share no beginning: they are to be answers to one prompt")
        both = []
        for name, messages in zip(("chosen", "rejected"), sides):
            answers = {n for n in range(shared, len(messages)) if messages[n]["role"] == "assistant"}
            if not any(messages[n]["weight"] for n in answers):
                also = "; chosen and rejected are the same" if sides[0] == sides[1] else ""
                raise DataError(f"has no assistant message behind what both share{also}", name)
            both.append(self._conversation(messages, tools, thinking, answers))
        if np.array_equal(both[0].ids, both[1].ids):
            raise DataError(
                "and rejected are the same to the model: the chat template drops that in which they differ", "chosen"
            )
        return self._cut_alike(*both)

    def _cut_alike(self, chosen: Tokens, rejected: Tokens) -> Fitted:
        """Both within data.seq_length together: the same oldest turns left out of both, then each cut at its end."""
        limit, longest = self.options.seq_length // 2, max(len(chosen.ids), len(rejected.ids))
        if longest > limit and self.options.overlong == "error":
            raise DataError(
                f"{longest} tokens of the longer answer and its prompt exceed half of data.seq_length {self.options.seq_length}: "
                "a row holds both of a pair. Raise it, shorten the row, or say with data.overlong what should become of it"
            )
        if longest <= limit:
            return Fitted([chosen, rejected], Counter())
        if self.options.overlong == "drop" or chosen.head >= limit:
            why = why_left_out(longest, chosen.head, limit, self.options.overlong)
            return Fitted([], Counter(dropped=1), [why])
        shared = [start for start in chosen.turns if start in rejected.turns]
        fitting = [start for start in shared if chosen.head + longest - start <= limit]
        first = fitting[0] if fitting else max(shared, default=chosen.head)
        pieces = [cut(side, first, min(len(side.ids), first + limit - side.head)) for side in (chosen, rejected)]
        if all(piece.mask.any() for piece in pieces):
            return Fitted(pieces, Counter(truncated=1))
        why = f"left out: of one answer nothing fits into {limit:,} tokens, half of a row"
        return Fitted([], Counter({"dropped": 1, "pieces that would train nothing": 1}), [why])
