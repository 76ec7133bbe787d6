"""The routed experts of one rank: two grouped matrix products around a SwiGLU, with a backward of their own.

A frozen weight never needs its input: what is kept for the backward is the gate/up output, each token's weights and which
expert it went to. Sorted copies of the tokens are made again by index where LoRA or a trained weight needs them.

Shapes: T tokens, K experts a token, N = T · K rows sorted by expert; E experts of this rank; F their width.
"""

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule

from glm45_tune.mcore.layers import fp8, weight
from glm45_tune.mcore.layers.grouped import grouped_add_, grouped_mm, grouped_outer
from glm45_tune.mcore.layers.rows import Plan, at, spread, sum_rows


def _add_lora(output, x, lora_A, lora_B, scaling, dropout, edges):
    """Add the pair's product to output [N, B] in place, unless it is None.

    Returns what its gradient needs: the narrow product and the dropout's mask.
    """
    mask = None
    if dropout:
        with get_cuda_rng_tracker().fork():  # every rank drops its own rows
            x, mask = torch.native_dropout(x, dropout, True)
    narrow = grouped_mm(x, lora_A.transpose(1, 2), edges)
    if output is not None:
        grouped_add_(output, narrow, lora_B.transpose(1, 2), edges, scaling)
    return narrow, mask


def _dropped(x, mask, dropout):
    """What the forward's dropout let through of x."""
    return x if mask is None else torch.ops.aten.native_dropout_backward(x, mask, 1 / (1 - dropout))


def _lora_backward(gradient, x_out, kept, lora_A, lora_B, scaling, dropout, edges):
    """Take the pair's gradients from gradient [N, B] of the linear's output.

    Adds the pair's part to x_out [N, A], that of its input. Returns the gradients of the narrow
    product and of lora_B.
    """
    narrow, mask = kept
    narrow_out = grouped_mm(gradient, lora_B, edges).mul_(scaling)
    if mask is None:
        grouped_add_(x_out, narrow_out, lora_A, edges, 1.0)
    else:
        x_out.add_(_dropped(grouped_mm(narrow_out, lora_A, edges), mask, dropout))
    return narrow_out, grouped_outer(gradient, narrow, edges).mul_(scaling)


class Experts(torch.autograd.Function):
    """Σ over a token's experts of prob · fc2(silu(gate) · up), where (gate, up) = fc1(token); either linear may carry LoRA.

    What the shared experts gave is added on the way.

    The weight of an expert multiplies the activation, before fc2: the same product at a third of the width.
    """

    @staticmethod
    def forward(ctx, x, probs, fc1, fc2, A1, B1, A2, B2, shared, plan: Plan, weights, adapters, unread: bool, arrived):
        """Return [T, hidden] of x [T, hidden] and probs fp32 [T, K].

        fc1 [E, 2F, hidden] and fc2 [E, hidden, F], where they are trained; A1, B1, A2, B2: LoRA
        factors ([E, r, in], [E, out, r]) or None; shared: [T, hidden] to add, or None; weights: fc1
        and fc2 as `weight.of` gives them; adapters: (scaling, dropout) of each. unread: zeros are
        returned, see `recompute.py`. arrived: x in FP8, and x itself then nothing but its shape; or
        None.
        """
        first, second = weights
        kept, rows = first.spread(x if arrived is None else arrived, plan, keep=A1 is not None)
        shares = probs.flatten()[plan.slot]
        gate_up = first.grouped(rows, plan)
        kept1 = kept2 = (None, None)
        if A1 is not None:
            kept1 = _add_lora(gate_up, kept, A1, B1, *adapters[0], plan.edges)
        del kept, rows
        output = None
        if A2 is not None or not unread:
            hidden, rows = second.activate(gate_up, shares, keep=A2 is not None)
        if not unread:
            output = second.grouped(rows, plan)
        if A2 is not None:
            kept2 = _add_lora(output, hidden, A2, B2, *adapters[1], plan.edges)
        needs_x = A1 is not None or ctx.needs_input_grad[2]
        ctx.save_for_backward(x if needs_x else None, shares, gate_up, A1, B1, A2, B2, *kept1, *kept2)
        ctx.plan, ctx.weights, ctx.adapters = plan, weights, adapters
        return torch.zeros_like(x) if unread else sum_rows(output, plan.place, shared)

    @staticmethod
    def backward(ctx, gradient):
        x, shares, gate_up, A1, B1, A2, B2, *kept = ctx.saved_tensors
        plan, edges, (first, second) = ctx.plan, ctx.plan.edges, ctx.weights
        fc1_out = fc2_out = A1_out = B1_out = A2_out = B2_out = None
        shared_out = gradient if ctx.needs_input_grad[8] else None
        gradient, rows = second.spread_gradient(gradient, plan, keep=A2 is not None)
        hidden_out = second.grouped_input_gradient(rows, plan)
        if A2 is not None:
            narrow_out, B2_out = _lora_backward(gradient, hidden_out, kept[2:], A2, B2, *ctx.adapters[1], edges)
        needs_hidden = A2 is not None or ctx.needs_input_grad[3]
        gate_up_out, shares_out, hidden, rows = first.activation_gradient(
            gate_up, shares, hidden_out, plan, keep=A1 is not None, again=needs_hidden
        )
        if A2 is not None:
            A2_out = grouped_outer(narrow_out, _dropped(hidden, kept[3], ctx.adapters[1][1]), edges)
        if ctx.needs_input_grad[3]:
            fc2_out = grouped_outer(gradient, hidden, edges)
        del gradient, hidden, hidden_out
        x_out = first.grouped_input_gradient(rows, plan)
        if A1 is not None:
            narrow_out, B1_out = _lora_backward(gate_up_out, x_out, kept[:2], A1, B1, *ctx.adapters[0], edges)
        if x is not None:
            rows = spread(x, plan)
            if A1 is not None:
                A1_out = grouped_outer(narrow_out, _dropped(rows, kept[1], ctx.adapters[0][1]), edges)
            if ctx.needs_input_grad[2]:
                fc1_out = grouped_outer(gate_up_out, rows, edges)
        x_out, probs_out = sum_rows(x_out, plan.place), at(shares_out, plan.place)
        return x_out, probs_out, fc1_out, fc2_out, A1_out, B1_out, A2_out, B2_out, shared_out, *(None,) * 5


def mark_expert_parameter(parameter: torch.nn.Parameter, cut_dim: int | None) -> None:
    """Tell megatron how an expert parameter is spread over ranks.

    Its gradient is reduced over expert-data ranks only. In the gradient norm every expert tensor
    rank counts where dim `cut_dim` is cut over them, else the first one.
    """
    parameter.allreduce = False
    if cut_dim is not None:
        set_tensor_model_parallel_attributes(parameter, True, cut_dim, 1)


class GroupedLinear(torch.nn.Module):
    """The stacked weight of one linear an expert, with room for a LoRA adapter (one low-rank pair an expert)."""

    def __init__(self, num_experts: int, input_size: int, output_size: int, config, init_method, cut_dim: int):
        """Sizes are this rank's. cut_dim: the weight's dim that expert tensor ranks share, 1 = output, 2 = input."""
        super().__init__()
        self.register_module("adapter", None)
        self.cut_dim, self.config = cut_dim, config
        shape = num_experts, output_size, input_size
        if config.frozen_dtype == "fp8":
            weight.hold_fp8(self, shape, config)
        else:
            device = torch.cuda.current_device()
            self.weight = torch.nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=device))
        mark_expert_parameter(self.weight, cut_dim)
        if config.perform_initialization:
            init_method(self.weight)

    def factors(self):
        """(lora_A, lora_B) or (None, None), and (scaling, dropout)."""
        if self.adapter is None or not self.adapter.enabled:
            return (None, None), None
        return self.adapter.factors(), (self.adapter.scaling, self.adapter.dropout if self.training else 0.0)


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


class GroupedExperts(MegatronModule):
    """SwiGLU experts in megatron's place for `experts`; parameters `linear_fc1.weight` [E, 2F, hidden] and `linear_fc2`."""

    def __init__(self, num_local_experts, config, pg_collection=None, name=None):
        super().__init__(config)
        etp = pg_collection.expt_tp.size()
        width = config.moe_ffn_hidden_size // etp
        self.linear_fc1 = GroupedLinear(
            num_local_experts, config.hidden_size, 2 * width, config, config.init_method, cut_dim=1
        )
        self.linear_fc2 = GroupedLinear(
            num_local_experts, width, config.hidden_size, config, config.output_layer_init_method, cut_dim=2
        )

    def quantized(self, x: torch.Tensor) -> fp8.Rows | None:
        """x [T, hidden] in FP8, where that is all that the first product wants of it; else None."""
        wants_x = not isinstance(weight.of(self.linear_fc1), weight.Fp8) or self.linear_fc1.factors()[1] is not None
        return None if wants_x else fp8.quantize_rows(x.detach())

    def forward(
        self,
        x: torch.Tensor,
        probs: torch.Tensor,
        plan: Plan,
        shared: torch.Tensor | None = None,
        unread: bool = False,
        arrived: fp8.Rows | None = None,
    ) -> torch.Tensor:
        """x [T, hidden], probs fp32 [T, K], plan over this rank's experts → [T, hidden], their weighted sum plus shared.

        unread: zeros will do. arrived: what `quantized` gave on the rank that x is of.
        """
        (A1, B1), adapter1 = self.linear_fc1.factors()
        (A2, B2), adapter2 = self.linear_fc2.factors()
        linears = self.linear_fc1, self.linear_fc2
        trained = (linear.weight if linear.weight.requires_grad else None for linear in linears)
        weights, adapters = tuple(map(weight.of, linears)), (adapter1, adapter2)
        return Experts.apply(x, probs, *trained, A1, B1, A2, B2, shared, plan, weights, adapters, unread, arrived)

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
