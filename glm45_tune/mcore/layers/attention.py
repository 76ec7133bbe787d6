"""Self-attention over packed rows: documents are separated by their edges, never by a mask.

Shapes: T tokens of a row (all documents), H query heads and G key/value heads of this tensor rank, D head size.
"""

import functools
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import checkpoint
from megatron.core.transformer.module import MegatronModule
from torch.nn.attention import SDPBackend, sdpa_kernel

from glm45_tune.data.context import Share
from glm45_tune.mcore.layers import fast
from glm45_tune.mcore.layers.context_parallel import context_attention
from glm45_tune.mcore.layers.linear import ColumnLinear, LowRank, RowLinear
from glm45_tune.mcore.layers.norm import RMSNorm
from glm45_tune.mcore.layers.recompute import is_unread


def rotary_table(positions: torch.Tensor, head_size: int, percent: float, base: float) -> torch.Tensor:
    """cos and sin of every token's position, fp32 [2, T, 1, rotary dims]; rotary dims = head_size · percent."""
    dims = int(head_size * percent)
    frequencies = 1.0 / base ** (torch.arange(0, dims, 2, dtype=torch.float, device=positions.device) / dims)
    angles = torch.outer(positions.float(), frequencies).repeat(1, 2)
    return torch.stack((angles.cos(), angles.sin())).unsqueeze(2)


def rotate(x_THD: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Rotate the first dims of each head, half against half (GLM-4.5 and Llama order); the rest passes unchanged."""
    cos, sin = table.to(x_THD.dtype)
    turned, kept = x_THD.split((cos.shape[-1], x_THD.shape[-1] - cos.shape[-1]), dim=-1)
    low, high = turned.chunk(2, dim=-1)
    return torch.cat((turned * cos + torch.cat((-high, low), dim=-1) * sin, kept), dim=-1)


class _SplitHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mixed, table, heads, narrow, lora_B, scaling):
        from glm45_tune.mcore.layers import kernels

        ctx.save_for_backward(table, narrow, lora_B)
        ctx.heads, ctx.scaling = heads, scaling
        lora_B = None if lora_B is None else lora_B.contiguous()
        return kernels.split_heads(mixed.contiguous(), table, heads, narrow, lora_B, scaling)

    @staticmethod
    def backward(ctx, query, key, value):
        from glm45_tune.mcore.layers import kernels

        table, *low_rank = ctx.saved_tensors
        mixed = kernels.join_heads(query, key, value, table, ctx.heads)
        narrow_out = B_out = None
        if low_rank[0] is not None:
            narrow_out, B_out = LowRank(*low_rank, ctx.scaling).backward(mixed.flatten(1))
        return mixed, None, None, narrow_out, B_out, None


def split_heads(
    mixed: torch.Tensor, shape: tuple[int, int, int], table: torch.Tensor | None, low_rank: LowRank | None = None
):
    """[T, G · (heads + 2) · D], each group's queries, its key and its value → query [T, G · heads, D], key and value [T, G, D].

    shape: (G, heads + 2, D). With a `rotary_table`, query and key come rotated. low_rank: to be added to what comes in.
    """
    _, parts, size = shape
    fits = adds = False
    if table is not None and mixed.is_cuda:
        from glm45_tune.mcore.layers import kernels

        rotary, r = table.shape[-1], 0 if low_rank is None else low_rank.narrow.shape[1]
        fits, adds = kernels.has_heads(size, rotary), kernels.adds_to_heads(size, rotary, r)
    if low_rank is not None and not adds:
        mixed, low_rank = low_rank.add_to(mixed), None
    mixed = mixed.view(mixed.shape[0], *shape)
    if fits:
        return _SplitHeads.apply(mixed, table, parts - 2, *(low_rank or (None, None, 1.0)))
    query, key, value = mixed.split((parts - 2, 1, 1), dim=2)
    query, key, value = query.flatten(1, 2), key.squeeze(2), value.squeeze(2)
    return (query, key, value) if table is None else (rotate(query, table), rotate(key, table), value)


def packed_attention(query_THD, key_TGD, value_TGD, row: "PackedRow") -> torch.Tensor:
    """Causal attention inside each document of the row. Returns [T, H, D]."""
    if query_THD.is_cuda and query_THD.dtype == torch.bfloat16 and fast.has_flash_attention():
        edges, longest = row.cu_seqlens_q, row.max_seqlen_q
        return fast.flash_attention(query_THD, key_TGD, value_TGD, edges, edges, longest, longest)
    outputs = []
    with sdpa_kernel(
        [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
        set_priority=True,
    ):
        for first, last in zip(row.bounds, row.bounds[1:]):
            q, k, v = (x[first:last].transpose(0, 1).unsqueeze(0) for x in (query_THD, key_TGD, value_TGD))
            outputs.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


class Attention(MegatronModule):
    """GLM-4.5 attention in megatron's place for `self_attention`, with megatron's parameter names."""

    def __init__(self, config, layer_number, pg_collection, name=None, **_):
        super().__init__(config)
        self.layer_number = layer_number
        tp = pg_collection.tp.size()
        self.head_size = config.kv_channels
        self.num_groups = config.num_query_groups // tp
        self.heads_per_group = config.num_attention_heads // config.num_query_groups
        common = dict(config=config, skip_bias_add=False, is_expert=False, tp_group=pg_collection.tp)
        query_size = config.num_attention_heads * self.head_size
        self.linear_qkv = ColumnLinear(
            config.hidden_size,
            query_size + 2 * config.num_query_groups * self.head_size,
            init_method=config.init_method,
            bias=config.add_qkv_bias,
            gather_output=False,
            **common,
        )
        self.linear_proj = RowLinear(
            query_size,
            config.hidden_size,
            init_method=config.output_layer_init_method,
            bias=False,
            input_is_parallel=True,
            **common,
        )
        self.recompute = "core_attn" in (config.recompute_modules or [])
        self.ends_recompute = "attention" in (config.recompute_modules or [])
        norm = RMSNorm if config.qk_layernorm else _no_norm
        self.q_layernorm = norm(config=config, hidden_size=self.head_size, eps=config.layernorm_epsilon)
        self.k_layernorm = norm(config=config, hidden_size=self.head_size, eps=config.layernorm_epsilon)

    def forward(self, hidden_states, rotary_pos_emb, packed_seq_params: PackedSeqParams, **_):
        """[T (cut under sequence parallel), 1, hidden] → same. rotary_pos_emb: `rotary_table` of the whole row."""
        # asked here: a recompute within (core_attn) ends with megatron thinking all is over
        unread = is_unread(self.ends_recompute)
        mixed, low_rank = self.linear_qkv.in_parts(hidden_states)
        # each group's rows lie together: its query heads, its key, its value
        shape = self.num_groups, self.heads_per_group + 2, self.head_size
        if self.q_layernorm is None:
            query, key, value = split_heads(mixed, shape, rotary_pos_emb, low_rank)
        else:
            query, key, value = split_heads(mixed, shape, None, low_rank)
            query = rotate(self.q_layernorm(query), rotary_pos_emb)
            key = rotate(self.k_layernorm(key), rotary_pos_emb)
        attend = partial(packed_attention, row=packed_seq_params)
        if packed_seq_params.cache is not None:
            attend = partial(packed_seq_params.cache.attend, self.layer_number)
        elif packed_seq_params.share is not None:
            attend = partial(context_attention, share=packed_seq_params.share)
        if self.recompute and self.training:
            context = checkpoint(attend, False, query, key, value)
        else:
            context = attend(query, key, value)
        return self.linear_proj(context.reshape(context.shape[0], 1, -1), unread)


def _no_norm(**_):
    return None


class PackedRow(PackedSeqParams):
    """megatron's packed parameters with the document edges on the host too, so that no layer waits for the device.

    share: this context rank's part of the row, None where a rank has all of it; ahead: int64 [1 + MTP layers, T], the tokens
    1, 2, … places on from each position; cache: of a model that writes, the keys and values of what stands before.
    """

    def __init__(
        self,
        bounds: list[int],
        device: torch.device,
        share: Share | None = None,
        ahead: torch.Tensor | None = None,
        cache=None,
    ):
        edges = torch.tensor(bounds, dtype=torch.int32).to(device, non_blocking=True)
        longest = int(np.diff(bounds).max())
        super().__init__(
            qkv_format="thd", cu_seqlens_q=edges, cu_seqlens_kv=edges, max_seqlen_q=longest, max_seqlen_kv=longest
        )
        self.bounds, self.share, self.ahead, self.cache = bounds, share, ahead, cache

    @functools.cached_property
    def document(self) -> torch.Tensor:
        """int64 [T]: the document of each token."""
        lengths = np.diff(self.bounds)
        return torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)).to(
            self.cu_seqlens_q.device, non_blocking=True
        )

    @functools.cached_property
    def place(self) -> torch.Tensor:
        """int64 [T]: the place of each token in its document."""
        places = np.concatenate([np.arange(length) for length in np.diff(self.bounds)])
        return torch.from_numpy(places).to(self.cu_seqlens_q.device, non_blocking=True)
