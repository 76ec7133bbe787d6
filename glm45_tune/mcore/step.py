"""One optimizer step over the parallel model: build it, run it, read its numbers."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig as McoreOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.router import TopKRouter

from glm45_tune.conversion.tensors import HfReader
from glm45_tune.data.batch import Batch
from glm45_tune.layout import Layout
from glm45_tune.mcore import lora, runtime
from glm45_tune.mcore.load import load_weights
from glm45_tune.mcore.model import GLM45Model, ModelOptions
from glm45_tune.recipe import OptimizerConfig, Recipe

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class StepResult:
    """losses: mean per prediction (the next token first, then MTP's); the same on every rank."""

    losses: list[float]
    grad_norm: float = math.nan
    expert_load: float = math.nan
    """Tokens of the busiest expert over the mean, in the layer where that is largest."""
    aux_loss: float = math.nan
    """Load-balancing loss before its coefficient, mean over MoE layers and micro batches."""


def model_options(recipe: Recipe) -> ModelOptions:
    train = recipe.train
    full = train.recompute_granularity == "full"
    default = ["core_attn"] if train.recompute_granularity == "selective" else []
    return ModelOptions(
        params_dtype=DTYPES[recipe.model.params_dtype],
        with_mtp=recipe.model.mtp_loss_scaling_factor > 0,
        recompute_granularity=train.recompute_granularity,
        recompute_method=train.recompute_method if full else None,
        recompute_num_layers=train.recompute_num_layers if full else None,
        recompute_modules=default if train.recompute_modules is None else train.recompute_modules,
        moe_aux_loss_coeff=recipe.model.moe_aux_loss_coeff,
    )


class Trainer:
    """This rank's stage of the model with its gradients and optimizer. Every method is called by all ranks together."""

    def __init__(self, recipe: Recipe, layout: Layout, source: HfReader):
        model = GLM45Model(source.spec, layout, model_options(recipe))
        if recipe.lora is not None:
            lora.attach(model, recipe.lora, recipe.train.seed)
        load_weights(model, source)
        model.to(runtime.device())
        self.config = model.config
        self.num_predictions = 1 + (self.config.mtp_num_layers or 0)
        self.mtp_loss_scaling_factor = recipe.model.mtp_loss_scaling_factor
        self.pad_multiple = layout.tensor_model_parallel_size
        self.data_parallel_rank = parallel_state.get_data_parallel_rank()
        self.is_lora = recipe.lora is not None
        self.has_aux_loss = recipe.model.moe_aux_loss_coeff > 0
        self.model = DistributedDataParallel(
            self.config,
            DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True),
            model,
        )
        self.optimizer = get_megatron_optimizer(_optimizer_config(recipe), [self.model])
        self.config.finalize_model_grads_func = self._finalize
        self._routers = [m for m in model.modules() if isinstance(m, TopKRouter)]
        self._expert_load = math.nan

    @property
    def module(self) -> GLM45Model:
        return self.model.module

    def train(self, batches: Iterable[Batch], num_microbatches: int, denominators: list[float], lr: float) -> StepResult:
        """Forward, backward and update. denominators: the global batch's total weight of each prediction."""
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        losses = self._run(batches, num_microbatches, denominators, forward_only=False)
        _, grad_norm, _ = self.optimizer.step()
        return StepResult(losses, float(grad_norm), self._expert_load, self._aux_loss(num_microbatches))

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch], num_microbatches: int, denominators: list[float]) -> StepResult:
        """Losses alone; nothing is updated."""
        self.model.eval()
        return StepResult(self._run(batches, num_microbatches, denominators, forward_only=True))

    def _run(self, batches, num_microbatches: int, denominators: list[float], forward_only: bool) -> list[float]:
        # a mean over the weights of the whole global batch: megatron divides by micro batches and data ranks, which cancels here
        num_mtp = self.num_predictions - 1
        factors = [1.0] + num_mtp * [self.mtp_loss_scaling_factor / max(num_mtp, 1)]
        shares = num_microbatches * parallel_state.get_data_parallel_world_size()
        scale = torch.tensor([shares * f / max(d, 1e-30) for f, d in zip(factors, denominators)], device=runtime.device())
        reports = get_forward_backward_func()(
            forward_step_func=partial(_forward_step, scale),
            data_iterator=iter(batches),
            model=self.model,
            num_microbatches=num_microbatches,
            seq_length=1,  # every row brings its own length (variable_seq_lengths)
            micro_batch_size=1,
            forward_only=forward_only,
        )
        sums = torch.zeros(self.num_predictions, dtype=torch.float64, device=runtime.device())
        for report in reports:
            sums += report["sums"]
        dist.all_reduce(sums, group=parallel_state.get_data_parallel_group())
        dist.all_reduce(sums, group=parallel_state.get_pipeline_model_parallel_group())  # only the last stage has any
        return [total / max(d, 1e-30) for total, d in zip(sums.tolist(), denominators)]

    def _finalize(self, model, num_tokens=None, **kwargs) -> None:
        self._expert_load = self._measure_expert_load()
        finalize_model_grads(model, None, **kwargs)

    def _measure_expert_load(self) -> float:
        worst = torch.zeros((), device=runtime.device())
        if self._routers:
            counts = torch.stack([router.local_tokens_per_expert for router in self._routers])
            dist.all_reduce(counts, group=parallel_state.get_tensor_and_data_parallel_group())
            worst = (counts.amax(1) / counts.mean(1).clamp(min=1e-9)).amax()
        dist.all_reduce(worst, op=dist.ReduceOp.MAX, group=parallel_state.get_pipeline_model_parallel_group())
        return worst.item()

    def _aux_loss(self, num_microbatches: int) -> float:
        if not self.has_aux_loss:
            return math.nan
        spec, name, found = self.module.spec, "load_balancing_loss", {}
        get_moe_metrics_tracker().report(
            loss_scale=1 / num_microbatches,
            iteration=0,
            force_initialize=True,  # a stage without experts takes part in the sum
            track_names=name,
            num_layers=self.config.num_layers,
            moe_layer_freq=[int(spec.is_moe(layer)) for layer in range(spec.num_layers)],
            mtp_num_layers=self.config.mtp_num_layers,
            total_loss_dict=found,
        )
        return float(found[name])


def _forward_step(scale: torch.Tensor, batches, model):
    batch: Batch = next(batches).to(runtime.device())
    output = model(batch.tokens, batch.positions, batch.bounds, batch.labels)
    return output, partial(_loss, scale, batch.weights)


def _loss(scale: torch.Tensor, weights: torch.Tensor, losses: torch.Tensor):
    """losses, weights [M, T] → (the scalar to differentiate, weighted sums for the report)."""
    sums = (losses * weights).sum(dim=1)
    return (sums * scale).sum(), {"sums": sums.detach().double()}


def _optimizer_config(recipe: Recipe) -> McoreOptimizerConfig:
    options: OptimizerConfig = recipe.optimizer
    dtype = DTYPES[recipe.model.params_dtype]
    return McoreOptimizerConfig(
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
