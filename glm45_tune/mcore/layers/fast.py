"""Kernels of two libraries written for Hopper and later, where they are installed (the extra `fast`): `flash-attn-4`, `quack-kernels`.

Imported late: both compile for the card when they are first called.
"""

import functools

import torch


@functools.cache
def has_flash_attention() -> bool:
    """Whether FlashAttention-4 is installed. An older flash-attn has no `cute`."""
    try:
        import flash_attn.cute  # noqa: F401
    except ImportError:
        return False
    return True


def flash_attention(query, key, value, edges, key_edges, longest: int, longest_key: int) -> torch.Tensor:
    """Causal attention in bf16 of all documents of a row, whose queries are the last of their keys' positions.

    query [n, H, D]; key, value [S, G, D]; edges, key_edges: int32 [documents + 1] on the device; the longest document of each.
    Returns [n, H, D]; keeps it, what came in, and a number a query and head.
    """
    from flash_attn.cute import flash_attn_varlen_func

    return flash_attn_varlen_func(
        query, key, value, cu_seqlens_q=edges, cu_seqlens_k=key_edges, max_seqlen_q=longest, max_seqlen_k=longest_key,
        causal=True, deterministic=torch.are_deterministic_algorithms_enabled(),
    )[0]  # fmt: skip


@functools.cache
def quack_gemm(tile_m: int, tile_n: int, pingpong: bool, cluster_n: int, swap_ab: bool = False):
    """QuACK's GEMM by this tile; None where there is none or the card is no Hopper.

    The tiles below: of those tried, each the fastest or within 2 % of it on every shape of an Air expert and its LoRA pairs.
    """
    if torch.cuda.get_device_capability() != (9, 0):
        return None
    try:
        from quack.gemm_config import GemmConfig
        from quack.gemm_interface import gemm_tuned
    except ImportError:
        return None
    tile = GemmConfig(
        tile_m,
        tile_n,
        pingpong=pingpong,
        cluster_m=1,
        cluster_n=cluster_n,
        swap_ab=swap_ab,
        is_dynamic_persistent=False,
    )
    return functools.partial(gemm_tuned.fn, config=tile)


@functools.cache
def has_fp8() -> bool:
    """Whether the card multiplies in FP8 by row and column scales: Hopper and later."""
    return torch.cuda.get_device_capability() >= (9, 0)


@functools.cache
def _scaled_gemm():
    """QuACK's products with scales, see `scaled_gemm.py`; None where there is no QuACK or the card is not a Hopper."""
    if torch.cuda.get_device_capability() != (9, 0):
        return None
    try:
        from glm45_tune.mcore.layers import scaled_gemm
    except ImportError:
        return None
    return scaled_gemm


def fp8_product(q, scale, weight, columns, bias, dtype) -> torch.Tensor:
    """q e4m3 [N, A] with scale fp32 [N], weight e4m3 [B, A], columns fp32 [B] or None, bias [B] or None → [N, B], as `fp8.product`."""
    columns = scale.new_ones(1).expand(weight.shape[0]).contiguous() if columns is None else columns
    return torch._scaled_mm(
        q, weight.t(), scale.unsqueeze(1), columns.unsqueeze(0), bias, out_dtype=dtype, use_fast_accum=True
    )


def fp8_grouped_product(q, scale, weight, columns, edges, dtype) -> torch.Tensor:
    """q e4m3 [N, A] sorted by expert, scale fp32 [N], weight e4m3 [E, B, A], columns fp32 [E, B] or None → [N, B]."""
    gemm = _scaled_gemm()
    if gemm is not None:
        return gemm.grouped_product(q, scale, weight, columns, edges, dtype)
    ones = scale.new_ones(weight.shape[0], weight.shape[1]) if columns is None else columns
    return torch._scaled_grouped_mm(
        q, weight.transpose(1, 2), scale, ones, offs=edges[1:], out_dtype=dtype, use_fast_accum=True
    )


def _quack_narrow(columns: int, swap_ab: bool = False):
    """For the narrow side of a LoRA pair: one tile across, hardly wider than it is."""
    return quack_gemm(128, max(16, 1 << (columns - 1).bit_length()), True, 1, swap_ab)


def grouped_mm(x: torch.Tensor, weight: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
    """x bf16 [N, A] sorted by expert, weight [E, A, B], edges int32 [E + 1] → [N, B], each row times its expert's matrix.

    By QuACK on a Hopper card, whose tiles of 192 rows leave less of an expert's last tile empty than the 256 of torch's.
    """
    columns = weight.shape[2]
    # two tiles side by side share their rows, so that the experts' weights are read once for both
    gemm = _quack_narrow(columns) if columns <= 128 else quack_gemm(192, 128, True, 2)
    if gemm is None:
        return torch.nn.functional.grouped_mm(x, weight, offs=edges[1:])
    out = x.new_empty(x.shape[0], columns)
    gemm(x, weight, out, cu_seqlens_m=edges)
    return out


def grouped_add_(
    output: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, edges: torch.Tensor, scaling: float
) -> None:
    """Add scaling times that product to output [N, B]; by QuACK in one pass, else made apart first."""
    gemm = quack_gemm(128, 256, False, 1)
    if gemm is None:
        output.add_(torch.nn.functional.grouped_mm(x, weight, offs=edges[1:]), alpha=scaling)
    else:
        gemm(x, weight, output, C=output, alpha=scaling, cu_seqlens_m=edges)


def grouped_outer(x: torch.Tensor, y: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
    """x bf16 [N, A], y [N, B], both sorted by expert → [E, A, B], the sum over each expert's rows of xᵀ y."""
    narrow = min(x.shape[1], y.shape[1])
    gemm = _quack_narrow(narrow, swap_ab=narrow < y.shape[1]) if narrow <= 128 else quack_gemm(128, 192, True, 2)
    if gemm is None:
        return torch.nn.functional.grouped_mm(x.t(), y, offs=edges[1:])
    out = x.new_empty(len(edges) - 1, x.shape[1], y.shape[1])
    gemm(x.t(), y, out, cu_seqlens_k=edges)
    return out
