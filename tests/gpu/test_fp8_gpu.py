"""The FP8 kernels of a card held to the rule in plain torch (mcore/layers/fp8.py), and an FP8 base held to one in bf16."""

import dataclasses

import pytest
import torch

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
    chosen = chosen[torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0))].view(-1, 2)
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


@pytest.mark.parametrize("products, least", [("fp8", 0.99), ("bf16", 0.99)])
def test_gradients_over_an_fp8_base_point_where_bf16s_do(products, least):
    """A dense and a MoE layer of GLM-4.5-Air's width with trained-like weights, LoRA on all linears; loss, and each tensor's cosine."""
    from glm45_tune.layout import Layout
    from glm45_tune.mcore import lora, runtime
    from glm45_tune.mcore.layers.fp8 import quantize_rows
    from glm45_tune.mcore.layers.weight import keep_turned  # noqa: F401
    from glm45_tune.mcore.model import GLM45Model, ModelOptions
    from glm45_tune.plan.models import find_spec
    from glm45_tune.recipe import LoraConfig

    runtime.start(Layout())
    spec = dataclasses.replace(find_spec("GLM-4.5-Air")[0], num_layers=2, mtp_num_layers=0, num_moe_experts=32)
    tokens = torch.randint(0, spec.vocab_size, (1024,), generator=torch.Generator().manual_seed(1)).cuda()
    found = {}
    for kept in ("bf16", "fp8"):
        model = GLM45Model(spec, Layout(), ModelOptions(torch.bfloat16, kept, products)).cuda()
        lora.attach(model, LoraConfig(r=16, target_modules="all-linear"), seed=1)
        with torch.no_grad():
            for number, (name, tensor) in enumerate(model.named_parameters()):
                generator = torch.Generator("cuda").manual_seed(number)
                values = torch.empty(tensor.shape, device="cuda").normal_(
                    float("norm" in name), 0.02, generator=generator
                )
                if tensor.dtype == torch.float8_e4m3fn:
                    module = model.get_submodule(name.rpartition(".")[0])
                    for part, scale, q in zip(
                        values.view(-1, *values.shape[-2:]),
                        module.weight_scale.view(-1, values.shape[-2]),
                        tensor.view(-1, *values.shape[-2:]),
                    ):
                        rows = quantize_rows(part.bfloat16())
                        scale.copy_(rows.scale)
                        q.copy_(rows.q)
                else:
                    tensor.copy_(values)
        model.train()
        losses = model(tokens, torch.arange(1024, device="cuda"), [0, 1024], tokens.roll(-1)[None])
        losses.mean().backward()
        found[kept] = (
            losses.mean().item(),
            {n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None},
        )
        del model
        torch.cuda.empty_cache()
    (loss, gradients), (loss_fp8, gradients_fp8) = found["bf16"], found["fp8"]
    assert abs(loss_fp8 - loss) < 0.02
    cosines = {
        name: torch.nn.functional.cosine_similarity(gradients[name].flatten(), gradients_fp8[name].flatten(), 0).item()
        for name in gradients
    }
    print({name.removeprefix("decoder.layers."): round(value, 4) for name, value in cosines.items()})
    assert min(cosines.values()) >= least, min(cosines.items(), key=lambda item: item[1])
