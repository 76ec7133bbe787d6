"""Memory of every rank, stage by stage: what is always there, what backward holds at its worst moment, what still fits."""

from dataclasses import dataclass, field, replace

from glm45_tune.layout import Layout
from glm45_tune.plan import activations as acts
from glm45_tune.plan.activations import DTYPE_BYTES, Sizes, total
from glm45_tune.plan.weights import Weights, attention, ends_weights, layer_weights, mlp
from glm45_tune.recipe import Recipe
from glm45_tune.spec import ModelSpec

GIB = 2**30
# CUDA's context, NCCL's buffers and libraries' workspaces, outside the allocator: as on two H200 with expert parallel 2
# (docs/numbers.md). NCCL takes more for every further set of ranks that speak together.
OUTSIDE_GIB = 2.4
# an assumption: share of what comes and goes (activations, working memory) that the allocator cannot use again
FRAGMENTATION = 0.06
# weights that an Adam with small or offloaded state updates at once (mcore/adam.py)
PIECE = 2**26


def margin_bytes(coming_and_going: float) -> float:
    """What must stay free beside the allocator's peak."""
    return OUTSIDE_GIB * GIB + FRAGMENTATION * coming_and_going


@dataclass(frozen=True)
class StageMemory:
    """One rank of a pipeline stage, in bytes. `recompute`: for each of its layers whether backward computes it again."""

    stage: int
    num_layers: int
    weights: float
    lora: float
    gradients: float
    optimizer: float
    activations: float
    """Kept for backward, all micro batches in flight."""
    working: float
    """Beside them at the worst moment of backward: a layer computed again, gradients on their way, logits."""
    worst: str
    """Where that moment is: the head, or a layer; or `optimizer` when Adam's own buffers exceed backward."""
    logits: float
    wire: float
    optimizer_working: float
    in_flight: float
    recompute: tuple[bool, ...] = field(repr=False)

    @property
    def standing(self) -> float:
        return self.weights + self.lora + self.gradients + self.optimizer

    @property
    def peak(self) -> float:
        """What the allocator's peak should read."""
        return self.standing + max(self.activations + self.working, self.optimizer_working)

    @property
    def margin(self) -> float:
        return margin_bytes(self.peak - self.standing)

    @property
    def needed(self) -> float:
        return self.peak + self.margin


@dataclass(frozen=True, slots=True)
class Recompute:
    """What backward computes again. layers: of a stage, whether; run: so many whole layers at a time, or 0: half a layer."""

    layers: tuple[bool, ...]
    run: int = 0


class Model:
    """The arithmetic of one recipe under one layout; layers of a kind are counted once."""

    def __init__(self, spec: ModelSpec, layout: Layout, recipe: Recipe):
        self.spec, self.layout, self.recipe = spec, layout, recipe
        self.sizes = Sizes(spec, layout, recipe)
        self.with_mtp = recipe.model.mtp_loss_scaling_factor > 0 and spec.mtp_num_layers > 0
        self.segments = layout.stage_layers(spec, self.with_mtp)
        pp = layout.pipeline_model_parallel_size
        self.stages = [sum(self.segments[stage::pp]) for stage in range(pp)]
        self._weights = {moe: layer_weights(spec, layout, recipe.lora, moe) for moe in (False, True)}
        kept, whole = self._halves(self.sizes), self._halves(replace(self.sizes, is_whole=True))
        self._kept = {moe: sum(parts) for moe, parts in kept.items()}
        self._whole = {moe: sum(parts) for moe, parts in whole.items()}
        self._half = {moe: max(parts) for moe, parts in whole.items()}
        # what backward rebuilds inside a layer that is not recomputed whole: one half at a time
        self._inside = {moe: max(w - k for w, k in zip(whole[moe], kept[moe])) for moe in (False, True)}
        self._working = {moe: total(acts.layer_working(self.sizes, moe)) for moe in (False, True)}
        self._input = self.sizes.hidden

    @staticmethod
    def _halves(sizes: Sizes) -> dict[bool, tuple[int, int]]:
        """With experts or not → bytes that attention and MLP keep."""
        return {moe: (total(acts.attention_terms(sizes)), total(acts.mlp_terms(sizes, moe))) for moe in (False, True)}

    @property
    def num_microbatches(self) -> int:
        """Of an optimizer step, on one data-parallel rank. In reinforcement learning each completion is taken to fill a row."""
        rows, train = self.recipe.train.global_batch_size, self.recipe.train
        if rl := getattr(self.recipe, "rl", None):
            rows = rows * rl.group_size // rl.updates_per_rollout
        return max(1, rows // (train.micro_batch_size * self.layout.data_parallel_size))

    @property
    def interleaved(self) -> int:
        """Runs of layers a stage holds: 1, or its virtual stages."""
        return len(self.segments) // len(self.stages)

    def layers(self, stage: int) -> list[bool]:
        """For each layer of a stage whether it has experts."""
        firsts = [sum(self.segments[:segment]) for segment in range(len(self.segments))]
        mine = range(stage, len(self.segments), len(self.stages))
        return [self.spec.is_moe(firsts[s] + n) for s in mine for n in range(self.segments[s])]

    def weights(self, stage: int) -> Weights:
        kinds = self.layers(stage)
        counted = self._weights[True] * sum(kinds) + self._weights[False] * (len(kinds) - sum(kinds))
        if self.with_mtp and stage == len(self.stages) - 1:
            counted += self._weights[True] * self.spec.mtp_num_layers
        return counted + ends_weights(self.spec, self.layout, stage == 0, stage == len(self.stages) - 1, self.with_mtp)

    def in_flight(self, stage: int) -> float:
        """Micro batches whose activations a stage holds at once under 1F1B; parts of one where stages are interleaved."""
        behind = len(self.stages) - stage - 1
        if self.interleaved == 1:
            return min(self.num_microbatches, behind + 1)
        runs = 2 * behind + (self.interleaved - 1) * len(self.stages) + 1
        return min(self.num_microbatches, runs / self.interleaved)

    def groups(self, stage: int, recompute: "Recompute") -> list[tuple[int, int, int]]:
        """Runs of layers that backward treats as one: (bytes kept, bytes rebuilt when their turn comes, worst working)."""
        kinds, found = self.layers(stage), []
        size = recompute.run or 1
        for first in range(0, len(kinds), size):
            run = kinds[first : first + size]
            working = max(self._working[moe] for moe in run)
            if not recompute.layers[first]:
                found.append((self._kept[run[0]], self._inside[run[0]], working))
            elif recompute.run:
                found.append((self._input, sum(self._whole[moe] for moe in run), working))
            else:
                found.append((2 * self._input, self._half[run[0]], working))
        return found

    def by_recipe(self, stage: int) -> "Recompute":
        """What the recipe has computed again (megatron's meaning of full, uniform and block, which counts in every segment)."""
        train, count = self.recipe.train, self.stages[stage]
        if train.recompute_granularity != "full":
            return Recompute((False,) * count)
        if train.recompute_method == "uniform":
            return Recompute((True,) * count, train.recompute_num_layers)
        return self.first_layers(stage, train.recompute_num_layers)

    def first_layers(self, stage: int, again: int) -> "Recompute":
        """Of each of a stage's segments the first layers: their turn in backward comes when the others' activations are gone."""
        sizes = self.segments[stage :: len(self.stages)]
        return Recompute(tuple(n < again for size in sizes for n in range(size)))

    def memory(self, stage: int, recompute: Recompute) -> StageMemory:
        counted, d = self.weights(stage), self.sizes.d
        is_last = stage == len(self.stages) - 1
        kept, working, worst = self._backward(stage, recompute, is_last)
        gradients, optimizer, adam = self._optimizer(counted)
        adapters = counted.lora_dense + counted.lora_expert
        standing_working = kept + working
        return StageMemory(
            stage=stage,
            num_layers=self.stages[stage],
            weights=self._base_bytes(counted),
            lora=adapters * d,
            gradients=gradients,
            optimizer=optimizer,
            activations=kept,
            working=working,
            worst=worst if standing_working >= adam else "optimizer",
            logits=total(acts.head_working(self.sizes)) if is_last else 0,
            wire=self._wire(stage),
            optimizer_working=adam,
            in_flight=self.in_flight(stage),
            recompute=recompute.layers,
        )

    def _base_bytes(self, counted: Weights) -> float:
        """The base as it is kept: of FP8 matrices a byte a weight and four a channel, and their transposes where they are kept."""
        base, d = counted.dense + counted.expert, self.sizes.d
        if not self.sizes.in_fp8:
            return base * d
        copies = 2 if self.sizes.by_fp8 and self.recipe.model.frozen_turned else 1
        return (base - counted.matrices) * d + copies * counted.matrices + 4 * counted.channels

    def _converted(self) -> float:
        """Bytes of one FP8 matrix at a time in the form that a product wants: turned, or cast."""
        if not self.sizes.in_fp8 or (self.sizes.by_fp8 and self.recipe.model.frozen_turned):
            return 0.0
        spec, layout = self.spec, self.layout
        matrices = (*attention(spec, layout), *mlp(spec, layout, True), *mlp(spec, layout, False))
        return max(matrix.size for matrix in matrices) * (1 if self.sizes.by_fp8 else self.sizes.d)

    def _wire(self, stage: int) -> float:
        """Bytes of the rows that a dispatch sends: as many again arrive."""
        if not (self.sizes.travels and any(self.layers(stage))):
            return 0.0
        return 2.0 * self.sizes.travelling_rows * self.spec.hidden_size * self.sizes.d

    def _backward(self, stage: int, recompute: Recompute, is_last: bool) -> tuple[float, float, str]:
        """(kept by all micro batches in flight, the most that is alive beside it in backward, where)."""
        groups = self.groups(stage, recompute)
        one = total(acts.row_terms(self.sizes)) + sum(kept for kept, _, _ in groups)
        worst, where = 0.0, "layer"
        if is_last:
            predictions = 1 + (self.spec.mtp_num_layers if self.with_mtp else 0)
            one += predictions * total(acts.head_terms(self.sizes))
            if self.with_mtp:
                one += self.spec.mtp_num_layers * (self._whole[True] + total(acts.mtp_terms(self.sizes)))
            worst, where = total(acts.head_working(self.sizes)), "head"
        freed = 0.0  # of this micro batch, by the layers behind whose backward is done
        for kept, rebuilt, working in reversed(groups):
            if rebuilt + working - freed > worst:
                worst, where = rebuilt + working - freed, "layer"
            freed += kept
        return one * self.in_flight(stage), worst + self._converted(), where

    def _optimizer(self, counted: Weights) -> tuple[float, float, float]:
        """(gradient buffers, optimizer state, what Adam's step holds for a moment), bytes of one rank.

        Master weights (of bf16 ones) and two moments are shared out over the ranks that hold the same weights.
        """
        layout, options = self.layout, self.recipe.optimizer
        dense, expert = counted.lora_dense, counted.lora_expert
        if self.recipe.lora is None:
            dense, expert = counted.dense, counted.expert
        copies = layout.world_size / (layout.tensor_model_parallel_size * layout.pipeline_model_parallel_size)
        shard = dense / copies + expert / (layout.world_size / layout.expert_ranks)
        master = 4 if self.sizes.d == DTYPE_BYTES["bf16"] else 0
        moments = [DTYPE_BYTES[getattr(options, name)] for name in ("exp_avg_dtype", "exp_avg_sq_dtype")]
        away = options.optimizer_offload_fraction
        gradient = DTYPE_BYTES[options.main_grads_dtype]
        working = 4.0 * shard  # torch's Adam takes the root of all second moments at once
        if away or min(moments) < 4:  # in pieces, offloaded masters all on the card
            working = min(shard, PIECE) * 5 * 4 + away * master * shard
        if gradient < 4:
            working += 4 * shard
        return gradient * (dense + expert), (master + sum(moments)) * shard * (1 - away), working

    def all_stages(self) -> list[StageMemory]:
        """Every stage as the recipe says."""
        return [self.memory(stage, self.by_recipe(stage)) for stage in range(len(self.stages))]

    def least(self, stage: int, free_bytes: float) -> int | None:
        """The fewest layers of a segment to compute again with which the stage needs no more than free_bytes; None: none will do."""
        low, high = 0, max(self.segments[stage :: len(self.stages)])

        def fits(again: int) -> bool:
            return self.memory(stage, self.first_layers(stage, again)).needed <= free_bytes

        if not fits(high):
            return None
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if fits(middle) else (middle + 1, high)
        return low

    def least_everywhere(self, free_bytes: float) -> int | None:
        """The fewest layers to compute again, the same number in every segment of every stage; None: none will do."""
        counts = [self.least(stage, free_bytes) for stage in range(len(self.stages))]
        if None in counts:
            return None
        return next(
            (again for again in range(max(counts), max(self.segments) + 1) if self._all_fit(again, free_bytes)), None
        )

    def _all_fit(self, again: int, free_bytes: float) -> bool:
        stages = range(len(self.stages))
        return all(self.memory(stage, self.first_layers(stage, again)).needed <= free_bytes for stage in stages)
