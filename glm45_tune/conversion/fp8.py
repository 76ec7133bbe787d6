"""FP8 checkpoints: which weights are quantized how, what they stand for, and quantizing anew.

Two layouts: `channel`, compressed-tensors with a scale an output row (zai-org's releases), and `block`, a scale for each 128 × 128
values, as DeepSeek-style tools and transformers' FineGrainedFP8 write. Value = q × scale, q in e4m3.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from glm45_tune.conversion.names import Row, rows
from glm45_tune.conversion.tensors import ALL, HfReader, pieces
from glm45_tune.errors import CheckpointError

LAYOUTS = ("channel", "block")
FP8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(FP8).max
_BLOCK = 128
# left in bf16, in zai-org's releases too: norms, biases, embedding, head, the router, MTP's projection
_QUANTIZED = re.compile(r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(.*\.)?(gate|up|down)_proj)\.weight$")


@dataclass(frozen=True, slots=True)
class Scale:
    """The scales of one weight: each holds for so many rows and columns of it."""

    name: str
    rows: int
    columns: int


class StoredTensor(Protocol):
    dtype: torch.dtype | None
    code: str
    shape: tuple[int, ...]


def find_scales(config: dict | None, stored: dict[str, StoredTensor], where: Path) -> dict[str, Scale]:
    """FP8 weight → its scales, as quantization_config and the tensors both say. Raises CheckpointError naming a tensor."""
    if not isinstance(config or {}, dict):
        raise CheckpointError(f"{where}: config.json's quantization_config is {config!r}; an object is expected.")
    weights = [name for name, tensor in stored.items() if tensor.dtype == FP8]
    if config is None and not weights:
        return {}
    first = weights[0] if weights else next((n for n, t in stored.items() if t.dtype is None), next(iter(stored)))
    suffix, kinds = _kinds(config or {}, f"{where}: {first} ({stored[first].code})")
    found = {}
    for name in weights:
        scale, shape = stored.get(name + suffix), stored[name].shape
        if scale is None or len(shape) != 2 or scale.dtype in (None, FP8):
            raise CheckpointError(
                f"{where}: {name} is FP8 and has no {name.rpartition('.')[2]}{suffix} that can be read."
            )
        fitting = [(r or shape[0], c or shape[1]) for r, c in kinds if _fits(scale.shape, shape, r, c)]
        if not fitting:
            raise CheckpointError(
                f"{where}: {name} has shape {shape} and its scales {scale.shape}; quantization_config makes that "
                f"{' or '.join(str(_scale_shape(shape, r, c)) for r, c in kinds)}."
            )
        found[name] = Scale(name + suffix, *fitting[0])
    return found


def _kinds(config: dict, what: str) -> tuple[str, list[tuple[int, int]]]:
    """The scales' suffix, and the rows and columns that a scale may hold for (0: all of them)."""
    method = config.get("quant_method")
    if method == "fp8":
        if config.get("fmt", "e4m3") != "e4m3":
            raise CheckpointError(f"{what}: quantization_config has fmt {config['fmt']!r}; allowed: e4m3.")
        return "_scale_inv", [tuple(config.get("weight_block_size") or (0, 0))]
    groups = (config.get("config_groups") or {}).values() if method == "compressed-tensors" else ()
    schemes = [group.get("weights") or {} for group in groups]
    strategies = {"channel": (1, 0), "tensor": (0, 0), "block": None}
    known = [
        s.get("num_bits") == 8
        and s.get("type") == "float"
        and s.get("symmetric", True)
        and s.get("strategy") in strategies
        for s in schemes
    ]
    if not schemes or not all(known):
        raise CheckpointError(
            f"{what}: quantization_config's scheme is not known ({method!r}, weights {schemes or None}); allowed: "
            "compressed-tensors with 8-bit float weights by channel, tensor or block, and fp8 by block."
        )
    return "_scale", [strategies[s["strategy"]] or tuple(s["block_structure"]) for s in schemes]


def _scale_shape(shape: tuple[int, ...], rows: int, columns: int) -> tuple[int, ...]:
    return math.ceil(shape[0] / (rows or shape[0])), math.ceil(shape[1] / (columns or shape[1]))


def _fits(scale: tuple[int, ...], shape: tuple[int, ...], rows: int, columns: int) -> bool:
    wanted = _scale_shape(shape, rows, columns)
    return scale == wanted or (wanted[1] == 1 and scale == wanted[:1]) or (wanted == (1, 1) and scale == ())


def dequantize(q: torch.Tensor, scale: Scale, values: torch.Tensor, first: int, left: int) -> torch.Tensor:
    """q × its scales in fp32, rounded to bf16. q: rows from `first` on and columns from `left` on; values: all scales."""
    values = values.float().view(-1, values.shape[1] if values.dim() == 2 else 1)
    rows = torch.arange(first, first + q.shape[0]) // scale.rows
    columns = torch.arange(left, left + q.shape[1]) // scale.columns
    spread = values[rows] if values.shape[1] == 1 else values[rows][:, columns]
    return q.float().mul_(spread).bfloat16()


class Quantized:
    """An HfReader: `base` with its linear weights in FP8 beside their scales, and the quantization_config that says so.

    By block, a weight whose sizes are no multiples of 128 stays as it is, and what vLLM fuses with it: neither transformers nor
    vLLM reads such blocks.
    """

    def __init__(self, base: HfReader, layout: str):
        self.base, self.layout, self.spec, self.path = base, layout, base.spec, base.path
        self._quantized = {name for row in rows(base.spec) for name in _quantized(row, layout)} & set(base.names)
        matrices = [name for name in base.names if name.endswith(".weight") and len(base.shape(name)) == 2]
        left = [name.removesuffix(".weight") for name in matrices if name not in self._quantized]
        self.config = base.config | {"quantization_config": _config(layout, left)}
        self._suffix = "_scale" if layout == "channel" else "_scale_inv"
        self._weight_of = {name + self._suffix: name for name in self._quantized}
        self.names = [
            each
            for name in base.names
            for each in ((name, name + self._suffix) if name in self._quantized else (name,))
        ]

    def __reduce__(self):
        return Quantized, (self.base, self.layout)

    def stamp(self) -> object:
        return [self.base.stamp(), self.layout]

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._weight_of:
            return self.base.shape(name)
        rows, columns = (1, 0) if self.layout == "channel" else (_BLOCK, _BLOCK)
        return _scale_shape(self.base.shape(self._weight_of[name]), rows, columns)

    def dtype(self, name: str) -> torch.dtype:
        if name in self._weight_of:
            return torch.float32
        return FP8 if name in self._quantized else self.base.dtype(name)

    def read(self, name: str, first: int = 0, last: int | None = None, columns: slice = ALL) -> torch.Tensor:
        last = self.shape(name)[0] if last is None else last
        height = 1 if self.layout == "channel" else _BLOCK
        if weight := self._weight_of.get(name):
            found = [self._scales(weight, lo, hi) for lo, hi in pieces(self.base, weight) if hi > first * height]
            start = next(lo for lo, hi in pieces(self.base, weight) if hi > first * height) // height
            return torch.cat(found)[first - start : last - start, columns].contiguous()
        if name not in self._quantized:
            return self.base.read(name, first, last, columns)
        lo, hi = first // height * height, min(math.ceil(last / height) * height, self.shape(name)[0])
        values = self.base.read(name, lo, hi).float()
        spread = _spread(_scale_of(values, self.layout), values.shape, self.layout)
        q = values.div_(spread).clamp_(-_LARGEST, _LARGEST).to(FP8)
        return q[first - lo : last - lo, columns].contiguous()

    def _scales(self, weight: str, first: int, last: int) -> torch.Tensor:
        return _scale_of(self.base.read(weight, first, last).float(), self.layout)


def _quantized(row: Row, layout: str) -> list[str]:
    """The HF weights of a megatron tensor that are written in FP8: all or none."""
    fits = layout == "channel" or all(size % _BLOCK == 0 for part in row.parts for size in part.shape)
    if not fits or not _QUANTIZED.match(row.hf_names(0)[0]):
        return []
    return [name for expert in range(row.num_experts or 1) for name in row.hf_names(expert)]


def quantize_channels(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [out, in] → (e4m3, fp32 scales [out]), as `Quantized` writes it by channel. NaN and infinity reach the scale."""
    values = values.float()
    scale = _scale_of(values, "channel")
    return (values / scale).clamp_(-_LARGEST, _LARGEST).to(FP8), scale.squeeze(1)


def _scale_of(values: torch.Tensor, layout: str) -> torch.Tensor:
    """The scale that makes the largest value of each row, or block, the largest of e4m3."""
    rows, columns = values.shape
    if layout == "block":
        padded = torch.nn.functional.pad(values, (0, -columns % _BLOCK, 0, -rows % _BLOCK))
        values = padded.view(-1, _BLOCK, padded.shape[1] // _BLOCK, _BLOCK).transpose(1, 2).flatten(2)
        largest = values.abs().amax(2)
    else:
        largest = values.abs().amax(1, keepdim=True)
    return torch.where(largest == 0, 1.0, largest / _LARGEST)


def _spread(scales: torch.Tensor, shape: torch.Size, layout: str) -> torch.Tensor:
    if layout == "channel":
        return scales
    return scales.repeat_interleave(_BLOCK, 0)[: shape[0]].repeat_interleave(_BLOCK, 1)[:, : shape[1]]


def _config(layout: str, left: list[str]) -> dict:
    """config.json's quantization_config, as transformers and vLLM read it; activations are quantized as they come.

    left: modules that stay as they are, by their full names, which is what vLLM compares.
    """
    if layout == "block":
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [_BLOCK, _BLOCK],
            "modules_to_not_convert": left,
        }
    scheme = {"num_bits": 8, "type": "float", "symmetric": True}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": scheme | {"strategy": "channel", "dynamic": False},
                "input_activations": scheme | {"strategy": "token", "dynamic": True},
            }
        },
        "ignore": left,
    }
