"""megatron `torch_dist` checkpoint directories: read by slices without megatron, written as a stream.

The format is torch.distributed.checkpoint's: a pickled `.metadata` that says which bytes of which file hold which chunk of
which tensor, and files of such chunks, each a torch.save. megatron adds metadata.json and a `common_state` object.
"""

import io
import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemWriter, save
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner, create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from glm45_tune.conversion.names import DIALECTS, Row, hf_places, is_mtp, rows
from glm45_tune.conversion.tensors import ALL, split_row
from glm45_tune.errors import CheckpointError
from glm45_tune.spec import ModelSpec, read_config

COMMON = "common_state/shard_0_1"  # where megatron keeps what is not a tensor


class _MetadataUnpickler(pickle.Unpickler):
    """Unpickles what torch.distributed.checkpoint puts into `.metadata` and nothing else: the file came from somebody."""

    def find_class(self, module: str, name: str):
        if module in ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), (torch.dtype, type(torch.Size))):
            return getattr(torch, name)
        if (module, name) in (
            ("torch.serialization", "_get_layout"),
            ("collections", "OrderedDict"),
            ("pathlib", "PosixPath"),
            ("pathlib", "PurePosixPath"),
        ):
            return super().find_class(module, name)
        if (module, name) == ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"):
            return Metadata  # megatron 0.15 wrote this subclass
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint's metadata")


class TorchDistFiles:
    """The tensors of a torch_dist directory, by key and slice."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not (self.path / ".metadata").is_file():
            raise CheckpointError(
                f"{self.path}: no .metadata here; not a megatron torch_dist checkpoint, or an incomplete one."
            )
        try:
            with open(self.path / ".metadata", "rb") as file:
                metadata = _MetadataUnpickler(file).load()
        except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, ValueError) as error:
            raise CheckpointError(f"{self.path}/.metadata: cannot be read: {error}.") from error
        self.tensors: dict[str, TensorStorageMetadata] = {
            key: meta for key, meta in metadata.state_dict_metadata.items() if isinstance(meta, TensorStorageMetadata)
        }
        self._storage = metadata.storage_data
        for info in self._storage.values():
            if not (self.path / info.relative_path).is_file():
                raise CheckpointError(f"{self.path}/.metadata names {info.relative_path}, which is not there.")

    def read_key(self, key: str, offsets: tuple[int, ...] | None = None, sizes: tuple[int, ...] | None = None):
        """The part of a tensor that starts at `offsets` and has shape `sizes` (all of it by default)."""
        meta = self.tensors[key]
        offsets = offsets or (0,) * len(meta.size)
        sizes = sizes or tuple(meta.size)
        result, filled = torch.empty(sizes, dtype=meta.properties.dtype), 0
        for chunk in meta.chunks:
            low = [max(a, b) for a, b in zip(offsets, chunk.offsets)]
            high = [min(a + n, b + m) for a, n, b, m in zip(offsets, sizes, chunk.offsets, chunk.sizes)]
            if any(a >= b for a, b in zip(low, high)):
                continue
            data = self._read(MetadataIndex(key, chunk.offsets))
            data = data[tuple(slice(a - o, b - o) for a, b, o in zip(low, high, chunk.offsets))]
            if data.shape == result.shape:
                return data
            result[tuple(slice(a - o, b - o) for a, b, o in zip(low, high, offsets))] = data
            filled += data.numel()
        if filled != result.numel():
            raise CheckpointError(f"{self.path}: {filled} of the {result.numel()} values asked of {key} are stored.")
        return result

    def _read(self, index: MetadataIndex):
        info = self._storage[index]
        with open(self.path / info.relative_path, "rb") as file:
            file.seek(info.offset)
            data = file.read(info.length)
        try:
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise CheckpointError(
                f"{self.path}/{info.relative_path}: {index.fqn} cannot be read; the file is damaged."
            ) from error


class McoreDir(TorchDistFiles):
    """A megatron checkpoint of a GLM-4.5 model in either dialect, read by megatron's names or by Hugging Face's."""

    def __init__(self, path: str | Path):
        self.config = read_config(path)
        self.spec = ModelSpec.from_config(self.config, f"{path}/config.json")
        super().__init__(path)
        self.dialect = self._recognise()
        self._place = hf_places(self.spec, lambda row: row.name(self.dialect) in self.tensors)
        self._last_read: tuple = (None, [])
        self.check()

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
                raise CheckpointError(f"{self.path}: no place in a GLM-4.5 model for {key}. Wrong model or a new release?")

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
        """Rows [first, last) and columns of an HF tensor. Its whole row is read, and kept until another row is asked for."""
        row, part, expert = self._place[name]
        if self._last_read[0] != (row.hybrid, expert):
            self._last_read = (row.hybrid, expert), split_row(row, self.read_row(row, expert))
        tensor = self._last_read[1][part][first:last]
        return tensor if columns == ALL else tensor[:, columns]

    def read_row(self, row: Row, expert: int | None = None) -> torch.Tensor:
        """A row's whole tensor, or one expert of it."""
        key = row.name(self.dialect)
        if expert is None:
            return self.read_key(key)
        _, *one = row.shape
        return self.read_key(key, (expert,) + (0,) * len(one), (1, *one))[0]


class _StreamPlanner(DefaultSavePlanner):
    """Plans a save from shapes alone and fetches each chunk only when it is about to be written."""

    def __init__(self, chunks: "Chunks", objects: dict[str, bytes]):
        super().__init__()
        self._chunks, self._objects = chunks, objects

    def set_up_planner(self, state_dict, storage_meta=None, is_coordinator=False) -> None:
        pass

    def create_local_plan(self) -> SavePlan:
        items, self._readers = [], {}
        for key, (shape, dtype, parts) in self._chunks.items():
            for offsets, sizes, read in parts:
                index = MetadataIndex(key, torch.Size(offsets))
                chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
                data = TensorWriteData(chunk, TensorProperties(dtype=dtype), torch.Size(shape))
                items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
                self._readers[index] = read
        items += [WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in self._objects]
        return SavePlan(items)

    def create_global_plan(self, all_plans: list[SavePlan]):
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem):
        if write_item.type == WriteItemType.BYTE_IO:
            return io.BytesIO(self._objects[write_item.index.fqn])
        return self._readers[write_item.index]().detach()


# key → (shape of the whole tensor, dtype, [(offsets, sizes, read), …]): the chunks this process writes
Chunks = dict[str, tuple[tuple[int, ...], torch.dtype, list[tuple[tuple[int, ...], tuple[int, ...], Callable]]]]


def write_torch_dist(path: Path, chunks: Chunks, objects: dict[str, object], group=None) -> None:
    """Write a torch_dist checkpoint into an existing directory; with `group`, its ranks write their parts together.

    A chunk's `read` is called when its turn comes, so one chunk a thread is in memory. objects: plain values by key.
    """
    packed = {key: _pickled([value]) for key, value in objects.items()}
    writer = FileSystemWriter(str(path), single_file_per_rank=True, sync_files=False, thread_count=2)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process writes: that is the intent
        planner = _StreamPlanner(chunks, packed)
        save({}, storage_writer=writer, planner=planner, process_group=group, no_dist=group is None)
    if group is None or group.rank() == 0:
        (path / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))


def write_model(path: Path, chunks: Chunks, empty_objects: list[str], legacy_common: bool) -> None:
    """Write a model's checkpoint. empty_objects: keys of objects that hold None.

    legacy_common: also write the common.pt that megatron-core before 0.19 wants.
    """
    write_torch_dist(path, chunks, dict.fromkeys(empty_objects) | {COMMON: {}})
    if legacy_common:
        torch.save({}, path / "common.pt")


def _pickled(value) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()
