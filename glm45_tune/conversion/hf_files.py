"""Hugging Face checkpoint directories: sharded safetensors with an index, read by slices and written as a stream."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from glm45_tune.conversion.names import hf_shapes, rows
from glm45_tune.conversion.tensors import ALL, HfReader
from glm45_tune.errors import CheckpointError
from glm45_tune.spec import ModelSpec, read_config

INDEX = "model.safetensors.index.json"
_CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_DTYPES = {code: dtype for dtype, code in _CODES.items()}
# what travels beside the weights, whichever format they are in
SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "LICENSE",
)


class HfDir:
    """A checkpoint directory as Hugging Face lays it out. Opening it checks config, index and shards against each other."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config = read_config(self.path)
        self.spec = ModelSpec.from_config(self.config, f"{self.path}/config.json")
        self._files: dict[str, object] = {}
        self._shard_of = self._weight_map()

    def _weight_map(self) -> dict[str, str]:
        index = self.path / INDEX
        if index.is_file():
            try:
                weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            except (ValueError, KeyError, TypeError) as error:
                raise CheckpointError(f"{index}: not an index with a weight_map ({error}).") from error
            shards = sorted(set(weight_map.values()))
        elif (self.path / "model.safetensors").is_file():
            weight_map, shards = None, ["model.safetensors"]
        else:
            raise CheckpointError(f"{self.path}: neither {INDEX} nor model.safetensors here. Is the download complete?")
        held = {}
        for shard in shards:
            if not (self.path / shard).is_file():
                raise CheckpointError(f"{index} names {shard}, which is not in {self.path}. Is the download complete?")
            held |= dict.fromkeys(self._open(shard).keys(), shard)
        if weight_map is None:
            return held
        for name, shard in weight_map.items():
            if held.get(name) != shard:
                raise CheckpointError(f"{index} says that {name} is in {shard}; that file does not hold it.")
        if extra := sorted(held.keys() - weight_map.keys()):
            raise CheckpointError(
                f"{self.path}/{held[extra[0]]} holds {extra[0]}, which {INDEX} does not name ({len(extra)} such)."
            )
        return weight_map

    def _open(self, shard: str):
        if shard not in self._files:
            try:
                self._files[shard] = safe_open(self.path / shard, framework="pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{self.path / shard}: not a whole safetensors file ({error}). Download it again."
                ) from error
        return self._files[shard]

    @property
    def names(self) -> list[str]:
        return list(self._shard_of)

    def _slice(self, name: str):
        return self._open(self._shard_of[name]).get_slice(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        code = self._slice(name).get_dtype()
        if code not in _DTYPES:
            raise CheckpointError(
                f"{self.path}/{self._shard_of[name]}: {name} has dtype {code}; allowed: {', '.join(_DTYPES)}."
            )
        return _DTYPES[code]

    def read(self, name: str, first: int = 0, last: int | None = None, columns: slice = ALL) -> torch.Tensor:
        """Rows [first, last) of a tensor, of a matrix these columns; only their bytes are read."""
        rows = slice(first, self.shape(name)[0] if last is None else last)
        return self._slice(name)[rows] if columns == ALL else self._slice(name)[rows, columns]

    def check(self) -> None:
        """Raise CheckpointError unless the tensors are this model's, all of them, in its shapes and dtypes."""
        expected = hf_shapes(self.spec)
        where = f"{self.path}"
        if missing := sorted(expected.keys() - self._shard_of.keys()):
            raise CheckpointError(
                f"{where}: {missing[0]} is missing ({len(missing)} of {len(expected)} tensors are). "
                "config.json and the weights disagree, or the download is incomplete."
            )
        if unknown := sorted(self._shard_of.keys() - expected.keys()):
            raise CheckpointError(
                f"{where}: no place in a GLM-4.5 model for {unknown[0]} ({len(unknown)} such). Wrong model or a new release?"
            )
        for name, shape in expected.items():
            if self.shape(name) != shape:
                raise CheckpointError(f"{where}: {name} has shape {self.shape(name)}; config.json makes it {shape}.")
        for row in rows(self.spec):
            for expert in range(row.num_experts or 1):
                dtypes = {name: self.dtype(name) for name in row.hf_names(expert)}
                if len(set(dtypes.values())) > 1:
                    raise CheckpointError(f"{where}: tensors that are one in megatron differ in dtype: {dtypes}.")
                if row.is_fp32 and set(dtypes.values()) != {torch.float32}:
                    raise CheckpointError(f"{where}: {dtypes} must be float32.")


class ShardWriter:
    """One safetensors file written tensor by tensor, in order: memory holds one of them at a time."""

    def __init__(self, path: Path, tensors: dict[str, tuple[tuple[int, ...], torch.dtype]]):
        """tensors: name → (shape, dtype), in the order in which `write` will bring them."""
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, (shape, dtype) in tensors.items():
            size = torch.Size(shape).numel() * dtype.itemsize
            header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [end, end + size]}
            end += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._waiting = dict(tensors)
        self._file = open(path, "wb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        expected = next(iter(self._waiting))
        assert name == expected, f"{name} came where {expected} was announced"
        assert (tuple(tensor.shape), tensor.dtype) == self._waiting.pop(name), f"{name} changed since it was announced"
        self._file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)

    def close(self) -> None:
        self._file.close()
        assert not self._waiting, f"{next(iter(self._waiting))} was announced and never written"


def copy_side_files(source: Path, target: Path) -> None:
    """Tokenizer, template and configuration travel as they are."""
    for name in SIDE_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def write_hf(
    path: Path, source: HfReader, names: list[str], max_shard_bytes: int, tick: Callable[[int], None] = lambda size: None
) -> None:
    """Write tensors in the given order as model-0000i-of-0000n.safetensors with an index; `tick` hears bytes written.

    Reads each tensor once, when its turn comes.
    """
    shards: list[dict] = [{}]
    size = total = 0
    for name in names:
        shape, dtype = source.shape(name), source.dtype(name)
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        if shards[-1] and size + nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = (shape, dtype)
        size += nbytes
        total += nbytes
    weight_map = {}
    for number, tensors in enumerate(shards, start=1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        writer = ShardWriter(path / file_name, tensors)
        for name in tensors:
            tensor = source.read(name)
            writer.write(name, tensor)
            weight_map[name] = file_name
            tick(tensor.nbytes)
        writer.close()
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
