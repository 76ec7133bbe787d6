"""What recompute may leave out: the second pass is for what the backward needs, and nobody reads its output."""

import torch
from megatron.core.tensor_parallel.random import is_checkpointing


def is_unread(ends_recompute: bool) -> bool:
    """Whether a module's output is for nobody now. ends_recompute: it is the last of a part that recompute runs as a whole.

    Its last product can be left out then, and any output of the right shape will do: only the backward through it counts.
    """
    return ends_recompute and is_checkpointing() and torch.is_grad_enabled()  # the first pass has no gradients


def never_again(module: torch.nn.Module) -> None:
    """Nothing in the module is recomputed by itself."""
    for part in module.modules():
        for name in ("recompute", "recompute_mlp", "ends_recompute"):
            if hasattr(part, name):
                setattr(part, name, False)
