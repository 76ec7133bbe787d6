"""Kernels of two libraries written for Hopper and later, where they are installed (the extra `fast`): `flash-attn-4`, `quack-kernels`.

Imported late: both compile for the card when they are first called.
"""

import functools
import warnings

import torch


@functools.cache
def has_flash_attention() -> bool:
    """Whether FlashAttention-4 is installed. An older flash-attn has no `cute`."""
    try:
        import flash_attn.cute  # noqa: F401
    except ImportError:
        return False
    warnings.filterwarnings("ignore", "Argument aux_data")  # the compiler, of an argument that is not used
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
def _grouped_gemm():
    """QuACK's GEMM with the tile that was best or within 1 % of it for every product of an Air expert; None where there is none."""
    if torch.cuda.get_device_capability() != (9, 0):
        return None
    try:
        from quack.gemm_config import GemmConfig
        from quack.gemm_interface import gemm_tuned
    except ImportError:
        return None
    # two tiles side by side share their rows, so that the experts' weights are read once for both
    tile = GemmConfig(tile_m=192, tile_n=128, pingpong=True, cluster_m=1, cluster_n=2, is_dynamic_persistent=False)
    return functools.partial(gemm_tuned.fn, config=tile)


def grouped_mm(x: torch.Tensor, weight: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
    """x bf16 [N, A] sorted by expert, weight [E, A, B], edges int32 [E + 1] → [N, B], each row times its expert's matrix.

    By QuACK on a Hopper card, whose tiles of 192 rows leave less of an expert's last tile empty than the 256 of torch's.
    """
    gemm = _grouped_gemm()
    if gemm is None:
        return torch.nn.functional.grouped_mm(x, weight, offs=edges[1:])
    out = x.new_empty(x.shape[0], weight.shape[2])
    gemm(x, weight, out, cu_seqlens_m=edges)
    return out
