"""Each Triton kernel against its plain twin, forward and backward: `python tests/kernel_twins.py cuda`, or with TRITON_INTERPRET=1 `cpu`."""

import sys

import torch

from glm45_tune.mcore.layers import attention, experts, kernels, linear, loss, swiglu


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
        close([experts._sum(back.cpu(), place)], [there])
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
    plan = experts.plan_rows(chosen, 16)
    assert torch.equal(chosen.flatten()[plan.slot], chosen.flatten().sort(stable=True).values)
    assert torch.equal(plan.slot[plan.place.flatten()], torch.arange(200))
    counts = (chosen.flatten()[:, None] == torch.arange(16)).sum(0)
    assert plan.edges[0] == 0 and torch.equal(plan.edges[1:], counts.cumsum(0).int())
    part = experts.plan_rows(chosen.clamp(max=11), 11)  # five experts are elsewhere
    part = part.first(int(part.edges[-1]))
    assert torch.equal(part.slot, plan.slot[: part.edges[-1]]) and torch.equal(part.edges, plan.edges[:12])
    assert torch.equal(part.place < part.slot.numel(), chosen < 11)
    device = new(1).device
    if device.type == "cuda":
        close(experts.plan_rows(chosen.to(device), 16), plan)


if __name__ == "__main__":
    generator = torch.Generator().manual_seed(0)
    for check in (rows, normalisation, activation, heads, words, routing):
        check(lambda *shape: torch.randn(*shape, generator=generator).to(sys.argv[1]))
