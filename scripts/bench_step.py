"""Milliseconds of one GLM-4.5-Air MoE layer, forward + backward under LoRA, ours and transformers + PEFT in turns. One GPU:

    python scripts/bench_step.py [--tokens 8192] [--no-peer]

Both are built at Air's width with random bf16 weights, at two depths; a layer is the difference of the two, so that embedding,
head and launch overheads fall out. LoRA r 32 on attention, a row of `tokens`: one document, or many of log-normal lengths.
"""

import argparse
import dataclasses
import statistics

import numpy as np
import torch

from glm45_tune.layout import Layout
from glm45_tune.mcore import lora, runtime
from glm45_tune.mcore.model import GLM45Model, ModelOptions
from glm45_tune.recipe import LoraConfig
from glm45_tune.spec import ModelSpec

SHALLOW, DEEP, REPEATS = 2, 5, 7
AIR = ModelSpec(
    num_layers=DEEP,
    num_dense_layers=1,
    hidden_size=4096,
    ffn_hidden_size=10944,
    moe_ffn_hidden_size=1408,
    num_attention_heads=96,
    num_query_groups=8,
    kv_channels=128,
    num_moe_experts=128,
    moe_router_topk=8,
    num_shared_experts=1,
    moe_router_topk_scaling_factor=1.0,
    moe_router_num_groups=1,
    moe_router_group_topk=1,
    qk_layernorm=False,
    add_qkv_bias=True,
    vocab_size=151552,
    rotary_percent=0.5,
    rotary_base=1e6,
    layernorm_epsilon=1e-5,
    mtp_num_layers=0,
    eos_token_ids=(151329,),
)


def documents(tokens: int, packed: bool) -> list[int]:
    """Edges of the documents of a row."""
    if not packed:
        return [0, tokens]
    lengths = np.random.default_rng(0).lognormal(6.0, 0.6, 200).astype(int)
    ends = np.cumsum(lengths)
    return [0, *ends[ends < tokens].tolist(), tokens]


def ours(depth: int, recompute: str | None):
    """A function of (tokens, bounds) that runs forward and backward."""
    spec = dataclasses.replace(AIR, num_layers=depth)
    options = ModelOptions(
        torch.bfloat16,
        recompute_granularity=recompute,
        recompute_method="uniform" if recompute else None,
        recompute_num_layers=1 if recompute else None,
    )
    model = GLM45Model(spec, Layout(), options)
    lora.attach(model, LoraConfig(r=32, lora_alpha=64), seed=1)
    _randomise(model)
    model.train()

    def step(tokens, bounds):
        lengths = np.diff(bounds)
        positions = torch.cat([torch.arange(n) for n in lengths]).to(tokens.device)
        model(tokens, positions, bounds, tokens[None].roll(-1, 1)).mean().backward()
        model.zero_grad(set_to_none=True)

    return step


def peer(depth: int, recompute: str | None):
    """transformers + PEFT at its best on one document: grouped_mm experts, SDPA."""
    import peft
    import transformers

    config = transformers.Glm4MoeConfig(
        num_hidden_layers=depth,
        first_k_dense_replace=1,
        hidden_size=AIR.hidden_size,
        intermediate_size=AIR.ffn_hidden_size,
        moe_intermediate_size=AIR.moe_ffn_hidden_size,
        num_attention_heads=AIR.num_attention_heads,
        num_key_value_heads=AIR.num_query_groups,
        head_dim=AIR.kv_channels,
        n_routed_experts=AIR.num_moe_experts,
        num_experts_per_tok=AIR.moe_router_topk,
        attention_bias=True,
        vocab_size=AIR.vocab_size,
    )
    config._experts_implementation = "grouped_mm"
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = transformers.Glm4MoeForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=32, lora_alpha=64, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    )
    _randomise(model)
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()

    def step(tokens, bounds):
        model(tokens[None], labels=tokens[None]).loss.backward()
        model.zero_grad(set_to_none=True)

    return step


@torch.no_grad()
def _randomise(model) -> None:
    """Trained-like scales: zeros and ones would hide work."""
    for name, tensor in model.named_parameters():
        tensor.normal_(1.0 if "norm" in name else 0.0, 0.02)


def milliseconds(step, tokens, bounds) -> float:
    """Median over repeats, by CUDA events, warmed up."""
    times = []
    for _ in range(REPEATS + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step(tokens, bounds)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[2:])


def measure(build, recompute, rows) -> dict[str, tuple[float, float]]:
    """Row name → (milliseconds a MoE layer, GiB of activations a layer)."""
    found: dict[str, list] = {name: [] for name in rows}
    for depth in (SHALLOW, DEEP):
        step = build(depth, recompute)
        for name, (tokens, bounds) in rows.items():
            step(tokens, bounds)
            held = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            found[name].append((milliseconds(step, tokens, bounds), (torch.cuda.max_memory_allocated() - held) / 2**30))
        del step
        torch.cuda.empty_cache()
    layers = DEEP - SHALLOW
    return {name: tuple((deep - shallow) / layers for shallow, deep in zip(*both)) for name, both in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--no-peer", action="store_true")
    arguments = parser.parse_args()
    runtime.start(Layout())
    print(torch.cuda.get_device_name(), torch.__version__, f"{arguments.tokens} tokens, LoRA r 32 on attention, bf16")
    tokens = torch.randint(0, AIR.vocab_size, (arguments.tokens,), device="cuda")
    one, many = documents(arguments.tokens, False), documents(arguments.tokens, True)
    rows = {"one document": (tokens, one), f"{len(many) - 1} documents": (tokens, many)}
    for recompute in (None, "full"):
        for name, (ms, gib) in measure(ours, recompute, rows).items():
            print(f"ours, recompute {recompute}, {name}: {ms:.1f} ms a layer, {gib:.2f} GiB kept", flush=True)
        if not arguments.no_peer:
            alone = {"one document": rows["one document"]}
            for name, (ms, gib) in measure(peer, recompute, alone).items():
                print(
                    f"transformers + PEFT, recompute {recompute}, {name}: {ms:.1f} ms a layer, {gib:.2f} GiB kept",
                    flush=True,
                )


if __name__ == "__main__":
    main()
