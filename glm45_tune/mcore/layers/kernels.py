"""Triton kernels for one NVIDIA card: each does in one pass over memory what plain torch does in several.

Every function here has a plain twin in the module that calls it, and a test in tests/gpu holds the two together. All compute
in fp32 and round once. Imported only where tensors live on a GPU.
"""

import torch
import triton
import triton.language as tl

WIDTH = 1024
"""Columns a program works on at a time."""
SMALLEST = tl.constexpr(2.0**-100)
"""See `fp8.SMALLEST`."""


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
    """Split and rotate the heads of mixed [T, G, heads + 2, D], a group's queries, its key and its value.

    mixed is contiguous. Returns the rotated query [T, G · heads, D], the rotated key and the value
    [T, G, D]. table: cos and sin, fp32 [2, T, 1, rotary dims]. With narrow [T, r] and lora_B [G ·
    (heads + 2) · D, r], both contiguous, of mixed + scaling · narrow · lora_Bᵀ.
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


ROWS = 8
"""Rows in succession that one program quantizes: those of one expert read its columns once."""


@triton.jit
def _quantize(
    x, columns, expert, slot, q, scale, rows, width: tl.constexpr, K: tl.constexpr, SPREAD: tl.constexpr,
    HAS_COLUMNS: tl.constexpr, HAS_EXPERT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    inside = column < width
    held = -1
    factors = tl.full((BLOCK,), 1.0, tl.float32)
    if HAS_COLUMNS and not HAS_EXPERT:
        factors = tl.load(columns + column, mask=inside, other=0.0)
    for number in range(ROWS):
        row = tl.program_id(0).to(tl.int64) * ROWS + number
        is_row = row < rows
        source = row
        if SPREAD:
            source = tl.load(slot + row, mask=is_row, other=0).to(tl.int64) // K
        values = tl.load(x + source * width + column, mask=inside & is_row, other=0.0).to(tl.float32)
        if HAS_EXPERT:
            own = tl.load(expert + row, mask=is_row, other=0).to(tl.int32)
            if own != held:
                factors = tl.load(columns + own.to(tl.int64) * width + column, mask=inside, other=0.0)
                held = own
        if HAS_COLUMNS:
            values *= factors
        values, factor = _to_fp8(values)
        tl.store(scale + row, factor, mask=is_row)
        tl.store(q + row * width + column, values.to(q.dtype.element_ty), mask=inside & is_row)


@triton.jit
def _greater(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _largest(values):
    """The largest magnitude of fp32 [BLOCK]; NaN where one is."""
    return tl.reduce(tl.abs(values), 0, _greater)


@triton.jit
def _factors(largest):
    """→ (448 over the largest magnitude of a row, its scale); NaN and infinity reach the scale."""
    is_zero = largest < SMALLEST
    return tl.where(is_zero, 1.0, tl.div_rn(448.0, largest)), tl.where(is_zero, 1.0, tl.div_rn(largest, 448.0))


@triton.jit
def _to_fp8(values):
    """A row fp32 [BLOCK] → (the row so scaled that its largest value is 448, its scale)."""
    inverse, scale = _factors(_largest(values))
    return values * inverse, scale


def _warps(block: int) -> int:
    return min(max(block // 1024, 1), 8)


def quantize_rows(
    x: torch.Tensor, columns: torch.Tensor | None = None, expert: torch.Tensor | None = None,
    slot: torch.Tensor | None = None, k: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """x [T, W] contiguous, fp32 columns [W] or [E, W], expert int [N] → (e4m3 [N, W], fp32 [N]), see `fp8.quantize_rows`.

    slot: int [N], row n is x[slot[n] // k] instead of x[n].
    """
    rows, width = x.shape[0] if slot is None else slot.numel(), x.shape[1]
    q = torch.empty(rows, width, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    if rows:
        block, together = triton.next_power_of_2(width), 1 if expert is None else ROWS
        _quantize[(triton.cdiv(rows, together),)](
            x, columns, expert, slot, q, scale, rows, width=width, K=k, SPREAD=slot is not None,
            HAS_COLUMNS=columns is not None, HAS_EXPERT=expert is not None, ROWS=together, BLOCK=block,
            num_warps=_warps(block),
        )  # fmt: skip
    return q, scale


@triton.jit
def _quantize_and_spread(x, place, q, scale, rows, width: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    values, factor = _to_fp8(tl.load(x + row * width + column, mask=inside, other=0.0).to(tl.float32))
    values = values.to(q.dtype.element_ty)
    for choice in tl.static_range(K):
        target = tl.load(place + row * K + choice).to(tl.int64)
        tl.store(scale + target, factor, mask=target < rows)
        tl.store(q + target * width + column, values, mask=inside & (target < rows))


def quantize_and_spread(x: torch.Tensor, place: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, W] contiguous, place as in `spread_rows` → its rows quantized, at each place: (e4m3 [rows, W], fp32 [rows])."""
    q = x.new_empty(rows, x.shape[1], dtype=torch.float8_e4m3fn)
    scale = x.new_empty(rows, dtype=torch.float32)
    if q.numel():
        block = triton.next_power_of_2(x.shape[1])
        _quantize_and_spread[(x.shape[0],)](
            x, place, q, scale, rows, width=x.shape[1], K=place.shape[1], BLOCK=block, num_warps=_warps(block)
        )
    return q, scale


@triton.jit
def _turn(source, target, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    matrix = tl.program_id(2).to(tl.int64) * rows * columns
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    values = tl.load(source + matrix + row.to(tl.int64)[:, None] * columns + column[None, :], mask=inside)
    at = target + matrix + column.to(tl.int64)[:, None] * rows + row[None, :]
    tl.store(at, tl.trans(values), mask=tl.trans(inside))


def turn(q: torch.Tensor, out: torch.Tensor) -> None:
    """Put the transposes of q, one-byte [E, A, B] contiguous, into out [E, B, A]."""
    experts, rows, columns = q.shape
    grid = (triton.cdiv(columns, 128), triton.cdiv(rows, 64), experts)
    _turn[grid](q.view(torch.uint8), out.view(torch.uint8), rows, columns, ROWS=64, COLUMNS=128, num_warps=8)


@triton.jit
def _cast(q, out, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    bits = tl.load(q + at, mask=at < size, other=0).to(tl.int32)
    # as fp32, e4m3's exponent and mantissa are those of the value times 2**-120, subnormals too: any card can do it
    values = (((bits & 0x80) << 24) | ((bits & 0x7F) << 20)).to(tl.float32, bitcast=True) * 2.0**120
    values = tl.where((bits & 0x7F) == 0x7F, float("nan"), values)
    tl.store(out + at, values.to(out.dtype.element_ty), mask=at < size)


def cast(q: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """e4m3, contiguous, of any shape → the same values in dtype."""
    out = torch.empty_like(q, dtype=dtype)
    _cast[(triton.cdiv(q.numel(), 4096),)](q.view(torch.uint8), out, q.numel(), BLOCK=4096, num_warps=8)
    return out


@triton.jit
def _scale_columns(x, columns, expert, out, width, HAS_EXPERT: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    if HAS_EXPERT:
        columns += tl.load(expert + row).to(tl.int64) * width
    values = tl.load(x + row * width + column, mask=inside, other=0.0).to(tl.float32)
    values *= tl.load(columns + column, mask=inside, other=0.0)
    tl.store(out + row * width + column, values.to(out.dtype.element_ty), mask=inside)


def scale_columns(x: torch.Tensor, columns: torch.Tensor, expert: torch.Tensor | None = None) -> torch.Tensor:
    """x [N, W] contiguous times fp32 columns [W], or columns [E, W] of each row's expert int [N] → [N, W] in x's dtype."""
    out = torch.empty_like(x)
    if x.numel():
        grid = (x.shape[0], triton.cdiv(x.shape[1], WIDTH))
        _scale_columns[grid](x, columns, expert, out, x.shape[1], HAS_EXPERT=expert is not None, BLOCK=WIDTH)
    return out


@triton.jit
def _swiglu_fp8(gate_up, weights, out, q, scale, width: tl.constexpr, KEEP: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    at = gate_up + row * 2 * width + column
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + width, mask=inside, other=0.0).to(tl.float32)
    value = (gate * tl.sigmoid(gate) * up * tl.load(weights + row).to(tl.float32)).to(gate_up.dtype.element_ty)
    if KEEP:
        tl.store(out + row * width + column, value, mask=inside)
    values, factor = _to_fp8(value.to(tl.float32))
    tl.store(scale + row, factor)
    tl.store(q + row * width + column, values.to(q.dtype.element_ty), mask=inside)


def swiglu_fp8(
    gate_up: torch.Tensor, weights: torch.Tensor, keep: bool
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """`swiglu` and the rows of what it gives in FP8 → (its value if it is to be kept, e4m3 [N, F], fp32 [N])."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, width) if keep else None
    q = gate_up.new_empty(rows, width, dtype=torch.float8_e4m3fn)
    scale = gate_up.new_empty(rows, dtype=torch.float32)
    if rows:
        block = triton.next_power_of_2(width)
        _swiglu_fp8[(rows,)](
            gate_up, weights, out, q, scale, width=width, KEEP=keep, BLOCK=block, num_warps=_warps(block // 2)
        )
    return out, q, scale


@triton.jit
def _swiglu_back(
    gate_up, gradient, columns, factor, out, again, row, first: tl.constexpr, width: tl.constexpr,
    KEEP: tl.constexpr, AGAIN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """From column `first` on → (gradients of gate and up times their columns, what of the row's weight's gradient is here)."""
    kind = gate_up.dtype.element_ty
    column = first + tl.arange(0, BLOCK)
    inside = column < width
    at = row * 2 * width + column
    gate = tl.load(gate_up + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + at + width, mask=inside, other=0.0).to(tl.float32)
    upstream = tl.load(gradient + row * width + column, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    total = tl.sum(upstream * silu * up, 0)
    if AGAIN:
        tl.store(again + row * width + column, (silu * up * factor).to(kind), mask=inside)
    upstream *= factor
    gate_out = (upstream * up * (sigmoid + silu * (1.0 - sigmoid))).to(kind)
    up_out = (upstream * silu).to(kind)
    if KEEP:
        tl.store(out + at, gate_out, mask=inside)
        tl.store(out + at + width, up_out, mask=inside)
    gate_out = gate_out.to(tl.float32) * tl.load(columns + column, mask=inside, other=0.0)
    up_out = up_out.to(tl.float32) * tl.load(columns + width + column, mask=inside, other=0.0)
    return gate_out, up_out, total


@triton.jit
def _swiglu_backward_fp8(
    gate_up, weights, gradient, columns, expert, out, weights_out, again, q, scale, width: tl.constexpr,
    KEEP: tl.constexpr, AGAIN: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    # a row in two powers of two, such as 1024 + 512 for 1408: in one of 2048 a third of the lanes would idle
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(weights + row).to(tl.float32)
    columns += tl.load(expert + row).to(tl.int64) * 2 * width
    gate, up, total = _swiglu_back(gate_up, gradient, columns, factor, out, again, row, 0, width, KEEP, AGAIN, BLOCK)
    largest = _greater(_largest(gate), _largest(up))
    if REST > 0:
        gate_rest, up_rest, total_rest = _swiglu_back(
            gate_up, gradient, columns, factor, out, again, row, BLOCK, width, KEEP, AGAIN, REST
        )
        largest = _greater(largest, _greater(_largest(gate_rest), _largest(up_rest)))
        total += total_rest
    tl.store(weights_out + row, total)
    inverse, row_scale = _factors(largest)
    tl.store(scale + row, row_scale)
    column = tl.arange(0, BLOCK)
    at = q + row * 2 * width + column
    tl.store(at, (gate * inverse).to(q.dtype.element_ty), mask=column < width)
    tl.store(at + width, (up * inverse).to(q.dtype.element_ty), mask=column < width)
    if REST > 0:
        column = BLOCK + tl.arange(0, REST)
        at = q + row * 2 * width + column
        tl.store(at, (gate_rest * inverse).to(q.dtype.element_ty), mask=column < width)
        tl.store(at + width, (up_rest * inverse).to(q.dtype.element_ty), mask=column < width)


def swiglu_backward_fp8(
    gate_up: torch.Tensor, weights: torch.Tensor, gradient: torch.Tensor, columns: torch.Tensor, expert: torch.Tensor,
    keep: bool, again: bool,
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:  # fmt: skip
    """`swiglu_backward`, and the rows of gate_up's gradient times columns [E, 2F] of each row's expert in FP8.

    → (that gradient if it is to be kept, of weights, the forward's value once more if asked, e4m3 [N, 2F], fp32 [N]).
    """
    rows, width = gradient.shape
    out = torch.empty_like(gate_up) if keep else None
    weights_out = weights.new_empty(rows, dtype=torch.float32)
    value = torch.empty_like(gradient) if again else None
    q = gate_up.new_empty(rows, 2 * width, dtype=torch.float8_e4m3fn)
    scale = gate_up.new_empty(rows, dtype=torch.float32)
    if rows:
        block = triton.next_power_of_2(width + 1) // 2  # the largest that is not more
        rest = triton.next_power_of_2(width - block) if width > block else 0
        _swiglu_backward_fp8[(rows,)](
            gate_up, weights, gradient, columns, expert, out, weights_out, value, q, scale,
            width=width, KEEP=keep, AGAIN=again, BLOCK=block, REST=rest, num_warps=_warps(4 * block),
        )  # fmt: skip
    return out, weights_out, value, q, scale
