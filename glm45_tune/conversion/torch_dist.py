"""`torch_dist` checkpoint directories: read by slices without megatron, planned file by file, or written by ranks together.

The format is torch.distributed.checkpoint's: a pickled `.metadata` that says which bytes of which file hold which chunk of
which tensor, and files of such chunks, each a torch.save. megatron adds metadata.json and a `common_state` object.
"""

import io
import json
import pickle
import warnings
from collections.abc import Callable
from functools import lru_cache
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

from glm45_tune.conversion.blocks import InputFile, read_block
from glm45_tune.errors import CheckpointError

COMMON = "common_state/shard_0_1"  # where megatron keeps what is not a tensor
FORMAT = json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1})


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
        self._files: dict[str, InputFile] = {}
        self._starts: dict[MetadataIndex, int | None] = {}
        self._plain_pickles: dict[tuple, bool] = {}
        self.file_names = sorted({info.relative_path for info in self._storage.values()})
        for name in self.file_names:
            if not (self.path / name).is_file():
                raise CheckpointError(f"{self.path}/.metadata names {name}, which is not there.")

    def read_key(self, key: str, offsets: tuple[int, ...] | None = None, sizes: tuple[int, ...] | None = None):
        """The part of a tensor that starts at `offsets` and has shape `sizes` (all of it by default); only its bytes are read."""
        meta = self.tensors[key]
        offsets = offsets or (0,) * len(meta.size)
        sizes = sizes or tuple(meta.size)
        result, filled = None, 0
        for chunk in meta.chunks:
            low = [max(a, b) for a, b in zip(offsets, chunk.offsets)]
            high = [min(a + n, b + m) for a, n, b, m in zip(offsets, sizes, chunk.offsets, chunk.sizes)]
            if any(a >= b for a, b in zip(low, high)):
                continue
            inside = [tuple(x - o for x, o in zip(corner, chunk.offsets)) for corner in (low, high)]
            data = self._read(MetadataIndex(key, chunk.offsets), chunk, meta.properties.dtype, *inside)
            if tuple(data.shape) == tuple(sizes):
                return data
            result = torch.empty(sizes, dtype=meta.properties.dtype) if result is None else result
            result[tuple(slice(a - o, b - o) for a, b, o in zip(low, high, offsets))] = data
            filled += data.numel()
        if result is None or filled != result.numel():
            raise CheckpointError(
                f"{self.path}: {filled} of the {torch.Size(sizes).numel()} values asked of {key} are stored."
            )
        return result

    def _read(self, index: MetadataIndex, chunk: ChunkStorageMetadata, dtype: torch.dtype, low, high) -> torch.Tensor:
        """A block of a chunk."""
        info = self._storage[index]
        file = self._file(info.relative_path)
        view = _View(file, info.offset, info.length)
        try:
            if index not in self._starts:
                start = self._start(view, chunk, dtype)
                self._starts[index] = None if start is None else info.offset + start
            if self._starts[index] is not None:
                return read_block(file, self._starts[index], dtype, tuple(chunk.sizes), low, high)
            whole = torch.load(view, map_location="cpu", weights_only=True)
            return whole[tuple(slice(a, b) for a, b in zip(low, high))].contiguous()
        except (RuntimeError, EOFError, AttributeError, pickle.UnpicklingError) as error:
            raise view.failure or CheckpointError(
                f"{file.path}: {index.fqn} cannot be read; the file is damaged."
            ) from error

    def _start(self, view: "_View", chunk: ChunkStorageMetadata, dtype: torch.dtype) -> int | None:
        """Where in a torch.save the chunk's values begin, one after the other; None if it holds them otherwise."""
        archive = torch._C.PyTorchFileReader(view)
        said = archive.get_record("data.pkl"), tuple(chunk.sizes), dtype
        if said not in self._plain_pickles:
            view.seek(0)
            tensor = torch.load(view, map_location="meta", weights_only=True)
            self._plain_pickles[said] = (
                (tuple(tensor.shape), tensor.dtype) == said[1:] and tensor.is_contiguous() and not tensor.storage_offset()
            )
        view.seek(0)
        return archive.get_record_offset("data/0") if self._plain_pickles[said] else None

    def _file(self, name: str) -> InputFile:
        if name not in self._files:
            self._files[name] = InputFile(self.path / name)
        return self._files[name]


class _View(io.RawIOBase):
    """A range of a file as a file of its own."""

    def __init__(self, file: InputFile, start: int, length: int):
        self._file, self._start, self._length, self._position = file, start, length, 0
        self.failure: CheckpointError | None = None  # torch's reader makes an error of its own of it

    def readinto(self, buffer) -> int:
        view = memoryview(buffer).cast("B")[: max(self._length - self._position, 0)]
        try:
            self._file.read_into(view, self._start + self._position)
        except CheckpointError as error:
            self.failure = error
            raise
        self._position += len(view)
        return len(view)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + (0, self._position, self._length)[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


class _Skeleton(io.RawIOBase):
    """What torch.save writes around a tensor's values: it seeks over them, once."""

    def __init__(self):
        self.before, self.after = bytearray(), None

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def write(self, data) -> int:
        (self.before if self.after is None else self.after).extend(data)
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        assert whence == io.SEEK_CUR and self.after is None, "torch.save seeks otherwise than over the one record"
        self.after = bytearray()
        return len(self.before) + offset


@lru_cache(maxsize=1024)
def around(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[bytes, bytes]:
    """The bytes that torch.save puts before and after the values of a contiguous tensor."""
    skeleton = _Skeleton()
    with torch.serialization.skip_data():
        torch.save(torch.empty(shape, dtype=dtype), skeleton)
    assert skeleton.after is not None
    return bytes(skeleton.before), bytes(skeleton.after)


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


def write_torch_dist(path: Path, chunks: Chunks, objects: dict[str, object], group) -> None:
    """Write a checkpoint into an existing directory; the ranks of `group` write their parts together.

    A chunk's `read` is called when its turn comes. objects: plain values by key. (torch loses errors of any thread but the
    first, so there is one.)
    """
    packed = {key: pickled([value]) for key, value in objects.items()}
    writer = FileSystemWriter(str(path), single_file_per_rank=True, sync_files=False, thread_count=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        save({}, storage_writer=writer, planner=_StreamPlanner(chunks, packed), process_group=group)
    if group.rank() == 0:
        (path / "metadata.json").write_text(FORMAT)


def pickled(value) -> bytes:
    """torch.save's bytes of a plain value."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()
