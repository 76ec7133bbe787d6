"""Conversion between the two formats: files planned first, then written by one process or several, each file by itself."""

from pathlib import Path

from glm45_tune.conversion.adapter import Merged
from glm45_tune.conversion.blocks import passing
from glm45_tune.conversion.check import check_tensors
from glm45_tune.conversion.fp8 import Quantized
from glm45_tune.conversion.hf_files import INDEX, AsStored, HfDir, plan_hf, plan_side_files
from glm45_tune.conversion.mcore_files import McoreDir, plan_mcore
from glm45_tune.conversion.names import mtp_copies
from glm45_tune.conversion.outdir import Beside, nothing, resumable
from glm45_tune.conversion.tensors import HfReader, nbytes, pieces
from glm45_tune.conversion.verify import compare, same_bytes
from glm45_tune.conversion.views import WithoutMtp
from glm45_tune.conversion.workers import Tick, default_workers
from glm45_tune.conversion.write import write_files
from glm45_tune.errors import CheckpointError, VerificationError

MAX_SHARD_BYTES = 2 * 10**9


def open_model(path: str | Path) -> HfDir | McoreDir:
    """A checkpoint of either format, recognised by its files. Raises CheckpointError."""
    path = Path(path)
    if (path / ".metadata").is_file():
        return McoreDir(path)
    if (path / INDEX).is_file() or (path / "model.safetensors").is_file() or not path.is_dir():
        return HfDir(path)
    if (path / "config.json").is_file():
        raise CheckpointError(
            f"{path}: config.json is here, but neither {INDEX} (HF) nor .metadata (megatron torch_dist)."
        )
    return HfDir(path)  # says what is missing


def has_mtp(source: HfReader) -> bool:
    return any(name.startswith(f"model.layers.{source.spec.num_layers}.") for name in source.names)


def total_bytes(source: HfReader) -> int:
    return sum(nbytes(source, name) for name in source.names)


def convert(
    model: str | Path,
    output: str | Path,
    to: str,
    dialect: str = "hybrid",
    adapter: str | Path | None = None,
    fp8: str | None = None,
    mtp: bool = True,
    **how: object,
) -> HfReader:
    """Convert a checkpoint directory to `to`, "mcore" or "hf", with a PEFT adapter merged in where one is given.

    adapter: a PEFT directory, or a run that made one. fp8: "channel" or "block", of "hf": quantized as it is written, after
    merging. mtp: False leaves the MTP layers out. how: verify, workers, allow_nonfinite, tick of `to_hf`. Returns what was read.
    """
    source: HfReader = open_model(model)
    if adapter is not None:
        inside_run = Path(adapter) / "adapter"
        source = Merged(source, inside_run if inside_run.is_dir() else adapter)
    if not mtp:  # last: an adapter knows its base by what that holds
        source = WithoutMtp(source)
    if to == "mcore":
        to_mcore(source, output, dialect, **how)
    else:
        to_hf(Quantized(source, fp8) if fp8 else source, output, **how)
    return source


def to_mcore(
    source: HfReader,
    output: str | Path,
    dialect: str = "hybrid",
    verify: bool = True,
    tick: Tick = lambda size: None,
    workers: int | None = None,
    allow_nonfinite: bool = False,
) -> None:
    """Write `source` as a torch_dist checkpoint that megatron-core loads under any layout; the rest is as in `to_hf`."""
    check_tensors(source)
    _check_copies(source)
    facts = {"source": str(source.path), "dialect": dialect, "mtp_copies": source.spec.mtp_copies}
    with resumable(output, "mcore", source.path, job=source.stamp(), **facts) as staging:
        workers = workers or default_workers(total_bytes(source))
        write_files(
            staging, source, plan_mcore(source, dialect) + plan_side_files(source), workers, allow_nonfinite, tick
        )
        if verify:
            _verify(source, McoreDir(staging.path), workers, tick)


def to_hf(
    source: HfReader,
    output: str | Path,
    verify: bool = True,
    tick: Tick = lambda size: None,
    kind: str = "hf",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    beside: Beside = nothing,
    workers: int | None = None,
    allow_nonfinite: bool = False,
    kept: bool = False,
    **facts: object,
) -> None:
    """Write `source` as an HF directory: sharded safetensors, index, config, tokenizer and template as they were.

    verify: read what was written and compare every byte. tick: hears bytes written, and once more those verified. beside: adds
    files to the directory. facts: what its marker says instead of the source's path. workers: processes that share the work, None:
    as many as it is worth. kept: leave it in the page cache, for somebody who reads it at once. What was cut off goes on with the
    files that were whole. Raises CheckpointError on tensors that are not this model's, or not finite unless
    allow_nonfinite; VerificationError when what was written differs from the source.
    """
    check_tensors(source.base if isinstance(source, Quantized) else source)
    facts = (facts or {"source": str(source.path)}) | {"max_shard_bytes": max_shard_bytes}
    with resumable(output, kind, source.path, job=source.stamp(), **facts) as staging:
        workers = workers or default_workers(total_bytes(source))
        files = plan_hf(source, max_shard_bytes) + plan_side_files(source)
        write_files(staging, source, files, workers, allow_nonfinite, tick, kept)
        beside(staging.path)
        if verify:
            written = HfDir(staging.path)
            _verify(source, AsStored(written) if isinstance(source, Quantized) else written, workers, tick)


@passing()
def _check_copies(source: HfReader) -> None:
    for copy, original in mtp_copies(source.spec).items():
        for first, last in pieces(source, copy):
            if not same_bytes(source.read(copy, first, last), source.read(original, first, last)):
                raise CheckpointError(
                    f"{source.path}: {copy} differs from {original}, which it must repeat: megatron keeps one of the two."
                )


def _verify(source: HfReader, written: HfReader, workers: int, tick: Tick) -> None:
    report = compare(source, written, tick, workers)
    if report.differences:
        raise VerificationError(f"What was written differs from {source.path}. {report.summary()}")
