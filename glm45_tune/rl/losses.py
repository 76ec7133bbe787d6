"""Policy losses of tokens, from log-probabilities. Each is per token; how tokens are averaged is a weight of their answer.

T tokens of a micro batch; `sequence` int64 [T]: which answer a token belongs to, `mask` bool [T]: which tokens are trained (those
the model wrote). `across` sums over the ranks that share a row's tokens, with the gradient left alone; by itself a row is whole.
"""

from collections.abc import Callable

import numpy as np
import torch

Across = Callable[[torch.Tensor], torch.Tensor]


def _whole(sums: torch.Tensor) -> torch.Tensor:
    return sums


def answer_weights(lengths: np.ndarray, average: str, longest: int) -> np.ndarray:
    """The weight of each token of every answer of an update, float64 [N], so that a plain sum over tokens is the mean wanted.

    lengths: trained tokens of each, 0 for an answer left out. average: `sequence`, the mean over answers of the mean over their
    tokens; `token`, the mean over all tokens; `constant`, the sum over N · longest.
    """
    kept = lengths > 0
    count = max(int(kept.sum()), 1)
    if average == "sequence":
        return kept / (np.maximum(lengths, 1) * count)
    return kept / (max(int(lengths.sum()), 1) if average == "token" else count * longest)


def sum_by_sequence(values: torch.Tensor, sequence: torch.Tensor, count: int, across: Across = _whole) -> torch.Tensor:
    """values [T] → [count], their sums over each sequence; tokens of sequence −1 are left out."""
    ours = sequence >= 0
    zeros = values.new_zeros(count)
    return across(zeros.index_add(0, sequence[ours], values[ours]))


def policy_losses(
    logp: torch.Tensor, ratio_logs: torch.Tensor, advantages: torch.Tensor, kind: str, low: float, high: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """→ losses [T], and which tokens the clip took out, bool [T]. logp carries the gradient; advantages [T].

    ratio_logs [T], with gradient: the logarithm of new over old probability, of the token, or of its sequence (`sequence_ratios`).
    kind `grpo` or `gspo`: −min(ratio · A, clip(ratio) · A); `cispo`: the clipped ratio, held fixed, weighs −A · logp. The clip is
    to [1 − low, 1 + high].
    """
    ratio = ratio_logs.exp()
    clipped = ratio.clamp(1 - low, 1 + high)
    if kind == "cispo":
        return -clipped.detach() * advantages * logp, ratio.detach() != clipped.detach()
    plain, bounded = ratio * advantages, clipped * advantages
    return -torch.minimum(plain, bounded), (bounded < plain).detach()


def sequence_ratios(
    token_logs: torch.Tensor, mask: torch.Tensor, sequence: torch.Tensor, count: int, across: Across, back: Across
) -> torch.Tensor:
    """Mean of the masked tokens' log ratios over each sequence, given to each of its tokens (GSPO's s_i, arXiv:2507.18071, eq. 7).

    across: see above; back: the identity, whose gradient is summed over the same ranks.
    """
    token_logs = torch.where(mask, token_logs, 0.0)
    sums = sum_by_sequence(token_logs, sequence, count, across)
    lengths = sum_by_sequence(mask.to(token_logs.dtype), sequence, count, across)
    means = back(sums / lengths.clamp(min=1))
    return means[sequence.clamp(min=0)]


def divergence(logp: torch.Tensor, reference: torch.Tensor, kind: str) -> torch.Tensor:
    """Estimators of KL(policy ‖ reference) at a token the policy drew: k1 = log p/q, k2 = (log p/q)² / 2, k3 = q/p − 1 − log q/p."""
    log_ratio = logp - reference
    if kind == "k1":
        return log_ratio
    if kind == "k2":
        return 0.5 * log_ratio.square()
    return torch.expm1(-log_ratio) + log_ratio


def importance_weights(
    old: torch.Tensor, engine: torch.Tensor, mask: torch.Tensor, sequence: torch.Tensor, count: int, kind: str, cap: float,
    across: Across = _whole,
) -> torch.Tensor:  # fmt: skip
    """Return min(trainer's / engine's probability, cap), [T], of each token or of its whole sequence.

    It corrects for an engine whose probabilities differ from the trainer's. old, engine:
    log-probabilities [T] without gradient.
    """
    gap = torch.where(mask, old - engine, 0.0)
    if kind == "none":
        return torch.ones_like(gap)
    if kind == "sequence":
        gap = sum_by_sequence(gap, sequence, count, across)[sequence.clamp(min=0)]
    return gap.exp().clamp(max=cap)
