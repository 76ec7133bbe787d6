"""LoRA (Hu et al. 2021, arXiv:2106.09685) beside megatron's linears, cut the way their weights are.

A fused linear (`linear_qkv`, `linear_fc1`) may carry one pair for all of it, megatron's way (A is shared by q, k and v), or a
pair for each HF projection named (`q_proj`, `up_proj`), PEFT's way. Routed experts have one pair each.
"""

import contextlib
import math
import zlib

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint

from glm45_tune.mcore.layers.experts import GroupedLinear, mark_expert_parameter, sharded_experts
from glm45_tune.mcore.layers.linear import ColumnLinear
from glm45_tune.mcore.load import sharded_tensors
from glm45_tune.recipe import LINEARS, LoraConfig


class Pair(torch.nn.Module):
    """One low-rank pair: lora_A [r, in], lora_B [out, r], or [E, r, in] and [E, out, r] for experts; sizes are this rank's.

    `rows` says where lora_B's rows lie in the linear's output: None for all of it, else (groups, rows of a group, first,
    last): the output dim seen as [groups, rows of a group], the pair's part being [:, first:last].
    """

    def __init__(self, linear, r: int, input_size: int, output_size: int, rows: tuple[int, int, int, int] | None):
        super().__init__()
        weight = linear.weight
        stack = weight.shape[:-2]
        new = dict(dtype=linear.config.params_dtype, device=weight.device)
        self.rows = rows
        self.lora_A = torch.nn.Parameter(torch.empty(*stack, r, input_size, **new))
        self.lora_B = torch.nn.Parameter(torch.zeros(*stack, output_size, r, **new))

    def whole_B(self) -> torch.Tensor:
        """lora_B for the linear's whole output, [..., out, r]: zeros outside the pair's rows."""
        if self.rows is None:
            return self.lora_B
        groups, size, first, last = self.rows
        return F.pad(self.lora_B.unflatten(-2, (groups, last - first)), (0, 0, first, size - last)).flatten(-3, -2)


class _Adapter(torch.nn.Module):
    """The pairs of one linear, by target name."""

    def __init__(self, linear, config: LoraConfig, pairs: dict[str, Pair], halves: set[str]):
        """halves: names of pairs whose lora_B rows are [gate; up]."""
        super().__init__()
        self.pairs = torch.nn.ModuleDict(pairs)
        self.halves = halves
        self.scaling = config.scaling
        self.enabled = True
        self.dropout = config.lora_dropout

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All pairs as one: lora_A [..., Σ r, in], lora_B [..., out, Σ r]."""
        pairs = list(self.pairs.values())
        if len(pairs) == 1:
            return pairs[0].lora_A, pairs[0].whole_B()
        return torch.cat([pair.lora_A for pair in pairs], dim=-2), torch.cat([pair.whole_B() for pair in pairs], dim=-1)


class LinearAdapter(_Adapter):
    """Of a column- or row-parallel linear. Column: lora_B is cut with the output; row: lora_A is cut with the input."""

    def __init__(self, linear, config, pairs, halves):
        super().__init__(linear, config, pairs, halves)
        self.is_column = isinstance(linear, ColumnLinear)
        self.tp_group = linear.tp_group
        for pair in self.pairs.values():
            cut, whole = (pair.lora_B, pair.lora_A) if self.is_column else (pair.lora_A, pair.lora_B)
            set_tensor_model_parallel_attributes(cut, True, 0 if self.is_column else 1, 1)
            # each tensor rank has a part of the gradient: sum them
            whole.sequence_parallel = linear.config.sequence_parallel

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        sharded = {}
        for name, pair in self.pairs.items():
            at = f"{prefix}{name}."
            tensors = make_sharded_tensors_for_checkpoint(
                {"lora_A": pair.lora_A, "lora_B": pair.lora_B},
                at,
                {"lora_B": 0} if self.is_column else {"lora_A": 1},
                sharded_offsets,
                tp_group=self.tp_group,
                dp_cp_group=metadata["dp_cp_group"],
            )
            if name in self.halves:
                tensors[f"{at}lora_B"] = apply_swiglu_sharded_factory(
                    tensors[f"{at}lora_B"], sharded_offsets, tp_group=self.tp_group, dp_group=metadata["dp_cp_group"]
                )
            sharded |= tensors
        return sharded


class ExpertAdapter(_Adapter):
    """Of a grouped linear: one pair an expert of this rank."""

    def __init__(self, linear: GroupedLinear, config, pairs, halves):
        super().__init__(linear, config, pairs, halves)
        self.cut_dim = linear.cut_dim
        for pair in self.pairs.values():
            mark_expert_parameter(pair.lora_A, 2 if self.cut_dim == 2 else None)
            mark_expert_parameter(pair.lora_B, 1 if self.cut_dim == 1 else None)

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        # expert tensor ranks share the tokens; each has a part of the gradient of the half that is not cut
        lora_A, lora_B = super().factors()
        etp = parallel_state.get_expert_tensor_parallel_group()
        if self.cut_dim == 1:
            return copy_to_tensor_model_parallel_region(lora_A, group=etp), lora_B
        return lora_A, copy_to_tensor_model_parallel_region(lora_B, group=etp)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        sharded = {}
        for name, pair in self.pairs.items():
            for half, cut in (("lora_A", 2), ("lora_B", 1)):
                key = f"{prefix}{name}.{half}"
                is_cut = (half == "lora_B") == (self.cut_dim == 1)
                halves = half == "lora_B" and name in self.halves
                sharded[key] = sharded_experts(getattr(pair, half), key, cut if is_cut else None, halves)
        return sharded


def attach(model, config: LoraConfig, seed: int) -> None:
    """Freeze the base weights and put an adapter beside every linear that `config.target_modules` names.

    lora_A is drawn per tensor (and per expert) from the seed and the tensor's global name, lora_B starts at 0: the same model
    under any parallel layout.
    """
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        kind = name.rpartition(".")[2]
        if kind in LINEARS and (targets := config.targets_of(name)):
            module.adapter = _build(module, kind, targets, config)
    _draw(model, config.r, seed)


def _build(module, kind: str, targets: list[str], config: LoraConfig) -> _Adapter:
    is_experts = isinstance(module, GroupedLinear)
    output_size, input_size = module.weight.shape[-2:]
    pairs = {}
    for target in targets:
        rows = None if target == kind else _rows_of(module, target, output_size)
        size = output_size if rows is None else rows[0] * (rows[3] - rows[2])
        pairs[target] = Pair(module, config.r, input_size, size, rows)
    halves = {kind} & pairs.keys() if kind == "linear_fc1" else set()
    return (ExpertAdapter if is_experts else LinearAdapter)(module, config, pairs, halves)


def _rows_of(module, projection: str, output_size: int) -> tuple[int, int, int, int] | None:
    """Where an HF projection lies in the fused output (see Pair); None where it is all of it (o_proj, down_proj)."""
    if projection in ("gate_proj", "up_proj"):
        half = output_size // 2
        return (1, output_size, 0, half) if projection == "gate_proj" else (1, output_size, half, output_size)
    if projection in ("q_proj", "k_proj", "v_proj"):
        config = module.config
        head = config.kv_channels
        queries = config.num_attention_heads // config.num_query_groups * head
        size = queries + 2 * head
        first = {"q_proj": 0, "k_proj": queries, "v_proj": queries + head}[projection]
        return output_size // size, size, first, first + (queries if projection == "q_proj" else head)
    return None


@contextlib.contextmanager
def off(model):
    """The model without its adapters: where they have not been trained yet, the same bits as with them."""
    adapters = [module for module in model.modules() if isinstance(module, _Adapter)]
    for adapter in adapters:
        adapter.enabled = False
    try:
        yield
    finally:
        for adapter in adapters:
            adapter.enabled = True


@torch.no_grad()
def _draw(model, r: int, seed: int) -> None:
    """Kaiming-uniform lora_A, as PEFT draws it: U(−1/√in, 1/√in)."""
    for shard in sharded_tensors(model):
        if not shard.key.endswith(".lora_A"):
            continue
        *stack, _, input_size = shard.global_shape
        first = shard.global_offset[-1]
        for index in range(shard.local_shape[0] if stack else 1):
            expert = shard.global_offset[0] + index if stack else 0
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {shard.key} {expert}".encode()))
            whole = torch.empty(r, input_size).uniform_(-1, 1, generator=generator) / math.sqrt(input_size)
            target = shard.data[index] if stack else shard.data
            target.copy_(whole[:, first : first + target.shape[1]])
