"""From a run to a model directory: the adapter merged into its base, fully trained weights, or the adapter alone."""

import shutil
import tempfile
from pathlib import Path

import torch

from glm45_tune.conversion.adapter import Merged, write_peft
from glm45_tune.conversion.fp8 import Quantized
from glm45_tune.conversion.hf_files import TOKENIZER_FILES
from glm45_tune.conversion.mcore_files import McoreDir
from glm45_tune.conversion.names import mtp_copies
from glm45_tune.conversion.outdir import check_free
from glm45_tune.conversion.stream import open_model, to_hf
from glm45_tune.conversion.tensors import ALL, HfReader, fingerprint
from glm45_tune.errors import CheckpointError
from glm45_tune.hub.card import Card
from glm45_tune.recipe import LoraConfig
from glm45_tune.run.files import Facts, read_facts


class Trained:
    """An HfReader: what a full run trained, in the base's dtypes; what it did not hold (an MTP layer left out) from the base."""

    def __init__(self, base: HfReader, checkpoint: McoreDir):
        self.base, self.spec, self.path, self.names, self.config = base, base.spec, base.path, base.names, base.config
        self._checkpoint, self._trained = checkpoint, set(checkpoint.names)
        self._copies = mtp_copies(base.spec)

    def __reduce__(self):
        return Trained, (self.base, self._checkpoint)

    def stamp(self) -> object:
        return [self.base.stamp(), self._checkpoint.stamp()]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.base.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self.base.dtype(name)

    def read(self, name: str, first: int = 0, last: int | None = None, columns: slice = ALL) -> torch.Tensor:
        name = self._copies.get(name, name)  # what MTP repeats is repeated as it was trained
        source = self._checkpoint if name in self._trained else self.base
        return source.read(name, first, last, columns).to(self.dtype(name))


def export(
    run: str | Path,
    output: str | Path,
    adapter_only: bool = False,
    step: int | None = None,
    fp8: str | None = None,
    **how: object,
) -> None:
    """Write a run's result as a Hugging Face directory (or its adapter as a PEFT directory), with a model card, and read it back.

    step: which checkpoint; None takes the last complete one. fp8: "channel" or "block", quantized after merging. how:
    workers, max_shard_bytes, allow_nonfinite, tick of `to_hf`. Raises CheckpointError when the run has none, or when its base
    model is gone or another.
    """
    run, output = Path(run), Path(output)
    facts = read_facts(run)
    check_free(output, "adapter" if adapter_only else "export", run, facts["model"])
    checkpoint = checkpoint_of(run, step)
    base = trained_on(run, facts)
    if facts["lora"] is None and adapter_only:
        raise CheckpointError(f"{run} trained all weights; it has no adapter. Leave --adapter-only out.")
    if fp8 and adapter_only:
        raise CheckpointError("An adapter is written as it was trained: leave --fp8 or --adapter-only out.")
    card = Card(run, facts, step_of(checkpoint), base.spec, adapter_only)
    # names alone: an export may be pushed, and directories are nobody else's business
    marker = {"step": step_of(checkpoint), "run": run.resolve().name, "base": base.path.name}

    def write(model: HfReader) -> None:
        model = Quantized(model, fp8) if fp8 else model
        to_hf(model, output, kind="export", beside=lambda staging: card.write(staging, output.name), **marker, **how)

    if facts["lora"] is None:
        write(Trained(base, McoreDir(checkpoint)))
        return
    lora = LoraConfig(**facts["lora"])
    if adapter_only:

        def beside(staging: Path) -> None:
            for name in TOKENIZER_FILES:
                if (base.path / name).is_file():
                    shutil.copyfile(base.path / name, staging / name)
            card.write(staging, output.name)

        write_peft(checkpoint, lora, base, output, beside, card.base.name if card.base.is_on_hub else None)
        return
    holder = Path(tempfile.mkdtemp(prefix="glm45_tune_"))
    try:
        write_peft(checkpoint, lora, base, holder / "adapter")
        write(Merged(base, holder / "adapter"))
    finally:
        shutil.rmtree(holder)


def trained_on(run: Path, facts: Facts) -> HfReader:
    """The model that a run was trained on. Raises CheckpointError when it is gone or another."""
    base = open_model(facts["model"])
    if fingerprint(base) != facts["fingerprint"]:
        raise CheckpointError(f"{facts['model']} is no longer the model that {run} was trained on.")
    return base


def checkpoint_of(run: Path, step: int | None) -> Path:
    """A run's complete checkpoint of a step, or its last one. Raises CheckpointError."""
    found = sorted(path.parent for path in run.glob("checkpoints/step_*/complete.json"))
    if not found:
        raise CheckpointError(f"{run}: no complete checkpoint yet. Let the run reach one (train.save_interval).")
    if step is None:
        return found[-1]
    steps = {step_of(path): path for path in found}
    if step not in steps:
        raise CheckpointError(
            f"{run}: no complete checkpoint of step {step}; complete ones: {', '.join(map(str, steps))}."
        )
    return steps[step]


def step_of(checkpoint: Path) -> int:
    """The step of a checkpoint's directory."""
    return int(checkpoint.name.removeprefix("step_"))
