"""Who writes the answers of a rollout, as the training ranks see it: every rank asks, every rank gets every answer."""

from typing import Protocol

import torch.distributed as dist

from glm45_tune.mcore.generate import Writer
from glm45_tune.mcore.step import Trainer
from glm45_tune.rl.engine import Completion, Request
from glm45_tune.training.prepare import Job


class Engine(Protocol):
    def generate(self, requests: list[Request], seed: int) -> list[Completion]:
        """An answer to each request, from the weights last synchronised."""

    def synchronise(self, version: int) -> None:
        """From now on write with the trainer's weights as they stand, which are `version`."""

    def close(self) -> None:
        """Called once, at the end."""


class LocalEngine:
    """The training ranks themselves: each data-parallel rank writes its share, with the weights in training."""

    def __init__(self, job: Job, trainer: Trainer):
        rl = job.recipe.rl
        self._trainer, self._version = trainer, 0
        stops = job.source.spec.eos_token_ids
        self._writer = Writer(trainer.module[0], stops, rl.engine.concurrency, rl.router_replay == "engine")

    def generate(self, requests: list[Request], seed: int) -> list[Completion]:
        rank, size = self._trainer.data_parallel_rank, self._trainer.data_parallel_size
        own = self._writer.write(requests[rank::size], seed * size + rank, self._version)
        shares = self._trainer.gather(own)
        found: list = [None] * len(requests)
        for number, share in enumerate(shares):
            found[number::size] = share
        return found

    def synchronise(self, version: int) -> None:
        self._version = version

    def close(self) -> None:
        pass


def on_first(work) -> object:
    """What the first rank makes of `work()`, on every rank. What it raises is raised on every rank."""
    box: list = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = work()
        except Exception as error:
            box[1] = error
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    return box[0]
