"""`torch_dist` checkpoint directories: read by slices without megatron, planned file by file, or written by ranks, a file each.

The format is torch.distributed.checkpoint's: a pickled `.metadata` that says which bytes of which file hold which chunk of
which tensor, and files of such chunks, each a torch.save. megatron adds metadata.json and a `common_state` object.
"""

import io
import json
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

from glm45_tune.conversion.archives import Stored, find_object, find_tensor
from glm45_tune.conversion.blocks import InputFile, bytes_of
from glm45_tune.conversion.metadata import Place, read_metadata
from glm45_tune.errors import CheckpointError
from glm45_tune.foreign import member, shown

COMMON = "common_state/shard_0_1"  # where megatron keeps what is not a tensor
FORMAT = json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1})


class TorchDistFiles:
    """The tensors of a torch_dist directory, by key and slice."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.tensors, self._storage = read_metadata(self.path)
        self._files: dict[str, InputFile] = {}
        self._stored: dict[Place, Stored] = {}
        self.file_names = sorted({info.relative_path for info in self._storage.values()})
        for name in self.file_names:
            self._file(name)
        for (key, _), info in self._storage.items():
            if info.offset + info.length > (size := self._file(info.relative_path).size):
                raise CheckpointError(
                    f"{self.path}/.metadata: puts {shown(key)} at bytes {info.offset} to {info.offset + info.length} of "
                    f"{info.relative_path}, which has {size}. Is the file whole?"
                )

    def read_key(self, key: str, offsets: tuple[int, ...] | None = None, sizes: tuple[int, ...] | None = None):
        """The part of a tensor that starts at `offsets` and has shape `sizes` (all of it by default); only its bytes are read."""
        if key not in self.tensors:
            raise CheckpointError(f"{self.path}: {key} is missing.")
        meta = self.tensors[key]
        offsets = offsets or (0,) * len(meta.size)
        sizes = sizes or tuple(meta.size)
        result, filled = None, None
        for chunk in meta.chunks:
            low = [max(a, b) for a, b in zip(offsets, chunk.offsets)]
            high = [min(a + n, b + m) for a, n, b, m in zip(offsets, sizes, chunk.offsets, chunk.sizes)]
            if any(a >= b for a, b in zip(low, high)):
                continue
            inside = [tuple(x - o for x, o in zip(corner, chunk.offsets)) for corner in (low, high)]
            data = self._read((key, tuple(chunk.offsets)), chunk, meta.properties.dtype, *inside)
            if tuple(data.shape) == tuple(sizes):
                return data
            if result is None or filled is None:
                result, filled = torch.empty(sizes, dtype=meta.properties.dtype), torch.zeros(sizes, dtype=torch.bool)
            place = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, offsets))
            result[place] = data
            filled[place] = True
        if result is None or filled is None or not filled.all():
            count = 0 if filled is None else int(filled.sum())
            raise CheckpointError(
                f"{self.path}: {count} of the {torch.Size(sizes).numel()} values asked of {key} are stored."
            )
        return result

    def _read(self, place: Place, chunk: ChunkStorageMetadata, dtype: torch.dtype, low, high) -> torch.Tensor:
        """A block of a chunk."""
        info = self._storage[place]
        file = self._file(info.relative_path)
        if place not in self._stored:
            self._stored[place] = find_tensor(file, info.offset, info.length, tuple(chunk.sizes), dtype)
        return self._stored[place].read(file, dtype, low, high)

    def read_object(self, key: str) -> object:
        """What is stored under `key` that is not a tensor: plain values. Raises CheckpointError."""
        info = self._storage.get((key, None))
        if info is None:
            raise CheckpointError(f"{self.path}: {key} is missing.")
        return find_object(self._file(info.relative_path), info.offset, info.length)

    def _file(self, name: str) -> InputFile:
        if name not in self._files:
            self._files[name] = InputFile(member(self.path, name, ".metadata"))
        return self._files[name]


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
