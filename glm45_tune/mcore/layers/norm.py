"""RMSNorm as GLM-4.5 has it, knowing sequence parallelism."""

import torch
import torch.nn.functional as F


class RMSNorm(torch.nn.Module):
    """y = x / rms(x) · weight over the last dim, in fp32 inside, rounded once to x's dtype. Keeps x and one number a row.

    Under sequence parallelism every tensor rank sees its own tokens, so the weight's gradient is summed over the
    tensor ranks: the attribute `sequence_parallel` tells megatron to.
    """

    def __init__(self, config, hidden_size: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class _Norm(torch.autograd.Function):
    """x → (its norm, x): in the backward the gradient that went round the layer is added in the same pass."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        from glm45_tune.mcore.layers import kernels

        out, scale = kernels.norm(x.flatten(0, -2), weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return out.view_as(x), x.view_as(x)

    @staticmethod
    def backward(ctx, gradient, around):
        from glm45_tune.mcore.layers import kernels

        x, weight, scale = ctx.saved_tensors
        gradient, flat = gradient.contiguous().flatten(0, -2), x.flatten(0, -2)
        x_out = kernels.norm_backward(gradient, around.contiguous(), flat, weight, scale).view_as(x)
        weight_out = None
        if ctx.needs_input_grad[1]:
            weight_out = (gradient * (flat * scale.unsqueeze(1))).sum(0, dtype=torch.float32).to(weight.dtype)
        return x_out, weight_out, None


class LayerNorm(RMSNorm):
    """The norm before a layer: gives (norm, residual), as megatron's layers accept it."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if x.is_cuda and torch.is_grad_enabled():
            return _Norm.apply(x.contiguous(), self.weight, self.eps)
        return super().forward(x), x
