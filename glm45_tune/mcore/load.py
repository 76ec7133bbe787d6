"""Fill a model stage from a checkpoint of either format: each rank reads what it holds and nothing else."""

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import apply_factories

from glm45_tune.conversion.mcore_files import McoreDir
from glm45_tune.conversion.names import Row, rows
from glm45_tune.conversion.tensors import ALL, HfReader, read_row


def sharded_tensors(model) -> list[ShardedTensor]:
    """This rank's part of every tensor of the model: global name, shape and offset, and the live data behind it."""
    sharded = model.sharded_state_dict()
    apply_factories(sharded)
    return [value for value in nested_values(sharded) if isinstance(value, ShardedTensor)]


@torch.no_grad()
def load_weights(model, source: HfReader) -> None:
    """Copy the base weights of `source` into the model, cast to its dtype. Adapters stay as they are."""
    table = {row.hybrid: row for row in rows(source.spec)}
    for shard in sharded_tensors(model):
        if ".adapter." not in shard.key:
            _fill(shard.data, source, table[shard.key], shard.global_offset, shard.local_shape)


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
