"""The routed experts of one rank as two grouped linears: one stacked weight each, one GEMM over all of them on a GPU.

Shapes: N tokens that reached this rank, sorted by expert; E experts of this rank.
"""

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.tensor_parallel import checkpoint
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule


def grouped_linear(x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """x [N, in] whose rows are sorted by expert, weight [E, out, in], counts [E] (on the CPU) → [N, out]."""
    # one kernel for all experts, which takes bf16 rows of whole 16-byte words
    if x.is_cuda and x.dtype == torch.bfloat16 and weight.shape[1] % 8 == 0 and weight.shape[2] % 8 == 0:
        ends = counts.to(x.device).cumsum(0).to(torch.int32)
        return F.grouped_mm(x, weight.transpose(1, 2), offs=ends)
    return torch.cat([F.linear(rows, w) for rows, w in zip(x.split(counts.tolist()), weight)])


def mark_expert_parameter(parameter: torch.nn.Parameter, cut_dim: int | None) -> None:
    """Tell megatron how an expert parameter is spread: its gradient is reduced over expert-data ranks only, and in the

    gradient norm every expert tensor rank counts where dim `cut_dim` is cut over them, else the first one.
    """
    parameter.allreduce = False
    if cut_dim is not None:
        set_tensor_model_parallel_attributes(parameter, True, cut_dim, 1)


class GroupedLinear(torch.nn.Module):
    """A stack of linears, one an expert, with room for a LoRA adapter (one low-rank pair an expert)."""

    def __init__(self, num_experts: int, input_size: int, output_size: int, config, init_method, cut_dim: int):
        """Sizes are this rank's. cut_dim: the weight's dim that expert tensor ranks share, 1 = output, 2 = input."""
        super().__init__()
        self.register_module("adapter", None)
        self.cut_dim = cut_dim
        self.weight = torch.nn.Parameter(
            torch.empty(num_experts, output_size, input_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        mark_expert_parameter(self.weight, cut_dim)
        if config.perform_initialization:
            init_method(self.weight)

    def forward(self, x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        output = grouped_linear(x, self.weight, counts)
        return output if self.adapter is None else output + self.adapter(x, counts)


def sharded_experts(tensor: torch.Tensor, key: str, cut_dim: int | None, halves: bool = False):
    """Describe [E, ...] as this rank's part of the [all experts, ...] tensor `key`.

    cut_dim: the dim cut over expert tensor ranks, or None. halves: dim 1 is [gate; up], each cut by itself, so that the
    whole tensor is [all gates; all ups] under any cut.
    """
    ep, etp = parallel_state.get_expert_model_parallel_group(), parallel_state.get_expert_tensor_parallel_group()
    replica = (0, 0 if cut_dim is not None else etp.rank(), parallel_state.get_expert_data_parallel_rank())
    on_experts = (0, ep.rank(), ep.size())

    def whole(key, tensor, replica_id, flattened_range=None):
        cut = ((cut_dim, etp.rank(), etp.size()),) if cut_dim is not None else ()
        return ShardedTensor.from_rank_offsets(key, tensor, on_experts, *cut, replica_id=replica_id)

    def gate_and_up(key, tensor, replica_id, flattened_range=None):
        return [
            ShardedTensor.from_rank_offsets(
                key, half, on_experts, (1, part * etp.size() + etp.rank(), 2 * etp.size()), replica_id=replica_id
            )
            for part, half in enumerate(tensor.chunk(2, dim=1))
        ]

    if not halves:
        return whole(key, tensor, replica)
    with torch.no_grad():
        return ShardedTensorFactory(key, tensor, gate_and_up, lambda parts: torch.cat(parts, dim=1), replica)


def weighted_swiglu(gate_up: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
    """silu(gate) · up · prob, [N, 2F] and [N] → [N, F] in gate_up's dtype."""
    gate, up = gate_up.chunk(2, dim=-1)
    return (F.silu(gate) * up * probs.unsqueeze(-1)).to(gate_up.dtype)


class GroupedExperts(MegatronModule):
    """SwiGLU experts in megatron's place for `experts`; parameters `linear_fc1.weight` [E, 2F, hidden] and `linear_fc2`."""

    def __init__(self, num_local_experts, config, pg_collection=None, name=None):
        super().__init__(config)
        self.recompute = "moe_act" in (config.recompute_modules or []) and config.recompute_granularity == "selective"
        etp = pg_collection.expt_tp.size()
        width = config.moe_ffn_hidden_size // etp
        self.linear_fc1 = GroupedLinear(
            num_local_experts, config.hidden_size, 2 * width, config, config.init_method, cut_dim=1
        )
        self.linear_fc2 = GroupedLinear(
            num_local_experts, width, config.hidden_size, config, config.output_layer_init_method, cut_dim=2
        )

    def forward(self, x: torch.Tensor, counts: torch.Tensor, probs: torch.Tensor):
        """x [N, hidden] sorted by expert, counts [E], probs [N]: each token's weight for its expert → ([N, hidden], None).

        The weight multiplies the activation, before fc2: the same product, at a third of the width.
        """
        gate_up = self.linear_fc1(x, counts)
        if self.recompute and self.training:
            hidden = checkpoint(weighted_swiglu, False, gate_up, probs)
        else:
            hidden = weighted_swiglu(gate_up, probs)
        return self.linear_fc2(hidden, counts), None

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        sharded = {}
        for name in ("linear_fc1", "linear_fc2"):
            linear = getattr(self, name)
            # megatron's own experts write under `experts.experts.`, whichever class made them
            sharded[f"{prefix}{name}.weight"] = sharded_experts(
                linear.weight, f"{prefix}experts.{name}.weight", linear.cut_dim, halves=name == "linear_fc1"
            )
            if linear.adapter is not None:
                sharded.update(
                    linear.adapter.sharded_state_dict(f"{prefix}experts.{name}.adapter.", sharded_offsets, metadata)
                )
        return sharded
