"""The same laws on NVIDIA cards. `pytest tests/gpu` on a machine that has them; elsewhere every test here says what it needs."""

import gc
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
@pytest.mark.parametrize("counts", [[7, 0, 120, 1], [0, 0, 0, 64], [32, 32, 32, 32], [700, 3, 0, 191]])
@pytest.mark.parametrize(
    "widths", [(64, 48), (256, 512), (136, 8), (8, 136), (16, 64), (512, 32), (264, 128), (32, 32), (264, 328)]
)
@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_products_equal_a_loop_over_experts(counts, widths, transposed):
    """bf16, uneven and empty experts, adapters' ranks: the grouped products within bf16 rounding of a loop in fp32."""
    from glm45_tune.mcore.layers.grouped import grouped_add_, grouped_mm, grouped_outer

    generator = torch.Generator("cuda").manual_seed(0)
    x, y = (torch.randn(sum(counts), n, device="cuda", generator=generator).bfloat16() for n in widths)
    weight = torch.randn(4, *(widths[::-1] if transposed else widths), device="cuda", generator=generator).bfloat16()
    weight = weight.transpose(1, 2) if transposed else weight
    edges = torch.tensor([0, *counts], device="cuda").cumsum(0).int()
    product = torch.cat([rows.float() @ w.float() for rows, w in zip(x.split(counts), weight)])
    outer = torch.stack([a.float().t() @ b.float() for a, b in zip(x.split(counts), y.split(counts))])
    added = y.clone()
    grouped_add_(added, x, weight, edges, 0.5)
    pairs = (grouped_mm(x, weight, edges), product), (added, y + 0.5 * product), (grouped_outer(x, y, edges), outer)
    for ours, plain in pairs:
        assert (ours.float() - plain).norm() <= 1e-2 * plain.norm()


@pytest.mark.gpu(1)
@pytest.mark.parametrize("lengths", [[512], [1, 300, 2, 129, 80], [64] * 9])
def test_flash_attention_equals_one_call_a_document(lengths):
    """bf16 value and gradients of FlashAttention-4 on packed rows against torch's attention in fp32, one document at a time."""
    from glm45_tune.mcore.layers import attention, fast

    if not fast.has_flash_attention():
        pytest.skip("needs flash-attn-4")
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


def _sizes(tensor=1, pipeline=1, expert=1, expert_tensor=1, context=1, virtual=1) -> dict[str, int]:
    return {
        "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": pipeline,
        "expert_model_parallel_size": expert,
        "expert_tensor_parallel_size": expert_tensor,
        "context_parallel_size": context,
        "virtual_pipeline_model_parallel_size": virtual,
    }


def _case(name, sizes, checkpoints, corpus, make_recipe, output, dtype, lora, **sections):
    sections = {
        "parallel": sizes,
        "model": {
            "mtp_loss_scaling_factor": 0.3,
            "moe_aux_loss_coeff": 1e-2,
            "moe_z_loss_coeff": 1e-3,
            "params_dtype": dtype,
        },
        **sections,
    }
    if lora:
        sections["lora"] = {"r": 8, "target_modules": "all-linear"}
    return {"name": name, "recipe": make_recipe(checkpoints["355b"], corpus, output / "run", **sections)}


TWO_CARDS = {
    "tensor": _sizes(tensor=2),
    "pipeline": _sizes(pipeline=2),
    "interleaved": _sizes(pipeline=2, virtual=2),
    "expert": _sizes(expert=2),
    "tensor and expert": _sizes(tensor=2, expert=2),
    "expert tensor": _sizes(expert_tensor=2),
    "context": _sizes(context=2),
    "context and expert": _sizes(context=2, expert=2),
    "data": _sizes(),
}


@pytest.mark.gpu(2)
@pytest.mark.parametrize("dtype, tolerance", [("fp32", 1e-4), ("bf16", 2e-2)])
def test_layouts_over_nccl(checkpoints, corpus, make_recipe, ranks, tmp_path, dtype, tolerance):
    """Losses and gradient norm of two cards against one. fp32 sums in another order on a GPU; bf16 rounds at other places."""
    common = (checkpoints, corpus, make_recipe, tmp_path, dtype)
    for world_size, layouts in ((1, {"one": _sizes()}), (2, TWO_CARDS)):
        cases = [_case(f"{name}{lora}", s, *common, lora) for name, s in layouts.items() for lora in (True, False)]
        (tmp_path / "cases.json").write_text(json.dumps(cases))
        ranks(world_size, WORKER, [str(tmp_path / "cases.json"), str(tmp_path)])
    for lora in (True, False):
        reference = json.loads((tmp_path / f"one{lora}.json").read_text())
        for name in TWO_CARDS:
            ours = json.loads((tmp_path / f"{name}{lora}.json").read_text())
            for key in ("train/loss", "train/mtp_loss", "train/aux_loss", "train/z_loss", "train/grad_norm"):
                assert abs(ours[key] / reference[key] - 1) <= tolerance, (lora, name, key)


@pytest.mark.gpu(1)
@pytest.mark.parametrize("group", [1, 12])
def test_context_pieces_by_one_kernel_equal_a_loop(group):
    """bf16, queries that are the end of their keys, grouped heads: value and gradients within bf16 rounding of fp32, each piece

    alone. The pieces are those of one of four context ranks, of documents from 1 to 700 tokens.
    """
    from glm45_tune.data.context import shares
    from glm45_tune.mcore.layers.context_parallel import _flash, _one_piece

    bounds = [0, 1, 701, 740, 745, 1000]
    share = shares(bounds, 4, 2)[1].to(torch.device("cuda"))
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(rows, heads):
        return torch.randn(rows, heads, 128, device="cuda", generator=generator).bfloat16().requires_grad_()

    inputs = draw(share.bounds[-1], 2 * group), draw(share.key_bounds[-1], 2), draw(share.key_bounds[-1], 2)
    out = _flash(*inputs, share)
    gradient = torch.randn(out.shape, device="cuda", generator=generator)
    found = torch.autograd.grad(out, inputs, gradient.bfloat16())
    query, key, value = plain = [x.detach().float().requires_grad_() for x in inputs]
    pieces = zip(share.bounds, share.bounds[1:], share.key_bounds, share.key_bounds[1:])
    expected_out = torch.cat([_one_piece(query[a:b], key[c:d], value[c:d]) for a, b, c, d in pieces])
    expected = torch.autograd.grad(expected_out, plain, gradient)
    for ours, theirs in zip((out, *found), (expected_out, *expected)):
        assert (ours.float() - theirs).norm() <= 1e-2 * theirs.norm()


@pytest.mark.gpu(1)
@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_offloaded_state_is_the_same_update_and_leaves_the_card(fraction):
    """Bit for bit the update of state that stays on the card; between steps the offloaded share takes no memory there."""
    from glm45_tune.mcore.adam import LeanAdamW

    settings, dtypes = (
        dict(lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1),
        {
            "exp_avg": torch.float32,
            "exp_avg_sq": torch.float32,
        },
    )
    size, results = 1 << 22, []
    for offload in (0.0, fraction):
        generator = torch.Generator("cuda").manual_seed(0)
        before = torch.cuda.memory_allocated()
        parameters = [torch.randn(size, device="cuda", generator=generator) for _ in range(4)]
        optimizer = LeanAdamW([{"params": parameters, **settings}], dtypes, offload, masters=True)
        for _ in range(3):
            optimizer.fetch()
            for parameter in parameters:
                parameter.grad = torch.randn(size, device="cuda", generator=generator)
            optimizer.step()
            for parameter in parameters:
                parameter.grad = None
            optimizer.release()
        kept = (torch.cuda.memory_allocated() - before) / (4 * size * 12)  # master and two moments, four bytes each
        assert abs(kept - (1 - offload)) < 0.01
        results.append([parameter.cpu() for parameter in parameters])
        del parameters, parameter, optimizer
        gc.collect()  # before the next is measured: an optimizer is part of a circle
    assert all(a.equal(b) for a, b in zip(*results))


@pytest.mark.gpu(1)
@pytest.mark.parametrize("lora", [True, False])
def test_deterministic_runs_end_with_the_same_bits(checkpoints, corpus, make_recipe, ranks, tmp_path, lora):
    """`train.deterministic` on as many cards as there are (tensor 2 × expert 2 on two): every saved tensor of two runs."""
    from glm45_tune.conversion.mcore_files import TorchDistFiles

    world_size = min(torch.cuda.device_count(), 2)
    sizes = _sizes(tensor=world_size, expert=world_size)
    common = (checkpoints, corpus, make_recipe, tmp_path, "bf16", lora)
    train = {"steps": 2, "global_batch_size": 4, "deterministic": True}
    cases = [_case(f"run{number}", sizes, *common, train=train) for number in range(2)]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    ranks(world_size, WORKER, [str(tmp_path / "cases.json"), str(tmp_path)])
    one, two = (TorchDistFiles(tmp_path / f"run{number}") for number in range(2))
    assert set(one.tensors) == set(two.tensors) and all(
        one.read_key(key).equal(two.read_key(key)) for key in one.tensors
    )
