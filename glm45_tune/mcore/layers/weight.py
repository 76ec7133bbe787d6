"""What a linear multiplies by: a weight in the model's dtype, or a frozen one in FP8 with a scale an output channel.

Each kind says in which form its products want rows, and gives the product and the gradient of its input: for one matrix [B, A], and
for one an expert, [E, B, A], whose rows come sorted by expert. `keep` asks for the rows in the model's dtype as well, which LoRA
and trained weights need; where nobody does, FP8 kinds make none.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from glm45_tune.mcore.layers import fp8
from glm45_tune.mcore.layers.fp8 import FP8
from glm45_tune.mcore.layers.grouped import grouped_mm
from glm45_tune.mcore.layers.rows import Plan, spread
from glm45_tune.mcore.layers.swiglu import swiglu_backward, swiglu_forward


@dataclass(frozen=True, slots=True)
class Plain:
    """A weight in the model's dtype."""

    value: torch.Tensor

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x [N, A] → [N, B]."""
        return F.linear(x, self.value, bias)

    def input_gradient(self, gradient: torch.Tensor) -> torch.Tensor:
        """[N, B] → [N, A]."""
        return gradient @ self.value

    def spread(self, x: torch.Tensor, plan: Plan, keep: bool):
        """x [T, A] → ([N, A] in x's dtype if it is to be kept, the same as `grouped` wants it)."""
        rows = spread(x, plan)
        return rows, rows

    def spread_gradient(self, gradient: torch.Tensor, plan: Plan, keep: bool):
        """gradient [T, B] → ([N, B] if it is to be kept, the same as `grouped_input_gradient` wants it)."""
        return self.spread(gradient, plan, keep)

    def activate(self, gate_up: torch.Tensor, weights: torch.Tensor, keep: bool):
        """SwiGLU of gate_up [N, 2 A] times weights fp32 [N] → (it if it is to be kept, the same as `grouped` wants it)."""
        value = swiglu_forward(gate_up, weights)
        return value, value

    def activation_gradient(self, gate_up, weights, gradient, plan: Plan, keep: bool, again: bool):
        """Take SwiGLU's gradients in the form that the product behind it wants.

        gate_up [N, B], weights fp32 [N], gradient [N, B / 2] of their SwiGLU → (gate_up's gradient
        if it is to be kept, that of weights, SwiGLU's value once more if asked, and gate_up's
        gradient as `grouped_input_gradient` wants it).
        """
        gate_up_out, weights_out, value = swiglu_backward(gate_up, weights, gradient, again)
        return gate_up_out, weights_out, value, gate_up_out

    def grouped(self, rows, plan: Plan) -> torch.Tensor:
        """[N, A] → [N, B]."""
        return grouped_mm(rows, self.value.transpose(1, 2), plan.edges)

    def grouped_input_gradient(self, rows, plan: Plan) -> torch.Tensor:
        """[N, B] → [N, A]."""
        return grouped_mm(rows, self.value, plan.edges)


@dataclass(frozen=True, slots=True)
class Fp8(Plain):
    """A frozen weight in e4m3, multiplied in FP8.

    scale: fp32 [B] or [E, B]; dtype: what products give; turned: the weight transposed, None where
    it is only made when backward wants it. In the gradient of the input the channels are summed
    over, so their scales multiply the gradient before its rows are quantized.
    """

    scale: torch.Tensor
    dtype: torch.dtype
    turned: torch.Tensor | None = None

    def product(self, x, bias):
        return fp8.product(fp8.quantize_rows(x), self.value, self.scale, bias, self.dtype)

    def input_gradient(self, gradient):
        return fp8.product(fp8.quantize_rows(gradient, self.scale), self._turned(), None, None, self.dtype)

    def _turned(self):
        return fp8.turned(self.value) if self.turned is None else self.turned

    def spread(self, x, plan, keep):
        if isinstance(x, fp8.Rows):  # they came from another rank
            return None, fp8.Rows(fp8.spread_bytes(x.q, plan), x.scale[plan.slot // plan.place.shape[1]])
        return spread(x, plan) if keep else None, fp8.quantize_and_spread(x, plan)

    def spread_gradient(self, gradient, plan, keep):
        return spread(gradient, plan) if keep else None, fp8.spread_and_quantize(gradient, self.scale, plan)

    def activate(self, gate_up, weights, keep):
        if gate_up.is_cuda:
            from glm45_tune.mcore.layers import kernels

            value, *rows = kernels.swiglu_fp8(gate_up, weights, keep)
            return value, fp8.Rows(*rows)
        value = swiglu_forward(gate_up, weights)
        return value, fp8.quantize_rows(value)

    def activation_gradient(self, gate_up, weights, gradient, plan, keep, again):
        if gate_up.is_cuda:
            from glm45_tune.mcore.layers import kernels

            *found, q, scale = kernels.swiglu_backward_fp8(
                gate_up, weights, gradient.contiguous(), self.scale, plan.expert, keep, again
            )
            return *found, fp8.Rows(q, scale)
        gate_up_out, weights_out, value = swiglu_backward(gate_up, weights, gradient, again)
        return gate_up_out, weights_out, value, fp8.quantize_rows(gate_up_out, self.scale[plan.expert])

    def grouped(self, rows, plan):
        return fp8.grouped_product(rows, self.value, self.scale, plan.edges, self.dtype)

    def grouped_input_gradient(self, rows, plan):
        return fp8.grouped_product(rows, self._turned(), None, plan.edges, self.dtype)


@dataclass(frozen=True, slots=True)
class Cast(Plain):
    """A frozen weight in e4m3, multiplied in the model's dtype: every e4m3 value is one of bf16, so the cast is exact.

    scale: fp32 [B] or [E, B], applied after the product, or before it to the gradient.
    """

    scale: torch.Tensor
    dtype: torch.dtype

    def _cast(self):
        if self.value.is_cuda:
            from glm45_tune.mcore.layers import kernels

            return kernels.cast(self.value, self.dtype)
        return self.value.to(self.dtype)

    def product(self, x, bias):
        y = _scaled(F.linear(x, self._cast()), self.scale)
        return y if bias is None else y.add_(bias)

    def input_gradient(self, gradient):
        return _scaled(gradient, self.scale) @ self._cast()

    def spread_gradient(self, gradient, plan, keep):
        rows = spread(gradient, plan)
        return rows, _scaled(rows, self.scale, plan.expert)

    def activation_gradient(self, gate_up, weights, gradient, plan, keep, again):
        gate_up_out, weights_out, value = swiglu_backward(gate_up, weights, gradient, again)
        return gate_up_out, weights_out, value, _scaled(gate_up_out, self.scale, plan.expert)

    def grouped(self, rows, plan):
        output = grouped_mm(rows, self._cast().transpose(1, 2), plan.edges)
        return _scaled(output, self.scale, plan.expert)

    def grouped_input_gradient(self, rows, plan):
        return grouped_mm(rows, self._cast(), plan.edges)


def _scaled(x: torch.Tensor, columns: torch.Tensor, expert: torch.Tensor | None = None) -> torch.Tensor:
    """x [N, W] times columns [W], or columns [E, W] of each row's expert, in fp32 and rounded once."""
    if x.is_cuda:
        from glm45_tune.mcore.layers import kernels

        return kernels.scale_columns(x.contiguous(), columns, expert)
    return (x * (columns if expert is None else columns[expert])).to(x.dtype)


def hold_fp8(linear: torch.nn.Module, shape: tuple[int, ...], config) -> None:
    """Give the linear a frozen weight in FP8 of this shape, whose values come from a checkpoint.

    config: the model's, whose `frozen_dtype` asks for it and whose `frozen_products` says what it is multiplied in.
    """
    linear.weight = torch.nn.Parameter(
        torch.empty(shape, dtype=FP8, device=torch.cuda.current_device()), requires_grad=False
    )
    # no part of the state: where the weight's rows go, their scales go (mcore/load.py)
    scale = torch.empty(shape[:-1], dtype=torch.float32, device=linear.weight.device)
    linear.register_buffer("weight_scale", scale, persistent=False)
    linear.register_buffer("weight_turned", None, persistent=False)


def keep_turned(model: torch.nn.Module) -> None:
    """Keep the transposes of all FP8 weights as well, so that no backward makes them: as much memory again."""
    for module in model.modules():
        if hasattr(module, "weight_turned"):
            module.weight_turned = fp8.turned(module.weight.detach()).contiguous().clone()


def of(linear: torch.nn.Module) -> Plain:
    """What the linear multiplies by."""
    if linear.weight.dtype != FP8:
        return Plain(linear.weight)
    value, dtype = linear.weight, linear.config.params_dtype
    if linear.config.frozen_products == "bf16":
        return Cast(value, linear.weight_scale, dtype)
    return Fp8(value, linear.weight_scale, dtype, linear.weight_turned)
