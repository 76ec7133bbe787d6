"""The tensors of the model in training, gathered one at a time from the ranks that hold their parts."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import is_main_replica

from glm45_tune.conversion.names import hf_places, is_mtp
from glm45_tune.conversion.tensors import ALL, HfReader, split_row
from glm45_tune.mcore import runtime
from glm45_tune.mcore.load import sharded_tensors


class LiveTensors:
    """By megatron's names, whole, on the first rank. Made by all ranks together; the others then `serve`."""

    def __init__(self, module):
        self._own: dict[str, list] = {}
        facts: dict[str, tuple] = {}
        for shard in sharded_tensors(module):
            if is_main_replica(shard.replica_id):
                self._own.setdefault(shard.key, []).append((shard.global_offset, shard.data))
                facts[shard.key] = (shard.global_shape, shard.dtype)
        parts = {key: [(offset, tuple(data.shape)) for offset, data in found] for key, found in self._own.items()}
        gathered: list = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, (facts, parts))
        self.tensors = {key: fact for known, _ in gathered for key, fact in known.items()}
        self._parts = [found for _, found in gathered]

    @torch.no_grad()
    def read_key(self, key: str) -> torch.Tensor:
        """On the host. Called by the first rank while the others serve."""
        dist.broadcast_object_list([key], src=0)
        shape, dtype = self.tensors[key]
        whole = torch.empty(shape, dtype=dtype)
        for offset, data in self._own.get(key, ()):
            _place(whole, offset, data)
        for rank, parts in enumerate(self._parts[1:], start=1):
            for offset, size in parts.get(key, ()):
                landing = torch.empty(size, dtype=dtype, device=runtime.device())
                dist.recv(landing, src=rank)
                _place(whole, offset, landing)
        return whole

    @torch.no_grad()
    def serve(self) -> None:
        """Send what the first rank reads, until it has read all."""
        while True:
            box = [None]
            dist.broadcast_object_list(box, src=0)
            if box[0] is None:
                return
            for _, data in self._own.get(box[0], ()):
                dist.send(data.detach().contiguous(), dst=0)


def _place(whole: torch.Tensor, offset: tuple[int, ...], part: torch.Tensor) -> None:
    whole[tuple(slice(first, first + size) for first, size in zip(offset, part.shape))].copy_(part)


def on_first_rank(module, work: Callable[[LiveTensors], object]) -> None:
    """work(tensors) on the first rank, with the tensors of all ranks at hand. Called by all ranks together; what it raises, all raise."""
    live = LiveTensors(module)
    fault: list = [None]
    if dist.get_rank() == 0:
        try:
            work(live)
        except Exception as error:  # raised below, once the others no longer wait
            fault[0] = error
        dist.broadcast_object_list([None], src=0)
    else:
        live.serve()
    dist.broadcast_object_list(fault, src=0)
    if fault[0] is not None:
        raise fault[0]


class LiveModel:
    """An HfReader of all weights in training, in the base's dtypes; what is not trained (MTP layers left out) is the base's."""

    def __init__(self, base: HfReader, live: LiveTensors):
        self.base, self.spec, self.path, self.names, self.config = base, base.spec, base.path, base.names, base.config
        self._live = live
        with_mtp = any(key.startswith("mtp.") for key in live.tensors)
        self._places = hf_places(base.spec, lambda row: with_mtp or not is_mtp(row))
        self._last: dict[str, torch.Tensor] = {}

    def stamp(self) -> object:
        return id(self)  # of this moment alone: nothing can be gone on with later

    def shape(self, name: str) -> tuple[int, ...]:
        return self.base.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self.base.dtype(name)

    def read(self, name: str, first: int = 0, last: int | None = None, columns: slice = ALL) -> torch.Tensor:
        if name not in self._places:
            return self.base.read(name, first, last, columns)
        row, part, expert = self._places[name]
        if row.hybrid not in self._last:
            if len(self._last) > 2:  # an expert's two linears, and what comes between
                self._last.pop(next(iter(self._last)))
            self._last[row.hybrid] = self._live.read_key(row.hybrid)
        merged = self._last[row.hybrid] if expert is None else self._last[row.hybrid][expert]
        whole = split_row(row, merged)[part][first:last].to(self.dtype(name))
        return whole if columns == ALL else whole[:, columns]
