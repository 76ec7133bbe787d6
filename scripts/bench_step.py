"""Milliseconds of one GLM-4.5-Air MoE layer, forward + backward, ours and its peers in turns on one GPU.

    python scripts/bench_step.py [--tokens 8192] [--peers transformers,te] [--profile] [--full]

All are built at Air's width with random bf16 weights at two depths, and run one after the other in every round, a second
each; a layer is the difference of the two depths' medians over the layers between them, so that embedding, head and launch overheads fall out.
LoRA r 32 on attention unless said otherwise. Rows: one document of `tokens`, and documents of log-normal lengths.
"""

import argparse
import collections
import cProfile
import gc
import pstats
import statistics
import time

import numpy as np
import torch
from bench_models import AIR, Megatron, Ours, Transformers

from glm45_tune.layout import Layout
from glm45_tune.mcore import runtime

SHALLOW, DEEP, ROUNDS = 2, 4, 3
SECONDS, SETTLING = 1.2, 0.6
"""Of steps in a row, each round, and of these before the first that is kept: a card takes a while to find the clock that its power limit

allows this work, whatever ran before.
"""
ATTENTION = ("linear_qkv", "linear_proj")


def documents(tokens: int, packed: bool) -> list[int]:
    """Edges of the documents of a row."""
    if not packed:
        return [0, tokens]
    lengths = np.random.default_rng(0).lognormal(6.0, 0.6, tokens).astype(int) + 1
    ends = np.cumsum(lengths)
    return [0, *ends[ends < tokens].tolist(), tokens]


class Timed:
    """One thing to time: a model, how it is to run, and a row."""

    def __init__(self, name: str, prepare, row):
        self.name, self.prepare, self.row = name, prepare, row
        self.milliseconds: dict[int, list[float]] = collections.defaultdict(list)
        self.gib: dict[int, float] = {}
        self.loss = float("nan")

    def run(self, depth: int, models, keep: bool) -> None:
        for model in models.values():
            model.set_depth(depth)
        step = self.prepare(models)
        held = torch.cuda.memory_allocated()
        began = time.perf_counter()
        while True:
            settled = keep and time.perf_counter() - began >= SETTLING
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            self.loss, kept = step(*self.row)
            end.record()
            torch.cuda.synchronize()
            if settled:
                self.milliseconds[depth].append(start.elapsed_time(end))
                self.gib[depth] = (kept - held) / 2**30
            if not keep or time.perf_counter() - began >= SECONDS and self.milliseconds[depth]:
                break

    def a_layer(self) -> tuple[float, float]:
        """(milliseconds, GiB of activations kept) of one layer."""
        layers = DEEP - SHALLOW
        times = {depth: statistics.median(values) for depth, values in self.milliseconds.items()}
        return (times[DEEP] - times[SHALLOW]) / layers, (self.gib[DEEP] - self.gib[SHALLOW]) / layers


def measure(build: dict, cases: list[Timed]) -> None:
    """build: name → model class; each case's prepare takes the models by name. A shallow model is the deep one's first layers."""
    models = {name: make(DEEP) for name, make in build.items()}
    for round_ in range(ROUNDS + 1):
        for case in cases:
            for depth in (SHALLOW, DEEP):
                case.run(depth, models, keep=round_ >= 1)
    del models
    gc.collect()
    torch.cuda.empty_cache()


def teraflop(tokens: int, bounds: list[int], factor: int) -> float:
    """Of a MoE layer: factor · active parameters · tokens, and causal attention (forward 1, backward 2.5 times its two products).

    factor 4 = forward and input gradient, as LoRA costs; 6 = with weight gradients; never 6 for LoRA.
    """
    head = AIR.num_attention_heads * AIR.kv_channels
    attention = AIR.hidden_size * (2 * head + 2 * AIR.num_query_groups * AIR.kv_channels)
    experts = 3 * AIR.hidden_size * AIR.moe_ffn_hidden_size * (AIR.moe_router_topk + AIR.num_shared_experts)
    pairs = sum((last - first) ** 2 / 2 for first, last in zip(bounds, bounds[1:]))
    return (factor * (attention + experts) * tokens + 3.5 * 4 * pairs * head) / 1e12


def sustained_gemm() -> float:
    """TFLOP/s of the card's own matrix product (8192³, bf16, random data) after two seconds of it: what its power limit allows."""
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    began = time.perf_counter()
    while time.perf_counter() - began < 2:
        for _ in range(50):
            a @ b
        torch.cuda.synchronize()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(100):
        a @ b
    end.record()
    torch.cuda.synchronize()
    return 100 * 2 * 8192**3 / start.elapsed_time(end) / 1e9


def report(cases: list[Timed], tokens: int, factor: int = 4) -> None:
    for case in cases:
        ms, gib = case.a_layer()
        work = teraflop(tokens, case.row[1], factor)
        print(
            f"| {case.name} | {ms:.2f} ms a layer | {tokens / ms * 1e3:,.0f} tokens/s a layer | {work / ms * 1e3:.0f} TFLOP/s | "
            f"{work / ms * 1e3 / 989:.0%} of 989 | {gib:.2f} GiB kept | loss {case.loss:.4f} |",
            flush=True,
        )


def run_for(seconds: float, step, row) -> tuple[int, float]:
    """→ (steps taken in that time or a little more, milliseconds of one)."""
    begin, steps = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        step(*row)
        steps += 1
    torch.cuda.synchronize()
    return steps, (time.perf_counter() - begin) / steps * 1e3


def profile(model: Ours, row) -> None:
    """Where a MoE layer's time goes: GPU milliseconds by kernel, deep less shallow, beside the wall's and the host's."""
    found, wall, host = {}, {}, {}
    step = model.prepare(ATTENTION)
    for depth in (SHALLOW, DEEP):
        model.set_depth(depth)
        step(*row)
        _, wall[depth] = run_for(SECONDS, step, row)
        host[depth] = model.enqueue(*row)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            steps, _ = run_for(SECONDS, step, row)
        found[depth] = {
            e.key: (e.self_device_time_total / steps / 1e3, e.count / steps) for e in profiler.key_averages()
        }
    layers = DEEP - SHALLOW
    a_layer = {
        key: tuple(
            (deep - shallow) / layers for deep, shallow in zip(found[DEEP][key], found[SHALLOW].get(key, (0, 0)))
        )
        for key in found[DEEP]
    }
    for key, (ms, calls) in sorted(a_layer.items(), key=lambda item: -item[1][0])[:48]:
        print(f"  {ms:7.3f} ms a layer, {calls:5.1f} calls: {key[:110]}")
    print(f"  {sum(ms for ms, _ in a_layer.values()):7.3f} ms of kernels a layer")
    print(
        f"  {(wall[DEEP] - wall[SHALLOW]) / layers:7.3f} ms of wall, {(host[DEEP] - host[SHALLOW]) / layers:.3f} of host",
        flush=True,
    )
    with cProfile.Profile() as calls:
        model.enqueue(*row)
    torch.cuda.synchronize()
    pstats.Stats(calls).sort_stats("tottime").print_stats(45)


def in_fp8(model: Ours, targets, turned: bool):
    model.keep_turned(turned)
    return model.prepare(targets)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--peers", default="transformers", help="transformers, te, both with a comma, or none")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--fp8", action="store_true", help="a frozen base in FP8 beside the one in bf16")
    parser.add_argument("--full", action="store_true", help="full SFT instead of LoRA")
    arguments = parser.parse_args()
    runtime.start(Layout())
    card = f"{torch.cuda.get_device_name()}, its own product of 8192³ at {sustained_gemm():.0f} TFLOP/s"
    print(card, torch.__version__, f"{arguments.tokens} tokens, bf16", flush=True)
    tokens = torch.randint(0, AIR.vocab_size, (arguments.tokens,), device="cuda")
    rows = {"one document": documents(arguments.tokens, False), "packed": documents(arguments.tokens, True)}
    print(f"packed: {len(rows['packed']) - 1} documents, the longest {max(np.diff(rows['packed']))}")
    rows = {name: (tokens, bounds) for name, bounds in rows.items()}
    peers = arguments.peers.split(",")
    if arguments.full:
        build = {"ours": lambda depth: Ours(depth, lora=False)}
        if "te" in peers:
            build["te"] = lambda depth: Megatron(depth, lora=False)
        for name in build:  # one at a time: weights and gradients of two do not fit
            cases = [Timed(f"{name}, full SFT, {row}", lambda m, n=name: m[n].prepare(()), rows[row]) for row in rows]
            measure({name: build[name]}, cases)
            report(cases, arguments.tokens, factor=6)
        return
    if arguments.profile:
        model = Ours(DEEP, frozen_dtype="fp8" if arguments.fp8 else "bf16")
        for name, row in rows.items():
            print(f"profile, {name}")
            profile(model, row)
        del model
        gc.collect()
        torch.cuda.empty_cache()
    build, cases = {"ours": Ours}, []
    for name, row in rows.items():
        cases.append(Timed(f"ours, {name}", lambda m: m["ours"].prepare(ATTENTION), row))
        cases.append(Timed(f"ours, all-linear, {name}", lambda m: m["ours"].prepare(None), row))
        if arguments.fp8:
            build["fp8"] = lambda depth: Ours(depth, frozen_dtype="fp8")
            build["cast"] = lambda depth: Ours(depth, frozen_dtype="fp8", frozen_products="bf16")
            for title, targets, turned in (
                ("fp8", ATTENTION, False),
                ("fp8, both orientations", ATTENTION, True),
                ("fp8, all-linear", None, False),
            ):
                cases.append(
                    Timed(f"ours, {title}, {name}", lambda m, t=targets, k=turned: in_fp8(m["fp8"], t, k), row)
                )
            cases.append(
                Timed(f"ours, fp8 weights, bf16 products, {name}", lambda m: m["cast"].prepare(ATTENTION), row)
            )
        if "transformers" in peers:
            build["transformers"] = Transformers
            how = "sdpa" if name == "one document" else "flex_attention"
            for recompute in (True, False):
                title = f"transformers + PEFT, {how}, {'recompute' if recompute else 'no recompute'}, {name}"
                cases.append(Timed(title, lambda m, h=how, r=recompute: m["transformers"].prepare(h, r), row))
        if "te" in peers:
            build["te"] = Megatron
            cases.append(Timed(f"megatron-core + TE, full recompute, {name}", lambda m: m["te"].prepare(()), row))
    measure(build, cases)
    report(cases, arguments.tokens)


if __name__ == "__main__":
    main()
