"""megatron's top-k router, giving each token's experts as a list instead of a table over all experts.

Its losses and counts are over the real tokens of a micro batch, whatever share of them a rank holds. megatron's own take every
tensor and context rank to hold equally many tokens, all of them data; ours differ by the padding that evens out tensor ranks
and by documents whose length context ranks do not divide.
"""

from collections import deque

import torch
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    compute_routing_scores_for_aux_loss,
    switch_load_balancing_loss_func,
    topk_routing_with_score_function,
)
from megatron.core.transformer.moe.router import TopKRouter


class _Gate(torch.autograd.Function):
    """x · weightᵀ in fp32.

    In bf16 the tensor cores are exact enough: a product of two bf16 numbers is exact in fp32 and
    summed in fp32, so nothing needs widening. The fp32 gradient goes through them as the sum of two
    bf16 numbers.
    """

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        if x.is_cuda and x.dtype == torch.bfloat16:
            return torch.mm(x, weight.t(), out_dtype=torch.float32)
        return x.float() @ weight.float().t()

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        if weight.is_cuda and weight.dtype == torch.bfloat16:
            high = gradient.to(torch.bfloat16)
            low = (gradient - high).to(torch.bfloat16)
            x_out = torch.cat((high, low), dim=1) @ torch.cat((weight, weight))
        else:
            x_out = (gradient @ weight.float()).to(weight.dtype)
        return x_out, None if x is None else (gradient.t() @ x.float()).to(weight.dtype)


class Replay:
    """What a router is asked about its choice of experts (megatron's RouterReplay interface): to remember it, or to take another's.

    One object is for one pass over micro batches. target: int [T, K], −1 where no choice is known and the router's own stands. Under recompute a layer runs first without
    gradient, then again with it when its micro batch's turn comes: the second time takes the oldest target not yet used again.
    """

    def __init__(self):
        self.history: list[torch.Tensor] = []
        """What was chosen, micro batch by micro batch, of a pass without gradient."""
        self.agreed = self.asked = 0
        self.with_gradient = True
        self._targets: deque[torch.Tensor] = deque()
        self._runs_twice = False

    def expect(self, target: torch.Tensor) -> None:
        """The choice of the micro batch that comes next."""
        if not self._runs_twice:
            self._targets.clear()
        self._targets.append(target)

    def get_replay_topk(self, scores, topk, num_groups, group_topk, compute):
        values, own = compute(scores, topk, num_groups, group_topk)
        if not self._targets:
            self._remember(own)
            return values, own
        is_first = not self.with_gradient
        self._runs_twice |= is_first
        target = self._targets[-1] if is_first or not self._runs_twice else self._targets.popleft()
        known = target >= 0
        chosen = torch.where(known, target, own)
        if is_first or not self._runs_twice:
            shared = (chosen.unsqueeze(2) == own.unsqueeze(1)).any(2) & known
            self.agreed, self.asked = self.agreed + shared.sum(), self.asked + known.sum()
        self._remember(chosen)
        return scores.gather(1, chosen), chosen

    def _remember(self, chosen: torch.Tensor) -> None:
        if not self.with_gradient:
            self.history.append(chosen)


class Router(TopKRouter):
    """forward: [T, 1, hidden] → (probs fp32 [T, K], experts int64 [T, K]) instead of two [T, E] tables.

    padding_mask: bool [T, 1], True where a token is no data; None where all are.
    """

    loss_weight = 1.0
    """All micro batches of a step over those that hold samples: megatron divides their losses by all of them."""

    def gating(self, input: torch.Tensor) -> torch.Tensor:
        return _Gate.apply(input.flatten(0, -2), self.weight).unflatten(0, input.shape[:-1])

    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        config = self.config
        padding = None if padding_mask is None else padding_mask.flatten()
        logits = self.apply_z_loss(logits.flatten(0, -2), padding)
        # megatron leaves a token's experts unsorted where no gradient is asked for: their sum would have other bits then
        if self.router_replay is not None:
            self.router_replay.with_gradient = torch.is_grad_enabled()
        with torch.enable_grad():
            probs, experts = topk_routing_with_score_function(
                logits,
                self.topk,
                num_groups=config.moe_router_num_groups,
                group_topk=config.moe_router_group_topk,
                scaling_factor=config.moe_router_topk_scaling_factor,
                score_function=self.score_function,
                expert_bias=self.expert_bias,
                router_replay=self.router_replay,
                dense_output=True,
            )
        if self.training and torch.is_grad_enabled() and self.is_aux_loss_enabled():
            chosen, scores = compute_routing_scores_for_aux_loss(
                logits, self.topk, self.score_function, padding_mask=padding
            )
            probs = self._apply_aux_loss(probs, scores, chosen)
        return probs, experts

    def count(self, rows: torch.Tensor, experts: torch.Tensor, padding: torch.Tensor | None) -> None:
        """Add a micro batch's rows for every expert, int [E], to what balancing and the expert load go by: but for padding."""
        if not torch.is_grad_enabled():  # neither in evaluation nor in the first pass of recompute
            return
        self.local_tokens_per_expert += rows
        if padding is not None:
            every = torch.arange(len(rows), device=experts.device)
            chosen = experts.detach().masked_fill(~padding, -1)
            self.local_tokens_per_expert -= (chosen.flatten().unsqueeze(1) == every).sum(0)

    def _apply_aux_loss(self, probs, scores_for_aux_loss, routing_map, with_padding_mask=True):
        """scores and map [T, E] are 0 at padding. The loss of the micro batch is the sum of its ranks' parts."""
        coeff = self.get_aux_loss_coeff("aux_loss") * self.loss_weight
        counts = reduce_from_tensor_model_parallel_region(routing_map.sum(dim=0), self.tp_cp_group)
        loss = switch_load_balancing_loss_func(
            probs=scores_for_aux_loss,
            tokens_per_expert=counts,
            total_num_tokens=(counts.sum() / self.topk).clamp(min=1),  # a micro batch of padding has none
            topk=self.topk,
            num_experts=self.config.num_moe_experts,
            moe_aux_loss_coeff=coeff,
        )
        return self.attach_and_log_load_balancing_loss(probs, coeff, loss, "load_balancing_loss", self.tp_cp_group)

    def apply_z_loss(self, logits, padding_mask):
        """The mean over tokens of logsumexp(logits)², times its coefficient."""
        coeff = self.config.moe_z_loss_coeff
        if not coeff or not (self.training and torch.is_grad_enabled()):
            return logits
        squares = torch.logsumexp(logits, dim=-1).square()
        is_data = torch.ones_like(squares) if padding_mask is None else (~padding_mask).to(squares.dtype)
        count = reduce_from_tensor_model_parallel_region(is_data.sum(), self.tp_cp_group).clamp(min=1)
        loss = (squares * is_data).sum() / count
        num_layers = self.config.num_layers + (self.config.mtp_num_layers or 0)
        get_moe_metrics_tracker().record("z_loss", loss, self.layer_number, num_layers, reduce_group=self.tp_cp_group)
        return MoEAuxLossAutoScaler.apply(logits, coeff * self.loss_weight * loss)
