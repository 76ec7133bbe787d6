"""`torch_dist` checkpoint directories: read by slices without megatron, planned file by file, or written by ranks, a file each.

The format is torch.distributed.checkpoint's: a pickled `.metadata` that says which bytes of which file hold which chunk of
which tensor, and files of such chunks, each a torch.save. megatron adds metadata.json and a `common_state` object.
"""

import io
import json
import math
import os
import pickle
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
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

from glm45_tune.conversion.blocks import InputFile, bytes_of, read_block
from glm45_tune.conversion.metadata_file import MetadataError, read_metadata
from glm45_tune.errors import CheckpointError
from glm45_tune.foreign import member, read_bytes

COMMON = "common_state/shard_0_1"  # where megatron keeps what is not a tensor
MOST_METADATA_BYTES = 2**30
FORMAT = json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1})


class TorchDistFiles:
    """The tensors of a torch_dist directory, by key and slice."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not (self.path / ".metadata").is_file():
            raise CheckpointError(
                f"{self.path}: no .metadata here; not a megatron torch_dist checkpoint, or an incomplete one."
            )
        try:
            self.tensors, self._storage = read_metadata(read_bytes(self.path / ".metadata", MOST_METADATA_BYTES))
        except MetadataError as error:
            raise CheckpointError(f"{self.path}/.metadata: cannot be read: {error}.") from error
        self._files: dict[str, InputFile] = {}
        self._starts: dict[MetadataIndex, int | None] = {}
        self._plain_pickles: dict[tuple, bool] = {}
        self.file_names = sorted({info.relative_path for info in self._storage.values()})
        self._check_files()

    def _check_files(self) -> None:
        """Raise CheckpointError unless every file lies in the directory and holds what is said to be in it."""
        ends: dict[str, int] = {}
        for info in self._storage.values():
            ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
        for name in self.file_names:
            size = member(self.path, name, ".metadata").stat().st_size
            if ends[name] > size:
                raise CheckpointError(f"{self.path}/{name}: holds {size:,} bytes; .metadata names {ends[name]:,}.")
        for key, meta in self.tensors.items():
            for chunk in meta.chunks:
                info = self._storage.get(MetadataIndex(key, chunk.offsets))
                if info is None:
                    raise CheckpointError(f"{self.path}/.metadata: a chunk of {key} is stored nowhere.")
                if math.prod(chunk.sizes) * meta.properties.dtype.itemsize > info.length:
                    raise CheckpointError(
                        f"{self.path}/.metadata: a chunk of {key} has shape {tuple(chunk.sizes)} and {info.length:,} bytes."
                    )

    def read_object(self, key: str) -> object:
        """A plain value that is stored beside the tensors. Raises CheckpointError."""
        info = self._storage.get(MetadataIndex(key))
        if info is None:
            raise CheckpointError(f"{self.path}: {key} is not stored here.")
        view = _View(self._file(info.relative_path), info.offset, info.length)
        try:
            (value,) = torch.load(view, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, ValueError, TypeError, pickle.UnpicklingError) as error:
            raise view.failure or CheckpointError(f"{self.path}: {key} cannot be read: {error}") from error
        return value

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
                (tuple(tensor.shape), tensor.dtype) == said[1:]
                and tensor.is_contiguous()
                and not tensor.storage_offset()
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


@dataclass
class Part:
    """What one file holds: (tensor's key, shape, dtype, [(offsets, sizes, start, length), …]) and (object's key, start, length)."""

    name: str
    tensors: list[tuple[str, tuple, torch.dtype, list[tuple]]] = field(default_factory=list)
    objects: list[tuple[str, int, int]] = field(default_factory=list)
    size: int = 0
    crc: int = 0


def write_part(path: Path, name: str, chunks: "Chunks", objects: dict[str, object]) -> Part:
    """Write a file of chunks and plain values into the directory `path`, to the disk. Raises OSError.

    Beside torch's own writer a training step takes as much longer as the writing does; here values go from memory to the file
    without Python's lock.
    """
    part = Part(name)
    with open(path / name, "wb", buffering=2**20) as file:

        def put(data) -> None:
            file.write(data)
            part.size, part.crc = part.size + len(data), zlib.crc32(data, part.crc)

        for key, (shape, dtype, pieces) in chunks.items():
            written = []
            for offsets, sizes, tensor in pieces:
                before, after = around(tuple(sizes), dtype)
                start, values = part.size, bytes_of(tensor)
                put(before)
                for first in range(0, len(values), 2**24):
                    put(values[first : first + 2**24])
                put(after)
                written.append((tuple(offsets), tuple(sizes), start, part.size - start))
            part.tensors.append((key, tuple(shape), dtype, written))
        for key, value in objects.items():
            start = part.size
            put(pickled([value]))
            part.objects.append((key, start, part.size - start))
        file.flush()
        os.fsync(file.fileno())
    return part


def metadata_of(parts: Iterable[Part]) -> bytes:
    """The pickled `.metadata` of a directory that holds these files."""
    metadata = Metadata(state_dict_metadata={}, storage_data={})
    for part in parts:
        for key, shape, dtype, written in part.tensors:
            known = metadata.state_dict_metadata.setdefault(
                key, TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(shape), [])
            )
            for offsets, sizes, start, length in written:
                known.chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
                index = MetadataIndex(key, torch.Size(offsets))
                metadata.storage_data[index] = _StorageInfo(part.name, start, length)
        for key, start, length in part.objects:
            metadata.state_dict_metadata[key] = BytesStorageMetadata()
            metadata.storage_data[MetadataIndex(key)] = _StorageInfo(part.name, start, length)
    return pickle.dumps(metadata, protocol=4)


# key → (shape of the whole tensor, dtype, [(offsets, sizes, values), …]): the chunks this process writes
Chunks = dict[str, tuple[tuple[int, ...], torch.dtype, list[tuple[tuple[int, ...], tuple[int, ...], torch.Tensor]]]]


def pickled(value) -> bytes:
    """torch.save's bytes of a plain value."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()
