"""Attention where the tokens of a row are cut over context ranks: keys and values are gathered, queries stay where they are.

With 8 key/value heads against 96 query heads, gathering moves little: 4 KiB a token and layer for GLM-4.5 in bf16, half of
what its hidden state is. Shapes: n tokens of this rank, S keys its pieces see (see `data/context.py`), H query and G key/value
heads of this tensor rank, D head size.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from torch.nn.attention.varlen import varlen_attn

from glm45_tune.data.context import Share
from glm45_tune.mcore.layers import fast


class _SeenKeys(torch.autograd.Function):
    """[n, ...] of each rank → [S, ...]: what this rank's pieces see, piece by piece. Backward sums what all ranks saw of a key."""

    @staticmethod
    def forward(ctx, held: torch.Tensor, share: Share, group) -> torch.Tensor:
        ctx.share, ctx.group, ctx.num_held = share, group, held.shape[0]
        mine = F.pad(held, (0, 0) * (held.dim() - 1) + (0, share.longest - held.shape[0]))
        everyone = held.new_empty(group.size() * share.longest, *held.shape[1:])
        dist.all_gather_into_tensor(everyone, mine.contiguous(), group=group)
        return everyone.index_select(0, share.keys)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        share = ctx.share
        everyone = gradient.new_zeros(ctx.group.size() * share.longest, *gradient.shape[1:])
        # a key is seen by at most one front and one back piece: two writes without a repeated place are deterministic
        front, back = share.keys[: share.num_front], share.keys[share.num_front :]
        everyone[back] = gradient[share.num_front :]
        everyone[front] += gradient[: share.num_front]
        mine = gradient.new_empty(share.longest, *gradient.shape[1:])
        dist.reduce_scatter_tensor(mine, everyone, group=ctx.group)
        return mine[: ctx.num_held], None, None


def context_attention(query_THD, key_TGD, value_TGD, share: Share) -> torch.Tensor:
    """Causal attention of this rank's tokens inside their documents, wherever the keys lie. Returns [n, H, D].

    Called by all context ranks together.
    """
    group = parallel_state.get_context_parallel_group()
    seen = _SeenKeys.apply(torch.cat((key_TGD, value_TGD), dim=1), share, group)
    key, value = seen.chunk(2, dim=1)
    if query_THD.is_cuda and query_THD.dtype == torch.bfloat16:
        return _flash(query_THD, key, value, share)
    pieces = zip(share.bounds, share.bounds[1:], share.key_bounds, share.key_bounds[1:])
    return torch.cat([_one_piece(query_THD[a:b], key[c:d], value[c:d]) for a, b, c, d in pieces])


def _one_piece(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The queries are the last of the keys' positions."""
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
    rows, columns = query.shape[0], key.shape[0]
    square = rows == columns
    mask = None if square else torch.ones(rows, columns, dtype=torch.bool, device=q.device).tril(columns - rows)
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=square, enable_gqa=True)[0].transpose(0, 1)


def _flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, share: Share) -> torch.Tensor:
    """All pieces by one kernel: FlashAttention-4, or where that is not installed torch's FlashAttention."""
    edges = [torch.tensor(x, dtype=torch.int32, device=query.device) for x in (share.bounds, share.key_bounds)]
    longest = [max(b - a for a, b in zip(x, x[1:])) for x in (share.bounds, share.key_bounds)]
    key, value = key.contiguous(), value.contiguous()
    if fast.has_flash_attention():
        return fast.flash_attention(query, key, value, *edges, *longest)
    return varlen_attn(query, key, value, *edges, *longest, window_size=(-1, 0))
