"""Triton kernels for one NVIDIA card: each does in one pass over memory what plain torch does in several.

Every function here has a plain twin in the module that calls it, and a test in tests/gpu holds the two together. All compute
in fp32 and round once. Imported only where tensors live on a GPU.
"""

import torch
import triton
import triton.language as tl

WIDTH = 1024
"""Columns a program works on at a time."""


@triton.jit
def _spread(x, place, out, rows, width, K: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + row * width + column, mask=column < width)
    for choice in tl.static_range(K):
        target = tl.load(place + row * K + choice).to(tl.int64)
        tl.store(out + target * width + column, values, mask=(column < width) & (target < rows))


def spread_rows(x: torch.Tensor, place: torch.Tensor, rows: int) -> torch.Tensor:
    """x [T, W] contiguous, place int [T, K], each of 0 … rows − 1 once, the others more → out [rows, W], out[place[t, k]] = x[t]."""
    out = x.new_empty(rows, x.shape[1])
    if out.numel():
        grid = (x.shape[0], triton.cdiv(x.shape[1], WIDTH))
        _spread[grid](x, place, out, rows, x.shape[1], K=place.shape[1], BLOCK=WIDTH)
    return out


@triton.jit
def _sum(y, index, more, out, rows, width, K: tl.constexpr, HAS_MORE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    if HAS_MORE:
        total += tl.load(more + row * width + column, mask=column < width, other=0.0).to(tl.float32)
    for place in tl.static_range(K):
        source = tl.load(index + row * K + place).to(tl.int64)
        total += tl.load(y + source * width + column, mask=(column < width) & (source < rows), other=0.0).to(tl.float32)
    tl.store(out + row * width + column, total.to(out.dtype.element_ty), mask=column < width)


def sum_rows(y: torch.Tensor, index: torch.Tensor, more: torch.Tensor | None = None) -> torch.Tensor:
    """y [N, W] and more [T, W] or None, contiguous; index int [T, K] → y[index].sum(1) + more, [T, W], summed in fp32.

    An index of N or more adds nothing.
    """
    out = y.new_empty(index.shape[0], y.shape[1])
    if out.numel():
        grid = (out.shape[0], triton.cdiv(y.shape[1], WIDTH))
        _sum[grid](y, index, more, out, *y.shape, K=index.shape[1], HAS_MORE=more is not None, BLOCK=WIDTH)
    return out


@triton.jit
def _norm(x, weight, out, scale, eps, width: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    values = tl.load(x + row * width + column, mask=inside, other=0.0).to(tl.float32)
    factor = tl.rsqrt(tl.sum(values * values, 0) / width + eps)
    tl.store(scale + row, factor)
    values *= factor * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, values.to(out.dtype.element_ty), mask=inside)


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, W] contiguous → (x / rms(x) · weight in x's dtype, 1 / rms(x) fp32 [T])."""
    out, scale = torch.empty_like(x), torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(x.shape[1])
    _norm[(x.shape[0],)](x, weight, out, scale, eps, width=x.shape[1], BLOCK=block, num_warps=8)
    return out, scale


@triton.jit
def _norm_backward(gradient, more, x, weight, scale, out, width: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    at = row * width + column
    factor = tl.load(scale + row)
    values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * factor
    upstream = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
    upstream *= tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    total = (upstream - values * (tl.sum(upstream * values, 0) / width)) * factor
    total += tl.load(more + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


def norm_backward(
    gradient: torch.Tensor, more: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """Gradient of x through the norm, plus more; all [T, W] contiguous but weight [W] and scale fp32 [T]."""
    out = torch.empty_like(x)
    block = triton.next_power_of_2(x.shape[1])
    _norm_backward[(x.shape[0],)](gradient, more, x, weight, scale, out, width=x.shape[1], BLOCK=block, num_warps=8)
    return out


@triton.jit
def _swiglu(gate_up, scale, out, width, HAS_SCALE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = gate_up + row * 2 * width + column
    gate = tl.load(at, mask=column < width, other=0.0).to(tl.float32)
    up = tl.load(at + width, mask=column < width, other=0.0).to(tl.float32)
    value = gate * tl.sigmoid(gate) * up
    if HAS_SCALE:
        value *= tl.load(scale + row).to(tl.float32)
    tl.store(out + row * width + column, value.to(out.dtype.element_ty), mask=column < width)


def swiglu(gate_up: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """silu(gate) · up · scale: gate_up [N, 2F] contiguous, scale [N] or None → [N, F]."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, width)
    if rows:
        block = 512
        _swiglu[(rows, triton.cdiv(width, block))](
            gate_up, scale, out, width, HAS_SCALE=scale is not None, BLOCK=block, num_warps=2
        )
    return out


@triton.jit
def _swiglu_backward(
    gate_up, scale, gradient, out, scale_out, again, width: tl.constexpr,
    HAS_SCALE: tl.constexpr, AGAIN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    factor = 1.0
    if HAS_SCALE:
        factor = tl.load(scale + row).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < width
        at = row * 2 * width + column
        gate = tl.load(gate_up + at, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gate_up + at + width, mask=inside, other=0.0).to(tl.float32)
        upstream = tl.load(gradient + row * width + column, mask=inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        total += upstream * silu * up
        if AGAIN:
            tl.store(again + row * width + column, (silu * up * factor).to(again.dtype.element_ty), mask=inside)
        upstream *= factor
        gate_out = upstream * up * (sigmoid + silu * (1.0 - sigmoid))
        tl.store(out + at, gate_out.to(out.dtype.element_ty), mask=inside)
        tl.store(out + at + width, (upstream * silu).to(out.dtype.element_ty), mask=inside)
    if HAS_SCALE:
        tl.store(scale_out + row, tl.sum(total, 0))


def swiglu_backward(
    gate_up: torch.Tensor, scale: torch.Tensor | None, gradient: torch.Tensor, again: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """→ (gradient of gate_up, of scale in fp32 or None, and with `again` the forward's value once more, else None)."""
    rows, width = gradient.shape
    out = torch.empty_like(gate_up)
    scale_out = None if scale is None else scale.new_empty(rows, dtype=torch.float32)
    value = torch.empty_like(gradient) if again else None
    if rows:
        _swiglu_backward[(rows,)](
            gate_up, scale, gradient, out, scale_out, value, width,
            HAS_SCALE=scale is not None, AGAIN=again, BLOCK=1024,
        )  # fmt: skip
    return out, scale_out, value


@triton.jit
def _more(narrow, lora_B, scaling, first, N: tl.constexpr, R: tl.constexpr, RANK: tl.constexpr):
    """scaling · narrow [BLOCK, RANK] · lora_B[first : first + N]ᵀ, fp32."""
    row, rank = first + tl.arange(0, N)[:, None], tl.arange(0, RANK)[None, :]
    factor = tl.load(lora_B + row * R + rank, mask=rank < R, other=0.0)
    return scaling * tl.dot(narrow, tl.trans(factor), input_precision="ieee")


@triton.jit
def _heads(
    mixed, query, key, value, cos, sin, sign, narrow, lora_B, scaling, tokens,
    GROUPS: tl.constexpr, PER_GROUP: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
    R: tl.constexpr, RANK: tl.constexpr, JOIN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # neighbouring programs have neighbouring heads of the same tokens: neighbours in memory
    SIZE: tl.constexpr = 2 * HALF + REST
    head = tl.program_id(0)
    token = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[:, None]).to(tl.int64)
    inside = token < tokens
    group, place = head // (PER_GROUP + 2), head % (PER_GROUP + 2)
    own, pitch = value + group * SIZE, GROUPS * SIZE
    if place < PER_GROUP:
        own, pitch = query + (group * PER_GROUP + place) * SIZE, GROUPS * PER_GROUP * SIZE
    elif place == PER_GROUP:
        own = key + group * SIZE
    own += token * pitch
    at = mixed + token * GROUPS * (PER_GROUP + 2) * SIZE + head * SIZE
    source, target = (own, at) if JOIN else (at, own)
    low, high, rest = (
        tl.arange(0, HALF)[None, :],
        HALF + tl.arange(0, HALF)[None, :],
        2 * HALF + tl.arange(0, REST)[None, :],
    )
    a = tl.load(source + low, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(source + high, mask=inside, other=0.0).to(tl.float32)
    c = tl.load(source + rest, mask=inside, other=0.0).to(tl.float32)
    if RANK > 0:
        rank = tl.arange(0, RANK)[None, :]
        few = tl.load(narrow + token * R + rank, mask=inside & (rank < R), other=0.0)
        a += _more(few, lora_B, scaling, head * SIZE, HALF, R, RANK)
        b += _more(few, lora_B, scaling, head * SIZE + HALF, HALF, R, RANK)
        c += _more(few, lora_B, scaling, head * SIZE + 2 * HALF, REST, R, RANK)
    if place <= PER_GROUP:
        across = tl.load(cos + token * 2 * HALF + low, mask=inside, other=0.0)
        along = tl.load(sin + token * 2 * HALF + low, mask=inside, other=0.0) * sign
        a, b = a * across - b * along, b * across + a * along
    kind = mixed.dtype.element_ty
    tl.store(target + low, a.to(kind), mask=inside)
    tl.store(target + high, b.to(kind), mask=inside)
    tl.store(target + rest, c.to(kind), mask=inside)


def has_heads(size: int, rotary: int) -> bool:
    """Whether `split_heads` and `join_heads` take heads of this size, of which the first `rotary` dims turn."""
    parts = rotary // 2, size - rotary
    return all(part > 0 and part & (part - 1) == 0 for part in parts)


def adds_to_heads(size: int, rotary: int, r: int) -> bool:
    """Whether `split_heads` takes low-rank factors as well: a block's smallest side is 16, and it holds all r columns at once."""
    return has_heads(size, rotary) and min(rotary // 2, size - rotary) >= 16 and r <= 64


def split_heads(
    mixed: torch.Tensor, table: torch.Tensor, heads: int, narrow=None, lora_B=None, scaling: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """mixed [T, G, heads + 2, D] contiguous (a group's queries, its key, its value) → rotated query [T, G · heads, D], rotated key

    and value [T, G, D]. table: cos and sin, fp32 [2, T, 1, rotary dims]. With narrow [T, r] and lora_B [G · (heads + 2) · D, r], both
    contiguous, of mixed + scaling · narrow · lora_Bᵀ.
    """
    tokens, groups, _, size = mixed.shape
    query = mixed.new_empty(tokens, groups * heads, size)
    key, value = mixed.new_empty(2, tokens, groups, size)
    _launch_heads(mixed, query, key, value, table, heads, 1.0, False, narrow, lora_B, scaling)
    return query, key, value


def join_heads(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, table: torch.Tensor, heads: int
) -> torch.Tensor:
    """The transpose of `split_heads`: gradients of query, key and value → gradient of mixed."""
    tokens, groups, size = key.shape
    mixed = query.new_empty(tokens, groups, heads + 2, size)
    _launch_heads(mixed, query.contiguous(), key.contiguous(), value.contiguous(), table, heads, -1.0, True)
    return mixed


def _launch_heads(mixed, query, key, value, table, heads, sign, join, narrow=None, lora_B=None, scaling=1.0):
    tokens, groups, _, size = mixed.shape
    rotary, r = table.shape[-1], 0 if narrow is None else narrow.shape[1]
    block = 64
    _heads[(groups * (heads + 2), triton.cdiv(tokens, block))](
        mixed, query, key, value, table[0], table[1], sign, narrow, lora_B, scaling, tokens,
        GROUPS=groups, PER_GROUP=heads, HALF=rotary // 2, REST=size - rotary,
        R=r, RANK=max(16, triton.next_power_of_2(r)) if r else 0, JOIN=join, BLOCK=block,
    )  # fmt: skip


@triton.jit
def _row_sums(logits, labels, lse, target, words: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = logits + row * words
    highest, total = float("-inf"), 0.0
    for first in range(0, words, BLOCK):
        column = first + tl.arange(0, BLOCK)
        values = tl.load(at + column, mask=column < words, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(highest, tl.max(values, 0))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(values - higher), 0)
        highest = higher
    tl.store(lse + row, highest + tl.log(total))
    label = tl.load(labels + row)
    ours = (label >= 0) & (label < words)
    tl.store(target + row, tl.load(at + label, mask=ours, other=0.0).to(tl.float32))


def row_sums(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [N, V], labels int64 [N] → fp32 (logsumexp of each row, its label's logit or 0 where the label is outside [0, V))."""
    lse, target = torch.empty(2, logits.shape[0], dtype=torch.float32, device=logits.device)
    _row_sums[(logits.shape[0],)](logits, labels, lse, target, logits.shape[1], BLOCK=4096, num_warps=8)
    return lse, target


@triton.jit
def _softmax_gradient(logits, labels, lse, scale, words, HAS_SCALE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = logits + row * words + column
    values = tl.load(at, mask=column < words, other=0.0).to(tl.float32)
    values = tl.exp(values - tl.load(lse + row)) - (column == tl.load(labels + row)).to(tl.float32)
    if HAS_SCALE:
        values *= tl.load(scale + row)
    tl.store(at, values.to(logits.dtype.element_ty), mask=column < words)


def softmax_gradient_(
    logits: torch.Tensor, labels: torch.Tensor, lse: torch.Tensor, scale: torch.Tensor | None
) -> None:
    """Put (softmax − one-hot of the label) · scale in the place of logits [N, V]; lse, scale: fp32 [N]."""
    words = logits.shape[1]
    grid = (logits.shape[0], triton.cdiv(words, 4096))
    _softmax_gradient[grid](logits, labels, lse, scale, words, HAS_SCALE=scale is not None, BLOCK=4096, num_warps=8)
