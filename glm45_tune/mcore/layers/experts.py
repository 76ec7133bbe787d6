"""The routed experts of one rank: two grouped matrix products around a SwiGLU, with a backward of their own.

A frozen weight never needs its input: what is kept for the backward is the gate/up output, each token's weights and which
expert it went to. Sorted copies of the tokens are made again by index where LoRA or a trained weight needs them.

Shapes: T tokens, K experts a token, N = T · K rows sorted by expert; E experts of this rank; F their width.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule

from glm45_tune.mcore.layers import fast
from glm45_tune.mcore.layers.swiglu import swiglu_backward, swiglu_forward


class Plan(NamedTuple):
    """Where rows go. slot: int [N], the place of each sorted row in the flat [T · K] choices. place: int [T, K], the sorted row of

    each choice, N or more where it goes nowhere. edges: int32 [E + 1], where each expert's rows begin, and the end.
    """

    slot: torch.Tensor
    place: torch.Tensor
    edges: torch.Tensor

    def first(self, rows: int) -> "Plan":
        """Without the choices that go nowhere, which were sorted behind the others: N = rows."""
        return self._replace(slot=self.slot[:rows])


def plan_rows(experts: torch.Tensor, num_experts: int) -> Plan:
    """experts: int [T, K], the expert of each choice; num_experts where it has none here (see `Plan.first`).

    No wait for the device.
    """
    chosen, slot = experts.flatten().to(torch.int32).sort(stable=True)
    place = torch.empty_like(slot).scatter_(0, slot, torch.arange(slot.numel(), device=slot.device))
    every = torch.arange(num_experts + 1, dtype=torch.int32, device=slot.device)
    edges = torch.searchsorted(chosen, every, out_int32=True)
    return Plan(slot, place.view_as(experts), edges)


def _spread(x, plan):
    """x [T, W] → [N, W], each token's row at every place it has."""
    if x.is_cuda:
        from glm45_tune.mcore.layers import kernels

        return kernels.spread_rows(x.contiguous(), plan.place, plan.slot.numel())
    return x[plan.slot // plan.place.shape[1]]


def _at(y, place):
    """y [N, …] → [T, K, …], zero where a choice went nowhere."""
    if place.numel() == len(y):
        return y[place]
    return torch.cat([y, y.new_zeros(1, *y.shape[1:])])[place.clamp(max=len(y))]


def _sum(y, place, more=None):
    """y [N, W] → [T, W], the sum of a token's rows, and more."""
    if y.is_cuda:
        from glm45_tune.mcore.layers import kernels

        return kernels.sum_rows(y.contiguous(), place, None if more is None else more.contiguous())
    return _at(y, place).sum(1) if more is None else _at(y, place).sum(1) + more


class GatherRows(torch.autograd.Function):
    """x [T, W] → [N, W], each token once for every place of its plan. Backward: sum over a token's rows."""

    @staticmethod
    def forward(ctx, x, plan: Plan):
        ctx.plan = plan
        return _spread(x, plan)

    @staticmethod
    def backward(ctx, gradient):
        return _sum(gradient, ctx.plan.place), None


class SumRows(torch.autograd.Function):
    """y [N, W], more [T, W] → [T, W], the sum of each token's rows, and more. Backward: each row gets its token's gradient."""

    @staticmethod
    def forward(ctx, y, more, plan: Plan, unread: bool):
        """unread: zeros will do, see `recompute.py`."""
        ctx.plan = plan
        return torch.zeros_like(more) if unread else _sum(y, plan.place, more)

    @staticmethod
    def backward(ctx, gradient):
        return _spread(gradient, ctx.plan), gradient, None, None


def _one_kernel(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether a grouped kernel takes them: bf16 on a GPU, rows of whole 16-byte words, something to do."""
    sizes = (a.shape[1], *b.shape[1:])
    return a.is_cuda and a.dtype == torch.bfloat16 and a.shape[0] > 0 and all(size % 8 == 0 for size in sizes)


def _rows_of_experts(x: torch.Tensor, edges: torch.Tensor) -> list[torch.Tensor]:
    return [x[first:last] for first, last in pairwise(edges.tolist())]


def grouped_mm(x: torch.Tensor, weight: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
    """x [N, A] sorted by expert, weight [E, A, B] → [N, B], each row times its expert's matrix."""
    if _one_kernel(x, weight):
        return fast.grouped_mm(x, weight, edges)
    return torch.cat([rows @ w for rows, w in zip(_rows_of_experts(x, edges), weight)])


def grouped_add_(
    output: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, edges: torch.Tensor, scaling: float
) -> None:
    """Add scaling times what `grouped_mm` gives to output [N, B]."""
    if _one_kernel(x, weight):
        fast.grouped_add_(output, x, weight, edges, scaling)
    else:
        output.add_(grouped_mm(x, weight, edges), alpha=scaling)


def grouped_outer(x: torch.Tensor, y: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
    """x [N, A], y [N, B], both sorted by expert → [E, A, B], the sum over each expert's rows of xᵀ y."""
    if _one_kernel(x, y):
        return fast.grouped_outer(x, y, edges)
    return torch.stack([a.t() @ b for a, b in zip(_rows_of_experts(x, edges), _rows_of_experts(y, edges))])


def _add_lora(output, x, lora_A, lora_B, scaling, dropout, edges):
    """Add the pair's product to output [N, B] in place, unless it is None. → what its gradient needs: the narrow product and the

    dropout's mask.
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
    """gradient [N, B] of the linear's output; adds the pair's part to x_out [N, A], that of its input. → gradients of the narrow product

    and of lora_B.
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
    def forward(ctx, x, probs, fc1, fc2, A1, B1, A2, B2, shared, plan: Plan, adapters, unread: bool):
        """x [T, hidden]; probs fp32 [T, K]; fc1 [E, 2F, hidden]; fc2 [E, hidden, F]; A1, B1, A2, B2: LoRA factors or None

        ([E, r, in], [E, out, r]); shared: [T, hidden] to add, or None; adapters: (scaling, dropout) of each. Returns [T, hidden];
        unread: zeros, see `recompute.py`.
        """
        rows = _spread(x, plan)
        weights = probs.flatten()[plan.slot]
        gate_up = grouped_mm(rows, fc1.transpose(1, 2), plan.edges)
        kept1 = kept2 = (None, None)
        if A1 is not None:
            kept1 = _add_lora(gate_up, rows, A1, B1, *adapters[0], plan.edges)
        del rows
        output = None
        if A2 is not None or not unread:
            hidden = swiglu_forward(gate_up, weights)
        if not unread:
            output = grouped_mm(hidden, fc2.transpose(1, 2), plan.edges)
        if A2 is not None:
            kept2 = _add_lora(output, hidden, A2, B2, *adapters[1], plan.edges)
        needs_x = A1 is not None or ctx.needs_input_grad[2]
        ctx.save_for_backward(x if needs_x else None, weights, gate_up, fc1, fc2, A1, B1, A2, B2, *kept1, *kept2)
        ctx.plan, ctx.adapters = plan, adapters
        return torch.zeros_like(x) if unread else _sum(output, plan.place, shared)

    @staticmethod
    def backward(ctx, gradient):
        x, weights, gate_up, fc1, fc2, A1, B1, A2, B2, *kept = ctx.saved_tensors
        plan, edges = ctx.plan, ctx.plan.edges
        fc1_out = fc2_out = A1_out = B1_out = A2_out = B2_out = None
        shared_out = gradient if ctx.needs_input_grad[8] else None
        gradient = _spread(gradient, plan)
        hidden_out = grouped_mm(gradient, fc2, edges)
        if A2 is not None:
            narrow_out, B2_out = _lora_backward(gradient, hidden_out, kept[2:], A2, B2, *ctx.adapters[1], edges)
        needs_hidden = A2 is not None or ctx.needs_input_grad[3]
        gate_up_out, weights_out, hidden = swiglu_backward(gate_up, weights, hidden_out, needs_hidden)
        if A2 is not None:
            A2_out = grouped_outer(narrow_out, _dropped(hidden, kept[3], ctx.adapters[1][1]), edges)
        if ctx.needs_input_grad[3]:
            fc2_out = grouped_outer(gradient, hidden, edges)
        del gradient, hidden, hidden_out
        x_out = grouped_mm(gate_up_out, fc1, edges)
        if A1 is not None:
            narrow_out, B1_out = _lora_backward(gate_up_out, x_out, kept[:2], A1, B1, *ctx.adapters[0], edges)
        if x is not None:
            rows = _spread(x, plan)
            if A1 is not None:
                A1_out = grouped_outer(narrow_out, _dropped(rows, kept[1], ctx.adapters[0][1]), edges)
            if ctx.needs_input_grad[2]:
                fc1_out = grouped_outer(gate_up_out, rows, edges)
        x_out, probs_out = _sum(x_out, plan.place), _at(weights_out, plan.place)
        return x_out, probs_out, fc1_out, fc2_out, A1_out, B1_out, A2_out, B2_out, shared_out, None, None, None


def mark_expert_parameter(parameter: torch.nn.Parameter, cut_dim: int | None) -> None:
    """Tell megatron how an expert parameter is spread: its gradient is reduced over expert-data ranks only, and in the

    gradient norm every expert tensor rank counts where dim `cut_dim` is cut over them, else the first one.
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
        self.cut_dim = cut_dim
        self.weight = torch.nn.Parameter(
            torch.empty(
                num_experts, output_size, input_size, dtype=config.params_dtype, device=torch.cuda.current_device()
            )
        )
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

    def forward(
        self, x: torch.Tensor, probs: torch.Tensor, plan: Plan, shared: torch.Tensor | None = None, unread: bool = False
    ) -> torch.Tensor:
        """x [T, hidden], probs fp32 [T, K], plan over this rank's experts → [T, hidden], their weighted sum plus shared.

        unread: zeros will do.
        """
        (A1, B1), adapter1 = self.linear_fc1.factors()
        (A2, B2), adapter2 = self.linear_fc2.factors()
        fc1, fc2 = self.linear_fc1.weight, self.linear_fc2.weight
        return Experts.apply(x, probs, fc1, fc2, A1, B1, A2, B2, shared, plan, (adapter1, adapter2), unread)

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
