"""Losses of preference pairs, from the log-probabilities of whole answers under the policy and the reference.

P pairs; every log-probability [P] is an answer's sum over its tokens, or its mean where lengths are normalised.
"""

import torch
import torch.nn.functional as F


def pair_losses(
    chosen: torch.Tensor, rejected: torch.Tensor, ref_chosen: torch.Tensor, ref_rejected: torch.Tensor, kind: str, beta: float
) -> torch.Tensor:  # fmt: skip
    """Return the loss of each pair, [P].

    `sigmoid`: −log σ(beta · h); `ipo`: (h − 1 / (2 beta))²; h is by how much more than the
    reference the policy prefers the chosen answer.
    """
    preferred = (chosen - rejected) - (ref_chosen - ref_rejected)
    if kind == "ipo":
        return (preferred - 1 / (2 * beta)).square()
    return -F.logsigmoid(beta * preferred)


def kto_losses(
    policy: torch.Tensor,
    reference: torch.Tensor,
    desirable: torch.Tensor,
    kl: torch.Tensor,
    beta: float,
    weights: tuple,
) -> torch.Tensor:
    """[answers]. desirable bool; kl: the reference point z0, a scalar ≥ 0 without gradient; weights: of desirable, undesirable.

    λ − λ σ(± beta (log-ratio − z0)), arXiv:2402.01306 eq. 8 less its constant.
    """
    gain = beta * (policy - reference - kl)
    value = torch.sigmoid(torch.where(desirable, gain, -gain))
    weight = torch.where(desirable, *(value.new_tensor(weight) for weight in weights))
    return weight * (1 - value)
