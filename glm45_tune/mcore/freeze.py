"""Full fine-tuning with some weights left as they are."""

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.transformer.moe.router import TopKRouter

from glm45_tune.mcore.chunks import Chunks


def freeze(chunks: Chunks, names: set[str]) -> None:
    """Take these tensors (by global name, see `conversion/patterns.py`) out of training; a router's bias is no longer moved."""
    state = chunks.sharded_state_dict()
    held = {value.data.data_ptr() for value in nested_values(state) if getattr(value, "key", None) in names}
    for parameter in chunks.parameters():
        if parameter.data_ptr() in held:
            parameter.requires_grad_(False)
    for module in chunks.modules():
        if isinstance(module, TopKRouter) and module.expert_bias.data_ptr() in held:
            module.frozen_expert_bias = True
