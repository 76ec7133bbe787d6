"""megatron's tensor-parallel linears with room for a LoRA adapter beside the weight."""

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
    reduce_scatter_to_sequence_parallel_region,
)


class _LoraLinear(torch.autograd.Function):
    """x [T, in] → x · weightᵀ + bias + scaling · dropout(x) · lora_Aᵀ · lora_Bᵀ; the weight and bias are frozen.

    The second product is added by its own GEMM, in place. Kept for the backward: x and the narrow product.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, lora_A, lora_B, scaling, dropout):
        output = F.linear(x, weight, bias)
        dropped, mask = (x, None) if dropout == 0 else torch.native_dropout(x, dropout, True)
        narrow = F.linear(dropped, lora_A)
        output.addmm_(narrow, lora_B.t(), alpha=scaling)
        ctx.save_for_backward(x, weight, lora_A, lora_B, narrow, mask)
        ctx.scaling, ctx.keep = scaling, 1 - dropout
        return output

    @staticmethod
    def backward(ctx, gradient):
        x, weight, lora_A, lora_B, narrow, mask = ctx.saved_tensors
        narrow_out = (gradient @ lora_B).mul_(ctx.scaling)
        B_out = (gradient.t() @ narrow).mul_(ctx.scaling)
        x_out = gradient @ weight
        if mask is None:
            x_out.addmm_(narrow_out, lora_A)
        else:
            x = torch.ops.aten.native_dropout_backward(x, mask, 1 / ctx.keep)
            x_out += torch.ops.aten.native_dropout_backward(narrow_out @ lora_A, mask, 1 / ctx.keep)
        return x_out, None, None, narrow_out.t() @ x, B_out, None, None


class _WithAdapter:
    """A linear that may have an adapter. Parameter names of the base never change, with LoRA or without."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_module("adapter", None)

    def with_lora(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, 1, in] as this rank's weight takes it → [T, 1, out] before any sum over ranks."""
        adapter = self.adapter
        if not adapter.enabled:  # the base's product as it is made below
            return F.linear(x.flatten(0, 1), self.weight, self.bias).unsqueeze(1)
        dropout = adapter.dropout if self.training else 0.0
        output = _LoraLinear.apply(x.flatten(0, 1), self.weight, self.bias, *adapter.factors(), adapter.scaling, dropout)
        return output.unsqueeze(1)

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
        if self.adapter is None:
            return super().forward(x, *args, **kwargs)
        if self.sequence_parallel:
            x = gather_from_sequence_parallel_region(x, group=self.tp_group)
        return self.with_lora(x), None


class RowLinear(_WithAdapter, RowParallelLinear):
    """Input dim cut over the tensor ranks. [T, 1, in / tp] → ([T, 1, out], None); scatters over the sequence again."""

    def forward(self, x: torch.Tensor):
        if self.adapter is None:
            return super().forward(x)
        if not self.sequence_parallel:
            return self.with_lora(x), None
        with get_cuda_rng_tracker().fork():  # each tensor rank drops its own part of the input
            output = self.with_lora(x)
        return reduce_scatter_to_sequence_parallel_region(output, group=self.tp_group), None
