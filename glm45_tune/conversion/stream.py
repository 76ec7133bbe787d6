"""Conversion between the two formats, tensor by tensor: memory never holds more than a few."""

from collections.abc import Callable
from pathlib import Path

import torch

from glm45_tune.conversion.adapter import Merged
from glm45_tune.conversion.hf_files import INDEX, HfDir, copy_side_files, write_hf
from glm45_tune.conversion.mcore_files import Chunks, McoreDir, write_model
from glm45_tune.conversion.names import modules_with_extra_state, mtp_copies, rows
from glm45_tune.conversion.outdir import whole
from glm45_tune.conversion.tensors import HfReader, read_row
from glm45_tune.conversion.verify import compare, same_bytes
from glm45_tune.errors import CheckpointError, VerificationError

MAX_SHARD_BYTES = 5 * 10**9

Tick = Callable[[int], None]


def open_model(path: str | Path) -> HfDir | McoreDir:
    """A checkpoint of either format, recognised by its files. Raises CheckpointError."""
    path = Path(path)
    if (path / ".metadata").is_file():
        return McoreDir(path)
    if (path / INDEX).is_file() or (path / "model.safetensors").is_file() or not path.is_dir():
        return HfDir(path)
    if (path / "config.json").is_file():
        raise CheckpointError(f"{path}: config.json is here, but neither {INDEX} (HF) nor .metadata (megatron torch_dist).")
    return HfDir(path)  # says what is missing


def has_mtp(source: HfReader) -> bool:
    return any(name.startswith(f"model.layers.{source.spec.num_layers}.") for name in source.names)


def total_bytes(source: HfReader) -> int:
    return sum(torch.Size(source.shape(name)).numel() * source.dtype(name).itemsize for name in source.names)


def to_mcore(
    source: HfReader, output: str | Path, dialect: str = "hybrid", verify: bool = True, tick: Tick = lambda n: None
):
    """Write `source` as a torch_dist checkpoint that megatron-core loads under any layout.

    Raises CheckpointError on tensors that are not this model's, VerificationError when what was written differs.
    `tick` hears the bytes read, and once more those verified.
    """
    if isinstance(source, HfDir):
        source.check()
    with whole(output, "mcore", source.path, source=str(source.path), dialect=dialect) as staging:
        _check_copies(source)
        write_model(staging, _chunks(source, dialect, tick), _extra_states(source, dialect), legacy_common=dialect == "gpt")
        copy_side_files(source.path, staging)
        if verify:
            _verify(source, McoreDir(staging), tick)


def convert(
    model: str | Path,
    output: str | Path,
    to: str,
    dialect: str = "hybrid",
    adapter: str | Path | None = None,
    verify: bool = True,
    tick: Tick = lambda n: None,
) -> HfReader:
    """Convert a checkpoint directory to `to`, "mcore" or "hf", with a PEFT adapter merged in where one is given.

    adapter: a PEFT directory, or a run that made one. Returns what was read.
    """
    source: HfReader = open_model(model)
    if adapter is not None:
        inside_run = Path(adapter) / "adapter"
        source = Merged(source, inside_run if inside_run.is_dir() else adapter)
    if source.spec.mtp_num_layers and not has_mtp(source):
        raise CheckpointError(
            f"{source.path}: config.json promises an MTP layer that is not here (a run that left it out of training?). "
            "`glm45-tune export RUN` takes it from the run's base model."
        )
    if to == "mcore":
        to_mcore(source, output, dialect, verify, tick)
    else:
        to_hf(source, output, verify, tick)
    return source


def _chunks(source: HfReader, dialect: str, tick: Tick) -> Chunks:
    chunks: Chunks = {}
    for row in rows(source.spec):
        dtype = source.dtype(row.hf_names(0)[0])

        def reader(row=row, expert=None):
            def read() -> torch.Tensor:
                tensor = read_row(row, source, expert=expert)
                tick(tensor.nbytes)
                return tensor if expert is None else tensor[None]

            return read

        if row.num_experts is None:
            parts = [((0,) * len(row.shape), row.shape, reader())]
        else:
            _, *one = row.shape
            parts = [((e,) + (0,) * len(one), (1, *one), reader(expert=e)) for e in range(row.num_experts)]
        for key in (row.name(dialect), *row.alias_names(dialect)):
            chunks[key] = (row.shape, dtype, parts)
    return chunks


def _extra_states(source: HfReader, dialect: str) -> list[str]:
    return [
        f"{module}._extra_state/shard_{i}_{count}"
        for module, count in modules_with_extra_state(source.spec, dialect)
        for i in range(count)
    ]


def _check_copies(source: HfReader) -> None:
    for copy, original in mtp_copies(source.spec).items():
        if copy in source.names and not same_bytes(source.read(copy), source.read(original)):
            raise CheckpointError(
                f"{source.path}: {copy} differs from {original}, which it must repeat: megatron keeps one of the two."
            )


def to_hf(
    source: HfReader, output: str | Path, verify: bool = True, tick: Tick = lambda n: None, kind: str = "hf", **facts: object
):
    """Write `source` as an HF directory: sharded safetensors, index, config, tokenizer and template as they were.

    Raises VerificationError when what was written differs from the source.
    """
    with whole(output, kind, source.path, source=str(source.path), **facts) as staging:
        write_hf(staging, source, source.names, MAX_SHARD_BYTES, tick)
        copy_side_files(source.path, staging)
        if verify:
            _verify(source, HfDir(staging), tick)


def _verify(source: HfReader, written: HfReader, tick: Tick) -> None:
    report = compare(source, written, tick)
    if report.differences:
        raise VerificationError(f"What was written differs from {source.path}. {report.summary()}")
