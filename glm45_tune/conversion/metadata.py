"""`.metadata` of a torch_dist directory: which bytes of which file hold which chunk of which tensor.

It is a pickle that came from somebody: what it says is checked for kind, size and range before anything is made of it.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorProperties, TensorStorageMetadata

from glm45_tune.conversion.pickles import Maker, PickleError, Record, load, record
from glm45_tune.errors import CheckpointError
from glm45_tune.foreign import read_bytes, shown

Place = tuple[str, tuple[int, ...] | None]
"""A tensor's key and a chunk's offsets; of what is not a tensor its key and None."""

MOST_BYTES = 2**28  # of .metadata: ten times what 355B with its optimizer takes
_DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)
_MAX_DIMENSIONS = 64
_CHECKPOINT = "torch.distributed.checkpoint.metadata"


def _size(arguments: tuple) -> tuple[int, ...]:
    (values,) = arguments
    # a long tuple could be named again and again, and each time be walked
    if (
        type(values) is not tuple
        or len(values) > _MAX_DIMENSIONS
        or any(type(value) is not int or not 0 <= value < 2**63 for value in values)
    ):
        raise PickleError("a shape in it is not made of sizes")
    return values


NAMES: Mapping[tuple[str, str], object] = {
    **{("torch", str(dtype).removeprefix("torch.")): dtype for dtype in _DTYPES},
    ("torch", "Size"): Maker(_size),
    ("torch.serialization", "_get_layout"): record("layout"),
    **{
        (_CHECKPOINT, name): record(name)
        for name in (
            *("Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata"),
            *("TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING"),
        )
    },
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): record("_StorageInfo"),
    # megatron 0.15 wrote this subclass
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"): record("Metadata"),
    ("collections", "OrderedDict"): Maker(lambda arguments: {}),
    **{
        (module, name): record("path")
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "PurePosixPath")
    },
}


def read_metadata(directory: Path) -> tuple[dict[str, TensorStorageMetadata], dict[Place, _StorageInfo]]:
    """The tensors by key, and where each chunk and each object is stored. Raises CheckpointError."""
    path = directory / ".metadata"
    if not path.is_file():
        raise CheckpointError(
            f"{directory}: no .metadata here; not a megatron torch_dist checkpoint, or an incomplete one."
        )
    data = read_bytes(path, MOST_BYTES)
    try:
        metadata = _fields(load(data, NAMES), "Metadata")
        storage = dict(_stored(key, info) for key, info in _mapping(metadata.get("storage_data")).items())
        tensors = {
            key: _tensor(key, _fields(meta, "TensorStorageMetadata"), storage)
            for key, meta in _mapping(metadata.get("state_dict_metadata")).items()
            if not (isinstance(meta, Record) and meta.kind == "BytesStorageMetadata")
        }
    except PickleError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}.") from error
    return tensors, storage


def _fields(value: object, kind: str) -> dict:
    """The state of a Record of this kind."""
    if not isinstance(value, Record) or value.kind != kind or not isinstance(value.state, dict):
        raise PickleError(f"something else stands where a {kind} is expected")
    return value.state


def _mapping(value: object) -> dict:
    if not isinstance(value, dict):
        raise PickleError("it does not map names to places")
    return value


def _stored(key: object, value: object) -> tuple[Place, _StorageInfo]:
    index, info = _fields(key, "MetadataIndex"), _fields(value, "_StorageInfo")
    name, offsets = index.get("fqn"), index.get("offset")
    start, length = info.get("offset"), info.get("length")
    if not isinstance(name, str) or not (offsets is None or isinstance(offsets, tuple)):
        raise PickleError("a place in it is not a name with offsets")
    if not all(type(number) is int and number >= 0 for number in (start, length)):
        raise PickleError(f"{shown(name)} is stored at no range of bytes")
    if not isinstance(path := info.get("relative_path"), str):
        raise PickleError(f"{shown(name)} is stored in {shown(path)}, which is not the name of a file")
    if info.get("transform_descriptors"):
        raise PickleError(f"{shown(name)} is stored compressed or otherwise changed")
    return (name, offsets and _size((offsets,))), _StorageInfo(path, start, length)


def _tensor(key: object, fields: dict, storage: dict[Place, _StorageInfo]) -> TensorStorageMetadata:
    properties, chunks = fields.get("properties"), fields.get("chunks")
    state = properties.state if isinstance(properties, Record) and properties.kind == "TensorProperties" else None
    if not isinstance(state, tuple) or not state or not isinstance(state[0], torch.dtype):
        raise PickleError(f"{shown(key)} has no known dtype")
    if not isinstance(key, str) or not isinstance(chunks, list):
        raise PickleError(f"{shown(key)} is not a tensor with chunks")
    size, dtype = _size((fields.get("size"),)), state[0]
    found: dict[tuple, ChunkStorageMetadata] = {}
    for chunk in chunks:
        values = _fields(chunk, "ChunkStorageMetadata")
        offsets, sizes = _size((values.get("offsets"),)), _size((values.get("sizes"),))
        inside = len(offsets) == len(sizes) == len(size) and all(
            first + count <= whole for first, count, whole in zip(offsets, sizes, size)
        )
        info = storage.get((key, offsets))
        if not inside or info is None or offsets in found or math.prod(sizes) * dtype.itemsize > info.length:
            raise PickleError(f"{shown(key)} has a chunk that does not fit it, or its file")
        found[offsets] = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
    return TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(size), list(found.values()))
