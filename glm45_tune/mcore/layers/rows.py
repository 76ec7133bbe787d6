"""Rows sorted by where they go: a token's row once for each of its choices, and the sum of what comes back.

Shapes: T tokens, K choices a token, N = T · K rows sorted by expert, or by rank.
"""

from typing import NamedTuple

import torch


class Plan(NamedTuple):
    """Where rows go.

    slot: int [N], the place of each sorted row in the flat [T · K] choices. place: int [T, K], the
    sorted row of each choice, N or more where it goes nowhere. edges: int32 [E + 1], where each
    expert's rows begin, and the end. expert: int32 [N], whose each row is.
    """

    slot: torch.Tensor
    place: torch.Tensor
    edges: torch.Tensor
    expert: torch.Tensor

    def first(self, rows: int) -> "Plan":
        """Without the choices that go nowhere, which were sorted behind the others: N = rows."""
        return self._replace(slot=self.slot[:rows], expert=self.expert[:rows])


def plan_rows(experts: torch.Tensor, num_experts: int) -> Plan:
    """experts: int [T, K], the expert of each choice; num_experts where it has none here (see `Plan.first`).

    No wait for the device.
    """
    chosen, slot = experts.flatten().to(torch.int32).sort(stable=True)
    place = torch.empty_like(slot).scatter_(0, slot, torch.arange(slot.numel(), device=slot.device))
    every = torch.arange(num_experts + 1, dtype=torch.int32, device=slot.device)
    edges = torch.searchsorted(chosen, every, out_int32=True)
    return Plan(slot, place.view_as(experts), edges, chosen)


def spread(x, plan):
    """x [T, W] → [N, W], each token's row at every place it has."""
    if x.is_cuda:
        from glm45_tune.mcore.layers import kernels

        return kernels.spread_rows(x.contiguous(), plan.place, plan.slot.numel())
    return x[plan.slot // plan.place.shape[1]]


def at(y, place):
    """y [N, …] → [T, K, …], zero where a choice went nowhere."""
    if place.numel() == len(y):
        return y[place]
    return torch.cat([y, y.new_zeros(1, *y.shape[1:])])[place.clamp(max=len(y))]


def sum_rows(y, place, more=None):
    """y [N, W] → [T, W], the sum of a token's rows, and more."""
    if y.is_cuda:
        from glm45_tune.mcore.layers import kernels

        return kernels.sum_rows(y.contiguous(), place, None if more is None else more.contiguous())
    return at(y, place).sum(1) if more is None else at(y, place).sum(1) + more


class GatherRows(torch.autograd.Function):
    """x [T, W] → [N, W], each token once for every place of its plan. Backward: sum over a token's rows."""

    @staticmethod
    def forward(ctx, x, plan: Plan):
        ctx.plan = plan
        return spread(x, plan)

    @staticmethod
    def backward(ctx, gradient):
        return sum_rows(gradient, ctx.plan.place), None


class SumRows(torch.autograd.Function):
    """y [N, W], more [T, W] → [T, W], the sum of each token's rows, and more. Backward: each row gets its token's gradient."""

    @staticmethod
    def forward(ctx, y, more, plan: Plan, unread: bool):
        """unread: zeros will do, see `recompute.py`."""
        ctx.plan = plan
        return torch.zeros_like(more) if unread else sum_rows(y, plan.place, more)

    @staticmethod
    def backward(ctx, gradient):
        return spread(gradient, ctx.plan), gradient, None, None
