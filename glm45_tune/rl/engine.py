"""What writes the answers: the same few words for the training ranks themselves and for a server. Token ids in and out, never text."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

Finish = Literal["stop", "length", "aborted", "broken off"]


@dataclass(frozen=True)
class Request:
    """One answer is wanted behind these tokens."""

    token_ids: list[int]
    max_new_tokens: int


@dataclass(frozen=True)
class Completion:
    """What an engine wrote to one request.

    token_ids: what was written, the token that stopped it included; logprobs: the engine's, of
    each; finish: a stop token, the limit, aborted by the engine, or broken off by us, to be gone on
    with; version: of the weights that wrote it; experts int16 [tokens of request and answer but the
    last, MoE layers, K], −1 where unknown, or None.
    """

    token_ids: list[int]
    logprobs: list[float]
    finish: Finish
    version: int
    experts: np.ndarray | None = None
