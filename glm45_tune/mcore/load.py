"""Fill a model stage from a checkpoint of either format: each rank reads what it holds and nothing else."""

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import apply_factories

from glm45_tune.conversion.fp8 import quantize_channels
from glm45_tune.conversion.hf_files import HfDir
from glm45_tune.conversion.mcore_files import McoreDir
from glm45_tune.conversion.names import Row, rows
from glm45_tune.conversion.tensors import ALL, HfReader, read_row, row_parts
from glm45_tune.errors import CheckpointError
from glm45_tune.mcore import runtime
from glm45_tune.mcore.layers.fp8 import FP8, Rows, dequantize_rows


def sharded_tensors(model) -> list[ShardedTensor]:
    """This rank's part of every tensor of the model: global name, shape and offset, and the live data behind it."""
    sharded = model.sharded_state_dict()
    apply_factories(sharded)
    return [value for value in nested_values(sharded) if isinstance(value, ShardedTensor)]


@torch.no_grad()
def load_weights(model, source: HfReader) -> list[str]:
    """Copy the base weights of `source` into the model, cast to its dtype, or quantized. Adapters stay as they are.

    Called by all ranks together where weights are in FP8. Returns a line about each kind of them.
    """
    table = {row.hybrid: row for row in rows(source.spec)}
    scales = _Scales(model)
    quantized = _Quantized(source)
    for shard in sharded_tensors(model):
        if ".adapter." in shard.key:
            continue
        row, offset, shape = table[shard.key], shard.global_offset, shard.local_shape
        if shard.data.dtype == FP8:
            quantized.fill(shard.data, scales.of(shard.data), row, offset, shape)
        else:
            _fill(shard.data, source, row, offset, shape)
    return quantized.lines() if scales else []


def _fill(target: torch.Tensor, source: HfReader, row: Row, offset: tuple[int, ...], shape: tuple[int, ...]) -> None:
    if isinstance(source, McoreDir):
        target.copy_(source.read_key(row.name(source.dialect), offset, shape))
    elif row.num_experts is None:
        target.copy_(_read(source, row, offset, shape, None))
    else:
        for number in range(shape[0]):
            target[number].copy_(_read(source, row, offset[1:], shape[1:], offset[0] + number))


def _read(source: HfReader, row: Row, offset, shape, expert: int | None) -> torch.Tensor:
    columns = slice(offset[1], offset[1] + shape[1]) if len(shape) == 2 else ALL
    return read_row(row, source, offset[0], offset[0] + shape[0], expert, columns)


class _Scales:
    """The scales of the model's FP8 weights, found by a part of a weight."""

    def __init__(self, model):
        held = [(m.weight, m.weight_scale) for m in model.modules() if hasattr(m, "weight_scale")]
        self._held = {weight.untyped_storage().data_ptr(): (weight, scale) for weight, scale in held}

    def __bool__(self) -> bool:
        return bool(self._held)

    def of(self, part: torch.Tensor) -> torch.Tensor:
        """part: rows of a weight [B, A], or the same rows of every expert's [E, B, A], as they lie in it → their scales."""
        weight, scale = self._held[part.untyped_storage().data_ptr()]
        first = (part.storage_offset() - weight.storage_offset()) // weight.shape[-1]
        return scale[..., first : first + part.shape[-2]]


class _Quantized:
    """Fills FP8 weights and keeps count of what that changes. Channels are quantized by all their inputs, whoever holds which."""

    def __init__(self, source: HfReader):
        self._source = source
        self._sums: dict[str, torch.Tensor] = {}
        """Kind of weight → squares of what was lost, squares of what there is, channels, channels of zeros."""
        self._as_stored: set[str] = set()
        self._kinds: dict[str, None] = {}

    def fill(self, target: torch.Tensor, scale: torch.Tensor, row: Row, offset, shape) -> None:
        kind = (
            row.hybrid.partition("layers.")[2]
            .partition(".")[2]
            .removesuffix(".weight")
            .replace("experts.experts", "experts")
        )
        if row.num_experts is None:
            self._fill(kind, target, scale, row, offset, shape, None)
        else:
            for number in range(shape[0]):
                self._fill(kind, target[number], scale[number], row, offset[1:], shape[1:], offset[0] + number)

    def _fill(self, kind: str, target, scale, row: Row, offset, shape, expert: int | None) -> None:
        columns, at = slice(offset[1], offset[1] + shape[1]), 0
        for name, first, last in row_parts(row, offset[0], offset[0] + shape[0], expert):
            part = slice(at, at + last - first)
            rows = self._read(kind, name, first, last, columns)
            target[part].copy_(rows.q)
            scale[part].copy_(rows.scale)
            at += last - first

    def _read(self, kind: str, name: str, first: int, last: int, columns: slice) -> Rows:
        """Rows and columns of an HF tensor: its own FP8 where it has a scale a channel, else quantized."""
        self._kinds[kind] = None
        found = self._source.read_fp8(name, first, last, columns) if isinstance(self._source, HfDir) else None
        if found is not None:
            self._as_stored.add(kind)
            return Rows(*found)
        values = self._source.read(name, first, last).to(runtime.device())
        rows = Rows(*quantize_channels(values))
        if not bool(rows.scale.isfinite().all()):
            raise CheckpointError(f"{self._source.path}: {name} holds NaN or infinity, which FP8 cannot keep.")
        error = dequantize_rows(rows, torch.float32) - values.float()
        zeros = (values == 0).all(1).sum()
        sums = torch.stack([error.square().sum(), values.float().square().sum(), zeros.new_tensor(last - first), zeros])
        self._sums[kind] = self._sums.get(kind, 0) + sums.double().cpu()
        return Rows(rows.q[:, columns], rows.scale)

    def lines(self) -> list[str]:
        """What all ranks did, a line a kind of weight."""
        everyone: list = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (self._kinds, self._as_stored, self._sums))
        lines = []
        for kind in dict.fromkeys(kind for kinds, _, _ in everyone for kind in kinds):
            sums = sum((found[kind] for _, _, found in everyone if kind in found), torch.zeros(4, dtype=torch.float64))
            lost, there, channels, zeros = sums.tolist()
            said = ["as the checkpoint has it"] if any(kind in stored for _, stored, _ in everyone) else []
            if channels:
                empty = f", {zeros:.0f} of {channels:.0f} channels are zero" if zeros else ""
                said.append(f"quantized here, error {(lost / max(there, 1e-300)) ** 0.5:.2%}{empty}")
            lines.append(f"{kind}: FP8 {' and '.join(said)}")
        return lines
