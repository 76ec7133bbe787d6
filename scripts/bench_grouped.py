"""Milliseconds of every grouped product of an expert layer and its LoRA pairs on one GPU, by torch, as this project runs it, by other tiles.

    python scripts/bench_grouped.py [--experts 128] [--rows 65536] [-r 32] [--only fc1 …] [--tiles]

GLM-4.5-Air's widths, bf16, random data, experts of log-normal load. One after the other in turns, the median of each; what differs
from torch by more than bf16's rounding is said. `--tiles` also times tiles of QuACK's that are not used.
"""

import argparse
import statistics

import torch
import torch.nn.functional as F

from glm45_tune.mcore.layers import fast, fp8, grouped

HIDDEN, WIDTH = 4096, 1408
ROUNDS, CALLS = 4, 8
TILES = {
    "m": [(192, 128, True, 2), (192, 128, True, 1), (128, 192, True, 2), (128, 176, True, 2), (128, 208, True, 2)],
    "k": [(192, 128, True, 2), (128, 192, True, 2), (128, 176, True, 2), (128, 208, True, 2), (128, 256, False, 1)],
}
"""(rows, columns, pingpong, tiles side by side that share their rows) for products over an expert's rows and sums over them."""


def edges_of(num_experts: int, rows: int, device) -> torch.Tensor:
    load = torch.exp(0.2 * torch.randn(num_experts, generator=torch.Generator().manual_seed(0)))
    counts = (load / load.sum() * rows).int()
    counts[0] += rows - counts.sum()
    return torch.cat([counts.new_zeros(1), counts.cumsum(0).int()]).to(device)


def milliseconds(call) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(CALLS):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / CALLS


def products(num_experts: int, rows: int, r: int, device):
    """→ name: (kind, inputs): rows [N, A] times a matrix an expert (m), added to what is there (add), or rows' sums of two (k)."""

    def new(*shape):
        return torch.randn(*shape, device=device, dtype=torch.bfloat16)

    fc1, fc2 = new(num_experts, 2 * WIDTH, HIDDEN), new(num_experts, HIDDEN, WIDTH)
    down, up = new(num_experts, r, HIDDEN), new(num_experts, 2 * WIDTH, r)
    token, gate_up, hidden, narrow = (new(rows, size) for size in (HIDDEN, 2 * WIDTH, WIDTH, r))
    return {
        "fc1": ("m", token, fc1.transpose(1, 2)),
        "fc2": ("m", hidden, fc2.transpose(1, 2)),
        "fc2, gradient of its input": ("m", token, fc2),
        "fc1, gradient of its input": ("m", gate_up, fc1),
        "LoRA's narrow product": ("m", token, down.transpose(1, 2)),
        "LoRA's wide product, added": ("add", narrow, up.transpose(1, 2)),
        "fc1, gradient of its weight": ("k", gate_up, token),
        "fc2, gradient of its weight": ("k", token, hidden),
        "lora_A's gradient": ("k", narrow, token),
        "lora_B's gradient": ("k", gate_up, narrow),
    }


def ways(kind: str, x, other, edges, tiles: bool):
    """→ name: a call that gives the product."""
    there = torch.zeros(x.shape[0], other.shape[-1], device=x.device, dtype=x.dtype) if kind == "add" else None
    ours = {
        "m": lambda: grouped.grouped_mm(x, other, edges),
        "add": lambda: grouped.grouped_add_(there, x, other, edges, 0.5),
        "k": lambda: grouped.grouped_outer(x, other, edges),
    }
    torchs = {
        "m": lambda: F.grouped_mm(x, other, offs=edges[1:]),
        "add": lambda: there.add_(F.grouped_mm(x, other, offs=edges[1:]), alpha=0.5),
        "k": lambda: F.grouped_mm(x.t(), other, offs=edges[1:]),
    }
    found = {"torch": torchs[kind], "ours": ours[kind]}
    if tiles and kind in TILES:
        shape = (len(edges) - 1, x.shape[1], other.shape[1]) if kind == "k" else (x.shape[0], other.shape[2])
        out = torch.empty(shape, device=x.device, dtype=x.dtype)
        inputs, cut = (x.t(), {"cu_seqlens_k": edges}) if kind == "k" else (x, {"cu_seqlens_m": edges})
        for tile in TILES[kind]:
            gemm = fast.quack_gemm(*tile)

            def by_tile(gemm=gemm):
                gemm(inputs, other, out, **cut)
                return out

            found[str(tile)] = by_tile
    return found, there


FP8_TILES = [(128, 208, True, 2), (128, 192, True, 2), (128, 192, True, 1), (128, 176, True, 2)]
FP8_TILES += [(192, 128, True, 2), (128, 256, False, 1)]


def in_fp8(num_experts: int, rows: int, edges, tiles: bool) -> None:
    """The four products of frozen experts in FP8: by torch, as this project runs them, by other tiles; TFLOP/s beside milliseconds."""
    sizes = {"fc1": (HIDDEN, 2 * WIDTH), "fc2": (WIDTH, HIDDEN)}
    sizes |= {"fc2, gradient of its input": (HIDDEN, WIDTH), "fc1, gradient of its input": (2 * WIDTH, HIDDEN)}
    scaled = fast._scaled_gemm()
    for name, (inputs, outputs) in sizes.items():
        x = fp8.quantize_rows(torch.randn(rows, inputs, device="cuda").bfloat16())
        weight = torch.randn(num_experts, outputs, inputs, device="cuda", dtype=torch.bfloat16).to(fp8.FP8)
        columns = None if "gradient" in name else torch.rand(num_experts, outputs, device="cuda") + 0.5
        ones = torch.ones(num_experts, outputs, device="cuda") if columns is None else columns
        found = {
            "torch": lambda: torch._scaled_grouped_mm(
                x.q,
                weight.transpose(1, 2),
                x.scale,
                ones,
                offs=edges[1:],
                out_dtype=torch.bfloat16,
                use_fast_accum=True,
            ),
            "ours": lambda: fp8.grouped_product(x, weight, columns, edges, torch.bfloat16),
        }
        for m, n, pingpong, cluster in FP8_TILES * tiles:
            tile = dict(tile_M=m, tile_N=n, pingpong=pingpong, cluster_M=1, cluster_N=cluster)
            found[f"{m}x{n} pingpong {pingpong} cluster {cluster}"] = lambda t=tile: scaled.grouped_product(
                *x, weight, columns, edges, torch.bfloat16, t
            )
        times, exact = {}, None
        for way, call in list(found.items()):
            try:
                given = call().float()
            except Exception as error:  # a tile that does not compile is no reason to lose the others
                print(name, way, repr(error)[:300], flush=True)
                del found[way]
                continue
            exact = given if exact is None else exact
            if way == "ours":
                print(f"{name}: differs from torch by {((given - exact).norm() / exact.norm()).item():.2e}")
        for _ in range(ROUNDS):
            for way, call in found.items():
                times.setdefault(way, []).append(milliseconds(call))
        work = 2 * rows * inputs * outputs / 1e9
        medians = {way: statistics.median(kept) for way, kept in times.items()}
        print(name, {way: f"{ms:.3f} ms, {work / ms:.0f}" for way, ms in medians.items()}, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--rows", type=int, default=65536)
    parser.add_argument("-r", type=int, default=32)
    parser.add_argument("--only", nargs="+", help="beginnings of names")
    parser.add_argument("--tiles", action="store_true")
    parser.add_argument("--fp8", action="store_true", help="the products of an FP8 base alone")
    arguments = parser.parse_args()
    edges = edges_of(arguments.experts, arguments.rows, "cuda")
    print(torch.cuda.get_device_name(), arguments)
    if arguments.fp8:
        in_fp8(arguments.experts, arguments.rows, edges, arguments.tiles)
        return
    for name, (kind, x, other) in products(arguments.experts, arguments.rows, arguments.r, "cuda").items():
        if arguments.only and not name.startswith(tuple(arguments.only)):
            continue
        found, there = ways(kind, x, other, edges, arguments.tiles)
        times, want = {way: [] for way in found}, None
        for way, call in found.items():
            if there is not None:
                there.zero_()
            given = call()
            given = (there if given is None else given).float()
            want = given if want is None else want
            if (given - want).norm() > 1e-2 * want.norm():
                print(f"{name}: {way} differs from torch")
        for _ in range(ROUNDS):
            for way, call in found.items():
                times[way].append(milliseconds(call))
        print(name, {way: round(statistics.median(kept), 4) for way, kept in times.items()}, flush=True)


if __name__ == "__main__":
    main()
