"""One optimizer step over the parallel model: build it, run it, read its numbers."""

import contextlib
import itertools
import math
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, reduce_from_tensor_model_parallel_region
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

from glm45_tune.conversion.patterns import frozen
from glm45_tune.conversion.tensors import HfReader
from glm45_tune.data.batch import Batch, collate
from glm45_tune.data.chat import Sample
from glm45_tune.data.context import shares
from glm45_tune.layout import Layout
from glm45_tune.mcore import chunks, lora, optimizer, runtime
from glm45_tune.mcore.freeze import freeze
from glm45_tune.mcore.interleaved import TwoWayCommunicator
from glm45_tune.mcore.layers.router import Replay, Router
from glm45_tune.mcore.layers.weight import keep_turned
from glm45_tune.mcore.load import load_weights
from glm45_tune.mcore.model import ModelOptions
from glm45_tune.mcore.optimizer import DTYPES
from glm45_tune.recipe import Recipe

Objective = Callable[[Batch, torch.Tensor], tuple[torch.Tensor, dict[str, torch.Tensor]]]
"""(micro batch, cross entropies [M, T]) → (this rank's part of the loss, numbers to be summed over micro batches and ranks).

A name that begins with `max/` is of a number whose largest is wanted. On a pipeline's last stage; micro batches of all data and
context ranks make up the loss together.
"""


@dataclass(frozen=True)
class StepResult:
    """losses: mean per prediction (the next token first, then MTP's), of supervised training; the same on every rank."""

    losses: list[float] = field(default_factory=list)
    sums: dict[str, float] = field(default_factory=dict)
    """What the objective counted."""
    grad_norm: float = math.nan
    grad_norm_by_group: dict[str, float] = field(default_factory=dict)
    """`attention`, `experts`, …: of the groups that are trained."""
    is_skipped: bool = False
    """The loss or the gradient was not finite, so no weight was updated."""
    expert_load: torch.Tensor | None = None
    """Tokens of every expert over its layer's mean, [MoE layers and MTP's, E]."""
    aux_loss: float = math.nan
    """Load-balancing loss before its coefficient, mean over MoE layers and micro batches."""
    z_loss: float = math.nan
    """The router's z-loss, the same mean."""


def model_options(recipe: Recipe) -> ModelOptions:
    train = recipe.train
    full = train.recompute_granularity == "full"
    default = ["core_attn"] if train.recompute_granularity == "selective" else []
    return ModelOptions(
        params_dtype=DTYPES[recipe.model.params_dtype],
        frozen_dtype="fp8" if recipe.model.frozen_dtype == "fp8" else "bf16",
        frozen_products="bf16" if recipe.model.frozen_products == "bf16" else "fp8",
        with_mtp=recipe.model.mtp_loss_scaling_factor > 0,
        recompute_granularity=train.recompute_granularity,
        recompute_method=train.recompute_method if full else None,
        recompute_num_layers=train.recompute_num_layers if full else None,
        recompute_modules=default if train.recompute_modules is None else train.recompute_modules,
        moe_aux_loss_coeff=recipe.model.moe_aux_loss_coeff,
        moe_z_loss_coeff=recipe.model.moe_z_loss_coeff,
        moe_router_bias_update_rate=recipe.model.moe_router_bias_update_rate,
        deterministic=train.deterministic,
        temperature=recipe.rl.temperature if recipe.rl else 1.0,
    )


class Trainer:
    """This rank's stages of the model with their gradients and optimizer. Every method is called by all ranks together."""

    def __init__(
        self, recipe: Recipe, layout: Layout, source: HfReader, enter: Callable[[str], None] = lambda phase: None
    ):
        """enter: told each phase of the work when it begins."""
        self.enter = enter
        enter("building the model and loading its weights")
        self.module = chunks.build(source.spec, layout, model_options(recipe))
        if recipe.lora is not None:
            lora.attach(self.module, recipe.lora, recipe.train.seed)
        self.quantization = load_weights(self.module, source)
        """What a frozen base in FP8 is on all ranks, a line a kind of weight; nothing of one in bf16."""
        self.module.to(runtime.device())
        self.keeps_turned = bool(recipe.model.frozen_turned)
        if self.keeps_turned:
            keep_turned(self.module)
        self.config = self.module.config
        self.num_predictions = 1 + (self.config.mtp_num_layers or 0)
        if recipe.train.freeze:
            freeze(self.module, frozen(source.spec, recipe.train.freeze, with_mtp=self.num_predictions > 1))
        self.mtp_loss_scaling_factor = recipe.model.mtp_loss_scaling_factor
        # context ranks pad their own parts of a row
        self.pad_multiple = 1 if layout.context_parallel_size > 1 else layout.tensor_model_parallel_size
        self.data_parallel_rank = parallel_state.get_data_parallel_rank()
        self.data_parallel_size = parallel_state.get_data_parallel_world_size()
        self.is_lora = recipe.lora is not None
        self.has_aux_loss = recipe.model.moe_aux_loss_coeff > 0
        self.has_z_loss = recipe.model.moe_z_loss_coeff > 0
        self._layout = layout
        self._pipeline = {}
        if layout.virtual_pipeline_model_parallel_size > 1:
            groups = ProcessGroupCollection.use_mpu_process_groups()
            self._pipeline = dict(p2p_communicator=TwoWayCommunicator(self.config), pg_collection=groups)
        self._wrapped = optimizer.wrap(self.module, recipe.optimizer)
        self.optimizer = optimizer.build(recipe, self._wrapped)
        self._norms = optimizer.Norms(self.module, self.optimizer)
        # not the method itself: megatron's optimizer closes a circle through it that is never collected, model and groups with it
        finalize = weakref.WeakMethod(self._finalize)
        self.config.finalize_model_grads_func = lambda *chunks, **how: finalize()(*chunks, **how)
        self._routers = [[m for m in chunk.modules() if isinstance(m, Router)] for chunk in self._wrapped]
        self.expert_load = torch.zeros(0, 0)
        """Of the last step, see StepResult."""

    def train(
        self,
        batches: Iterable[Batch],
        num_microbatches: int,
        denominators: list[float],
        lr: float,
        num_channels: int = 0,
        num_filled: int | None = None,
    ) -> StepResult:
        """A step of supervised training. denominators: the global batch's total weight of each prediction.

        num_channels: the batches have `along["channel"]`, and `sums` then hold the weighted loss of each: channel/0, …
        num_filled: see `update`.
        """
        objective = partial(_weighted_mean, self._scales(denominators), num_channels)
        result = self.update(batches, num_microbatches, objective, lr, num_filled)
        return replace(result, losses=_losses(result.sums, denominators))

    def update(
        self,
        batches: Iterable[Batch],
        num_microbatches: int,
        objective: Objective,
        lr: float,
        num_filled: int | None = None,
    ) -> StepResult:
        """Forward, backward and update. Where batches have routes, they are taken, and `sums` say how many the routers agree with.

        num_filled: how many of this rank's micro batches hold samples; None: all. The last batch of an epoch may leave some
        empty, and the routers' losses are means over those that are not.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        for chunk in self._wrapped:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        routers = [router for chunk in self._routers for router in chunk]
        share = self._filled_share(num_microbatches, num_microbatches if num_filled is None else num_filled)
        for router in routers:
            router.loss_weight = 1 / share
        biases = [router.expert_bias.clone() for router in routers if router.expert_bias is not None]
        sums = self._sum(self._run(batches, num_microbatches, objective, forward_only=False))
        self.enter("optimizer")
        is_finite = all(math.isfinite(value) for name, value in sums.items() if not name.startswith("max/"))
        norm, by_group, is_updated = optimizer.step(self.optimizer, self._norms, is_finite)
        if not is_updated:
            for router, bias in zip(routers, biases):
                router.expert_bias.copy_(bias)
        sums |= self._agreement()
        router_losses = self._router_losses(num_microbatches * share)
        return StepResult([], sums, norm, by_group, not is_updated, self.expert_load, **router_losses)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch], num_microbatches: int, denominators: list[float]) -> StepResult:
        """Losses alone; nothing is updated."""
        result = self.measure(batches, num_microbatches, partial(_weighted_mean, self._scales(denominators), 0))
        return replace(result, losses=_losses(result.sums, denominators))

    @torch.no_grad()
    def measure(self, batches: Iterable[Batch], num_microbatches: int, objective: Objective) -> StepResult:
        """What an objective counts; nothing is updated."""
        for chunk in self._wrapped:
            chunk.eval()
        return StepResult([], self._sum(self._run(batches, num_microbatches, objective, forward_only=True)))

    @torch.no_grad()
    def log_probabilities(self, batches: list[Batch], with_adapter: bool = True) -> list[torch.Tensor]:
        """Of each token of each batch given those before it, where it is predicted: float32 [T], whole rows, on the host.

        0 where the batch's weight is. Right on a pipeline's last stage, 0 on the others. with_adapter: False asks the model
        under the LoRA adapter.
        """
        for chunk in self._wrapped:
            chunk.eval()
        with contextlib.nullcontext() if with_adapter else lora.off(self.module):
            reports = self._run(iter(batches), len(batches), _keep, forward_only=True)
        self._last_routes = [self._routes_taken(batch, number) for number, batch in enumerate(batches)]
        found = [torch.zeros(len(batch.tokens)) for batch in batches]
        for whole, report, batch in zip(found, reports, batches):
            own, index = report["kept"].cpu(), torch.arange(len(batch.tokens))
            if self._layout.context_parallel_size > 1:
                index = torch.from_numpy(self._cut(batch).share.index)
            whole[index[index >= 0]] = own[index >= 0]
        if self._layout.context_parallel_size > 1:
            for number, whole in enumerate(found):
                whole = whole.to(runtime.device())
                dist.all_reduce(whole, group=parallel_state.get_context_parallel_group())
                found[number] = whole.cpu()
        return found

    def gather(self, value) -> list:
        """The objects of all data-parallel ranks, in their order."""
        found = [None] * self.data_parallel_size
        dist.all_gather_object(found, value, group=parallel_state.get_data_parallel_group())
        return found

    def over_row(self, sums: torch.Tensor) -> torch.Tensor:
        """Sums over this context rank's tokens → over the whole row's. The gradient stays with each rank's own part."""
        if self._layout.context_parallel_size == 1:
            return sums
        return reduce_from_tensor_model_parallel_region(sums, group=parallel_state.get_context_parallel_group())

    def for_row(self, values: torch.Tensor) -> torch.Tensor:
        """Values that every context rank has alike and uses for its own tokens: their gradients are summed."""
        if self._layout.context_parallel_size == 1:
            return values
        return copy_to_tensor_model_parallel_region(values, group=parallel_state.get_context_parallel_group())

    @property
    def reports_row(self) -> bool:
        """Whether this is the one of a row's context ranks that reports what is counted of whole rows."""
        return parallel_state.get_context_parallel_rank() == 0

    @property
    def reports_sample(self) -> bool:
        """Whether this is the one of a sample's ranks that reports what `log_probabilities` says of it."""
        is_first = self.reports_row and parallel_state.get_tensor_model_parallel_rank() == 0
        return is_first and parallel_state.is_pipeline_last_stage(ignore_virtual=True)

    def score(self, token_ids: list[int]) -> list[float]:
        """Log-probability of each token but the first, on every rank."""
        sample = Sample(np.array(token_ids, np.int32), np.ones(len(token_ids), np.float32), "", 0)
        batch = collate([sample], self.num_predictions, self.pad_multiple, 0)
        found = self.log_probabilities([batch] * self._layout.microbatch_multiple)[0].to(runtime.device())
        dist.all_reduce(found, group=parallel_state.get_pipeline_model_parallel_group())  # only the last stage has any
        return found[: len(token_ids) - 1].tolist()

    def routes_taken(self) -> list[dict[int, torch.Tensor]]:
        """For each batch of the last `log_probabilities` the experts that this rank's routers sent its tokens to, see `Batch.routes`."""
        return self._last_routes

    def _routes_taken(self, batch: Batch, number: int) -> dict[int, torch.Tensor]:
        """Of the batch that ran as `number`; −1 for padding, where nobody cares."""
        is_padding = self._own(self._cut(batch).sequence < 0).unsqueeze(1).to(runtime.device())
        routers = [router for chunk in self._routers for router in chunk]
        return {r.layer_number: r.router_replay.history[number].masked_fill(is_padding, -1) for r in routers}

    def _own(self, values: torch.Tensor) -> torch.Tensor:
        """Of values for this context rank's tokens those that this tensor rank's routers see."""
        tensor = parallel_state.get_tensor_model_parallel_group()
        return values.chunk(tensor.size())[tensor.rank()]

    def routes_of(self, batch: Batch, experts: torch.Tensor) -> dict[int, torch.Tensor]:
        """experts int [T, MoE layers, K] of the whole row → `Batch.routes` of this rank's part."""
        if self._layout.context_parallel_size > 1:
            index = torch.from_numpy(self._cut(batch).share.index)
            experts = experts[index.clamp(min=0)].masked_fill((index < 0)[:, None, None], -1)
        own = self._own(experts).long().to(runtime.device())
        dense = self.module.spec.num_dense_layers  # a GPT layer is two of megatron's, numbered from 1
        return {r.layer_number: own[:, r.layer_number // 2 - 1 - dense] for chunk in self._routers for r in chunk}

    def _agreement(self) -> dict[str, float]:
        """How many of the experts that routers were told they would have chosen, over all ranks."""
        replays = [router.router_replay for chunk in self._routers for router in chunk]
        counts = torch.tensor(
            [float(sum(replay.agreed for replay in replays)), float(sum(replay.asked for replay in replays))],
            dtype=torch.float64,
            device=runtime.device(),
        )
        dist.all_reduce(counts)
        return dict(zip(("routes_agreed", "routes_told"), counts.tolist()))

    def _scales(self, denominators: list[float]) -> torch.Tensor:
        """What each prediction's weighted sum counts in the loss."""
        num_mtp = self.num_predictions - 1
        factors = [1.0] + num_mtp * [self.mtp_loss_scaling_factor / max(num_mtp, 1)]
        return torch.tensor([f / max(d, 1e-30) for f, d in zip(factors, denominators)], device=runtime.device())

    def _run(
        self, batches, num_microbatches: int, objective: Objective, forward_only: bool
    ) -> list[dict[str, torch.Tensor]]:
        """The objective's numbers of each micro batch, on a pipeline's last stage."""
        # the loss is a sum over the whole global batch: megatron divides by micro batches and data ranks, which cancels here
        parts = num_microbatches * parallel_state.get_data_parallel_world_size()
        for router in itertools.chain(*self._routers):
            router.router_replay = Replay()
        routers = {id(chunk): found for chunk, found in zip(self._wrapped, self._routers)}
        self.enter("forward" if forward_only else "forward and backward")
        iterators = itertools.tee(map(self._cut, batches), len(self._wrapped))  # each chunk walks the batches by itself
        return get_forward_backward_func()(
            forward_step_func=partial(_forward_step, objective, parts, routers),
            data_iterator=list(iterators),
            model=self._wrapped,
            num_microbatches=num_microbatches,
            seq_length=1,  # every row brings its own length (variable_seq_lengths)
            micro_batch_size=1,
            forward_only=forward_only,
            **self._pipeline,
        )

    def _sum(self, reports: list[dict[str, torch.Tensor]]) -> dict[str, float]:
        """The micro batches' numbers together, the same on every rank."""
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        names = [list(reports[0]) if reports else []]
        group = parallel_state.get_pipeline_model_parallel_group()
        if group.size() > 1:
            dist.broadcast_object_list(names, src=last, group=group)
        found = {}
        for is_max, operation in ((False, dist.ReduceOp.SUM), (True, dist.ReduceOp.MAX)):
            chosen = [name for name in names[0] if name.startswith("max/") == is_max]
            if not chosen:
                continue
            numbers = torch.zeros(len(reports), len(chosen), dtype=torch.float64, device=runtime.device())
            if not reports:
                numbers = numbers.new_full((1, len(chosen)), -math.inf if is_max else 0)
            for row, report in zip(numbers, reports):
                row.copy_(torch.stack([report[name].double() for name in chosen]))
            total = numbers.amax(0) if is_max else numbers.sum(0)
            dist.all_reduce(total, operation, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
            dist.all_reduce(total, operation, group=group)  # only the last stage has any
            found |= dict(zip(chosen, total.tolist()))
        return found

    def _cut(self, batch: Batch) -> Batch:
        """This context rank's part of a row."""
        size = self._layout.context_parallel_size
        if size == 1:
            return batch
        parts = shares(batch.bounds, size, self._layout.tensor_model_parallel_size)
        return batch.cut(parts[parallel_state.get_context_parallel_rank()], pad_id=0)

    def _finalize(self, model, num_tokens=None, **kwargs) -> None:
        self.expert_load = self._measure_expert_load()
        finalize_model_grads(model, None, **kwargs)

    def _measure_expert_load(self) -> torch.Tensor:
        """Tokens of every expert over the layer's mean, float32 [MoE layers, MTP's last, E], on the host, the same on every rank."""
        spec = self.module.spec
        num_layers = spec.num_layers - spec.num_dense_layers
        counts = torch.zeros(num_layers + self.num_predictions - 1, spec.num_moe_experts, device=runtime.device())
        for chunk in self._wrapped:
            for name, router in chunk.named_modules():
                if isinstance(router, Router):
                    # a GPT layer is two of megatron's, numbered from 1
                    own = num_layers if "mtp." in name else router.layer_number // 2 - 1 - spec.num_dense_layers
                    counts[own] += router.local_tokens_per_expert
        dist.all_reduce(counts, group=parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True))
        dist.all_reduce(counts, group=parallel_state.get_pipeline_model_parallel_group())
        return (counts / counts.mean(1, keepdim=True).clamp(min=1e-9)).cpu()

    def _filled_share(self, num_microbatches: int, num_filled: int) -> float:
        """The share of all data ranks' micro batches that hold samples; 1 where none does, as then there is no loss."""
        if not (self.has_aux_loss or self.has_z_loss):
            return 1.0
        count = torch.tensor(num_filled, dtype=torch.float64, device=runtime.device())
        dist.all_reduce(count, group=parallel_state.get_data_parallel_group())
        return float(count) / (num_microbatches * self.data_parallel_size) or 1.0

    def _router_losses(self, num_microbatches: float) -> dict[str, float]:
        """num_microbatches: of one rank those that hold samples, a mean over the ranks."""
        names = {"aux_loss": "load_balancing_loss"} if self.has_aux_loss else {}
        names |= {"z_loss": "z_loss"} if self.has_z_loss else {}
        spec, found, tracker = self.module.spec, {}, get_moe_metrics_tracker()
        for name in names.values():  # a stage without experts has recorded nothing, and takes part in every sum
            tracker.ensure_initialized(name, self.config.num_layers + (self.config.mtp_num_layers or 0))
            tracker.metrics[name].reduce_group = parallel_state.get_tensor_and_context_parallel_group()
        tracker.report(  # all at once: it forgets every loss afterwards
            loss_scale=1 / num_microbatches,
            iteration=0,
            track_names=list(names.values()),
            num_layers=self.config.num_layers,
            moe_layer_freq=[int(spec.is_moe(layer)) for layer in range(spec.num_layers)],
            mtp_num_layers=self.config.mtp_num_layers,
            total_loss_dict=found,
        )
        return {ours: float(found[theirs]) for ours, theirs in names.items()}


def _forward_step(objective: Objective, parts: int, routers: dict[int, list[Router]], batches, model):
    batch: Batch = next(batches)
    counted = [index.to(runtime.device(), non_blocking=True) for index in batch.counted]
    batch = batch.to(runtime.device())
    if batch.routes is not None:
        for router in routers[id(model)]:
            router.router_replay.expect(batch.routes[router.layer_number])
    row = batch.tokens, batch.positions, batch.bounds, batch.labels, batch.num_padding, batch.share
    output = model(*row, counted=counted)
    return output, partial(_loss, objective, parts, batch)


def _loss(objective: Objective, parts: int, batch: Batch, losses: torch.Tensor):
    loss, numbers = objective(batch, losses)
    return loss * parts, numbers


def _weighted_mean(scales: torch.Tensor, num_channels: int, batch: Batch, losses: torch.Tensor):
    """Supervised training: the weighted sum of each prediction's cross entropies, scaled to a mean."""
    weighted = losses * batch.weights
    sums = weighted.sum(dim=1)
    numbers = {str(number): value for number, value in enumerate(sums.detach())}
    for channel in range(num_channels):
        numbers[f"channel/{channel}"] = weighted[0].detach()[batch.along["channel"] == channel].sum()
    return (sums * scales).sum(), numbers


def _losses(sums: dict[str, float], denominators: list[float]) -> list[float]:
    return [sums[str(number)] / max(d, 1e-30) for number, d in enumerate(denominators)]


def _keep(batch: Batch, losses: torch.Tensor):
    return losses.sum(), {"kept": -losses[0]}
