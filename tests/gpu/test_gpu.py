"""The same laws on NVIDIA cards. `pytest tests/gpu` on a machine that has them; elsewhere every test here says what it needs."""

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

WORKER = Path(__file__).parents[1] / "invariance" / "worker.py"
TWINS = Path(__file__).parents[1] / "kernel_twins.py"


@pytest.mark.gpu(1)
def test_fp32_logits_equal_transformers(checkpoints, cli):
    """Hidden states after every layer and logits, 1e-4 of their range, as on a CPU."""
    for like in ("air", "355b"):
        code, out, _ = cli("verify", checkpoints[like], checkpoints[like], "--forward", "--json")
        assert code == 0 and json.loads(out)["equal"]


@pytest.mark.gpu(1)
def test_every_kernel_equals_its_plain_twin():
    """fp32, forward and backward, sizes that do not fill a block."""
    done = subprocess.run([sys.executable, TWINS, "cuda"], stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu(1)
@pytest.mark.parametrize("counts", [[7, 0, 120, 1], [0, 0, 0, 64], [32, 32, 32, 32]])
def test_grouped_products_equal_a_loop_over_experts(counts):
    """bf16, uneven and empty experts: both grouped products within bf16 rounding of a loop in fp32."""
    from glm45_tune.mcore.layers.experts import grouped_mm, grouped_outer

    generator = torch.Generator("cuda").manual_seed(0)
    x, y = (torch.randn(sum(counts), n, device="cuda", generator=generator).bfloat16() for n in (64, 48))
    weight = torch.randn(4, 64, 48, device="cuda", generator=generator).bfloat16()
    ends = torch.tensor(counts, device="cuda").cumsum(0).int()
    product = torch.cat([rows.float() @ w.float() for rows, w in zip(x.split(counts), weight)])
    outer = torch.stack([a.float().t() @ b.float() for a, b in zip(x.split(counts), y.split(counts))])
    for ours, plain in ((grouped_mm(x, weight, ends), product), (grouped_outer(x, y, ends), outer)):
        assert (ours.float() - plain).norm() <= 1e-2 * plain.norm()


@pytest.mark.gpu(1)
@pytest.mark.parametrize("lengths", [[512], [1, 300, 2, 129, 80], [64] * 9])
def test_cudnn_attention_equals_one_call_a_document(lengths):
    """bf16 value and gradients of nvidia-cudnn-frontend on packed rows against torch's attention in fp32, one document at a time."""
    from glm45_tune.mcore.layers import attention

    if not attention.has_cudnn_attention():
        pytest.skip("needs nvidia-cudnn-frontend")
    generator = torch.Generator("cuda").manual_seed(0)
    row = attention.PackedRow([0, *torch.tensor(lengths).cumsum(0).tolist()], torch.device("cuda"))
    q, k, v, gradient = (
        torch.randn(sum(lengths), heads, 128, device="cuda", generator=generator).bfloat16() for heads in (12, 2, 2, 12)
    )

    def run(dtype):
        inputs = [t.to(dtype).requires_grad_() for t in (q, k, v)]
        output = attention.packed_attention(*inputs, row)
        return output, *torch.autograd.grad(output, inputs, gradient.to(dtype))

    for ours, plain in zip(run(torch.bfloat16), run(torch.float32)):
        assert (ours.float() - plain).norm() <= 1e-2 * plain.norm()


def _gradients(model, dtype, seed=3):
    """Of the embedding, a router, an expert stack and an attention output under one packed row; by our names and HF's."""
    import transformers

    from glm45_tune.conversion.stream import open_model
    from glm45_tune.layout import Layout
    from glm45_tune.mcore import runtime
    from glm45_tune.mcore.load import load_weights
    from glm45_tune.mcore.model import GLM45Model, ModelOptions

    runtime.start(Layout())
    source = open_model(model)
    ours = GLM45Model(source.spec, Layout(), ModelOptions(dtype))
    load_weights(ours, source)
    ours.cuda().train()
    theirs = transformers.Glm4MoeForCausalLM.from_pretrained(model, dtype=dtype).cuda().train()
    tokens = torch.randint(0, source.spec.vocab_size, (200,), generator=torch.Generator().manual_seed(seed)).cuda()
    bounds, total = [0, 70, 71, 200], 0.0
    positions = torch.cat([torch.arange(last - first) for first, last in zip(bounds, bounds[1:])]).cuda()
    losses = ours(tokens, positions, bounds, tokens.roll(-1)[None])[0]
    inside = torch.ones(200, device="cuda")
    inside[[69, 70, 199]] = 0.0  # the last token of a document predicts nothing
    (losses * inside).sum().backward()
    for first, last in zip(bounds, bounds[1:]):
        logits = theirs(tokens[None, first:last]).logits[0, :-1].float()
        total = total + F.cross_entropy(logits, tokens[first + 1 : last], reduction="sum")
    total.backward()
    layer = source.spec.num_dense_layers
    hybrid, hf = ours.decoder.layers[2 * layer + 1], theirs.model.layers[layer]
    pairs = [
        (ours.embedding.word_embeddings.weight, theirs.model.embed_tokens.weight),
        (ours.output_layer.weight, theirs.lm_head.weight),
        (hybrid.mlp.router.weight, hf.mlp.gate.weight),
        (hybrid.mlp.experts.linear_fc1.weight, hf.mlp.experts.gate_up_proj),
        (hybrid.mlp.experts.linear_fc2.weight, hf.mlp.experts.down_proj),
        (ours.decoder.layers[2 * layer].self_attention.linear_proj.weight, hf.self_attn.o_proj.weight),
    ]
    return [(losses * inside).sum(), *(a.grad for a, _ in pairs)], [total, *(b.grad for _, b in pairs)]


@pytest.mark.gpu(1)
def test_fast_path_gradients_equal_transformers(checkpoints):
    """Loss and gradients of packed rows against fp32 transformers: fp32 within 1e-5 of their norm in most rows, bf16 no further

    than 1.2 times transformers' own bf16 over all rows: in some rows a rounding, of fp32 even, changes a token's experts.
    """
    exactness, our_error, their_error = [], 0.0, 0.0
    for seed in range(8):
        ours, exact = _gradients(checkpoints["air"], torch.float32, seed)
        exactness.append(max(((a - b).norm() / b.norm()).item() for a, b in zip(ours, exact)))
        ours, theirs = _gradients(checkpoints["air"], torch.bfloat16, seed)
        our_error += sum((a.float() - reference).norm() / reference.norm() for a, reference in zip(ours, exact))
        their_error += sum((b.float() - reference).norm() / reference.norm() for b, reference in zip(theirs, exact))
    assert statistics.median(exactness) <= 1e-5
    assert our_error <= 1.2 * their_error


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
