"""megatron's tensor-parallel linears with room for a LoRA adapter beside the weight."""

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear


class _WithAdapter:
    """Adds `adapter(x)` to the output of a linear. Parameter names of the base never change, with LoRA or without."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_module("adapter", None)

    def forward(self, x: torch.Tensor, *args, **kwargs):
        output, bias = super().forward(x, *args, **kwargs)
        return (output if self.adapter is None else output + self.adapter(x)), bias

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        adapter, self.adapter = self.adapter, None  # its tensors have layouts of their own
        sharded = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        self.adapter = adapter
        if adapter is not None:
            sharded.update(adapter.sharded_state_dict(f"{prefix}adapter.", sharded_offsets, metadata))
        return sharded


class ColumnLinear(_WithAdapter, ColumnParallelLinear):
    """Output dim cut over the tensor ranks. [T, 1, in] → ([T, 1, out / tp], bias or None); gathers a sequence-cut input."""


class RowLinear(_WithAdapter, RowParallelLinear):
    """Input dim cut over the tensor ranks. [T, 1, in / tp] → ([T, 1, out], None); scatters over the sequence again."""
