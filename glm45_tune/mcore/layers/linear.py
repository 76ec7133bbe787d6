"""megatron's tensor-parallel linears with room for a LoRA adapter beside the weight."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
    reduce_scatter_to_sequence_parallel_region,
)

from glm45_tune.mcore.layers import weight
from glm45_tune.mcore.layers.fp8 import FP8
from glm45_tune.mcore.layers.weight import Plain, hold_fp8


class LowRank(NamedTuple):
    """What an adapter adds to a linear's output [T, out]: scaling · narrow · lora_Bᵀ; narrow [T, r], lora_B [out, r]."""

    narrow: torch.Tensor
    lora_B: torch.Tensor
    scaling: float

    def add_to(self, output: torch.Tensor, unread: bool = False) -> torch.Tensor:
        """In place, by a product of its own; unread: nothing is added, see `recompute.py`."""
        return _Add.apply(output, *self, unread)

    def backward(self, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradient of the output [T, out] → gradients of narrow and lora_B."""
        return (gradient @ self.lora_B).mul_(self.scaling), (gradient.t() @ self.narrow).mul_(self.scaling)


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx, output, narrow, lora_B, scaling, unread):
        ctx.mark_dirty(output)
        ctx.save_for_backward(narrow, lora_B)
        ctx.scaling = scaling
        return output if unread else output.addmm_(narrow, lora_B.t(), alpha=scaling)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, *LowRank(*ctx.saved_tensors, ctx.scaling).backward(gradient), None, None


class _Frozen(torch.autograd.Function):
    """x [T, in] → (x · weightᵀ + bias, dropout(x) · lora_Aᵀ or None); the weight and bias are frozen.

    Kept for the backward: x, for lora_A's gradient alone. weight: as `weight.of` gives it; lora_A
    [r, in] or None; unread: zeros in place of the first, see `recompute.py`.
    """

    @staticmethod
    def forward(ctx, x, weight: Plain, bias, lora_A, dropout, unread):
        dropped, mask = (x, None) if dropout == 0 else torch.native_dropout(x, dropout, True)
        ctx.save_for_backward(None if lora_A is None else x, lora_A, mask)
        ctx.weight, ctx.keep = weight, 1 - dropout
        output = x.new_zeros(x.shape[0], weight.value.shape[0]) if unread else weight.product(x, bias)
        return output, None if lora_A is None else F.linear(dropped, lora_A)

    @staticmethod
    def backward(ctx, gradient, narrow_out):
        x, lora_A, mask = ctx.saved_tensors
        x_out = ctx.weight.input_gradient(gradient)
        if lora_A is None:
            return x_out, None, None, None, None, None
        if mask is None:
            x_out.addmm_(narrow_out, lora_A)
        else:
            x = torch.ops.aten.native_dropout_backward(x, mask, 1 / ctx.keep)
            x_out += torch.ops.aten.native_dropout_backward(narrow_out @ lora_A, mask, 1 / ctx.keep)
        return x_out, None, None, narrow_out.t() @ x, None, None


class _Unread(torch.autograd.Function):
    """Zeros for x [T, in] · weightᵀ, with the product's backward."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return x.new_zeros(x.shape[0], weight.shape[0])

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        return gradient @ weight, None if x is None else gradient.t() @ x


class _UnreadScatter(torch.autograd.Function):
    """Zeros for the sums of x [T, …] over the tensor ranks, cut over them, with the backward of that."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.new_zeros(x.shape[0] // group.size(), *x.shape[1:])

    @staticmethod
    def backward(ctx, gradient):
        return gather_from_sequence_parallel_region(gradient, group=ctx.group), None


class _WithAdapter:
    """A linear that may have an adapter, and whose weight may be a frozen one in FP8. Parameter names of the base never change."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_module("adapter", None)
        if self.config.frozen_dtype == "fp8":
            hold_fp8(self, tuple(self.weight.shape), self.config)

    @property
    def is_plain(self) -> bool:
        """Whether megatron's own forward will do."""
        return self.adapter is None and self.weight.dtype != FP8

    def in_parts(self, x: torch.Tensor, unread: bool = False) -> tuple[torch.Tensor, LowRank | None]:
        """x [T, 1, in] as this rank's weight takes it → the base's [T, out] and what the adapter adds, before any sum over ranks.

        unread: zeros for the base's, see `recompute.py`.
        """
        adapter, x = self.adapter, x.flatten(0, 1)
        if adapter is None or not adapter.enabled:
            return _Frozen.apply(x, weight.of(self), self.bias, None, 0.0, unread)[0], None
        lora_A, lora_B = adapter.factors()
        dropout = adapter.dropout if self.training else 0.0
        output, narrow = _Frozen.apply(x, weight.of(self), self.bias, lora_A, dropout, unread)
        return output, LowRank(narrow, lora_B, adapter.scaling)

    def with_lora(self, x: torch.Tensor, unread: bool = False) -> torch.Tensor:
        """The same added, [T, 1, out]."""
        output, low_rank = self.in_parts(x, unread)
        return (output if low_rank is None else low_rank.add_to(output, unread)).unsqueeze(1)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        adapter, self.adapter = self.adapter, None  # its tensors have layouts of their own
        sharded = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        self.adapter = adapter
        if adapter is not None:
            sharded.update(adapter.sharded_state_dict(f"{prefix}adapter.", sharded_offsets, metadata))
        return sharded


class ColumnLinear(_WithAdapter, ColumnParallelLinear):
    """Output dim cut over the tensor ranks. [T, 1, in] → ([T, 1, out / tp], None); gathers a sequence-cut input."""

    def forward(self, x: torch.Tensor, *args, **kwargs):
        if self.is_plain:
            return super().forward(x, *args, **kwargs)
        return self.with_lora(x), None

    def in_parts(self, x: torch.Tensor, unread: bool = False) -> tuple[torch.Tensor, LowRank | None]:
        if self.is_plain:
            return super().forward(x)[0].flatten(0, 1), None
        if self.sequence_parallel:
            x = gather_from_sequence_parallel_region(x, group=self.tp_group)
        return super().in_parts(x, unread)


class RowLinear(_WithAdapter, RowParallelLinear):
    """Input dim cut over the tensor ranks. [T, 1, in / tp] → ([T, 1, out], None); scatters over the sequence again."""

    def forward(self, x: torch.Tensor, unread: bool = False):
        """unread: zeros will do, see `recompute.py`."""
        if self.is_plain and not unread:
            return super().forward(x)
        if self.is_plain:
            output = _Unread.apply(x.flatten(0, 1), self.weight).unsqueeze(1)
        elif not self.sequence_parallel:
            return self.with_lora(x, unread), None
        else:
            with get_cuda_rng_tracker().fork():  # each tensor rank drops its own part of the input
                output = self.with_lora(x, unread)
        if not self.sequence_parallel:
            return output, None
        scatter = _UnreadScatter.apply if unread else reduce_scatter_to_sequence_parallel_region
        return scatter(output, self.tp_group), None
