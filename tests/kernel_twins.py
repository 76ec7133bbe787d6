"""Each Triton kernel against its plain twin, forward and backward: `python tests/kernel_twins.py cuda`, or with TRITON_INTERPRET=1 `cpu`."""

import sys

import torch

from glm45_tune.mcore.layers import attention, fp8, kernels, linear, loss, swiglu
from glm45_tune.mcore.layers.rows import plan_rows, sum_rows


def close(ours, plain):
    for a, b in zip(ours, plain, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a.float().cpu(), b.float().cpu())


def rows(new):
    """Rows to 0 … 26 and, of the same choices, only the first 11: the others go nowhere."""
    for number in (27, 11):
        x, more, place = new(9, 70), new(9, 70), torch.randperm(27).view(9, 3)
        spread, back = torch.empty(27, 70), new(number, 70)
        spread[place.flatten()] = x.cpu().repeat_interleave(3, 0)
        close([kernels.spread_rows(x, place.to(x.device), number)], [spread[:number]])
        there = torch.cat([back.cpu(), torch.zeros(27 - number, 70)])[place].sum(1)
        close([kernels.sum_rows(back, place.to(x.device))], [there])
        close([sum_rows(back.cpu(), place)], [there])
        close([kernels.sum_rows(back, place.to(x.device), more)], [there + more.cpu()])


def normalisation(new):
    x, weight, gradient, around = new(5, 70), new(70), new(5, 70), new(5, 70)
    plain = x.cpu().requires_grad_()
    output = torch.nn.functional.rms_norm(plain, (70,), weight.cpu(), 1e-5)
    ours, scale = kernels.norm(x, weight, 1e-5)
    torch.autograd.backward((output, plain), (gradient.cpu(), around.cpu()))
    close([ours, kernels.norm_backward(gradient, around, x, weight, scale)], [output, plain.grad])


def activation(new):
    for width in (44, 1408):
        gate_up, gradient, weights = new(7, 2 * width), new(7, width), new(7).abs()
        for scale in (None, weights):
            on_cpu = None if scale is None else scale.cpu()
            close([kernels.swiglu(gate_up, scale)], [swiglu.swiglu_forward(gate_up.cpu(), on_cpu)])
            for again in (False, True):
                ours = kernels.swiglu_backward(gate_up, scale, gradient, again)
                close(ours, swiglu.swiglu_backward(gate_up.cpu(), on_cpu, gradient.cpu(), again))


def equal_rows(ours, plain):
    """The same FP8 and scales, to the bit; but Triton's interpreter loses the carry of a value that rounds up to a power of two,

    and rounds subnormals down.
    """
    q, scale = (t.cpu() for t in ours)
    torch.testing.assert_close(scale, plain.scale, equal_nan=True, rtol=0, atol=0)
    counts = plain.scale.isfinite()
    q, expected = q.float()[counts], plain.q.float()[counts]
    right = q == expected
    if sys.argv[1] == "cpu":
        right |= (torch.frexp(expected).mantissa.abs() == 0.5) | (expected.abs() < 2.0**-6)
    assert right.all(), (q[~right], expected[~right])


def quantization(new):
    """Rows of zeros, of NaN and infinity, of one value far above the others and of tiny ones among them."""
    for width in (70, 1408):
        x, columns, plan = new(9, width), new(3, width).abs(), plan_rows(torch.randint(0, 3, (9, 2)), 3)
        x[3], x[4, 5], x[5, 6], x[6, 7], x[7] = 0, float("nan"), float("inf"), 1e6, x[7] * 2.0**-110
        on_device = type(plan)(*(t.to(x.device) for t in plan))
        equal_rows(kernels.quantize_rows(x), fp8.quantize_rows(x.cpu()))
        equal_rows(kernels.quantize_rows(x, columns[0]), fp8.quantize_rows(x.cpu(), columns[0].cpu()))
        spread = kernels.quantize_and_spread(x, on_device.place, 18)
        equal_rows(spread, fp8.quantize_and_spread(x.cpu(), plan))
        spread = kernels.quantize_rows(x, columns, on_device.expert, on_device.slot, 2)
        equal_rows(spread, fp8.spread_and_quantize(x.cpu(), columns.cpu(), plan))
        close([kernels.scale_columns(x[:3], columns[1])], [x[:3].cpu() * columns[1].cpu()])
    q = fp8.quantize_rows(new(2, 70, 33).cpu()).q.to(x.device)
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    torch.testing.assert_close(
        kernels.cast(every.to(x.device), torch.bfloat16).cpu(), every.bfloat16(), rtol=0, atol=0, equal_nan=True
    )
    turned = torch.empty(2, 33, 70, dtype=q.dtype, device=q.device)
    kernels.turn(q, turned)
    close([turned], [q.cpu().transpose(1, 2)])


def activation_in_fp8(new):
    """SwiGLU and its gradients with their rows: those of the plain kernels quantized."""
    for width in (44, 1408):
        gate_up, gradient, shares, columns = new(7, 2 * width), new(7, width), new(7).abs(), new(3, 2 * width).abs()
        expert = torch.tensor([0, 0, 1, 1, 1, 2, 2], dtype=torch.int32).to(gate_up.device)
        value, *rows = kernels.swiglu_fp8(gate_up, shares, True)
        close([value], [kernels.swiglu(gate_up, shares)])
        equal_rows(rows, fp8.quantize_rows(value.cpu()))
        assert kernels.swiglu_fp8(gate_up, shares, False)[0] is None
        for keep in (True, False):
            out, *others, q, scale = kernels.swiglu_backward_fp8(gate_up, shares, gradient, columns, expert, keep, keep)
            plain = kernels.swiglu_backward(gate_up, shares, gradient, keep)
            close([out, *others], plain if keep else [None, *plain[1:]])
            equal_rows((q, scale), fp8.quantize_rows(plain[0].cpu(), columns.cpu()[expert.cpu().long()]))


def heads(new):
    for groups, per_group, size, r in (
        (2, 3, 32, 0),
        (1, 1, 16, 0),
        (8, 12, 128, 0),
        (2, 3, 64, 8),
        (8, 12, 128, 32),
        (1, 2, 128, 64),
        (1, 2, 128, 20),
    ):
        tokens, shape = 70, (groups, per_group + 2, size)
        mixed, width = new(tokens, *shape), groups * (per_group + 2) * size
        assert kernels.has_heads(size, size // 2) and kernels.adds_to_heads(size, size // 2, r) >= (r > 0)
        table = attention.rotary_table(torch.arange(tokens).remainder(41).to(mixed.device), size, 0.5, 1e4)
        factors = (new(tokens, r), new(width, r), 0.5) if r else ()
        plain = mixed.cpu().flatten(1).requires_grad_()
        low_rank = linear.LowRank(factors[0].cpu(), factors[1].cpu(), 0.5) if r else None
        outputs = attention.split_heads(plain * 1.0, shape, table.cpu(), low_rank)
        close(kernels.split_heads(mixed, table, per_group, *factors), outputs)
        gradients = [new(*output.shape) for output in outputs]
        torch.autograd.backward(outputs, [g.cpu() for g in gradients])
        close([kernels.join_heads(*gradients, table, per_group).flatten(1)], [plain.grad])


def words(new):
    logits, labels = new(4, 9000), torch.tensor([3, -2, 8999, 12000])
    close(kernels.row_sums(logits, labels.to(logits.device)), loss._row_sums(logits.cpu(), labels))
    lse = logits.logsumexp(1)
    for scale in (None, new(4)):
        ours = logits.clone()
        kernels.softmax_gradient_(ours, labels.to(logits.device), lse, scale)
        on_cpu = None if scale is None else scale.cpu()
        close([ours], [loss._softmax_gradient(logits.cpu(), labels, lse.cpu(), on_cpu)])


def routing(new):
    chosen = torch.stack([torch.randperm(16)[:4] for _ in range(50)])
    plan = plan_rows(chosen, 16)
    assert torch.equal(chosen.flatten()[plan.slot], chosen.flatten().sort(stable=True).values)
    assert torch.equal(plan.slot[plan.place.flatten()], torch.arange(200))
    counts = (chosen.flatten()[:, None] == torch.arange(16)).sum(0)
    assert plan.edges[0] == 0 and torch.equal(plan.edges[1:], counts.cumsum(0).int())
    part = plan_rows(chosen.clamp(max=11), 11)  # five experts are elsewhere
    part = part.first(int(part.edges[-1]))
    assert torch.equal(part.slot, plan.slot[: part.edges[-1]]) and torch.equal(part.edges, plan.edges[:12])
    assert torch.equal(part.place < part.slot.numel(), chosen < 11)
    device = new(1).device
    if device.type == "cuda":
        close(plan_rows(chosen.to(device), 16), plan)


if __name__ == "__main__":
    generator = torch.Generator().manual_seed(0)
    for check in (rows, normalisation, activation, quantization, activation_in_fp8, heads, words, routing):
        check(lambda *shape: torch.randn(*shape, generator=generator).to(sys.argv[1]))
