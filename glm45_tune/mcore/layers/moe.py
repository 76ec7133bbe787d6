"""The mixture-of-experts layer: router, routed experts wherever they live, shared experts meanwhile.

With one expert rank nothing is exchanged. Otherwise a token travels once to each rank where it chose experts, however many,
and the sum of their results travels back. The shared experts run while the rows are under way, forward and backward.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    checkpoint,
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.moe_layer import BaseMoELayer, MoELayer

from glm45_tune.mcore.layers.experts import GroupedExperts
from glm45_tune.mcore.layers.fp8 import FP8, Rows, spread_bytes
from glm45_tune.mcore.layers.recompute import is_unread
from glm45_tune.mcore.layers.router import Router
from glm45_tune.mcore.layers.rows import GatherRows, Plan, SumRows, plan_rows, sum_rows
from glm45_tune.mcore.layers.swiglu import SharedExperts


@dataclass
class Transfer:
    """One exchange of rows over a group, under way between `_Depart` and `_Arrive`."""

    group: dist.ProcessGroup
    send: list[int]
    receive: list[int]
    unread: bool = False
    """Forward nothing travels and zeros arrive, see `recompute.py`."""

    def start(self, rows: torch.Tensor, send: list[int], receive: list[int]) -> None:
        self.rows = rows.contiguous()  # alive until it has left
        self.landing = rows.new_empty(sum(receive), *rows.shape[1:])
        self.work = dist.all_to_all_single(self.landing, self.rows, receive, send, group=self.group, async_op=True)

    def finish(self) -> torch.Tensor:
        self.work.wait()
        landing, self.work, self.rows, self.landing = self.landing, None, None, None
        return landing


class _Depart(torch.autograd.Function):
    """Start to exchange rows [sum(send), W] → [sum(receive), W], not to be read before `_Arrive`."""

    @staticmethod
    def forward(ctx, rows, transfer: Transfer):
        ctx.transfer = transfer
        if transfer.unread:
            return rows.new_zeros(sum(transfer.receive), *rows.shape[1:])
        transfer.start(rows, transfer.send, transfer.receive)
        return transfer.landing.view_as(transfer.landing)

    @staticmethod
    def backward(ctx, _):
        return ctx.transfer.finish(), None


class _Arrive(torch.autograd.Function):
    """Wait for `_Depart`. The backward starts the way back; what was computed in between runs backward meanwhile."""

    @staticmethod
    def forward(ctx, rows, transfer: Transfer):
        ctx.transfer = transfer
        return (rows if transfer.unread else transfer.finish()).view_as(rows)

    @staticmethod
    def backward(ctx, gradient):
        ctx.transfer.start(gradient, ctx.transfer.receive, ctx.transfer.send)
        return gradient, None  # a placeholder of the right shape: `_Depart` takes what lands


class _DepartInFp8(torch.autograd.Function):
    """`GatherRows` and `_Depart` of x [T, W], which travels as q e4m3 [T, W]. What it gives is a gradient's shape and no rows."""

    @staticmethod
    def forward(ctx, x, q, plan: Plan, transfer: Transfer):
        ctx.plan, ctx.transfer = plan, transfer
        transfer.start(spread_bytes(q, plan).view(torch.uint8), transfer.send, transfer.receive)
        return x.new_zeros(1).expand(sum(transfer.receive), x.shape[1])

    @staticmethod
    def backward(ctx, _):
        return sum_rows(ctx.transfer.finish(), ctx.plan.place), None, None, None


class _ArriveInFp8(torch.autograd.Function):
    """Wait for `_DepartInFp8` → (the same shape, e4m3 rows). The gradient goes back in its own dtype, as in `_Arrive`."""

    @staticmethod
    def forward(ctx, shape, transfer: Transfer):
        ctx.transfer = transfer
        q = transfer.finish().view(FP8)
        ctx.mark_non_differentiable(q)
        return shape.view_as(shape), q

    @staticmethod
    def backward(ctx, gradient, _):
        return _Arrive.backward(ctx, gradient)


def each_once(ranks: torch.Tensor, num_ranks: int) -> torch.Tensor:
    """ranks: int [T, K], of every choice → the same in order, every rank of a token once and then num_ranks."""
    ranks = ranks.sort(1).values
    again = ranks[:, 1:] == ranks[:, :-1]
    ranks[:, 1:].masked_fill_(again, num_ranks)
    return ranks


class MoE(MoELayer):
    """In megatron's place for `mlp` of a MoE layer, with its parameter names."""

    def __init__(self, config, pg_collection, is_mtp_layer=False, name=None, *, submodules: MLPSubmodules):
        """submodules: the shared experts' linears."""
        BaseMoELayer.__init__(
            self, config, None, pg_collection, is_mtp_layer
        )  # not MoELayer's, which builds a dispatcher
        self.router = Router(config=config, pg_collection=pg_collection, is_mtp_layer=is_mtp_layer)
        self.experts = GroupedExperts(self.num_local_experts, config, pg_collection)
        self.shared_experts = SharedExperts(config, submodules, gate=False, pg_collection=pg_collection)
        self.etp_group = pg_collection.expt_tp
        self.recompute = self.ends_recompute = "moe" in (config.recompute_modules or [])

    def forward(self, hidden_states: torch.Tensor, padding_mask=None, **_) -> tuple[torch.Tensor, None]:
        """[T, 1, hidden] → (same, no bias). padding_mask: bool [1, T], True where a token is no data; None: all are."""
        padding_mask = None if padding_mask is None else padding_mask.t()
        if self.recompute and self.training:
            return checkpoint(self._forward, False, hidden_states, padding_mask), None
        return self._forward(hidden_states, padding_mask), None

    def _forward(self, hidden: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor:
        unread = is_unread(self.ends_recompute)
        probs, experts = self.router(hidden, padding)
        x = hidden.flatten(0, 1)
        plan = plan_rows(experts, self.config.num_moe_experts)
        counts = plan.edges.diff()
        self.router.count(counts, experts, padding)
        if self.ep_group.size() == 1 and self.etp_group.size() == 1:
            shared = self.shared_experts.project(self.shared_experts.activate(hidden), unread)
            return self.experts(x, probs, plan, shared.flatten(0, 1), unread).view_as(hidden)
        toward = plan_rows(each_once(experts // self.num_local_experts, self.ep_group.size()), self.ep_group.size())
        send, receive, choices = self._sizes(toward.edges.diff(), counts)
        toward = toward.first(sum(send))
        leaving, arriving = Transfer(self.ep_group, send, receive), Transfer(self.ep_group, send, receive)
        routes, sizes = [probs, experts.to(probs.dtype)], [probs.shape[1]] * 2
        sent = self.experts.quantized(x) if self.etp_group.size() == 1 else None
        if sent is None:
            rows = _Depart.apply(GatherRows.apply(x, toward), leaving)
        else:  # half the bytes, and quantized before or behind the wire it is the same
            rows = _DepartInFp8.apply(x, sent.q, toward, leaving)
            routes, sizes = [*routes, sent.scale.unsqueeze(1)], [*sizes, 1]
        routes = _Depart.apply(GatherRows.apply(torch.cat(routes, 1), toward), arriving)
        activated = self.shared_experts.activate(hidden)
        probs, experts, *scale = _Arrive.apply(routes, arriving).split(sizes, dim=1)
        arrived = None
        if sent is None:
            rows = _Arrive.apply(rows, leaving)
        else:
            rows, q = _ArriveInFp8.apply(rows, leaving)
            arrived = Rows(q, scale[0].detach().squeeze(1))
        rows = self._on_this_rank(rows, probs, self._local(experts), choices, unread, arrived)
        back = Transfer(self.ep_group, receive, send, unread)
        rows = _Depart.apply(rows, back)
        shared = self.shared_experts.project(activated, unread)
        return SumRows.apply(_Arrive.apply(rows, back), shared.flatten(0, 1), toward, unread).view_as(hidden)

    def _sizes(self, rows: torch.Tensor, counts: torch.Tensor) -> tuple[list[int], list[int], int]:
        """Return rows to every rank, rows from every rank, and the choices among those that come, on the host.

        rows: int [ranks], how many go to each; counts: int [experts], choices of each.
        """
        ranks, own = self.ep_group.size(), self.ep_group.rank()
        sent = torch.cat([rows, counts.view(ranks, -1).sum(1)])
        table = sent.new_empty(ranks * sent.numel())
        dist.all_gather_into_tensor(table, sent, group=self.ep_group)
        table = table.view(ranks, 2, ranks).cpu()  # the one wait for the device
        return table[own, 0].tolist(), table[:, 0, own].tolist(), int(table[:, 1, own].sum())

    def _local(self, experts: torch.Tensor) -> torch.Tensor:
        """Numbers of experts, as they travelled → numbers among this rank's, their count for those of other ranks."""
        number = experts.detach().to(torch.int32) - self.ep_group.rank() * self.num_local_experts
        return number.masked_fill((number < 0) | (number >= self.num_local_experts), self.num_local_experts)

    def _on_this_rank(self, x, probs, experts, choices: int, unread: bool, arrived: Rows | None) -> torch.Tensor:
        """[R, hidden] → the sum of what this rank's experts make of each row; probs and experts [R, K], of them `choices` here.

        arrived: x in FP8 where it travelled so.

        Expert tensor ranks each hold a slice of every expert: they pool rows and share out sums.
        """
        etp = self.etp_group
        if etp.size() == 1:
            plan = plan_rows(experts, self.num_local_experts).first(choices)
            return self.experts(x, probs, plan, unread=unread, arrived=arrived)
        own = torch.tensor([x.shape[0], choices], device=x.device)
        sizes = own.new_empty(2 * etp.size())
        dist.all_gather_into_tensor(sizes, own, group=etp)
        splits, choices = sizes[::2].tolist(), int(sizes[1::2].sum())
        x, probs, experts = (
            gather_from_sequence_parallel_region(t.contiguous(), group=etp, output_split_sizes=splits)
            for t in (x, probs, experts)
        )
        output = self.experts(x, probs, plan_rows(experts, self.num_local_experts).first(choices), unread=unread)
        return reduce_scatter_to_sequence_parallel_region(output, group=etp, input_split_sizes=splits)
