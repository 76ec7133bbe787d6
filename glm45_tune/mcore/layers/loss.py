"""Cross entropy straight from hidden states: the logits of all words exist for a few tokens at a time only.

Shapes: T tokens, V words of this tensor rank.
"""

import torch
import torch.distributed as dist

CHUNK_ELEMENTS = 2**27
"""Logits in memory at a time: 256 MiB in bf16."""


def _row_sums(logits, labels):
    """→ fp32 (logsumexp of each row, its label's logit, or 0 where another rank has it)."""
    if logits.is_cuda:
        from glm45_tune.mcore.layers import kernels

        return kernels.row_sums(logits, labels)
    logits = logits.float()
    ours = (labels >= 0) & (labels < logits.shape[1])
    target = logits.gather(1, labels.clamp(0, logits.shape[1] - 1).unsqueeze(1)).squeeze(1)
    return logits.logsumexp(1), torch.where(ours, target, 0.0)


def _softmax_gradient(logits, labels, lse, scale=None):
    """(softmax − one-hot) · scale in logits' dtype, in its memory where that can be."""
    if logits.is_cuda:
        from glm45_tune.mcore.layers import kernels

        kernels.softmax_gradient_(logits, labels, lse, scale)
        return logits
    gradient = (logits.float() - lse.unsqueeze(1)).exp()
    ours = ((labels >= 0) & (labels < logits.shape[1])).nonzero().squeeze(1)
    gradient[ours, labels[ours]] -= 1.0
    return (gradient if scale is None else gradient * scale.unsqueeze(1)).to(logits.dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    """A frozen head's hidden gradient is made in the forward, up to each token's factor, so that no logit is made twice.

    (Liger-Kernel's fused linear cross entropy does so.) A trained head makes the logits again in the backward, when it knows the factors.
    """

    @staticmethod
    def forward(ctx, hidden, weight, labels, counted, group):
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        losses = hidden.new_zeros(hidden.shape[0], dtype=torch.float32)
        lses = losses.new_empty(len(counted))
        early = hidden.new_empty(len(counted), hidden.shape[1]) if needs_hidden and not needs_weight else None
        for part in _chunks(len(counted), weight):
            rows = counted[part]
            logits, wanted = hidden[rows] @ weight.t(), labels[rows]
            lse, target = _row_sums(logits, wanted)
            if group is not None:
                every = lse.new_empty(group.size() * lse.shape[0])
                dist.all_gather_into_tensor(every, lse, group=group)
                lse = every.view(group.size(), -1).logsumexp(0)
                dist.all_reduce(target, group=group)
            losses[rows], lses[part] = lse - target, lse
            if early is not None:
                torch.mm(_softmax_gradient(logits, wanted, lse), weight, out=early[part])
        ctx.save_for_backward(early, counted, *((hidden, weight, labels, lses) if needs_weight else ()))
        return losses

    @staticmethod
    def backward(ctx, gradient):
        early, counted, *again = ctx.saved_tensors
        weight_out = None
        if early is not None:
            found = (early * gradient[counted].unsqueeze(1)).to(early.dtype)
        else:
            hidden, weight, labels, lses = again
            found = hidden.new_empty(len(counted), hidden.shape[1])
            weight_out = torch.zeros_like(weight, dtype=torch.float32)
            for part in _chunks(len(counted), weight):
                rows = counted[part]
                logits = _softmax_gradient(hidden[rows] @ weight.t(), labels[rows], lses[part], gradient[rows])
                torch.mm(logits, weight, out=found[part])
                weight_out += logits.t() @ hidden[rows]
            weight_out = weight_out.to(weight.dtype)
        hidden_out = found.new_zeros(len(gradient), found.shape[1]).index_copy_(0, counted, found)
        return hidden_out, weight_out, None, None, None


def _chunks(count: int, weight: torch.Tensor) -> list[slice]:
    size = max(1, CHUNK_ELEMENTS // weight.shape[0] // 128 * 128 or CHUNK_ELEMENTS // weight.shape[0])
    return [slice(first, first + size) for first in range(0, count, size)]


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    group: dist.ProcessGroup | None = None,
    counted: torch.Tensor | None = None,
) -> torch.Tensor:
    """hidden [T, H], weight [V, H], labels int64 [T] among the words of all ranks → fp32 cross entropies [T].

    group: the tensor ranks, each with V words in order; hidden, labels and counted are the same on all, and hidden's gradient is
    this rank's part, to be summed over them. counted: int64, which tokens are asked for, each once; the others' losses are 0 and
    cost nothing. None: all.
    """
    if group is not None and group.size() > 1:
        labels = labels - group.rank() * weight.shape[0]
    else:
        group = None
    if counted is None:
        counted = torch.arange(len(labels), device=labels.device)
    return _LinearCrossEntropy.apply(hidden, weight, labels, counted, group)
