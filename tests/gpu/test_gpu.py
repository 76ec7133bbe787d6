"""The same laws on NVIDIA cards. `pytest tests/gpu` on a machine that has them; elsewhere every test here says what it needs."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

WORKER = Path(__file__).parents[1] / "invariance" / "worker.py"


@pytest.mark.gpu(1)
def test_fp32_logits_equal_transformers(checkpoints, cli):
    """Hidden states after every layer and logits, 1e-4 of their range, as on a CPU."""
    for like in ("air", "355b"):
        code, out, _ = cli("verify", checkpoints[like], checkpoints[like], "--forward", "--json")
        assert code == 0 and json.loads(out)["equal"]


@pytest.mark.gpu(1)
@pytest.mark.parametrize("counts", [[7, 0, 120, 1], [0, 0, 0, 64], [32, 32, 32, 32]])
def test_grouped_linear_equals_a_loop_over_experts(counts):
    """bf16, uneven and empty experts: value and both gradients within bf16 rounding of the plain loop in fp32."""
    from glm45_tune.mcore.layers.experts import grouped_linear

    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(sum(counts), 64, device="cuda", generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(4, 48, 64, device="cuda", generator=generator).bfloat16().requires_grad_()
    out = grouped_linear(x, weight, torch.tensor(counts))
    gradient = torch.randn(out.shape, device="cuda", generator=generator)
    found = torch.autograd.grad(out, (x, weight), gradient.bfloat16())
    x32, weight32 = x.detach().float().requires_grad_(), weight.detach().float().requires_grad_()
    plain = torch.cat([F.linear(rows, w) for rows, w in zip(x32.split(counts), weight32)])
    expected = torch.autograd.grad(plain, (x32, weight32), gradient)
    for ours, theirs in zip((out, *found), (plain, *expected)):
        assert (ours.float() - theirs).norm() <= 1e-2 * theirs.norm()


def _case(name, sizes, checkpoints, corpus, make_recipe, output, dtype, lora):
    keys = (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "expert_model_parallel_size",
        "expert_tensor_parallel_size",
    )
    sections = {"parallel": dict(zip(keys, sizes)), "model": {"mtp_loss_scaling_factor": 0.3, "params_dtype": dtype}}
    if lora:
        sections["lora"] = {"r": 8, "target_modules": "all-linear"}
    return {"name": name, "recipe": make_recipe(checkpoints["air"], corpus, output / "run", **sections)}


@pytest.mark.gpu(2)
@pytest.mark.parametrize("dtype, tolerance", [("fp32", 1e-4), ("bf16", 2e-2)])
def test_layouts_over_nccl(checkpoints, corpus, make_recipe, ranks, tmp_path, dtype, tolerance):
    """Loss and gradient norm of two cards against one. fp32 sums in another order on a GPU; bf16 rounds at other places."""
    layouts = [(2, 1, 1, 1), (1, 2, 1, 1), (1, 1, 2, 1), (2, 1, 2, 1), (1, 1, 1, 2), (1, 1, 1, 1)]
    common = (checkpoints, corpus, make_recipe, tmp_path, dtype)
    for world_size, sizes in ((1, [(1, 1, 1, 1)]), (2, layouts)):
        cases = [_case(f"{lora}{world_size}{s}", s, *common, lora) for s in sizes for lora in (True, False)]
        (tmp_path / "cases.json").write_text(json.dumps(cases))
        ranks(world_size, WORKER, [str(tmp_path / "cases.json"), str(tmp_path)])
    for lora in (True, False):
        reference = json.loads((tmp_path / f"{lora}1(1, 1, 1, 1).json").read_text())
        for sizes in layouts:
            ours = json.loads((tmp_path / f"{lora}2{sizes}.json").read_text())
            for key in ("train/loss", "train/mtp_loss", "train/grad_norm"):
                assert abs(ours[key] / reference[key] - 1) <= tolerance, (lora, sizes, key)
