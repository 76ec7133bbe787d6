"""A frozen base in FP8: the rule of quantization and its products, the weights that come of any checkpoint, and what is refused."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from glm45_tune.errors import CheckpointError, RecipeError
from glm45_tune.mcore.layers import fp8
from glm45_tune.mcore.layers.rows import plan_rows
from glm45_tune.mcore.layers.weight import Cast, Fp8, Plain

sys.path.insert(0, str(Path(__file__).parents[1]))


def _draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _difference(ours, exact):
    return ((ours.double() - exact).norm() / exact.norm()).item()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40))
def test_a_quantized_row_is_off_by_half_a_step_at_most_and_never_saturates(values):
    """3 bits of mantissa: 1 / 16 of a value; below 2⁻⁶ of the scale, half of 2⁻⁹. Of e4m3's largest value no row has more."""
    row = torch.tensor([values])
    q, scale = fp8.quantize_rows(row)
    assert q.float().isfinite().all() and q.float().abs().max() <= 448 and scale.isfinite().all() and (scale > 0).all()
    if row.abs().max() >= fp8.SMALLEST:
        assert q.float().abs().max() == 448
        error = (q.double() * scale.double().unsqueeze(1) - row.double()).abs()
        assert (error <= (row.double().abs() / 16).clamp(min=scale.item() * 2**-10) * (1 + 1e-6)).all()
    else:
        assert (q.float() == 0).all() and scale == 1


def test_a_row_of_zeros_has_scale_1_and_nan_or_infinity_reach_the_scale():
    x = _draw(4, 8)
    x[0], x[1, 3], x[2, 5] = 0, float("nan"), float("inf")
    rows = fp8.quantize_rows(x)
    assert rows.scale[0] == 1 and (rows.q[0].float() == 0).all()
    assert not rows.scale[1:3].isfinite().any() and rows.scale[3].isfinite()
    weight = fp8.quantize_rows(_draw(5, 8, seed=1))
    finite = Fp8(*weight, torch.float32).product(x, None).isfinite()
    assert finite[[0, 3]].all() and not finite[1:3].any()


def test_products_are_those_of_what_the_rows_stand_for():
    """Forward with a bias, and the gradient of the input, whose columns the channels' scales multiply before it is quantized."""
    x, gradient, bias = _draw(7, 33), _draw(7, 20, seed=1), _draw(20, seed=2)
    weight = fp8.quantize_rows(_draw(20, 33, seed=3))
    exact = fp8.dequantize_rows(weight, torch.float64)
    ours = Fp8(*weight, torch.float32)
    rows = fp8.dequantize_rows(fp8.quantize_rows(x), torch.float64)
    assert _difference(ours.product(x, bias), rows @ exact.t() + bias) < 1e-6
    rows = fp8.dequantize_rows(fp8.quantize_rows(gradient * weight.scale), torch.float64)
    assert _difference(ours.input_gradient(gradient), rows @ weight.q.double()) < 1e-6
    # and these are not far from what would be without quantized rows: e4m3's error, once
    assert _difference(ours.input_gradient(gradient), gradient.double() @ exact) < 0.04


def test_grouped_products_are_each_experts_own():
    chosen = torch.randint(0, 4, (30, 2), generator=torch.Generator().manual_seed(0))
    plan, x, gradient = plan_rows(chosen, 4), _draw(30, 12), _draw(30, 10, seed=1)
    weight = fp8.quantize_rows(_draw(4, 10, 12, seed=2))
    for kind in (Fp8, Cast):
        grouped = kind(*weight, torch.float32)
        found = grouped.grouped(grouped.spread(x, plan, False)[1], plan)
        back = grouped.grouped_input_gradient(grouped.spread_gradient(gradient, plan, False)[1], plan)
        for row, choice in enumerate(plan.slot.tolist()):
            one = kind(weight.q[plan.expert[row]], weight.scale[plan.expert[row]], torch.float32)
            torch.testing.assert_close(found[row], one.product(x[choice // 2, None], None)[0])
            torch.testing.assert_close(back[row], one.input_gradient(gradient[choice // 2, None])[0])


def test_a_cast_weight_is_the_dequantized_one():
    x, gradient, bias = _draw(7, 33), _draw(7, 20, seed=1), _draw(20, seed=2)
    weight = fp8.quantize_rows(_draw(20, 33, seed=3))
    ours, plain = Cast(*weight, torch.float32), Plain(fp8.dequantize_rows(weight, torch.float32))
    torch.testing.assert_close(ours.product(x, bias), plain.product(x, bias))
    torch.testing.assert_close(ours.input_gradient(gradient), plain.input_gradient(gradient))


def test_gradients_over_an_fp8_base_point_where_those_of_exact_products_do(one_rank):
    """A dense and a MoE layer, LoRA on all linears, the same experts: the cosine of every tensor's gradient at least 0.99."""
    from fp8_gradients import cosines, gradients

    from glm45_tune.plan.models import find_spec

    small = dict(
        hidden_size=512, ffn_hidden_size=1024, moe_ffn_hidden_size=176, num_attention_heads=8, num_query_groups=2
    )
    small |= dict(num_layers=2, num_moe_experts=8, moe_router_topk=4, vocab_size=512, mtp_num_layers=0)
    spec = dataclasses.replace(find_spec("GLM-4.5-Air")[0], **small)
    loss, exact, routes = gradients(spec, 128, torch.float32, "fp8", "bf16")
    loss_fp8, ours, _ = gradients(spec, 128, torch.float32, "fp8", "fp8", routes)
    assert abs(loss_fp8 - loss) < 0.01 and min(cosines(ours, exact).values()) >= 0.99


@pytest.fixture(scope="module")
def releases(checkpoints, tmp_path_factory):
    """The tiny model as its makers would release it in FP8, and as megatron's directory."""
    from glm45_tune.conversion.fp8 import Quantized
    from glm45_tune.conversion.stream import open_model, to_hf, to_mcore

    root, source = tmp_path_factory.mktemp("releases"), checkpoints["air"]
    to_hf(Quantized(open_model(source), "channel"), root / "channel")
    to_mcore(open_model(source), root / "mcore", "hybrid")
    return {"bf16": source, "channel": root / "channel", "mcore": root / "mcore"}


def _loaded(path, one_rank, **options):
    """→ (weights and scales by name, what loading said)."""
    from glm45_tune.conversion.stream import open_model
    from glm45_tune.mcore.load import load_weights
    from glm45_tune.mcore.model import GLM45Model, ModelOptions

    source = open_model(path)
    model = GLM45Model(source.spec, one_rank, ModelOptions(torch.bfloat16, "fp8", with_mtp=True, **options))
    lines = load_weights(model, source)
    held = {name: (m.weight, m.weight_scale) for name, m in model.named_modules() if hasattr(m, "weight_scale")}
    assert len(held) == 4 * source.spec.num_layers + 4 + 2 * (source.spec.num_layers - source.spec.num_dense_layers + 1)
    return held, lines


def test_a_release_in_fp8_is_taken_as_it_is_and_bf16_gives_the_same_bytes(releases, one_rank):
    """Channel by channel and tensor by tensor, fused or not, experts and MTP's layer, from either format."""
    from glm45_tune.conversion.hf_files import AsStored, HfDir

    found = {name: _loaded(path, one_rank) for name, path in releases.items()}
    reference, _ = found["bf16"]
    for name, (held, lines) in found.items():
        assert all("as the checkpoint has it" in line for line in lines) == (name == "channel")
        assert all(
            torch.equal(q.float(), reference[key][0].float()) and torch.equal(scale, reference[key][1])
            for key, (q, scale) in held.items()
        )
    stored = AsStored(HfDir(releases["channel"]))
    q, scale = found["channel"][0]["decoder.layers.2.self_attention.linear_proj"]
    assert torch.equal(q.float(), stored.read("model.layers.1.self_attn.o_proj.weight").float())
    assert torch.equal(scale, stored.read("model.layers.1.self_attn.o_proj.weight_scale").flatten())
    gate_up, scale = found["channel"][0]["decoder.layers.3.mlp.experts.linear_fc1"]
    half = gate_up.shape[1] // 2
    assert torch.equal(gate_up[5, half:].float(), stored.read("model.layers.1.mlp.experts.5.up_proj.weight").float())
    assert torch.equal(scale[5, half:], stored.read("model.layers.1.mlp.experts.5.up_proj.weight_scale").flatten())


def test_start_up_says_what_quantizing_cost(releases, one_rank):
    """2.6 % of e4m3 with a scale a channel on Gaussian weights, by kind of weight."""
    _, lines = _loaded(releases["bf16"], one_rank)
    kinds = [line.partition(":")[0] for line in lines]
    assert {"self_attention.linear_qkv", "mlp.experts.linear_fc1", "mlp.linear_fc2"} <= set(kinds) and len(
        set(kinds)
    ) == len(kinds)
    errors = [float(line.partition("error ")[2].partition("%")[0]) for line in lines]
    assert all(2.3 < error < 2.9 for error in errors)


def _edited(source, target, edit):
    """A copy of a checkpoint with some tensors changed."""
    shutil.copytree(source, target)
    for path in target.glob("*.safetensors"):
        tensors = load_file(path)
        edit(tensors)
        save_file(tensors, path, {"format": "pt"})
    return target


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_is_not_a_positive_number_is_refused(releases, one_rank, tmp_path, value):
    name = "model.layers.1.mlp.experts.3.down_proj.weight_scale"

    def edit(tensors):
        if name in tensors:
            tensors[name].view(-1)[1] = value

    with pytest.raises(CheckpointError, match=rf"{name} holds the scale .*positive"):
        _loaded(_edited(releases["channel"], tmp_path / "edited", edit), one_rank)


def test_a_weight_that_fp8_cannot_hold_is_refused_and_a_channel_of_zeros_is_said(releases, one_rank, tmp_path):
    name = "model.layers.1.self_attn.k_proj.weight"

    def edit(tensors, value):
        if name in tensors:
            tensors[name][3] = value

    with pytest.raises(CheckpointError, match=rf"{name} holds NaN or infinity"):
        _loaded(_edited(releases["bf16"], tmp_path / "nan", lambda t: edit(t, float("nan"))), one_rank)
    held, lines = _loaded(_edited(releases["bf16"], tmp_path / "zeros", lambda t: edit(t, 0.0)), one_rank)
    assert sum("1 of" in line and "channels are zero" in line for line in lines) == 1
    assert all((scale > 0).all() for _, scale in held.values())


def test_full_fine_tuning_of_an_fp8_base_is_refused_and_auto_means_what_fits(releases, make_recipe, corpus, tmp_path):
    from glm45_tune.conversion.stream import open_model
    from glm45_tune.recipe import Recipe
    from glm45_tune.training.frozen import settled

    with pytest.raises(RecipeError, match="full fine-tuning trains all"):
        Recipe.from_dict(make_recipe(releases["channel"], corpus, tmp_path, model={"frozen_dtype": "fp8"}))
    for path, lora, kept in (("channel", {"r": 4}, "fp8"), ("channel", None, "bf16"), ("bf16", {"r": 4}, "bf16")):
        sections = {"lora": lora} if lora else {}
        recipe = Recipe.from_dict(make_recipe(releases[path], corpus, tmp_path, **sections))
        assert settled(recipe, open_model(releases[path])).model.frozen_dtype == kept


def test_a_run_over_an_fp8_base_learns_resumes_exactly_and_says_its_base(
    releases, make_recipe, corpus, train_here, tmp_path, capfd
):
    """Beside the same run over bf16: the loss falls as far, to 2 %; stopped after half its steps and resumed, it ends the same."""

    def run(name, path, steps=(12,), **model):
        for last in steps:
            recipe = make_recipe(
                releases[path],
                corpus,
                tmp_path / name,
                model=model,
                lora={"r": 8, "target_modules": "all-linear"},
                optimizer={"lr": 5e-3, "min_lr": 5e-3},
                train={"steps": last, "on_change": "continue"},
            )
            train_here(recipe)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [record["train/loss"] for record in map(json.loads, lines) if "train/loss" in record]

    bf16 = run("bf16", "bf16")
    assert "frozen in FP8" not in capfd.readouterr().err
    whole = run("whole", "channel")
    assert "base      frozen in FP8, products in fp8" in capfd.readouterr().err
    assert run("parts", "channel", steps=(6, 12)) == whole
    assert whole[-1] < 0.8 * whole[0] and abs(whole[-1] / bf16[-1] - 1) < 0.02
    cast = run("cast", "bf16", frozen_dtype="fp8", frozen_products="bf16")
    assert abs(cast[-1] / bf16[-1] - 1) < 0.02
