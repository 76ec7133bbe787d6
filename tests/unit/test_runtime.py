"""How ranks join: what every one of them must do in the same order."""

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from glm45_tune.mcore import runtime


class _Group:
    """Of a name, with the hash that its place in memory gives it on one rank."""

    def __init__(self, name: str, place: int):
        self.name, self._place = name, place

    def __hash__(self):
        return self._place


def test_groups_are_opened_in_the_same_order_on_every_rank(monkeypatch):
    """Wherever a rank has them in memory: over NCCL two ranks that begin with different groups wait for each other for ever."""
    names = [name for name in dir(parallel_state) if name.startswith("get_") and name.endswith("_parallel_group")]
    orders = []
    for places in (range(len(names)), reversed(range(len(names)))):
        spoken = []
        for name, place in zip(names, places):
            monkeypatch.setattr(parallel_state, name, lambda group=_Group(name, place), **_: group)
        monkeypatch.setattr(parallel_state, "get_expert_model_parallel_world_size", lambda: 1)
        monkeypatch.setattr(dist, "get_world_size", lambda: 1)
        monkeypatch.setattr(dist, "all_reduce", lambda tensor, group, spoken=spoken: spoken.append(group.name))
        monkeypatch.setattr(dist, "all_to_all_single", lambda *_, group: torch.zeros(1))
        runtime._open_groups()
        orders.append(spoken)
    assert orders[0] == orders[1] and len(orders[0]) == 7
