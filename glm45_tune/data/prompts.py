"""RL prompts: the token ids that ask for an answer, and the row they came from, for the reward."""

from collections import Counter

import numpy as np

from glm45_tune.data.chat import ChatRenderer
from glm45_tune.data.length import Fitted, Tokens, cut, why_left_out
from glm45_tune.errors import DataError


class PromptRenderer(ChatRenderer):
    """Renders prompts of RL, one sample a row.

    Its input_ids end where the answer begins, its loss_mask is all zeros, and its `row` is the row
    as it was read, every column kept.
    """

    kind = "rl"

    def _tokens(self, row: dict) -> Fitted:
        messages, tools, thinking = self._checked(row)
        if messages[-1]["role"] == "assistant":
            raise DataError(
                "is the assistant's; a prompt ends on what is to be answered. Keep a wanted answer in a field of its own",
                f"messages[{len(messages) - 1}].role",
            )
        ids = self._ids(self._templated(messages, tools, thinking, True))
        starts, _, roles = self._turns(ids, messages, tools, "assistant")
        self._check_length(len(ids))
        longest = self.options.seq_length - 1  # an answer has a token at least
        if len(ids) > longest and self.options.overlong == "error":
            raise DataError(
                f"a prompt of {len(ids)} tokens leaves no room for an answer in data.seq_length {self.options.seq_length}. "
                "Raise it, shorten the prompt, or say with data.overlong what should become of it"
            )
        users = [start for start, role in zip(starts, roles) if role == "user"] or starts[:1]
        whole = Tokens(np.array(ids, np.int32), np.zeros(len(ids), np.float32), users[0], users)
        if len(ids) <= longest:
            return Fitted([whole], Counter())
        if self.options.overlong == "split":
            raise DataError("a prompt cannot be split: data.overlong is to be error, drop or truncate")
        # only whole turns may be left out: a prompt without its end asks for nothing
        fitting = [start for start in users if users[0] + len(ids) - start <= longest]
        if self.options.overlong == "drop" or not fitting:
            return Fitted([], Counter(dropped=1), [why_left_out(len(ids), users[0], longest, self.options.overlong)])
        return Fitted([cut(whole, fitting[0], len(ids))], Counter(truncated=1))

    def _kept(self, row: dict) -> dict:
        return row
