"""The `.metadata` of a torch_dist directory, read without a pickle machine: the file may come from anybody.

It is a pickle, and a pickle can call whatever it names. So its opcodes are interpreted here: they make plain values and
records of a few named kinds, nothing is imported and nothing is called. What is not on the lists below is refused by name.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

_CHECKPOINT = "torch.distributed.checkpoint.metadata"
_NAMES = {
    *(
        (_CHECKPOINT, name)
        for name in ("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties")
    ),
    *((_CHECKPOINT, name) for name in ("ChunkStorageMetadata", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING")),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
    # megatron 0.15 wrote this subclass of Metadata
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"),
}
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}
_LARGEST = 2**63 - 1


class MetadataError(Exception):
    """What is wrong with a `.metadata`, in words."""


@dataclass(slots=True, eq=False)
class _Record:
    """Something that the pickle would have made by calling `kind`: with these arguments, and then this state."""

    kind: str
    arguments: tuple = ()
    state: object = None


class _Mark:
    pass


def read_metadata(data: bytes) -> tuple[dict[str, TensorStorageMetadata], dict[MetadataIndex, _StorageInfo]]:
    """Tensors by key, and where each chunk of a tensor or object is stored. Raises MetadataError."""
    try:
        whole = _Machine(data).run()
    except (struct.error, IndexError) as error:
        raise MetadataError("it ends in the middle of a value") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise MetadataError(f"its values do not fit together ({error})") from error
    fields = _state(whole, "Metadata", "MCoreMetadata")
    tensors, stored = fields.get("state_dict_metadata"), fields.get("storage_data")
    if not isinstance(tensors, dict) or not isinstance(stored, dict):
        raise MetadataError("state_dict_metadata and storage_data are expected to be mappings")
    for key in tensors:
        if not isinstance(key, str):
            raise MetadataError(f"a tensor's key is {type(key).__name__}; text is expected")
    return (
        {key: _tensor(key, value) for key, value in tensors.items() if _kind(value) == "TensorStorageMetadata"},
        {_index(key): _storage(value) for key, value in stored.items()},
    )


def _kind(value: object) -> str:
    return value.kind if isinstance(value, _Record) else type(value).__name__


def _state(value: object, *kinds: str) -> dict:
    if _kind(value) not in kinds or not isinstance(value.state, dict):
        raise MetadataError(f"{kinds[0]} is expected where {_kind(value)} is stored")
    return value.state


def _size(value: object) -> torch.Size:
    """A torch.Size, or a tuple or list of whole numbers."""
    if _kind(value) == "Size":
        value = value.arguments[0] if value.arguments else ()
    if not isinstance(value, tuple | list) or not all(_is_number(each) for each in value):
        raise MetadataError(f"a shape is expected where {_kind(value)} is stored")
    return torch.Size(value)


def _is_number(value: object) -> bool:
    return type(value) is int and 0 <= value <= _LARGEST


def _tensor(key: str, value: _Record) -> TensorStorageMetadata:
    fields = _state(value, "TensorStorageMetadata")
    properties = fields.get("properties")
    stored = properties.state if _kind(properties) == "TensorProperties" else None
    dtype = (
        stored[0] if isinstance(stored, tuple) and stored else stored.get("dtype") if isinstance(stored, dict) else None
    )
    if not isinstance(dtype, torch.dtype):
        raise MetadataError(f"{key} has no dtype")
    size, chunks = _size(fields.get("size")), fields.get("chunks")
    if not isinstance(chunks, list):
        raise MetadataError(f"{key}: a list of chunks is expected")
    found = []
    for chunk in chunks:
        parts = _state(chunk, "ChunkStorageMetadata")
        offsets, sizes = _size(parts.get("offsets")), _size(parts.get("sizes"))
        if not len(offsets) == len(sizes) == len(size) or any(a + n > b for a, n, b in zip(offsets, sizes, size)):
            raise MetadataError(f"{key} has shape {tuple(size)} and a chunk {tuple(sizes)} at {tuple(offsets)}")
        found.append(ChunkStorageMetadata(offsets, sizes))
    return TensorStorageMetadata(TensorProperties(dtype=dtype), size, found)


def _index(value: object) -> MetadataIndex:
    fields = _state(value, "MetadataIndex")
    fqn, offset, number = fields.get("fqn"), fields.get("offset"), fields.get("index")
    if not isinstance(fqn, str) or not (number is None or _is_number(number)):
        raise MetadataError("a chunk is stored without the tensor it belongs to")
    return MetadataIndex(fqn, None if offset is None else _size(offset), number)


def _storage(value: object) -> _StorageInfo:
    fields = _state(value, "_StorageInfo")
    name, first, length = fields.get("relative_path"), fields.get("offset"), fields.get("length")
    if not isinstance(name, str) or not _is_number(first) or not _is_number(length):
        raise MetadataError("a chunk is stored without file, offset and length")
    return _StorageInfo(name, first, length)


class _Machine:
    """Pickle's opcodes as torch and megatron write them (protocols 2 to 5); any other is refused."""

    def __init__(self, data: bytes):
        self._data, self._at = data, 0
        self._stack: list = []
        self._memo: dict[int, object] = {}
        self._operations: dict[int, Callable[[], None]] = {
            opcode: getattr(self, f"_{name}") for opcode, name in _OPCODES.items()
        }

    def run(self) -> object:
        data, stack, operations, simple, end = self._data, self._stack, self._operations, _CONSTANTS, ord(".")
        while (opcode := data[self._at]) != end:
            self._at += 1
            if opcode in simple:
                stack.append(simple[opcode])
            elif opcode in operations:
                operations[opcode]()
            else:
                raise MetadataError(f"the pickle opcode {bytes([opcode])!r} has no place in a checkpoint's metadata")
        return stack.pop()

    def _number(self, form: str):
        (value,) = struct.unpack_from(form, self._data, self._at)
        self._at += struct.calcsize(form)
        return value

    def _bytes(self, length: int) -> bytes:
        found = self._data[self._at : self._at + length]
        if len(found) != length:
            raise IndexError
        self._at += length
        return found

    def _proto(self) -> None:
        if (protocol := self._number("<B")) not in (2, 3, 4, 5):
            raise MetadataError(f"a pickle of protocol {protocol}; 2 to 5 are known")

    def _frame(self) -> None:
        self._number("<Q")

    def _binint(self) -> None:
        self._stack.append(self._number("<i"))

    def _binint1(self) -> None:
        self._stack.append(self._number("<B"))

    def _binint2(self) -> None:
        self._stack.append(self._number("<H"))

    def _long1(self) -> None:
        self._stack.append(int.from_bytes(self._bytes(self._number("<B")), "little", signed=True))

    def _binfloat(self) -> None:
        self._stack.append(self._number(">d"))

    def _text1(self) -> None:
        self._stack.append(self._bytes(self._number("<B")).decode("utf-8", "surrogatepass"))

    def _text4(self) -> None:
        self._stack.append(self._bytes(self._number("<I")).decode("utf-8", "surrogatepass"))

    def _mark(self) -> None:
        self._stack.append(_Mark)

    def _list(self) -> None:
        self._stack.append([])

    def _dict(self) -> None:
        self._stack.append({})

    def _memoize(self) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def _put1(self) -> None:
        self._memo[self._number("<B")] = self._stack[-1]

    def _put4(self) -> None:
        self._memo[self._number("<I")] = self._stack[-1]

    def _get1(self) -> None:
        self._stack.append(self._memo[self._number("<B")])

    def _get4(self) -> None:
        self._stack.append(self._memo[self._number("<I")])

    def _since_mark(self) -> list:
        stack = self._stack
        place = len(stack) - 1
        while stack[place] is not _Mark:
            if not place:
                raise IndexError
            place -= 1
        found = stack[place + 1 :]
        del stack[place:]
        return found

    def _tuple(self) -> None:
        self._stack.append(tuple(self._since_mark()))

    def _tuple_of(self, count: int) -> None:
        if len(self._stack) < count:
            raise IndexError
        found = tuple(self._stack[-count:])
        del self._stack[-count:]
        self._stack.append(found)

    def _tuple1(self) -> None:
        self._tuple_of(1)

    def _tuple2(self) -> None:
        self._tuple_of(2)

    def _tuple3(self) -> None:
        self._tuple_of(3)

    def _append(self) -> None:
        value = self._stack.pop()
        self._onto(list).append(value)

    def _appends(self) -> None:
        values = self._since_mark()
        self._onto(list).extend(values)

    def _setitem(self) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._onto(dict)[key] = value

    def _setitems(self) -> None:
        values = self._since_mark()
        self._onto(dict).update(zip(values[::2], values[1::2], strict=True))

    def _onto(self, kind: type):
        """What the top of the stack is filled with: a list or dict, or that of an OrderedDict."""
        value = self._stack[-1]
        if isinstance(value, _Record) and value.kind == "OrderedDict" and kind is dict:
            value.state = {} if value.state is None else value.state
            value = value.state
        if type(value) is not kind:
            raise TypeError(f"{_kind(value)} for {kind.__name__}")
        return value

    def _global(self) -> None:
        end = self._data.index(b"\n", self._at)
        after = self._data.index(b"\n", end + 1)
        module, name = self._data[self._at : end].decode(), self._data[end + 1 : after].decode()
        self._at = after + 1
        self._name(module, name)

    def _stack_global(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self._name(module, name)

    def _name(self, module: object, name: object) -> None:
        if module == "torch" and isinstance(name, str) and name in _DTYPES:
            self._stack.append(_DTYPES[name])
        elif (module, name) in _NAMES:
            self._stack.append(_Record("a class", (name,)))
        else:
            raise MetadataError(f"{module}.{name} has no place in a checkpoint's metadata".replace("\n", " ")[:300])

    def _made(self) -> None:
        """REDUCE and NEWOBJ: a named kind with its arguments."""
        arguments, named = self._stack.pop(), self._stack.pop()
        if _kind(named) != "a class" or not isinstance(arguments, tuple):
            raise TypeError(f"{_kind(named)} is called")
        self._stack.append(_Record(named.arguments[0], arguments))

    def _build(self) -> None:
        state = self._stack.pop()
        if _kind(record := self._stack[-1]) == "a class" or not isinstance(record, _Record):
            raise TypeError(f"{_kind(record)} is given a state")
        record.state = state


_CONSTANTS = {ord("N"): None, 0x88: True, 0x89: False, ord(")"): ()}
_OPCODES = {
    0x80: "proto", 0x95: "frame", ord("J"): "binint", ord("K"): "binint1", ord("M"): "binint2", 0x8A: "long1",
    ord("G"): "binfloat", 0x8C: "text1", ord("X"): "text4", ord("("): "mark", ord("]"): "list", ord("}"): "dict",
    0x94: "memoize", ord("q"): "put1", ord("r"): "put4", ord("h"): "get1", ord("j"): "get4", ord("t"): "tuple",
    0x85: "tuple1", 0x86: "tuple2", 0x87: "tuple3", ord("a"): "append", ord("e"): "appends", ord("s"): "setitem",
    ord("u"): "setitems", ord("c"): "global", 0x93: "stack_global", ord("R"): "made", 0x81: "made", ord("b"): "build",
}  # fmt: skip
