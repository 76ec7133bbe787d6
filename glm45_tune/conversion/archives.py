"""What torch.save wrote, found in a range of a file: a zip archive of a pickle and of the values, none of them compressed."""

import io
import math
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from glm45_tune.conversion.blocks import InputFile, read_block
from glm45_tune.conversion.pickles import Maker, PickleError, Record, load, record
from glm45_tune.errors import CheckpointError
from glm45_tune.foreign import shown

# of what an archive holds besides values: of a tensor's, which has some two thousand, and of an object's
_TENSOR_BYTES, _OBJECT_BYTES = 2**15, 2**24
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_NAMES: Mapping[tuple[str, str], object] = {
    **{("torch", name): dtype for name, dtype in _STORAGES.items()},
    ("torch._utils", "_rebuild_tensor_v2"): record("tensor"),
    ("collections", "OrderedDict"): Maker(lambda arguments: {}),
}


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a chunk's values begin in its file, and how they lie there."""

    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None  # None: one value after the other
    count: int = 0  # of the values, where they have strides

    def read(self, file: InputFile, dtype: torch.dtype, low: tuple[int, ...], high: tuple[int, ...]) -> torch.Tensor:
        """The block from corner `low` to corner `high`."""
        if self.strides is None:
            return read_block(file, self.start, dtype, self.shape, low, high)
        values = read_block(file, self.start, dtype, (self.count,), (0,), (self.count,))
        whole = values.as_strided(self.shape, self.strides)
        return whole[tuple(slice(a, b) for a, b in zip(low, high))].contiguous()


def find_tensor(file: InputFile, offset: int, length: int, shape: tuple[int, ...], dtype: torch.dtype) -> Stored:
    """Where the tensor lies that is archived in these bytes of a file. Raises CheckpointError unless it is this one."""
    archive = _Archive(file, offset, length, _TENSOR_BYTES)
    tensor = archive.pickle()
    try:
        if not isinstance(tensor, Record) or tensor.kind != "tensor":
            raise PickleError("it is not a tensor")
        storage, first, sizes, strides = tensor.arguments[:4]
        if not isinstance(storage, Record) or storage.kind != "storage":
            raise PickleError("it has no values")
        name, stored_dtype, count = storage.arguments
        if (sizes, stored_dtype) != (shape, dtype) or not _fits(first, sizes, strides, count):
            raise PickleError(f"it holds {shown(stored_dtype)} {shown(sizes)}, and {dtype} {list(shape)} is expected")
        start = archive.values(name, count * dtype.itemsize) + first * dtype.itemsize
    except (PickleError, ValueError) as error:
        raise archive.fault(error) from error
    dense = all(stride == math.prod(shape[dim + 1 :]) for dim, stride in enumerate(strides) if shape[dim] > 1)
    return Stored(start, shape) if dense else Stored(start, shape, strides, count - first)


def _fits(first: object, sizes: object, strides: object, count: object) -> bool:
    """Do the values lie within the storage?"""
    numbers = (first, count, *sizes, *strides) if type(sizes) is type(strides) is tuple else (None,)
    if any(type(number) is not int or number < 0 for number in numbers) or len(sizes) != len(strides):
        return False
    if not math.prod(sizes):
        return first <= count
    return first + sum((size - 1) * stride for size, stride in zip(sizes, strides)) < count


def find_object(file: InputFile, offset: int, length: int) -> object:
    """The plain value that is archived in these bytes of a file; a tensor in it is a Record."""
    return _Archive(file, offset, length, _OBJECT_BYTES).pickle()


class _Archive:
    """An archive of torch.save. Raises CheckpointError."""

    def __init__(self, file: InputFile, offset: int, length: int, most: int):
        self._file, self._offset, self._length = file, offset, length
        self._view = _View(file, offset, length, most)
        try:
            self._members = {info.filename.partition("/")[2]: info for info in zipfile.ZipFile(self._view).infolist()}
            order = self._member("byteorder") if "byteorder" in self._members else b"little"
        except _DAMAGES as error:
            raise self.fault(error) from error
        if order != b"little":
            raise self.fault(ValueError(f"its byte order is {shown(order)}"))

    def fault(self, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"{self._file.path}: what stands at byte {self._offset} cannot be read: {error}. Is the file whole?"
        )

    def pickle(self) -> object:
        try:
            return load(self._member("data.pkl"), _NAMES, _storage)
        except _DAMAGES as error:
            raise self.fault(error) from error

    def _member(self, name: str) -> bytes:
        info = self._members[name]
        start = self._start(info)
        data = self._view.range(start, info.file_size)
        if zlib.crc32(data) != info.CRC:
            raise ValueError(f"{name} does not hold what was written (CRC-32)")
        return data

    def _start(self, info: zipfile.ZipInfo) -> int:
        """Where a member's bytes begin."""
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise ValueError(f"{shown(info.filename)} is compressed")
        header = self._view.range(info.header_offset, 30)
        if header[:4] != b"PK\x03\x04":
            raise ValueError(f"{shown(info.filename)} is not where it should be")
        name, extra = struct.unpack("<HH", header[26:])
        start = info.header_offset + 30 + name + extra
        if start + info.file_size > self._length:
            raise ValueError(f"{shown(info.filename)} is longer than its place")
        return start

    def values(self, name: object, size: int) -> int:
        """Where in the file the values of a storage begin."""
        info = self._members.get(f"data/{name}")
        if info is None or info.file_size != size:
            raise ValueError(f"its values do not have {size} bytes")
        return self._offset + self._start(info)


_DAMAGES = (
    PickleError,
    zipfile.BadZipFile,
    ValueError,
    KeyError,
    OverflowError,
    EOFError,
    MemoryError,
    struct.error,
    NotImplementedError,
    RuntimeError,
    CheckpointError,
)


def _storage(said: object) -> Record:
    if type(said) is not tuple or len(said) != 5 or said[0] != "storage" or not isinstance(said[2], str):
        raise PickleError("it points outside itself")
    return Record("storage", (said[2], said[1], said[4]))


class _View(io.RawIOBase):
    """A range of a file as a file of its own, of which no more is read than an archive has around its values."""

    def __init__(self, file: InputFile, start: int, length: int, most: int):
        self._file, self._start, self._length, self._position = file, start, length, 0
        self._most = self._left = most

    def range(self, start: int, size: int) -> bytes:
        if not 0 <= start <= start + size <= self._length:
            raise ValueError("it is longer than its place")
        self._left -= size
        if self._left < 0:
            raise ValueError(f"it holds more than {self._most} bytes besides values")
        return self._file.read(self._start + start, size)

    def read(self, size: int = -1) -> bytes:
        left = max(self._length - self._position, 0)
        data = self.range(self._position, left if size is None or size < 0 else min(size, left))
        self._position += len(data)
        return data

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        position = offset + (0, self._position, self._length)[whence]
        if position < 0:
            raise ValueError("it is shorter than its own list says")
        self._position = position
        return self._position

    def tell(self) -> int:
        return self._position

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True
