"""megatron checkpoint directories of a GLM-4.5 model, in either dialect: read under both kinds of names, and planned."""

import io
import pickle
from collections.abc import Iterable
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from glm45_tune.conversion.names import DIALECTS, Row, hf_places, is_mtp, modules_with_extra_state, rows
from glm45_tune.conversion.plan import MAX_FILE_BYTES, PlannedFile, collector_off, literal
from glm45_tune.conversion.tensors import ALL, HfReader, row_parts
from glm45_tune.conversion.torch_dist import COMMON, FORMAT, TorchDistFiles, around, pickled
from glm45_tune.errors import CheckpointError
from glm45_tune.spec import ModelSpec, read_config

MAX_CHUNK_BYTES = 2**28  # a larger tensor is stored as several chunks


class McoreDir(TorchDistFiles):
    """A megatron checkpoint of a GLM-4.5 model in either dialect, read by megatron's names or by Hugging Face's."""

    def __init__(self, path: str | Path):
        self.config = read_config(path)
        self.spec = ModelSpec.from_config(self.config, f"{path}/config.json")
        super().__init__(path)
        self.dialect = self._recognise()
        self.check()
        self._place = hf_places(self.spec, lambda row: row.name(self.dialect) in self.tensors)

    def __reduce__(self):
        return McoreDir, (self.path,)

    def _recognise(self) -> str:
        for dialect, key in zip(DIALECTS, ("decoder.final_norm.weight", "decoder.final_layernorm.weight")):
            if key in self.tensors:
                return dialect
        raise CheckpointError(
            f"{self.path}: holds neither decoder.final_norm.weight (HybridModel) nor decoder.final_layernorm.weight "
            "(GPTModel): not a whole GLM-4.5 model."
        )

    def check(self) -> None:
        """Raise CheckpointError unless the tensors are this model's, all of them, in its shapes.

        A run that trained without the MTP layer saves none of its tensors: all or nothing is allowed there.
        """
        table = rows(self.spec)
        if not any(is_mtp(row) and row.name(self.dialect) in self.tensors for row in table):
            table = [row for row in table if not is_mtp(row)]
        for row in table:
            key = row.name(self.dialect)
            if key not in self.tensors:
                raise CheckpointError(f"{self.path}: {key} is missing.")
            if (shape := tuple(self.tensors[key].size)) != row.shape:
                raise CheckpointError(f"{self.path}: {key} has shape {shape}; config.json makes it {row.shape}.")
        known = {name for row in table for name in (row.name(self.dialect), *row.alias_names(self.dialect))}
        for key in self.tensors:
            if key not in known and not key.startswith("optimizer."):
                raise CheckpointError(
                    f"{self.path}: no place in a GLM-4.5 model for {key}. Wrong model or a new release?"
                )

    def stamp(self) -> object:
        return [_stat(self.path / name) for name in ("config.json", ".metadata", *self.file_names)]

    # the same checkpoint seen under its Hugging Face names, as HfDir shows one

    @property
    def names(self) -> list[str]:
        return list(self._place)

    def shape(self, name: str) -> tuple[int, ...]:
        row, part, _ = self._place[name]
        return row.parts[part].shape

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[self._place[name][0].name(self.dialect)].properties.dtype

    def read(self, name: str, first: int = 0, last: int | None = None, columns: slice = ALL) -> torch.Tensor:
        """Rows [first, last) and columns of an HF tensor, from wherever they stand in the merged one."""
        row, part, expert = self._place[name]
        last = row.parts[part].shape[0] if last is None else last
        found, start = [], 0
        for which, lo, hi in row.pieces:
            a, b = max(first, lo), min(last, hi)
            if which == part and a < b:
                found.append(self._read_rows(row, expert, start + a - lo, start + b - lo, columns))
            start += hi - lo
        return found[0] if len(found) == 1 else torch.cat(found)

    def _read_rows(self, row: Row, expert: int | None, first: int, last: int, columns: slice) -> torch.Tensor:
        """Rows of a merged tensor, or of one expert of it."""
        offsets, sizes = (first,), (last - first,)
        if len(row.parts[0].shape) == 2:
            left, right, _ = columns.indices(row.shape[-1])
            offsets, sizes = (first, left), (last - first, right - left)
        if expert is None:
            return self.read_key(row.name(self.dialect), offsets, sizes)
        return self.read_key(row.name(self.dialect), (expert, *offsets), (1, *sizes))[0]


@collector_off()
def plan_mcore(source: HfReader, dialect: str) -> list[PlannedFile]:
    """The files of `source` as a torch_dist checkpoint: chunks in the order of the table, `.metadata`, and what goes with it."""
    plan = _Plan(source, dialect)
    for row in rows(source.spec):
        plan.add_row(row)
    plan.add_object({}, [COMMON])
    plan.add_object(None, _extra_states(source.spec, dialect))
    buffer = io.BytesIO()
    pickle.dump(plan.metadata, buffer, protocol=4)
    files = [*plan.files, literal(".metadata", buffer.getvalue()), literal("metadata.json", FORMAT.encode())]
    if dialect == "gpt":
        files.append(literal("common.pt", pickled({})))  # megatron-core before 0.19 wants it
    return files


class _Plan:
    def __init__(self, source: HfReader, dialect: str):
        self._source, self._dialect = source, dialect
        self.files: list[PlannedFile] = []
        self.metadata = Metadata(state_dict_metadata={}, storage_data={})

    def add_row(self, row: Row) -> None:
        """A tensor, cut into chunks: one an expert, or as many rows as MAX_CHUNK_BYTES takes. Aliases share its bytes."""
        dtype = self._source.dtype(row.hf_names(0)[0])
        height, row_shape = row.height, row.parts[0].shape[1:]
        step = max(MAX_CHUNK_BYTES // (torch.Size(row_shape).numel() * dtype.itemsize), 1)
        keys = (row.name(self._dialect), *row.alias_names(self._dialect))
        zeros, ones = (0,) * len(row_shape), (1,) * (row.num_experts is not None)
        chunks = []
        for expert in range(row.num_experts) if row.num_experts else (None,):
            stack = () if expert is None else (expert,)
            for first in range(0, height, step):
                last = min(first + step, height)
                offsets = torch.Size((*stack, first, *zeros))
                sizes = torch.Size((*ones, last - first, *row_shape))
                chunks.append(ChunkStorageMetadata(offsets, sizes))
                info = self._add_chunk(sizes, dtype, row_parts(row, first, last, expert))
                for key in keys:
                    self.metadata.storage_data[MetadataIndex(key, offsets)] = info
        for key in keys:
            self.metadata.state_dict_metadata[key] = TensorStorageMetadata(
                TensorProperties(dtype=dtype), torch.Size(row.shape), list(chunks)
            )

    def _add_chunk(self, sizes: torch.Size, dtype: torch.dtype, parts: Iterable[tuple[str, int, int]]) -> _StorageInfo:
        before, after = around(sizes, dtype)
        file = self._file(sizes.numel() * dtype.itemsize)
        start = file.size
        file.add_bytes(before)
        for name, first, last in parts:
            file.add_rows(self._source, name, first, last)
        file.add_bytes(after)
        return _StorageInfo(file.name, start, file.size - start)

    def _file(self, size: int) -> PlannedFile:
        if not self.files or self.files[-1].size + size > MAX_FILE_BYTES:
            self.files.append(PlannedFile(f"__{len(self.files)}_0.distcp"))
        return self.files[-1]

    def add_object(self, value: object, keys: list[str]) -> None:
        """A plain value, stored once for all the keys that hold it."""
        data = pickled([value])
        file = self._file(len(data))
        info = _StorageInfo(file.name, file.size, len(data))
        file.add_bytes(data)
        for key in keys:
            self.metadata.state_dict_metadata[key] = BytesStorageMetadata()
            self.metadata.storage_data[MetadataIndex(key)] = info


def _extra_states(spec: ModelSpec, dialect: str) -> list[str]:
    return [
        f"{module}._extra_state/shard_{i}_{count}"
        for module, count in modules_with_extra_state(spec, dialect)
        for i in range(count)
    ]


def _stat(path: Path) -> list:
    found = path.stat()
    return [path.name, found.st_size, found.st_mtime_ns]
