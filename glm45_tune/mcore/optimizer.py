"""megatron's distributed data parallelism and distributed optimizer around a rank's chunks, as a recipe asks for them."""

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import ChainedOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as McoreOptimizerConfig

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


def step(optimizer: ChainedOptimizer) -> float:
    """Update the weights. Returns the gradient norm before clipping."""
    lean = [part.optimizer for part in optimizer.chained_optimizers if isinstance(part.optimizer, LeanAdamW)]
    for inner in lean:
        inner.fetch()
    _, norm, _ = optimizer.step()
    for inner in lean:
        inner.release()
    return float(norm)
