"""megatron's distributed data parallelism and distributed optimizer around a rank's chunks, as a recipe asks for them."""

import math

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import ChainedOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as McoreOptimizerConfig
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

from glm45_tune.mcore import runtime
from glm45_tune.mcore.adam import LeanAdamW
from glm45_tune.mcore.chunks import Chunks
from glm45_tune.recipe import OptimizerConfig, Recipe

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def wrap(chunks: Chunks, options: OptimizerConfig) -> list[DistributedDataParallel]:
    """Each chunk with buffers for its gradients. Parameters that are frozen must be so by now."""
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=options.main_grads_dtype == "fp32", use_distributed_optimizer=True
    )
    return [DistributedDataParallel(chunk.config, settings, chunk) for chunk in chunks]


def build(recipe: Recipe, wrapped: list[DistributedDataParallel]) -> ChainedOptimizer:
    """Adam over fp32 masters (of bf16 weights; fp32 weights are their own), cut over the data ranks."""
    options, dtype = recipe.optimizer, DTYPES[recipe.model.params_dtype]
    config = McoreOptimizerConfig(
        optimizer="adam",
        lr=options.lr,
        weight_decay=options.weight_decay,
        adam_beta1=options.adam_beta1,
        adam_beta2=options.adam_beta2,
        adam_eps=options.adam_eps,
        clip_grad=options.clip_grad,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=True,
    )
    optimizer = get_megatron_optimizer(config, wrapped)
    dtypes = {"exp_avg": DTYPES[options.exp_avg_dtype], "exp_avg_sq": DTYPES[options.exp_avg_sq_dtype]}
    if options.optimizer_offload_fraction or torch.bfloat16 in dtypes.values():
        for part in optimizer.chained_optimizers:
            if not part.is_stub_optimizer:
                groups = part.optimizer.param_groups
                part.optimizer = LeanAdamW(
                    groups, dtypes, options.optimizer_offload_fraction, masters=dtype == torch.bfloat16
                )
    return optimizer


# groups of weights whose gradient norms are told apart; a weight belongs to the first whose mark its name holds
GROUPS = {
    "mtp": "mtp.",
    "embedding": "embedding.",
    "head": "output_layer.",
    "norm": "norm.weight",
    "router": ".router.",
    "shared_experts": ".shared_experts.",
    "experts": ".experts.",
    "attention": ".self_attention.",
    "mlp": ".mlp.",
}


def group_of(name: str) -> str:
    """The group of a weight or of an adapter on it."""
    return next((group for group, mark in GROUPS.items() if mark in name), "mlp")


class Norms:
    """The gradient's norm, whole and by group of weights."""

    def __init__(self, chunks: Chunks, optimizer: ChainedOptimizer):
        groups = {id(p): list(GROUPS).index(group_of(name)) for name, p in chunks.named_parameters() if p.requires_grad}
        self._parts = [part for part in optimizer.chained_optimizers if not part.is_stub_optimizer]
        self._group_of_main = {}
        for part in self._parts:
            for weight, (group, place) in part.model_param_group_index_map.items():
                self._group_of_main[id(part.optimizer.param_groups[group]["params"][place])] = groups[id(weight)]
        trained = torch.zeros(len(GROUPS), dtype=torch.int32, device=runtime.device())
        trained[list(set(groups.values()))] = 1
        dist.all_reduce(trained, op=dist.ReduceOp.MAX)
        self._trained = [name for name, is_trained in zip(GROUPS, trained.tolist()) if is_trained]

    def measure(self) -> tuple[float, dict[str, float]]:
        """Of the gradients that the optimizer is about to use: (norm, norm by group that is trained). The same on every rank."""
        squares = torch.zeros(len(GROUPS), dtype=torch.float64, device=runtime.device())
        gradients, groups = [], []
        for part in self._parts:
            for parameter in part.get_parameters():
                counted = part._filter_grads_for_norm([parameter])  # nothing where another rank counts the same weight
                gradients += counted
                groups += [self._group_of_main[id(parameter)]] * len(counted)
        if gradients:
            norms = torch.stack(torch._foreach_norm([gradient.float() for gradient in gradients])).double()
            squares.index_add_(0, torch.tensor(groups, device=squares.device), norms.square())
        dist.all_reduce(squares)
        by_group = {
            name: math.sqrt(square) if square >= 0 else square for name, square in zip(GROUPS, squares.tolist())
        }
        return math.sqrt(sum(squares.tolist())), {name: by_group[name] for name in self._trained}


def step(optimizer: ChainedOptimizer, norms: Norms, may_update: bool) -> tuple[float, dict[str, float], bool]:
    """Update the weights unless the gradient is not finite, or `may_update` says no.

    Returns the gradient norm before clipping, the same by group, and whether the weights were updated.
    """
    lean = [part.optimizer for part in optimizer.chained_optimizers if isinstance(part.optimizer, LeanAdamW)]
    for inner in lean:
        inner.fetch()
    optimizer.prepare_grads()
    norm, by_group = norms.measure()
    if may_update := may_update and math.isfinite(norm):
        for part in optimizer.chained_optimizers:
            if not part.is_stub_optimizer and part.get_parameters() and part.config.clip_grad > 0:
                clip_grad_by_total_norm_fp32(part.get_parameters(), part.config.clip_grad, norm)
        optimizer.step_with_ready_grads()
    for inner in lean:
        inner.release()
    return norm, by_group, may_update
