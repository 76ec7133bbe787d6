"""The FP8 kernels of a card held to the rule in plain torch (mcore/layers/fp8.py), and an FP8 base held to one in bf16."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

pytestmark = pytest.mark.gpu(1)


def _draw(*shape, seed=0):
    return torch.randn(*shape, device="cuda", generator=torch.Generator("cuda").manual_seed(seed)).bfloat16()


def _difference(ours, plain):
    return ((ours.cpu().double() - plain.double()).norm() / plain.double().norm()).item()


@pytest.mark.parametrize("rows, inputs, outputs", [(1, 64, 48), (300, 4096, 1408), (77, 1408, 4096), (64, 96, 112)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_product_is_the_rule(rows, inputs, outputs, bias):
    """Forward with row and channel scales and a bias, and the gradient of the input: bf16's rounding and the tensor cores' sums."""
    from glm45_tune.mcore.layers import fp8
    from glm45_tune.mcore.layers.weight import Fp8

    x, gradient, added = _draw(rows, inputs), _draw(rows, outputs, seed=1), _draw(outputs, seed=2) if bias else None
    weight = fp8.quantize_rows(_draw(outputs, inputs, seed=3))
    ours = Fp8(*weight, torch.bfloat16)
    plain = Fp8(*(part.cpu() for part in weight), torch.bfloat16)
    assert _difference(ours.product(x, added), plain.product(x.cpu(), None if added is None else added.cpu())) < 6e-3
    assert _difference(ours.input_gradient(gradient), plain.input_gradient(gradient.cpu())) < 6e-3


@pytest.mark.parametrize("counts", [[7, 0, 120, 1], [0, 0, 0, 64], [700, 3, 0, 190]])
@pytest.mark.parametrize("inputs, outputs", [(64, 48), (512, 1408), (1408, 512), (96, 224)])
def test_a_grouped_product_is_the_rule(counts, inputs, outputs):
    """Uneven and empty experts: forward, and the gradient with the channels' scales folded in."""
    from glm45_tune.mcore.layers import fp8
    from glm45_tune.mcore.layers.rows import plan_rows
    from glm45_tune.mcore.layers.weight import Fp8

    chosen = torch.cat([torch.full((count,), expert) for expert, count in enumerate(counts)])
    chosen = chosen[torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0))].view(-1, 1)
    x, gradient = _draw(len(chosen), inputs), _draw(len(chosen), outputs, seed=1)
    weight = fp8.quantize_rows(_draw(4, outputs, inputs, seed=3).cpu())
    plan = plan_rows(chosen, 4)
    plain = Fp8(*weight, torch.bfloat16)
    ours = Fp8(*(part.cuda() for part in weight), torch.bfloat16)
    here = type(plan)(*(part.cuda() for part in plan))
    found = ours.grouped(ours.spread(x, here, False)[1], here)
    assert _difference(found, plain.grouped(plain.spread(x.cpu(), plan, False)[1], plan)) < 6e-3
    found = ours.grouped_input_gradient(ours.spread_gradient(gradient, here, False)[1], here)
    expected = plain.grouped_input_gradient(plain.spread_gradient(gradient.cpu(), plan, False)[1], plan)
    assert _difference(found, expected) < 6e-3


def test_weights_turned_once_and_each_time_give_the_same_bits():
    from glm45_tune.mcore.layers import fp8
    from glm45_tune.mcore.layers.weight import Fp8

    weight = fp8.quantize_rows(_draw(256, 384))
    gradient = _draw(40, 256, seed=1)
    kept = Fp8(*weight, torch.bfloat16, fp8.turned(weight.q).clone())
    assert torch.equal(kept.input_gradient(gradient), Fp8(*weight, torch.bfloat16).input_gradient(gradient))


def test_nan_and_infinity_are_seen():
    """In the rows that had them, and in no others."""
    from glm45_tune.mcore.layers import fp8
    from glm45_tune.mcore.layers.weight import Fp8

    x = _draw(8, 128)
    x[2, 3], x[5, 7] = float("nan"), float("inf")
    found = Fp8(*fp8.quantize_rows(_draw(64, 128, seed=1)), torch.bfloat16).product(x, None).isfinite()
    assert not found[[2, 5]].any() and found[[0, 1, 3, 4, 6, 7]].all()


def test_gradients_over_an_fp8_base_point_where_bf16s_do():
    """A dense and a MoE layer of GLM-4.5-Air's width with trained-like weights, LoRA on all linears, the experts that bf16 chooses:

    of every tensor, FP8 products against bf16 products of the same FP8 weights, and these against the weights in bf16.
    """
    from fp8_gradients import cosines, gradients

    from glm45_tune.layout import Layout
    from glm45_tune.mcore import runtime
    from glm45_tune.plan.models import find_spec

    runtime.start(Layout())
    spec = dataclasses.replace(find_spec("GLM-4.5-Air")[0], num_layers=2, mtp_num_layers=0, num_moe_experts=32)
    loss, bf16, routes = gradients(spec, 2048, torch.bfloat16, "bf16", "bf16")
    loss_cast, cast, _ = gradients(spec, 2048, torch.bfloat16, "fp8", "bf16", routes)
    loss_fp8, fp8, own = gradients(spec, 2048, torch.bfloat16, "fp8", "fp8", routes)
    agree = [(own[n].unsqueeze(1) == rows.unsqueeze(2)).any(1).float().mean().item() for n, rows in routes.items()]
    products, weights = cosines(fp8, cast), cosines(cast, bf16)
    print(f"losses {loss:.4f} {loss_cast:.4f} {loss_fp8:.4f}; experts that agree {min(agree):.3f}")
    for name in products:
        print(f"{name.removeprefix('decoder.layers.')}: products {products[name]:.4f}, weights {weights[name]:.4f}")
    assert abs(loss_fp8 - loss_cast) < 0.01 and abs(loss_fp8 - loss) < 0.02
    assert min(products.values()) >= 0.99 and min(weights.values()) >= 0.98
