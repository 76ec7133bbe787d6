"""Conversion and export against `cp -r`, verify against `cmp`, and memory of a worker, on a checkpoint of GLM-4.5-Air's tensor sizes.

    python scripts/bench_convert.py --directory /disk/scratch [--moe-layers 2] [--experts 128] [--workers 2] [--export | --memory]

Needs four times the checkpoint in free space (2 MoE layers of 128 experts: 12.3 GB) and removes what it wrote. Before each timing
the disk is synced and, as root, the page cache dropped; else files are warm from having been written.
"""

import argparse
import contextlib
import json
import shutil
import subprocess
import threading
import time
import zlib
from pathlib import Path

import torch
from safetensors.torch import save_file

from glm45_tune.conversion.adapter import Merged
from glm45_tune.conversion.hf_files import plan_hf
from glm45_tune.conversion.names import hf_shapes
from glm45_tune.conversion.plan import literal
from glm45_tune.conversion.stream import convert, open_model, to_hf
from glm45_tune.conversion.tensors import ALL
from glm45_tune.conversion.verify import compare
from glm45_tune.conversion.write import write_file
from glm45_tune.spec import ModelSpec
from glm45_tune.tiny.checkpoint import config as small_config


class Pattern:
    """An HfReader whose tensors are cut from 64 MiB of random bf16 values, each from a place of its own: quick to make."""

    path = Path("pattern")

    def __init__(self, config: dict):
        self.config, self.spec = config, ModelSpec.from_config(config, "config.json")
        self._shapes = hf_shapes(self.spec)
        self.names = list(self._shapes)
        self._values = torch.randn(2**25, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16

    def read(self, name: str, first: int = 0, last: int | None = None, columns: slice = ALL) -> torch.Tensor:
        rows, *width = self._shapes[name]
        sizes = ((rows if last is None else last) - first, *width)
        count = torch.Size(sizes).numel()
        start = zlib.crc32(f"{name} {first}".encode()) % (len(self._values) - count)
        return self._values[start : start + count].view(sizes).to(self.dtype(name))


def write_checkpoint(directory: Path, num_layers: int, num_experts: int) -> int:
    """Air's widths; returns the bytes written."""
    config = small_config("air", False, 151552, [151329]) | {
        "num_hidden_layers": num_layers, "hidden_size": 4096, "intermediate_size": 10944, "moe_intermediate_size": 1408,
        "num_attention_heads": 96, "num_key_value_heads": 8, "head_dim": 128, "n_routed_experts": num_experts,
        "num_experts_per_tok": min(8, num_experts),
    }  # fmt: skip
    directory.mkdir()
    source = Pattern(config)
    for file in [*plan_hf(source, 5 * 10**9), literal("config.json", json.dumps(config).encode())]:
        write_file(directory / file.name, source, file)
    return sum(path.stat().st_size for path in directory.iterdir())


class Memory:
    """The largest anonymous memory of any process below this one, while it is entered."""

    def __enter__(self):
        self.gib, self._stop = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()

    def _watch(self):
        while not self._stop.wait(0.05):
            for pid in _descendants("self"):
                with contextlib.suppress(OSError, StopIteration):
                    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
                    kib = int(next(line for line in lines if line.startswith("RssAnon")).split()[1])
                    self.gib = max(self.gib, kib / 2**20)


def _descendants(pid) -> list[str]:
    found = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += [child, *_descendants(child)]
    return found


def settle() -> str:
    subprocess.run(["sync"], check=True)
    with contextlib.suppress(OSError):
        Path("/proc/sys/vm/drop_caches").write_text("3")
        return "page cache dropped"
    return "warm"


def timed(what: str, size: int, call) -> float:
    settle()
    started = time.perf_counter()
    with Memory() as memory:
        call()
    rate = size / (time.perf_counter() - started) / 1e9
    print(f"{what:28s} {rate:6.2f} GB/s   {memory.gib:5.2f} GiB anonymous in the largest worker", flush=True)
    return rate


def speed(root: Path, workers: int, num_layers: int, num_experts: int) -> None:
    size = write_checkpoint(root / "hf", num_layers, num_experts)
    print(f"{size / 1e9:.1f} GB, {workers} workers, {settle()}")
    how = {"workers": workers, "verify": False}
    copy = timed("cp -r", size, lambda: subprocess.run(["cp", "-r", root / "hf", root / "copy"], check=True))
    to_mcore = timed("HF → mcore", size, lambda: convert(root / "hf", root / "mcore", "mcore", **how))
    shards = sorted((root / "hf").glob("*.safetensors"))
    same = timed("cmp", size, lambda: [subprocess.run(["cmp", s, root / "copy" / s.name], check=True) for s in shards])
    shutil.rmtree(root / "copy")
    to_hf = timed("mcore → HF", size, lambda: convert(root / "mcore", root / "back", "hf", **how))
    shutil.rmtree(root / "mcore")
    reports = []
    check = timed(
        "verify HF HF",
        size,
        lambda: reports.append(compare(open_model(root / "hf"), open_model(root / "back"), workers=workers)),
    )
    assert not reports[0].differences
    shutil.rmtree(root / "back")
    again = timed("cp -r", size, lambda: subprocess.run(["cp", "-r", root / "hf", root / "copy"], check=True))
    mean = (copy + again) / 2
    print(
        f"ratios: HF → mcore {to_mcore / mean:.2f}, mcore → HF {to_hf / mean:.2f} of cp -r; verify {check / same:.2f} of cmp"
    )
    shutil.rmtree(root / "hf")
    shutil.rmtree(root / "copy")


def write_adapter(directory: Path, base, ends: tuple[str, ...]) -> None:
    """A PEFT adapter of rank 32 for every weight whose name ends so."""
    pairs = {}
    for name in base.names:
        if name.endswith(ends):
            out, size = base.shape(name)
            front = f"base_model.model.{name.removesuffix('.weight')}"
            pairs[f"{front}.lora_A.weight"] = torch.randn(32, size).mul_(0.02).bfloat16()
            pairs[f"{front}.lora_B.weight"] = torch.randn(out, 32).mul_(0.02).bfloat16()
    directory.mkdir()
    save_file(pairs, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 32, "lora_alpha": 64}))


def export(root: Path, workers: int, num_layers: int, num_experts: int) -> None:
    size = write_checkpoint(root / "hf", num_layers, num_experts)
    print(f"{size / 1e9:.1f} GB, {workers} workers, {settle()}")
    rates = []
    for number, ends in enumerate(
        (("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"), ("_proj.weight",))
    ):
        rates.append(timed("cp -r", size, lambda: subprocess.run(["cp", "-r", root / "hf", root / "copy"], check=True)))
        shutil.rmtree(root / "copy")
        base = open_model(root / "hf")
        write_adapter(root / f"adapter{number}", base, ends)
        merged = Merged(base, root / f"adapter{number}")
        what = f"merged, LoRA on {('attention', 'all linears')[number]}"
        rate = timed(what, size, lambda merged=merged: to_hf(merged, root / "merged", verify=False, workers=workers))
        print(f"ratio {rate / rates[-1]:.2f} of cp -r")
        shutil.rmtree(root / "merged")


def memory(root: Path, workers: int) -> None:
    for num_layers in (4, 8):
        size = write_checkpoint(root / "hf", num_layers, 16)
        what = f"{num_layers} layers, {size / 1e9:.1f} GB:"
        timed(f"{what} HF → mcore", size, lambda: convert(root / "hf", root / "mcore", "mcore", workers=workers))
        timed(f"{what} mcore → HF", size, lambda: convert(root / "mcore", root / "back", "hf", workers=workers))
        for name in ("hf", "mcore", "back"):
            shutil.rmtree(root / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--moe-layers", type=int, default=2)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--export", action="store_true", help="a merged export instead of conversion")
    parser.add_argument(
        "--memory", action="store_true", help="memory of a worker at 4 and at 8 layers instead of speed"
    )
    options = parser.parse_args()
    root = options.directory / "bench_convert"
    root.mkdir(parents=True)
    try:
        if options.memory:
            memory(root, options.workers)
        elif options.export:
            export(root, options.workers, 1 + options.moe_layers, options.experts)
        else:
            speed(root, options.workers, 1 + options.moe_layers, options.experts)
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
