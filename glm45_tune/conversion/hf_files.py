"""Hugging Face checkpoint directories: sharded safetensors with an index, read by slices, and planned."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from glm45_tune.conversion import fp8
from glm45_tune.conversion.blocks import InputFile, read_block
from glm45_tune.conversion.check import check_tensors
from glm45_tune.conversion.names import with_copies_of
from glm45_tune.conversion.plan import PlannedFile, collector_off, grouped, literal
from glm45_tune.conversion.tensors import ALL, HfReader, nbytes
from glm45_tune.documents import MOST_JSON_BYTES, parse_json
from glm45_tune.errors import CheckpointError
from glm45_tune.foreign import check_own, member, read_bytes, read_json, short, shown
from glm45_tune.spec import ModelSpec, read_config

INDEX = "model.safetensors.index.json"
_CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float8_e4m3fn: "F8_E4M3"}
_DTYPES = {code: dtype for dtype, code in _CODES.items()}
# of a value of every dtype that the format knows, whole bytes a value
_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
# what travels beside the weights, besides config.json, whichever format they are in
SIDE_FILES = ("generation_config.json", *TOKENIZER_FILES, "LICENSE")
MOST_SIDE_BYTES = 2**28


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of a safetensors file."""

    file: "SafetensorsFile"
    code: str
    shape: tuple[int, ...]
    start: int
    length: int

    @property
    def dtype(self) -> torch.dtype | None:
        """None for one that is not known here."""
        return _DTYPES.get(self.code)

    def read(self, first: int, last: int | None, columns: slice) -> torch.Tensor:
        if not self.shape:
            return read_block(self.file, self.start, self.dtype, (), (), ())
        low, high = [first], [self.shape[0] if last is None else min(last, self.shape[0])]
        if len(self.shape) == 2:
            left, right, _ = columns.indices(self.shape[1])
            low.append(left)
            high.append(right)
        return read_block(self.file, self.start, self.dtype, self.shape, tuple(low), tuple(high))


def _strings(value: object) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise ValueError("something else stands where names and texts are expected")
    return value


def _are_sizes(value: object) -> bool:
    return isinstance(value, list) and len(value) <= 64 and all(type(n) is int and 0 <= n < 2**63 for n in value)


class SafetensorsFile(InputFile):
    """A safetensors file; opening it checks its header against its size."""

    def __init__(self, path: Path):
        super().__init__(path)
        try:
            length = int.from_bytes(self.read(0, 8), "little")
            if length > min(self.size - 8, MOST_JSON_BYTES):
                raise ValueError(f"its header has {length} bytes, the file {self.size}")
            header = parse_json(self.read(8, length))
            _strings(header.pop("__metadata__", {}))
            self.tensors = {name: self._entry(name, entry, 8 + length) for name, entry in header.items()}
            self._check_places(8 + length)
        except (CheckpointError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: not a whole safetensors file ({error}). Download it again.") from error

    def _entry(self, name: str, entry: dict, data: int) -> Stored:
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"{short(name)} is not described by dtype, shape and data_offsets")
        shape, offsets, code = entry["shape"], entry["data_offsets"], entry["dtype"]
        if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2 or code not in _BYTES:
            raise ValueError(f"{short(name)} has dtype {shown(code)}, shape {shown(shape)}, bytes {shown(offsets)}")
        first, last = offsets
        if not first <= last <= self.size - data:
            raise ValueError(f"{short(name)} ends at byte {data + last}, the file at {self.size}")
        if math.prod(shape) * _BYTES[code] != last - first:
            raise ValueError(f"{short(name)} has {last - first} bytes, which is not a {code} tensor of shape {shape}")
        return Stored(self, code, tuple(shape), data + first, last - first)

    def _check_places(self, end: int) -> None:
        """Raise ValueError unless the tensors fill the file from byte `end` on, one after the other."""
        for name, stored in sorted(self.tensors.items(), key=lambda item: (item[1].start, item[1].length)):
            if stored.start != end:
                raise ValueError(f"{short(name)} begins at byte {stored.start}, and what is before it ends at {end}")
            end += stored.length
        if end != self.size:
            raise ValueError(f"its tensors end at byte {end}, the file at {self.size}")


class HfDir:
    """A checkpoint directory as Hugging Face lays it out. Opening it checks config, index and shards against each other.

    FP8 weights are read as what they stand for, in bf16; `as_stored` shows them and their scales as they are.
    """

    @collector_off()
    def __init__(self, path: str | Path):
        self.path = Path(path)
        config = read_config(self.path)
        self.spec = ModelSpec.from_config(config, f"{self.path}/config.json")
        self.stored = self._open_shards()
        self.spec = with_copies_of(self.spec, self.stored)
        self.scales = fp8.find_scales(config.get("quantization_config"), self.stored, self.path)
        self.config = {key: value for key, value in config.items() if key != "quantization_config"}
        scales = {scale.name for scale in self.scales.values()}
        self.names = [name for name in self.stored if name not in scales]

    def __reduce__(self):
        return HfDir, (self.path,)

    def _open_shards(self) -> dict[str, Stored]:
        index = self.path / INDEX
        weight_map = None
        if index.is_file():
            try:
                weight_map = _strings(read_json(index)["weight_map"])
            except (KeyError, ValueError) as error:
                raise CheckpointError(f"{index}: not an index with a weight_map of file names ({error}).") from error
        elif not (self.path / "model.safetensors").is_file():
            raise CheckpointError(f"{self.path}: neither {INDEX} nor model.safetensors here. Is the download complete?")
        self.shards: list[str] = ["model.safetensors"] if weight_map is None else sorted(set(weight_map.values()))
        held: dict[str, tuple[str, Stored]] = {}
        for shard in self.shards:
            file = SafetensorsFile(member(self.path, shard, INDEX))
            held |= {name: (shard, stored) for name, stored in file.tensors.items()}
        for name, shard in (weight_map or {}).items():
            if name not in held or held[name][0] != shard:
                raise CheckpointError(f"{index} says that {short(name)} is in {shard}; that file does not hold it.")
        if weight_map and (extra := sorted(held.keys() - weight_map.keys())):
            raise CheckpointError(
                f"{self.path}/{held[extra[0]][0]} holds {short(extra[0])}, which {INDEX} does not name ({len(extra)} such)."
            )
        return {name: held[name][1] for name in weight_map or held}

    def shape(self, name: str) -> tuple[int, ...]:
        return self.stored[name].shape

    def dtype(self, name: str) -> torch.dtype:
        if name in self.scales:
            return torch.bfloat16
        stored = self.stored[name]
        dtype = stored.dtype
        if dtype is None or dtype == torch.float8_e4m3fn:
            raise CheckpointError(
                f"{stored.file.path}: {name} has dtype {stored.code}; allowed: F32, BF16, F16, and F8_E4M3 with a scale."
            )
        return dtype

    def read(self, name: str, first: int = 0, last: int | None = None, columns: slice = ALL) -> torch.Tensor:
        """Rows [first, last) of a tensor, of a matrix these columns; only their bytes are read."""
        tensor = self.stored[name].read(first, last, columns)
        if name not in self.scales:
            return tensor
        scale = self.scales[name]
        left, _, _ = columns.indices(self.shape(name)[1])
        return fp8.dequantize(tensor, scale, self.stored[scale.name].read(0, None, ALL), first, left)

    def read_fp8(self, name: str, first: int, last: int, columns: slice) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Rows [first, last) of a weight as the file holds it, e4m3, and fp32 scales of its rows; None where it has no such.

        Raises CheckpointError where a scale is no positive number.
        """
        scale = self.scales.get(name)
        if scale is None or scale.columns != self.shape(name)[1]:
            return None
        whole = self.stored[scale.name].read(0, None, ALL).float().flatten()
        if not bool(((whole > 0) & whole.isfinite()).all()):
            wrong = whole[~((whole > 0) & whole.isfinite())][0].item()
            raise CheckpointError(f"{self.path}: {scale.name} holds the scale {wrong}; allowed: positive numbers.")
        return self.stored[name].read(first, last, columns), whole[torch.arange(first, last) // scale.rows]

    def check(self) -> None:
        """Raise CheckpointError unless the tensors are this model's, all of them, in its shapes and dtypes."""
        check_tensors(self)

    def stamp(self) -> object:
        files = [self.path / name for name in ("config.json", *self.shards)]
        return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


class AsStored:
    """An HfReader of an HF directory's tensors as the files hold them: FP8 values and their scales by themselves."""

    def __init__(self, source: HfDir):
        self.source, self.spec, self.path, self.config = source, source.spec, source.path, source.config
        self.names = list(source.stored)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.source.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self.source.stored[name].dtype or self.source.dtype(name)

    def read(self, name: str, first: int = 0, last: int | None = None, columns: slice = ALL) -> torch.Tensor:
        return self.source.stored[name].read(first, last, columns)

    def stamp(self) -> object:
        return self.source.stamp()


@collector_off()
def plan_hf(source: HfReader, max_shard_bytes: int) -> list[PlannedFile]:
    """The files of `source` as model-0000i-of-0000n.safetensors with an index; tensors keep their order."""
    sizes = {name: nbytes(source, name) for name in source.names}
    shards = list(grouped(sizes, max_shard_bytes))
    files, weight_map = [], {}
    for number, names in enumerate(shards, start=1):
        file = PlannedFile(f"model-{number:05d}-of-{len(shards):05d}.safetensors")
        file.add_bytes(_header(source, {name: sizes[name] for name in names}))
        for name in names:
            if source.shape(name):
                file.add_rows(source, name, 0, source.shape(name)[0])
            weight_map[name] = file.name
        files.append(file)
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    return [*files, literal(INDEX, (json.dumps(index, indent=2) + "\n").encode())]


def _header(source: HfReader, sizes: dict[str, int]) -> bytes:
    """The beginning of a safetensors file that holds these tensors in this order."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, size in sizes.items():
        header[name] = {
            "dtype": _CODES[source.dtype(name)],
            "shape": list(source.shape(name)),
            "data_offsets": [end, end + size],
        }
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def plan_side_files(source: HfReader) -> list[PlannedFile]:
    """Tokenizer and template as they are, and config.json: as it is unless what is read is no longer what it describes."""
    path = source.path / "config.json"
    same = path.is_file() and read_json(path) == source.config
    config = path.read_bytes() if same else (json.dumps(source.config, indent=2, ensure_ascii=False) + "\n").encode()
    found = [source.path / name for name in SIDE_FILES if (source.path / name).is_file()]
    for file in found:
        check_own(file)
    return [literal("config.json", config), *(literal(file.name, read_bytes(file, MOST_SIDE_BYTES)) for file in found)]
