"""LoRA (Hu et al. 2021, arXiv:2106.09685) beside megatron's linears, cut the way their weights are.

A fused linear (`linear_qkv`, `linear_fc1`) may carry one pair for all of it, megatron's way (A is shared by q, k and v), or a
pair for each HF projection named (`q_proj`, `up_proj`), PEFT's way. Routed experts have one pair each.
"""

import math
import zlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint

from glm45_tune.mcore.layers.experts import GroupedLinear, grouped_linear, mark_expert_parameter, sharded_experts
from glm45_tune.mcore.layers.linear import ColumnLinear
from glm45_tune.mcore.load import sharded_tensors
from glm45_tune.recipe import LINEARS, LoraConfig


class Pair(torch.nn.Module):
    """One low-rank pair: lora_A [r, in], lora_B [out, r], or [E, r, in] and [E, out, r] for experts; sizes are this rank's.

    `rows` says where the product goes in the linear's output: None for all of it, else (groups, rows of a group, first,
    last): the output dim seen as [groups, rows of a group], the pair's part being [:, first:last].
    """

    def __init__(self, linear, r: int, input_size: int, output_size: int, rows: tuple[int, int, int, int] | None):
        super().__init__()
        weight = linear.weight
        stack = weight.shape[:-2]
        new = dict(dtype=weight.dtype, device=weight.device)
        self.rows = rows
        self.lora_A = torch.nn.Parameter(torch.empty(*stack, r, input_size, **new))
        self.lora_B = torch.nn.Parameter(torch.zeros(*stack, output_size, r, **new))

    def widen(self, delta: torch.Tensor) -> torch.Tensor:
        """Put the pair's product [..., its rows] at its rows of the linear's output [..., all rows], zeros elsewhere."""
        if self.rows is None:
            return delta
        groups, size, first, last = self.rows
        return F.pad(delta.unflatten(-1, (groups, last - first)), (first, size - last)).flatten(-2)


class _Adapter(torch.nn.Module):
    """The pairs of one linear, by target name."""

    def __init__(self, linear, config: LoraConfig, pairs: dict[str, Pair], halves: set[str]):
        """halves: names of pairs whose lora_B rows are [gate; up]."""
        super().__init__()
        self.pairs = torch.nn.ModuleDict(pairs)
        self.halves = halves
        self.scaling = config.scaling
        self.dropout = config.lora_dropout

    def _drop(self, x: torch.Tensor) -> torch.Tensor:
        if not (self.dropout and self.training):
            return x
        with get_cuda_rng_tracker().fork():  # tensor ranks hold different parts of x and drop them independently
            return F.dropout(x, self.dropout)

    def sum_of_pairs(self, x: torch.Tensor, delta_of: Callable[[Pair, torch.Tensor], torch.Tensor]) -> torch.Tensor:
        x = self._drop(x)
        return sum(pair.widen(delta_of(pair, x) * self.scaling) for pair in self.pairs.values())


class LinearAdapter(_Adapter):
    """Of a column- or row-parallel linear. Column: lora_B is cut with the output; row: lora_A is cut with the input."""

    def __init__(self, linear, config, pairs, halves):
        super().__init__(linear, config, pairs, halves)
        self.is_column = isinstance(linear, ColumnLinear)
        self.sequence_parallel = linear.config.sequence_parallel
        self.tp_group = linear.tp_group
        for pair in self.pairs.values():
            cut, whole = (pair.lora_B, pair.lora_A) if self.is_column else (pair.lora_A, pair.lora_B)
            set_tensor_model_parallel_attributes(cut, True, 0 if self.is_column else 1, 1)
            whole.sequence_parallel = self.sequence_parallel  # each tensor rank saw its own tokens: sum the gradients

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.sum_of_pairs(x, self._delta)

    def _delta(self, pair: Pair, x: torch.Tensor) -> torch.Tensor:
        narrow = F.linear(x, pair.lora_A)
        if self.sequence_parallel:
            move = gather_from_sequence_parallel_region if self.is_column else reduce_scatter_to_sequence_parallel_region
            narrow = move(narrow, group=self.tp_group)
        return F.linear(narrow, pair.lora_B)

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

    def forward(self, x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        return self.sum_of_pairs(x, lambda pair, x: self._delta(pair, x, counts))

    def _delta(self, pair: Pair, x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        # expert tensor ranks share the tokens; each contributes a part of the gradient of the half that is not cut
        etp = parallel_state.get_expert_tensor_parallel_group()
        lora_A, lora_B = pair.lora_A, pair.lora_B
        if self.cut_dim == 1:
            lora_A = copy_to_tensor_model_parallel_region(lora_A, group=etp)
        else:
            lora_B = copy_to_tensor_model_parallel_region(lora_B, group=etp)
        return grouped_linear(grouped_linear(x, lora_A, counts), lora_B, counts)

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
