"""SwiGLU that keeps only its input."""

import torch
import torch.nn.functional as F
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP

from glm45_tune.mcore.layers.recompute import is_unread


def swiglu_forward(gate_up: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
    """silu(gate) · up · scale, [N, 2F] and fp32 [N] or None → [N, F] in gate_up's dtype. No autograd."""
    if gate_up.is_cuda:
        from glm45_tune.mcore.layers import kernels

        return kernels.swiglu(gate_up, scale)
    gate, up = gate_up.chunk(2, dim=-1)
    value = F.silu(gate) * up
    return value if scale is None else (value * scale.unsqueeze(-1)).to(gate_up.dtype)


def swiglu_backward(gate_up, scale, gradient, again=False):
    """Gradients of gate_up and of scale (fp32; None without scale); with `again` the forward's value once more, else None."""
    if gate_up.is_cuda:
        from glm45_tune.mcore.layers import kernels

        return kernels.swiglu_backward(gate_up, scale, gradient.contiguous(), again)
    gate, up = gate_up.chunk(2, dim=-1)
    silu, sigmoid = F.silu(gate), torch.sigmoid(gate)
    value = silu * up
    scale_out = None if scale is None else (gradient * value).sum(-1, dtype=torch.float32)
    if scale is not None:
        gradient = gradient * scale.unsqueeze(-1)
        value = value * scale.unsqueeze(-1)
    out = torch.cat((gradient * up * (sigmoid + silu * (1 - sigmoid)), gradient * silu), dim=-1).to(gate_up.dtype)
    return out, scale_out, value.to(gate_up.dtype) if again else None


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up):
        ctx.save_for_backward(gate_up)
        return swiglu_forward(gate_up.flatten(0, -2)).unflatten(0, gate_up.shape[:-1])

    @staticmethod
    def backward(ctx, gradient):
        (gate_up,) = ctx.saved_tensors
        return swiglu_backward(gate_up.flatten(0, -2), None, gradient.flatten(0, -2))[0].view_as(gate_up)


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) · up, [..., 2F] → [..., F]."""
    return _Swiglu.apply(gate_up)


class GatedMLP(MLP):
    """megatron's MLP with this activation: the dense layers."""

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        self.ends_recompute = "mlp" in (config.recompute_modules or [])

    def forward(self, hidden_states, **_):
        return self.linear_fc2(swiglu(self.linear_fc1(hidden_states)[0]), is_unread(self.ends_recompute))


class SharedExperts(SharedExpertMLP):
    """The shared experts in two halves, so that each can run while tokens travel to or from the routed experts."""

    def activate(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[T, 1, hidden] → [T, 1, F of this tensor rank]."""
        return swiglu(self.linear_fc1(hidden_states)[0])

    def project(self, activated: torch.Tensor, unread: bool) -> torch.Tensor:
        """What `activate` gave → [T, 1, hidden]; unread: zeros will do."""
        return self.linear_fc2(activated, unread)[0]
