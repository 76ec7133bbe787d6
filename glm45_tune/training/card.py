"""The card a rank runs on, as the planner knows it."""

from dataclasses import replace

import numpy as np
import psutil
import torch
import torch.distributed as dist

from glm45_tune.layout import ranks_here
from glm45_tune.mcore import runtime
from glm45_tune.plan.cards import CARDS, Card, card_named, find_card
from glm45_tune.plan.planner import Hardware
from glm45_tune.training.prepare import Job


def this_card() -> Card:
    """A known card by its name; another with an H100's speeds; on a CPU, speeds of 0. memory_gib: what is free, the least of all ranks.

    Called by all ranks together, when they have joined and hold nothing yet: what NCCL has taken is gone from what is free.
    """
    if torch.cuda.is_available():
        card = card_named(torch.cuda.get_device_name()) or CARDS["h100"]
    else:
        card = find_card("cpu")
    free = torch.tensor(_free_gib(), dtype=torch.float64, device=runtime.device())
    dist.all_reduce(free, dist.ReduceOp.MIN)
    return replace(card, memory_gib=free.item())


def hardware(job: Job) -> Hardware:
    """What a job runs on and with, as the planner asks: its documents as long as they are, the mean over tokens."""
    lengths = np.zeros(0) if job.stream else job.train.lengths.astype(np.float64)
    tokens = (lengths**2).sum() / lengths.sum() if lengths.sum() else job.recipe.data.seq_length
    return Hardware(job.card, job.layout.world_size, ranks_here(), min(tokens, job.recipe.data.seq_length))


def _free_gib() -> float:
    """Of this rank's card, or its share of this host's memory."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0] / 2**30
    return psutil.virtual_memory().available / 2**30 / ranks_here()
