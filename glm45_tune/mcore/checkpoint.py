"""Checkpoints of a run: what is trained, the optimizer, and how far it got; saved under one layout, loaded under any.

The files are a megatron torch_dist checkpoint: of a full fine-tuning run it is a whole model, of a LoRA run the adapter.
A directory is complete only when `complete.json` is in it, written last.
"""

import contextlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, merge, nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    apply_factories,
    apply_factory_merges,
    is_main_replica,
)
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.utils import extract_sharded_base
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from glm45_tune.conversion.torch_dist import COMMON, FORMAT, Chunks, Part, TorchDistFiles, metadata_of, write_part
from glm45_tune.errors import CheckpointError, SaveError
from glm45_tune.foreign import member, read_json, shown
from glm45_tune.mcore.load import sharded_tensors
from glm45_tune.mcore.step import Trainer

COMPLETE = "complete.json"
# the optimizer's moments are stored in the shape of the weights, so that any layout can cut them anew
_RESHARDABLE = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def step_directory(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:06d}"


def every_checkpoint(run: Path) -> list[Path]:
    """Directories of a run's checkpoints, whole or not, oldest first."""
    return sorted(run.glob("checkpoints/step_*"))


def complete_checkpoints(run: Path) -> list[Path]:
    """Directories of a run's complete checkpoints, oldest first."""
    return sorted(path.parent for path in run.glob(f"checkpoints/step_*/{COMPLETE}"))


class Snapshot:
    """Host copies of what this rank saves, taken between two steps and written while training goes on.

    The next one taken uses the same memory.
    """

    def __init__(self):
        self._memory: dict[tuple, torch.Tensor] = {}
        self._chunks: Chunks = {}
        self._objects: dict[str, object] = {}

    @torch.no_grad()
    def take(self, trainer: Trainer) -> None:
        """Copy weights and optimizer. Called by all ranks together, while no write of this snapshot goes on."""
        state = _state(trainer, is_loading=False)
        apply_factories(state)
        sharded, common = extract_sharded_base(state)
        self._chunks = {}
        for tensor in nested_values(sharded):
            assert isinstance(tensor, ShardedTensor), f"{tensor.key} is no tensor"
            if is_main_replica(tensor.replica_id):
                _, _, parts = self._chunks.setdefault(tensor.key, (tensor.global_shape, tensor.dtype, []))
                copied = self._copy((tensor.key, tensor.global_offset), tensor.data)
                parts.append((tensor.global_offset, copied.shape, copied))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        commons: list = [None] * dist.get_world_size()
        dist.all_gather_object(commons, common["optimizer"])  # a stage without experts has no optimizer of theirs
        merged = {number: value for ranks in commons for number, value in ranks.items()}
        self._objects = {COMMON: {"optimizer": merged}} if dist.get_rank() == 0 else {}

    def _copy(self, name: tuple, data: torch.Tensor) -> torch.Tensor:
        if name not in self._memory or self._memory[name].shape != data.shape:
            self._memory[name] = torch.empty(data.shape, dtype=data.dtype, pin_memory=data.is_cuda)
        return self._memory[name].copy_(data, non_blocking=True)

    def write(self, directory: Path, config: dict, facts: dict, group: dist.ProcessGroup) -> None:
        """Write a checkpoint; complete.json comes last. config: the model's config.json; facts: kept in complete.json.

        Called by all ranks of `group`, which no other thread uses meanwhile. Raises SaveError on all of them when it fails on
        one, and leaves nothing behind then.
        """
        first = group.rank() == 0
        try:
            _together(group, lambda: first and _make_anew(directory))
            name = f"__{group.rank()}_0.distcp"
            parts = _together(group, lambda: write_part(directory, name, self._chunks, self._objects))
            _together(group, lambda: first and _seal(directory, config, facts, parts))
        except SaveError:
            if first:
                shutil.rmtree(directory, ignore_errors=True)
            raise


def _together(group: dist.ProcessGroup, work: Callable[[], object]) -> list:
    """Do something on every rank of the group. Returns all results, or raises SaveError everywhere when it failed on one."""
    result = fault = None
    try:
        result = work()
    except OSError as error:
        fault = str(error)
    ends: list = [None] * group.size()
    dist.all_gather_object(ends, (result, fault), group=group)
    for _, fault in ends:
        if fault:
            raise SaveError(fault)
    return [result for result, _ in ends]


def _seal(directory: Path, config: dict, facts: dict, parts: list[Part]) -> None:
    """Write what describes the ranks' files, and at last complete.json."""
    files = {part.name: [part.size, part.crc] for part in parts}
    beside = {".metadata": metadata_of(parts), "metadata.json": FORMAT.encode(), "config.json": _json(config)}
    for name, data in beside.items():
        _write(directory / name, data)
        files[name] = [len(data), zlib.crc32(data)]
    _write(directory / COMPLETE, _json({**facts, "files": files}))


def _json(value: dict) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _write(path: Path, data: bytes) -> None:
    """Under its name only when it is whole and on the disk."""
    staged = path.with_name(path.name + ".partial")
    with open(staged, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    staged.replace(path)


def _size_and_sum(path: Path) -> list[int]:
    size = crc = 0
    with open(path, "rb") as file:
        while piece := file.read(1 << 24):
            size, crc = size + len(piece), zlib.crc32(piece, crc)
    return [size, crc]


def saved_facts(directory: Path) -> dict:
    """What a complete checkpoint was saved with. Raises CheckpointError when that cannot be read."""
    return read_json(directory / COMPLETE)


def _saved_files(directory: Path) -> dict[str, list[int]]:
    """Name → size and CRC-32 of every file that the checkpoint was saved with."""
    files = saved_facts(directory).get("files", {})
    if not isinstance(files, dict) or not all(isinstance(sums, list) and len(sums) == 2 for sums in files.values()):
        raise CheckpointError(f"{COMPLETE} does not say what was written")
    for name in files:
        member(directory, name, COMPLETE)
    return files


def find_fault(directory: Path, group: dist.ProcessGroup) -> str | None:
    """What is wrong with a checkpoint on the disk, or None; its files are read by all ranks of the group, each its share."""
    fault = None
    try:
        if not (directory / COMPLETE).is_file():
            raise CheckpointError(f"it has no {COMPLETE}: it was not written to its end")
        for name, (size, crc) in sorted(_saved_files(directory).items())[group.rank() :: group.size()]:
            found = _size_and_sum(directory / name)
            if found[0] != size:
                raise CheckpointError(f"{name} holds {found[0]:,} bytes, {size:,} were written")
            if found[1] != crc:
                raise CheckpointError(f"{name} does not hold what was written (CRC-32)")
    except (OSError, CheckpointError) as error:
        fault = str(error)
    faults: list = [None] * group.size()
    dist.all_gather_object(faults, fault, group=group)
    return next(filter(None, faults), None)


def _make_anew(directory: Path) -> None:
    if directory.exists():
        shutil.rmtree(directory)
    directory.mkdir(parents=True)


def save(trainer: Trainer, directory: Path, config: dict, facts: dict) -> None:
    """Take a snapshot and write it. Called by all ranks together."""
    snapshot = Snapshot()
    snapshot.take(trainer)
    snapshot.write(directory, config, facts, dist.group.WORLD)


@torch.no_grad()
def restore(trainer: Trainer, directory: Path) -> None:
    """Load a checkpoint into the trainer, whatever layout wrote it. Called by all ranks together."""
    files = TorchDistFiles(directory)
    for shard in sharded_tensors(trainer.module):
        if _is_trained(trainer, shard.key):
            shard.data.copy_(files.read_key(shard.key, shard.global_offset, shard.local_shape))
    optimizers = _optimizers(trainer)
    for optimizer in optimizers.values():
        optimizer._init_optimizer_states_with_dummy_values()  # torch's Adam has no state to load into before its first step
    state = _read_state(files, _state(trainer, is_loading=True)["optimizer"])
    saved = files.read_object(COMMON)
    for number, optimizer in optimizers.items():
        _load_optimizer(optimizer, state[number], _saved_steps(saved, number, directory))


def _read_state(files: TorchDistFiles, state: dict) -> dict:
    """The state with its tensors read. megatron's own `load` would unpickle what a stranger wrote."""
    sharded, _, factories = load_preprocess(state)
    tensors, plain = extract_sharded_base(sharded)

    def read(shard: ShardedTensor) -> torch.Tensor:
        return shard.data.copy_(files.read_key(shard.key, shard.global_offset, shard.local_shape))

    dict_list_map_inplace(read, tensors)
    return apply_factory_merges(merge(plain, tensors), factories)


def _saved_steps(saved: object, number: int, directory: Path) -> float:
    """How many steps an optimizer had taken when it was saved, of the plain values that a checkpoint keeps."""
    try:
        steps = saved[0]["optimizer"][number]["optimizer"]["param_groups"][0]["step"]
    except (TypeError, LookupError) as error:
        raise CheckpointError(f"{directory}: does not say how many steps optimizer {number} has taken.") from error
    if type(steps) not in (int, float) or not 0 <= steps < 2**53:
        raise CheckpointError(f"{directory}: optimizer {number} has taken {shown(steps)} steps; a number is expected.")
    return float(steps)


def _optimizers(trainer: Trainer) -> dict[int, DistributedOptimizer]:
    """megatron's optimizers of this stage (one for experts, one for the rest) by number, those without parameters left out."""
    chained = trainer.optimizer.chained_optimizers
    return {
        number: optimizer
        for number, optimizer in enumerate(chained)
        if not optimizer.is_stub_optimizer and optimizer.buffers
    }


def _load_optimizer(optimizer, state: dict, steps_taken: float) -> None:
    """DistributedOptimizer.load_state_dict. Rates, decay and betas stay the recipe's; of the saved groups only the step count is taken.

    Around its one fault with torch's Adam: it takes the step count, a tensor there, for one of the moments. So the step is a
    number while the moments are copied.
    """
    moments = state.pop("param_state")
    state["optimizer"]["param_groups"] = [
        {**group, "params": [], "step": steps_taken} for group in optimizer.optimizer.param_groups
    ]
    optimizer.load_state_dict(state)
    of_parameter = optimizer.optimizer.state.values()
    steps = [values.get("step") for values in of_parameter]
    for values, step in zip(of_parameter, steps):
        if step is not None:
            values["step"] = float(step)
    optimizer.load_parameter_state_from_fully_reshardable(moments)
    for values, step in zip(of_parameter, steps):
        if step is not None:
            values["step"] = step.clone()


def _is_trained(trainer: Trainer, key: str) -> bool:
    return ".adapter." in key or not trainer.is_lora


def _state(trainer: Trainer, is_loading: bool) -> dict:
    model = trainer.module.sharded_state_dict()
    model = {
        key: value
        for key, value in model.items()
        if not isinstance(value, ShardedObject) and _is_trained(trainer, value.key)
    }
    optimizers = _optimizers(trainer)
    with _buckets_end_to_end(optimizers.values()):
        optimizer = {
            number: optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=_RESHARDABLE)
            for number, optimizer in optimizers.items()
        }
    return {"model": model, "optimizer": optimizer}


@contextlib.contextmanager
def _buckets_end_to_end(optimizers: Iterable[DistributedOptimizer]) -> Iterator[None]:
    """Let parameters lie, meanwhile, where DistributedOptimizer looks for them when it saves.

    It collects its buckets without the padding between them, and then looks for each parameter
    where it lies with the padding. Of an embedding that MTP shares, which has a bucket of its own,
    it would save something else.
    """
    kept = [(buffer, buffer.param_index_map) for optimizer in optimizers for buffer in optimizer.buffers]
    try:
        for buffer, places in kept:
            ends = accumulate((bucket.numel_unpadded for bucket in buffer.buckets), initial=0)
            padding = [bucket.offset - end for bucket, end in zip(buffer.buckets, ends)]
            buffer.param_index_map = {
                parameter: (start - padding[bucket], end - padding[bucket], bucket)
                for parameter, (start, end, bucket) in places.items()
            }
        yield
    finally:
        for buffer, places in kept:
            buffer.param_index_map = places
