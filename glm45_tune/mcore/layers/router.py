"""megatron's top-k router, giving each token's experts as a list instead of a table over all experts."""

import torch
from megatron.core.transformer.moe.moe_utils import compute_routing_scores_for_aux_loss, topk_routing_with_score_function
from megatron.core.transformer.moe.router import TopKRouter


class _Gate(torch.autograd.Function):
    """x · weightᵀ in fp32. In bf16 the tensor cores are exact enough: a product of two bf16 numbers is exact in fp32, and is

    summed in fp32, so nothing needs widening; the fp32 gradient goes through them as the sum of two bf16 numbers.
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


class Router(TopKRouter):
    """forward: [T, 1, hidden] → (probs fp32 [T, K], experts int64 [T, K]) instead of two [T, E] tables."""

    def gating(self, input: torch.Tensor) -> torch.Tensor:
        return _Gate.apply(input.flatten(0, -2), self.weight).unflatten(0, input.shape[:-1])

    def routing(self, logits: torch.Tensor, padding_mask=None) -> tuple[torch.Tensor, torch.Tensor]:
        config = self.config
        logits = self.apply_z_loss(logits.flatten(0, -2))
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
            chosen, scores = compute_routing_scores_for_aux_loss(logits, self.topk, self.score_function)
            probs = self._apply_aux_loss(probs, scores, chosen)
        return probs, experts

    def count(self, rows: torch.Tensor) -> None:
        """Add a micro batch's rows for every expert, int [E], to what balancing and the expert load go by."""
        if torch.is_grad_enabled():  # neither in evaluation nor in the first pass of recompute
            self.local_tokens_per_expert += rows
