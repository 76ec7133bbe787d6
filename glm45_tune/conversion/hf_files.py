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
from glm45_tune.errors import CheckpointError
from glm45_tune.foreign import MOST_JSON_BYTES, is_own, member, read_bytes, read_json, short
from glm45_tune.spec import ModelSpec, read_config

INDEX = "model.safetensors.index.json"
_CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float8_e4m3fn: "F8_E4M3"}
_DTYPES = {code: dtype for dtype, code in _CODES.items()}
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


class SafetensorsFile(InputFile):
    """A safetensors file; opening it checks its header against its size."""

    def __init__(self, path: Path):
        super().__init__(path)
        try:
            self.tensors = self._entries()
        except (CheckpointError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{path}: not a whole safetensors file ({error}). Download it again.") from error

    def _entries(self) -> dict[str, Stored]:
        """The tensors of the header, which lie end to end and fill the file. Raises ValueError and its kin."""
        length = int.from_bytes(self.read(0, 8), "little")
        if length > min(self.size - 8, MOST_JSON_BYTES):
            raise ValueError(f"its header has {length} bytes, the file {self.size}")
        header = json.loads(self.read(8, length), object_pairs_hook=_each_once)
        header.pop("__metadata__", None)
        found = {name: self._entry(name, entry, 8 + length) for name, entry in header.items()}
        end = 8 + length
        for first, last, name in sorted((*entry["data_offsets"], name) for name, entry in header.items()):
            if 8 + length + first != end:
                raise ValueError(
                    f"{short(name)} begins at byte {8 + length + first}, the tensor before it ends at {end}"
                )
            end = 8 + length + last
        if end != self.size:
            raise ValueError(f"its tensors end at byte {end}, the file at {self.size}")
        return found

    def _entry(self, name: str, entry: dict, data: int) -> Stored:
        first, last = entry["data_offsets"]
        shape, code = tuple(entry["shape"]), entry["dtype"]
        if not all(type(number) is int and number >= 0 for number in (first, last, *shape)):
            raise ValueError(f"{short(name)} has offsets {short([first, last])} and shape {short(list(shape))}")
        if not first <= last <= self.size - data:
            raise ValueError(f"{short(name)} ends at byte {data + last}, the file at {self.size}")
        if code in _DTYPES and math.prod(shape) * _DTYPES[code].itemsize != last - first:
            raise ValueError(
                f"{short(name)} has {last - first} bytes, not those of {code} values of shape {list(shape)}"
            )
        return Stored(self, str(code), shape, data + first)


def _each_once(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object whose keys are given once."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("its header names a tensor twice")
    return found


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
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
                raise CheckpointError(f"{index}: not an index with a weight_map of file names.")
        elif not (self.path / "model.safetensors").is_file():
            raise CheckpointError(f"{self.path}: neither {INDEX} nor model.safetensors here. Is the download complete?")
        self.shards: list[str] = ["model.safetensors"] if weight_map is None else sorted(set(weight_map.values()))
        held: dict[str, tuple[str, Stored]] = {}
        for shard in self.shards:
            file = SafetensorsFile(member(self.path, shard, INDEX if weight_map else "."))
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
    same = path.is_file() and json.loads(path.read_text(encoding="utf-8")) == source.config
    config = path.read_bytes() if same else (json.dumps(source.config, indent=2, ensure_ascii=False) + "\n").encode()
    found = [source.path / name for name in SIDE_FILES if (source.path / name).is_file()]
    for file in found:
        if not is_own(source.path, file):
            raise CheckpointError(
                f"{file}: a link to a file elsewhere, {file.resolve()}; it is not copied. Put the file itself there."
            )
    return [literal("config.json", config), *(literal(file.name, read_bytes(file, MOST_SIDE_BYTES)) for file in found)]
