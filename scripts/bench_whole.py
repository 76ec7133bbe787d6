"""Tokens per second of the whole GLM-4.5-Air under LoRA, optimizer included, random weights made on the GPUs.

    torchrun --nproc-per-node 2 scripts/bench_whole.py [--row packed|one] [--tokens 8192] [--recompute-layers 26] [-r 32]

Expert parallel over all ranks, or over `--expert-parallel` of them. Every rank trains `--rows` rows of `--tokens` a step: documents
of log-normal lengths, or one document; of each its end, a share of `--trained`, is what counts. `--recompute-layers auto` takes what
a run with `recompute_granularity: auto` would. `--full` trains all weights, their optimizer state in bf16 on the host. `--like tiny`
runs the same on CPU ranks. `--profile` also prints where one step's GPU time goes, and how much of a step of one row a rank lies
outside the layers. The planner's memory and step stand beside the measured; `--plan CARD` prints them alone.
"""

import argparse
import dataclasses
import statistics
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from bench_models import AIR, positions_of
from bench_step import documents

from glm45_tune.conversion.names import hf_shapes
from glm45_tune.conversion.tensors import ALL
from glm45_tune.data.batch import Batch
from glm45_tune.layout import Layout, ranks_here
from glm45_tune.mcore import runtime
from glm45_tune.mcore.step import Trainer
from glm45_tune.plan import planner
from glm45_tune.plan.cards import CARDS
from glm45_tune.plan.planner import Hardware
from glm45_tune.recipe import Recipe, with_frozen
from glm45_tune.training.card import this_card

TINY = dataclasses.replace(
    AIR,
    num_layers=4,
    hidden_size=64,
    ffn_hidden_size=128,
    moe_ffn_hidden_size=32,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=16,
    num_moe_experts=8,
    moe_router_topk=2,
    vocab_size=512,
)


class RandomWeights:
    """A model that exists nowhere: every read is drawn on this rank's device."""

    path = Path("random")

    def __init__(self, spec):
        self.spec = spec
        self.shapes = hf_shapes(spec)
        self.names = list(self.shapes)

    def shape(self, name):
        return self.shapes[name]

    def dtype(self, name):
        return torch.bfloat16

    def read(self, name, first=0, last=None, columns=ALL):
        rows, *rest = self.shapes[name]
        if rest:
            rest = [len(range(*columns.indices(rest[0])))]
        size = ((rows if last is None else last) - first, *rest)
        return torch.empty(size, dtype=torch.bfloat16, device=runtime.device()).normal_(float("norm" in name), 0.02)


def row_of(tokens: int, packed: bool, vocab_size: int, seed: int, trained: float = 1.0) -> Batch:
    ids = torch.randint(0, vocab_size, (tokens,), generator=torch.Generator().manual_seed(seed))
    bounds = documents(tokens, packed)
    weights = torch.zeros(1, tokens)
    for first, last in zip(bounds, bounds[1:]):
        weights[0, last - 1 - round(trained * (last - 1 - first)) : last - 1] = 1.0
    owners = torch.repeat_interleave(torch.arange(len(bounds) - 1), torch.tensor(bounds).diff())
    return Batch(
        ids,
        positions_of(bounds, "cpu"),
        bounds,
        ids.roll(-1)[None],
        weights,
        sequence=owners,
        num_samples=len(bounds) - 1,
    )


def teraflop(spec, batch: Batch, full: bool) -> float:
    """FLOP of a row, forward and backward; recompute is not counted.

    4 (all weights trained: 6) · active parameters · tokens (the head's: those that count), and causal attention at 3.5
    times its forward.
    """
    bounds = batch.bounds
    head = spec.num_attention_heads * spec.kv_channels
    attention = spec.hidden_size * (2 * head + 2 * spec.num_query_groups * spec.kv_channels)
    experts = 3 * spec.hidden_size * spec.moe_ffn_hidden_size * (spec.moe_router_topk + spec.num_shared_experts)
    dense = 3 * spec.hidden_size * spec.ffn_hidden_size
    moe_layers = spec.num_layers - spec.num_dense_layers
    active = spec.num_layers * attention + spec.num_dense_layers * dense + moe_layers * experts
    products = active * bounds[-1] + spec.hidden_size * spec.vocab_size * batch.weights.sum().item()
    pairs = sum((last - first) ** 2 / 2 for first, last in zip(bounds, bounds[1:]))
    return ((6 if full else 4) * products + spec.num_layers * 3.5 * 4 * pairs * head) / 1e12


def hardware_of(batches, card: str | None) -> Hardware:
    """This card, or one that is named, and these documents, as a run would tell the planner of them."""
    lengths = np.concatenate([np.diff(batch.bounds) for batch in batches]).astype(float)
    return Hardware(
        CARDS[card] if card else this_card(), dist.get_world_size(), ranks_here(), (lengths**2).sum() / lengths.sum()
    )


def planned(found: planner.Plan) -> str:
    step = f", {found.time.total:.3f} s a step" if found.time else ""
    halves = ", ".join(found.recipe.train.recompute_modules or []) or "nothing"
    again = f"{found.recomputed} layers recomputed and {halves} of the others"
    return f"{again}; planned peak {found.worst.peak / 2**30:.1f} GiB{step}"


def outside(trainer, step) -> float:
    """Share of a step of one micro batch that passes outside the decoder: embedding, head, loss, gradients' sums, optimizer, host."""
    decoder, marks, hooks = trainer.module[0].decoder, {}, []

    def mark(name):
        marks[name] = torch.cuda.Event(enable_timing=True)
        marks[name].record()

    def after_forward(module, inputs, output):
        mark("forward ends")
        output.register_hook(lambda gradient: mark("backward begins"))

    hooks.append(decoder.register_forward_pre_hook(lambda *_: mark("forward begins")))
    hooks.append(decoder.register_forward_hook(after_forward))
    for parameter in decoder.layers[0].parameters():
        if parameter.requires_grad:
            hooks.append(
                parameter.register_post_accumulate_grad_hook(lambda _: mark("backward ends"))
            )  # the last counts
    mark("step begins")
    step()
    mark("step ends")
    torch.cuda.synchronize()
    for hook in hooks:
        hook.remove()
    inside = sum(marks[f"{way} begins"].elapsed_time(marks[f"{way} ends"]) for way in ("forward", "backward"))
    return 1 - inside / marks["step begins"].elapsed_time(marks["step ends"])


def profile(step) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize()
    events = sorted(found.key_averages(), key=lambda e: -e.self_device_time_total)
    total = sum(e.self_device_time_total for e in events) / 1e3
    nccl = sum(e.self_device_time_total for e in events if "nccl" in e.key.lower()) / 1e3
    print(f"GPU time of all kernels {total:.0f} ms, of it NCCL's {nccl:.0f} ms (waiting and overlapped time included)")
    for event in events[:40]:
        print(f"  {event.self_device_time_total / 1e3:8.1f} ms, {event.count:5d} calls: {event.key[:100]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--like", default="air", choices=["air", "tiny"])
    parser.add_argument("--row", default="packed", choices=["packed", "one"])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rows", type=int, default=1, help="rows a rank and step")
    parser.add_argument(
        "--trained", type=float, default=1.0, help="share of a document's tokens whose prediction counts"
    )
    parser.add_argument("--recompute-layers", default="0", help="the first layers, wholly; or auto")
    parser.add_argument(
        "--rest", nargs="*", default=[], help="recompute_modules of the other layers: attention, moe, core_attn"
    )
    parser.add_argument("-r", type=int, default=32)
    parser.add_argument("--targets", default="linear_qkv,linear_proj", help="or all-linear")
    parser.add_argument("--frozen", default="bf16", choices=["bf16", "fp8"], help="what the frozen base is kept in")
    parser.add_argument("--full", action="store_true", help="train all weights")
    parser.add_argument("--expert-parallel", type=int, help="ranks that share the experts; all by default")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--plan", choices=CARDS, help="build nothing: what the planner says of this card")
    arguments = parser.parse_args()
    spec = {"air": AIR, "tiny": TINY}[arguments.like]
    targets = arguments.targets if arguments.targets == "all-linear" else arguments.targets.split(",")
    runtime.start(Layout())
    ranks = dist.get_world_size()
    train = {"micro_batch_size": 1, "global_batch_size": ranks * arguments.rows, "steps": 10}
    if arguments.recompute_layers == "auto":
        train |= {"recompute_granularity": "auto"}
    elif count := int(arguments.recompute_layers):
        train |= {"recompute_granularity": "full", "recompute_method": "block"}
        train |= {"recompute_num_layers": count, "recompute_modules": arguments.rest}
    expert_ranks = arguments.expert_parallel or ranks
    lora = {"lora": {"r": arguments.r, "lora_alpha": 2 * arguments.r, "target_modules": targets}}
    lean = {
        "exp_avg_dtype": "bf16",
        "exp_avg_sq_dtype": "bf16",
        "main_grads_dtype": "bf16",
        "optimizer_offload_fraction": 1.0,
    }
    recipe = Recipe.from_dict(
        {
            "model": {"path": "random", "params_dtype": "bf16", "frozen_dtype": arguments.frozen},
            "data": {"train": "none.jsonl", "seq_length": arguments.tokens},
            "parallel": {"expert_model_parallel_size": expert_ranks, "world_size": ranks},
            "train": train,
            "output_dir": "none",
            **({"optimizer": lean} if arguments.full else lora),
        }
    )
    layout = recipe.parallel.layout()
    runtime.start(layout)
    seed, is_packed = dist.get_rank() * arguments.rows, arguments.row == "packed"
    batches = [
        row_of(arguments.tokens, is_packed, spec.vocab_size, seed + n, arguments.trained) for n in range(arguments.rows)
    ]
    hardware = hardware_of(batches, arguments.plan)
    recipe = with_frozen(recipe, False, hardware.card.has_fp8)
    recipe = planner.with_recompute(spec, recipe, layout, runtime.stage(), hardware)
    recipe = planner.with_turned(spec, recipe, layout, hardware)
    if arguments.plan:
        if dist.get_rank() == 0:
            print(planned(planner.plan(spec, recipe, layout, hardware)))
        runtime.barrier()
        runtime.stop()
        return
    begin = time.perf_counter()
    trainer = Trainer(recipe, layout, RandomWeights(spec))
    built = time.perf_counter() - begin
    weight = sum(batch.weights.sum().item() for batch in batches) * ranks

    def step():
        return trainer.train(batches, arguments.rows, [weight], lr=1e-4)

    times = []
    for number in range(arguments.steps + 2):
        runtime.barrier()
        begin = time.perf_counter()
        result = step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if number >= 2:
            times.append(time.perf_counter() - begin)
    if dist.get_rank() == 0:
        seconds = statistics.median(times)
        tokens = arguments.tokens * arguments.rows
        work = sum(teraflop(spec, batch, arguments.full) for batch in batches)
        card = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else float("nan")
        print(f"{arguments.like}, {ranks} × {card}, EP {expert_ranks}, {arguments}, built in {built:.0f} s")
        print(
            f"{seconds:.3f} s a step, {tokens / seconds:,.0f} tokens/s/GPU, {work / seconds:.0f} TFLOP/s/GPU "
            f"({work / seconds / 989:.0%} of 989), peak {peak:.1f} GiB, loss {result.losses[0]:.4f}, "
            f"steps {np.round(times, 3).tolist()}",
            flush=True,
        )
        print(planned(planner.plan(spec, recipe, layout, hardware)))
        if torch.cuda.is_available():
            free, whole = torch.cuda.mem_get_info()
            print(
                f"on the card {(whole - free) / 2**30:.1f} GiB, of them torch's {torch.cuda.memory_reserved() / 2**30:.1f}"
            )
    if arguments.profile and torch.cuda.is_available():
        share = outside(trainer, step) if arguments.rows == 1 else float("nan")
        if dist.get_rank() == 0:
            print(f"outside the layers {share:.1%} of the step")
            profile(step)
        else:
            step()
    runtime.barrier()
    runtime.stop()


if __name__ == "__main__":
    main()
