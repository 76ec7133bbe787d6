"""How ranks join: what every one of them must do in the same order."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from glm45_tune.mcore import runtime
from glm45_tune.training import card


class _Group:
    """Of a name, with the hash that its place in memory gives it on one rank."""

    def __init__(self, name: str, place: int):
        self.name, self._place = name, place

    def __hash__(self):
        return self._place

    def size(self) -> int:
        return 1


def test_groups_are_opened_in_the_same_order_on_every_rank(monkeypatch):
    """Wherever a rank has them in memory: over NCCL two ranks that begin with different groups wait for each other for ever."""
    names = [name for name in dir(parallel_state) if name.startswith("get_") and name.endswith("_parallel_group")]
    orders = []
    for places in (range(len(names)), reversed(range(len(names)))):
        spoken = []
        for name, place in zip(names, places):
            group = _Group(name, place)
            monkeypatch.setattr(parallel_state, name, lambda group=group, **_: group)
        monkeypatch.setattr(
            parallel_state, "get_embedding_group", lambda check_initialized: None
        )  # of a stage in the middle
        monkeypatch.setattr(dist, "group", SimpleNamespace(WORLD=_Group("world", -1)))
        monkeypatch.setattr(dist, "all_reduce", lambda tensor, group, spoken=spoken: spoken.append(group.name))
        for call in ("all_to_all_single", "all_gather_into_tensor"):
            monkeypatch.setattr(dist, call, lambda *_, group: None)
        runtime._open_groups()
        orders.append(spoken)
    assert orders[0] == orders[1] and orders[0][0] == "world" and len(orders[0]) == 10


def test_groups_of_the_same_ranks_are_one(one_rank):
    """Each group over NCCL takes memory; those of one rank alone are all the job's own. A group made later is its own again."""
    getters = [getattr(parallel_state, name) for name in dir(parallel_state) if name.endswith("_parallel_group")]
    found = [
        getter() for getter in getters if getter.__name__.startswith("get_") and "hierarchical" not in getter.__name__
    ]
    assert len(found) > 9 and all(group is dist.group.WORLD for group in found)
    other = dist.new_group([0])
    assert other is not dist.group.WORLD
    dist.destroy_process_group(other)


@pytest.mark.parametrize(
    "name, tflops",
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H20", 148),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA A800-SXM4-80GB", 312),
        ("Some card", 989),
    ],
)
def test_a_card_is_known_by_its_name_and_has_what_is_free(monkeypatch, name, tflops):
    """An H200 has "H20" in its name; of all ranks the one with the least room counts."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (70 * 2**30, 80 * 2**30))
    monkeypatch.setattr(runtime, "device", lambda: torch.device("cpu"))
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, operation: tensor.sub_(8))
    found = card.this_card()
    assert found.tflops == tflops and found.memory_gib == 62
