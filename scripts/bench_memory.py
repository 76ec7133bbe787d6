"""Memory and step time that `plan` predicts, against the allocator's peak and the clock. One NVIDIA card, or two for a few more.

    python scripts/bench_memory.py [--output FILE.json] [--only NAME …] [--dry [CARD]]

Each setting is a process of its own: an Air-width model of a few layers with random weights, built by the Trainer that trains,
takes three steps on packed rows. Printed: predicted and measured peak, their ratio, and the same of a step's seconds, as a
markdown table; --output also writes JSON. Without a card, or with --dry, only the predictions are printed, of an H200 or the card named.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

from glm45_tune.layout import Layout
from glm45_tune.plan.cards import CARDS, Card, card_named
from glm45_tune.plan.memory import GIB, Model
from glm45_tune.plan.models import find_spec
from glm45_tune.plan.rates import MEASURED_CARD
from glm45_tune.plan.timing import step_seconds
from glm45_tune.recipe import Recipe
from glm45_tune.spec import ModelSpec

STEPS = 3
ATTENTION, ALL = ["linear_qkv", "linear_proj"], "all-linear"


@dataclasses.dataclass(frozen=True)
class Setting:
    """layers: one dense, the others with experts. targets: of LoRA; None trains every weight."""

    name: str
    layers: int
    experts: int
    targets: list[str] | str | None
    seq_length: int = 8192
    recompute: str | None = None
    recompute_method: str = "uniform"
    micro_batches: int = 1
    model: str = "GLM-4.5-Air"
    tensor: int = 1
    expert: int = 1

    @property
    def layout(self) -> Layout:
        sizes = {"tensor_model_parallel_size": self.tensor, "expert_model_parallel_size": self.expert}
        return Layout(**sizes, world_size=max(self.tensor, self.expert))

    def spec(self) -> ModelSpec:
        whole, _ = find_spec(self.model)
        sizes = {"num_layers": self.layers, "num_dense_layers": 1, "num_moe_experts": self.experts, "mtp_num_layers": 0}
        return dataclasses.replace(whole, **sizes)

    def recipe(self) -> Recipe:
        document = {
            "model": {"path": self.model},
            "data": {"train": "none", "seq_length": self.seq_length},
            "train": {
                "steps": STEPS,
                "global_batch_size": self.micro_batches * self.layout.data_parallel_size,
                "recompute_granularity": self.recompute,
                "recompute_method": self.recompute_method,
            },
            "output_dir": "none",
        }
        if self.targets is not None:
            document["lora"] = {"r": 32, "lora_alpha": 64, "target_modules": self.targets}
        return Recipe.from_dict(document)


SETTINGS = {
    setting.name: setting
    for setting in (
        Setting("lora-attention", 5, 128, ATTENTION),
        Setting("lora-attention-recompute", 5, 128, ATTENTION, recompute="full"),
        Setting("lora-attention-recompute-first", 5, 128, ATTENTION, recompute="full", recompute_method="block"),
        Setting("lora-attention-selective", 5, 128, ATTENTION, recompute="selective"),
        Setting("lora-attention-16k", 5, 128, ATTENTION, seq_length=16384),
        Setting("lora-attention-16k-recompute", 5, 128, ATTENTION, seq_length=16384, recompute="full"),
        Setting("lora-attention-accumulated", 5, 128, ATTENTION, seq_length=4096, micro_batches=4),
        Setting("lora-all-linear", 5, 128, ALL),
        Setting("lora-all-linear-recompute", 5, 128, ALL, recompute="full"),
        Setting("full", 3, 16, None),
        Setting("full-16k", 3, 16, None, seq_length=16384),
        Setting("full-16k-recompute", 3, 16, None, seq_length=16384, recompute="full"),
        Setting("355b-lora-attention", 3, 160, ATTENTION, model="GLM-4.5"),
        Setting("lora-attention-expert-2", 5, 128, ATTENTION, expert=2),
        Setting("lora-all-linear-expert-2", 5, 128, ALL, expert=2),
        Setting("lora-attention-tensor-2", 5, 128, ATTENTION, tensor=2),
    )
}


def predict(setting: Setting, card: Card) -> dict:
    model = Model(setting.spec(), setting.layout, setting.recipe())
    stage = model.memory(0, model.by_recipe(0))
    seconds = step_seconds(model, [stage], card, document_tokens(setting.seq_length)).total
    return {
        "predicted_peak_gib": stage.peak / GIB,
        "predicted_standing_gib": stage.standing / GIB,
        "predicted_seconds": seconds,
    }


def bounds(tokens: int) -> list[int]:
    """Edges of documents of log-normal lengths that fill a row."""
    import numpy as np

    lengths = np.random.default_rng(0).lognormal(6.0, 0.6, 400).astype(int)
    ends = np.cumsum(lengths)
    return [0, *ends[ends < tokens].tolist(), tokens]


def document_tokens(tokens: int) -> float:
    """Length whose square is the mean square of the row's documents, weighted by tokens: what attention pays for."""
    edges = bounds(tokens)
    return sum((last - first) ** 2 for first, last in pairwise(edges)) / tokens


def measure(setting: Setting) -> dict:
    """Build, step, read the allocator. Runs in a process of its own."""
    import torch

    from glm45_tune.conversion.names import hf_shapes
    from glm45_tune.data.batch import Batch
    from glm45_tune.mcore import runtime
    from glm45_tune.mcore.step import Trainer

    shapes = hf_shapes(setting.spec())

    class Blank:
        """A checkpoint whose tensors cost nothing; real values are drawn on the card."""

        spec, path = setting.spec(), Path("blank")

        def read(self, name, first=0, last=None, columns=slice(None)):
            whole = torch.zeros((), dtype=torch.bfloat16).expand(shapes[name])[first:last]
            return whole if columns == slice(None) else whole[:, columns]

    runtime.start(setting.layout)
    trainer = Trainer(setting.recipe(), setting.layout, Blank())
    with torch.no_grad():
        for name, tensor in trainer.module.named_parameters():
            tensor.normal_(1.0 if "norm" in name else 0.0, 0.02)
    edges = bounds(setting.seq_length)
    tokens = torch.randint(0, setting.spec().vocab_size, (setting.seq_length,))
    positions = torch.cat([torch.arange(last - first) for first, last in pairwise(edges)])
    batch = Batch(tokens, positions, edges, tokens[None].roll(-1, 1), torch.ones(1, len(tokens)))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    standing, times = torch.cuda.memory_allocated(), []
    for _ in range(STEPS):
        started = time.perf_counter()
        count = setting.micro_batches
        weight = float(count * len(tokens) * setting.layout.data_parallel_size)
        trainer.train([batch] * count, count, [weight], 1e-4)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return {
        "card": torch.cuda.get_device_name(),
        "measured_peak_gib": torch.cuda.max_memory_allocated() / GIB,
        "measured_reserved_gib": torch.cuda.max_memory_reserved() / GIB,
        "measured_built_gib": standing / GIB,
        "measured_standing_gib": torch.cuda.memory_allocated() / GIB,
        "measured_seconds": min(times[1:]),
    }


def run(setting: Setting) -> dict:
    """`measure` in processes of its own, one a rank. → {"failed": exit code} where that went wrong."""
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(setting.layout.world_size)]
    command = [sys.executable, *ranks, __file__, "--measure", setting.name]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    found = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]
    if ended.returncode or not found:
        return {"failed": ended.returncode}
    return max(found, key=lambda rank: rank["measured_peak_gib"])


def this_card() -> tuple[Card | None, int]:
    """The known card that this machine has, by its name, and how many."""
    import torch

    if not torch.cuda.is_available():
        return None, 0
    return card_named(torch.cuda.get_device_name()), torch.cuda.device_count()


def table(rows: list[dict]) -> str:
    lines = [
        "| setting | GiB predicted | GiB measured | ratio | s a step predicted | s measured | ratio |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        gib, seconds = row.get("measured_peak_gib"), row.get("measured_seconds")
        cells = [row["setting"], f"{row['predicted_peak_gib']:.2f}", *_against(gib, row["predicted_peak_gib"], ".2f")]
        cells += [f"{row['predicted_seconds']:.3f}", *_against(seconds, row["predicted_seconds"], ".3f")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _against(measured: float | None, predicted: float, form: str) -> tuple[str, str]:
    return (f"{measured:{form}}", f"{predicted / measured:.3f}") if measured else ("-", "-")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--dry", nargs="?", const=MEASURED_CARD, choices=CARDS, help="predictions alone, of this card")
    parser.add_argument("--measure", choices=SETTINGS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(SETTINGS[arguments.measure])), flush=True)
        return
    card, count = (None, 0) if arguments.dry else this_card()
    rows = []
    for name in arguments.only:
        if card and SETTINGS[name].layout.world_size > count:
            print(f"{name}: needs {SETTINGS[name].layout.world_size} cards, left out", file=sys.stderr)
            continue
        row = {"setting": name, **predict(SETTINGS[name], card or CARDS[arguments.dry or MEASURED_CARD])}
        if card:
            row |= run(SETTINGS[name])
            print(json.dumps(row), file=sys.stderr, flush=True)
        rows.append(row)
    print(
        f"{card.name if card else f'no card measured; seconds are of an {arguments.dry or MEASURED_CARD}'}\n\n{table(rows)}"
    )
    if arguments.output:
        arguments.output.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
