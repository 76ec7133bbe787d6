"""FP8 for frozen weights: how rows are quantized and what a product of them is, in plain torch. Kernels are held to it.

A value is q · scale with q in e4m3, which has 3 bits of mantissa and reaches 448. A weight has a scale an output channel, taken once
(conversion/fp8.py); activations and gradients have a scale a row (a token), taken anew each time.
"""

from itertools import pairwise
from typing import NamedTuple

import torch

from glm45_tune.mcore.layers import fast
from glm45_tune.mcore.layers.rows import Plan, spread

FP8 = torch.float8_e4m3fn
LARGEST = 448.0
SMALLEST = 2.0**-100
"""A row whose largest value is below counts as zero, so that no reciprocal overflows."""


class Rows(NamedTuple):
    """Rows in FP8. q: e4m3 [..., N, W]; scale: fp32 [..., N]."""

    q: torch.Tensor
    scale: torch.Tensor


def quantize_rows(x: torch.Tensor, columns: torch.Tensor | None = None) -> Rows:
    """x [..., N, W], times fp32 columns [W] unless they are None → its rows in FP8.

    scale = largest magnitude / 448, or 1 for a row of zeros; q = x · (448 / largest magnitude), rounded to the nearest, ties to even:
    nothing saturates. The scale of a row with a NaN or an infinity is NaN or infinite, and so is what is made of the row.
    """
    if x.is_cuda and x.dim() == 2:
        from glm45_tune.mcore.layers import kernels

        return Rows(*kernels.quantize_rows(x.contiguous(), columns))
    x = x.float() if columns is None else x * columns
    largest = x.abs().amax(-1)
    is_zero = largest < SMALLEST  # False for NaN
    q = (x * torch.where(is_zero, 1.0, LARGEST / largest).unsqueeze(-1)).to(FP8)
    return Rows(q, torch.where(is_zero, 1.0, largest / LARGEST))


def dequantize_rows(rows: Rows, dtype: torch.dtype) -> torch.Tensor:
    """What the rows stand for, rounded to dtype."""
    return (rows.q.float() * rows.scale.unsqueeze(-1)).to(dtype)


def quantize_and_spread(x: torch.Tensor, plan: Plan) -> Rows:
    """x [T, W] → [N, W]: each token quantized once, its row at every place it has."""
    if x.is_cuda:
        from glm45_tune.mcore.layers import kernels

        return Rows(*kernels.quantize_and_spread(x.contiguous(), plan.place, plan.slot.numel()))
    rows, token = quantize_rows(x), plan.slot // plan.place.shape[1]
    return Rows(rows.q[token], rows.scale[token])


def spread_bytes(q: torch.Tensor, plan: Plan) -> torch.Tensor:
    """q e4m3 [T, W] → [N, W], each token's row at every place it has."""
    if q.is_cuda and q.shape[1] % 4 == 0:  # four at a time
        return spread(q.view(torch.int32), plan).view(FP8)
    return spread(q.view(torch.uint8), plan).view(FP8)


def spread_and_quantize(x: torch.Tensor, columns: torch.Tensor, plan: Plan) -> Rows:
    """x [T, W] → [N, W]: each token's row at every place it has, there times columns [E, W] of the place's expert, quantized."""
    if x.is_cuda:
        from glm45_tune.mcore.layers import kernels

        return Rows(*kernels.quantize_rows(x.contiguous(), columns, plan.expert, plan.slot, plan.place.shape[1]))
    return quantize_rows(x[plan.slot // plan.place.shape[1]], columns[plan.expert])


def _by_kernel(q: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether the card's FP8 products take them: a Hopper or later, bf16 out, rows of whole 16-byte words, something to do."""
    if not (q.is_cuda and dtype == torch.bfloat16 and fast.has_fp8() and q.shape[0]):
        return False
    return all(size % 16 == 0 for size in weight.shape[-2:])


def product(
    x: Rows, weight: torch.Tensor, columns: torch.Tensor | None, bias: torch.Tensor | None, dtype
) -> torch.Tensor:
    """x [N, A], weight e4m3 [B, A], fp32 columns [B] or None for ones, bias [B] or None → [N, B] in dtype.

    Summed in fp32, times the row's scale, times the column's, the bias added, and rounded once.
    """
    if _by_kernel(x.q, weight, dtype):
        return fast.fp8_product(*x, weight, columns, bias, dtype)
    y = (x.q.float() @ weight.float().t()) * x.scale.unsqueeze(1)
    y = y if columns is None else y * columns
    return (y if bias is None else y + bias.float()).to(dtype)


def grouped_product(
    x: Rows, weight: torch.Tensor, columns: torch.Tensor | None, edges: torch.Tensor, dtype
) -> torch.Tensor:
    """x [N, A] sorted by expert, weight [E, B, A], columns [E, B] or None → [N, B], each row times its expert's matrix."""
    if _by_kernel(x.q, weight, dtype):
        return fast.fp8_grouped_product(*x, weight, columns, edges, dtype)
    spans = pairwise(edges.tolist())
    scales = columns if columns is not None else [None] * len(weight)
    return torch.cat(
        [product(Rows(x.q[a:b], x.scale[a:b]), w, c, None, dtype) for (a, b), w, c in zip(spans, weight, scales)]
    )


_turned: dict[torch.device, torch.Tensor] = {}
"""One buffer a device."""


def turned(weight: torch.Tensor) -> torch.Tensor:
    """weight e4m3 [..., B, A] → [..., A, B], contiguous where the card needs it: in one buffer that the next call overwrites."""
    if not weight.is_cuda:
        return weight.transpose(-1, -2)
    from glm45_tune.mcore.layers import kernels

    if weight.device not in _turned or _turned[weight.device].numel() < weight.numel():
        _turned[weight.device] = weight.new_empty(weight.numel())
    *stack, rows, columns = weight.shape
    out = _turned[weight.device][: weight.numel()].view(*stack, columns, rows)
    kernels.turn(weight.view(-1, rows, columns), out)
    return out
