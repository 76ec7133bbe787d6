"""From a run to a model directory: the adapter merged into its base, fully trained weights, or the adapter alone."""

import json
import shutil
import tempfile
from pathlib import Path

import torch

from glm45_tune.conversion.adapter import Merged, write_peft
from glm45_tune.conversion.fp8 import Quantized
from glm45_tune.conversion.mcore_files import McoreDir
from glm45_tune.conversion.names import mtp_copies
from glm45_tune.conversion.outdir import check_free
from glm45_tune.conversion.stream import open_model, to_hf
from glm45_tune.conversion.tensors import ALL, HfReader
from glm45_tune.errors import CheckpointError
from glm45_tune.recipe import LoraConfig
from glm45_tune.training.run_directory import RUN_FILE, fingerprint


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
    """Write a run's result as a Hugging Face directory (or its adapter as a PEFT directory) and read it back.

    step: which checkpoint; None takes the last complete one. fp8: "channel" or "block", quantized
    after merging. how: workers, allow_nonfinite, tick of `to_hf`. Raises CheckpointError when the run has none, or when its base
    model is gone or another.
    """
    run, output = Path(run), Path(output)
    facts = _facts(run)
    check_free(output, "adapter" if adapter_only else "export", run, facts["model"])
    checkpoint = _checkpoint(run, step)
    base = open_model(facts["model"])
    if fingerprint(base) != facts["fingerprint"]:
        raise CheckpointError(f"{facts['model']} is no longer the model that {run} was trained on.")
    if facts["lora"] is None:
        if adapter_only:
            raise CheckpointError(f"{run} trained all weights; it has no adapter. Leave --adapter-only out.")
        _write(Trained(base, McoreDir(checkpoint)), output, fp8, run, **how)
        return
    lora = LoraConfig(**facts["lora"])
    if adapter_only:
        write_peft(checkpoint, lora, base, output)
        return
    holder = Path(tempfile.mkdtemp(prefix="glm45_tune_"))
    try:
        write_peft(checkpoint, lora, base, holder / "adapter")
        _write(Merged(base, holder / "adapter"), output, fp8, run, **how)
    finally:
        shutil.rmtree(holder)


def _write(model: HfReader, output: Path, fp8: str | None, run: Path, **how: object) -> None:
    to_hf(Quantized(model, fp8) if fp8 else model, output, kind="export", run=str(run), **how)


def _facts(run: Path) -> dict:
    if not (run / RUN_FILE).is_file():
        raise CheckpointError(f"{run}: no {RUN_FILE} here; not a run of ours.")
    facts = json.loads((run / RUN_FILE).read_text(encoding="utf-8"))
    if facts.get("kind") != "run":
        raise CheckpointError(f"{run}: holds a {facts.get('kind')!r}, not a run.")
    return facts


def _checkpoint(run: Path, step: int | None) -> Path:
    found = sorted(path.parent for path in run.glob("checkpoints/step_*/complete.json"))
    if not found:
        raise CheckpointError(f"{run}: no complete checkpoint yet. Let the run reach one (train.save_interval).")
    if step is None:
        return found[-1]
    steps = {int(path.name.removeprefix("step_")): path for path in found}
    if step not in steps:
        raise CheckpointError(f"{run}: no complete checkpoint of step {step}; there are {', '.join(map(str, steps))}.")
    return steps[step]
