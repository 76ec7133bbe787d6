"""Seconds of a step: matrix work, attention, memory traffic, wires, the pipeline's bubble, the optimizer. An estimate.

A layer costs its matrix products and attention at the measured rates, and a remainder (norms, rope, permutation, SwiGLU,
launches) that grows with tokens · hidden size; the remainder is what is left of the measured layer in rates.py.
"""

from dataclasses import dataclass
from functools import cache

from glm45_tune.layout import Layout
from glm45_tune.plan import rates
from glm45_tune.plan.cards import CARDS, Card
from glm45_tune.plan.memory import Model, StageMemory
from glm45_tune.plan.models import find_spec
from glm45_tune.plan.weights import attention, mlp
from glm45_tune.recipe import Recipe

_REFERENCE = {
    "model": {"path": "GLM-4.5-Air"},
    "data": {"train": "none", "seq_length": rates.TOKENS},
    "lora": {"r": 32, "lora_alpha": 64},
    "train": {"steps": 1, "global_batch_size": 1},
    "output_dir": "none",
}


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of one optimizer step on the slowest stage."""

    compute: float
    wires: float
    bubble: float
    optimizer: float
    tokens: int

    @property
    def total(self) -> float:
        return self.compute + self.wires + self.bubble + self.optimizer

    @property
    def bubble_share(self) -> float:
        return self.bubble / self.total


class _Layer:
    """Work of one layer for one micro batch on one rank: FLOP of matrices (forward, backward) and of attention."""

    def __init__(self, model: Model, is_moe: bool, document_tokens: float):
        sizes, spec = model.sizes, model.spec
        self.forward = self.backward = 0.0
        lora = model.recipe.lora
        for matrix in (*attention(spec, model.layout), *mlp(spec, model.layout, is_moe)):
            rows = sizes.expert_rows if matrix.is_expert else sizes.tokens
            work = 2.0 * rows * matrix.inputs * matrix.outputs
            narrow = 2.0 * rows * (lora.r if lora else 0) * (matrix.inputs + matrix.outputs) * sizes.pairs(matrix.name)
            self.forward += work + narrow
            self.backward += work * (2 if lora is None else 1) + 2 * narrow
        # causal: half of every document's square, QK^T and PV
        self.attention = 2.0 * sizes.tokens * document_tokens * spec.query_size / sizes.tp
        self.traffic = sizes.cut_tokens * spec.hidden_size * sizes.d


@cache
def _remainders() -> tuple[float, float]:
    """Seconds on the measured card per byte of a layer's input (tokens · hidden · bytes): forward + backward, forward alone."""
    spec, _ = find_spec("GLM-4.5-Air")
    layer = _Layer(Model(spec, Layout(), Recipe.from_dict(_REFERENCE)), True, rates.DOCUMENT_TOKENS)
    card = CARDS[rates.MEASURED_CARD]
    both = rates.LAYER_MS / 1e3 - _known(layer, card, True, True)
    forward = (rates.LAYER_RECOMPUTED_MS - rates.LAYER_MS) / 1e3 - _known(layer, card, True, False)
    return both / layer.traffic, max(forward, 0.0) / layer.traffic


def _known(layer: _Layer, card: Card, forward: bool, backward: bool) -> float:
    """Seconds of the matrix products and the attention of a layer."""
    scale = card.tflops / CARDS[rates.MEASURED_CARD].tflops * 1e12
    seconds = 0.0
    if forward:
        seconds += layer.forward / (rates.MATRIX_TFLOPS * scale)
        seconds += layer.attention / (rates.ATTENTION_FORWARD_TFLOPS * scale)
    if backward:
        seconds += layer.backward / (rates.MATRIX_TFLOPS * scale)
        seconds += 2.5 * layer.attention / (rates.ATTENTION_BACKWARD_TFLOPS * scale)
    return seconds


def _layer_seconds(layer: _Layer, card: Card, again: bool) -> float:
    both, forward = _remainders()
    slower = CARDS[rates.MEASURED_CARD].bandwidth_gb_s / card.bandwidth_gb_s
    seconds = _known(layer, card, True, True) + both * layer.traffic * slower
    if again:
        seconds += _known(layer, card, True, False) + forward * layer.traffic * slower
    return seconds


def step_seconds(
    model: Model, stages: list[StageMemory], card: Card, document_tokens: float, gpus_per_node: int = 8
) -> StepTime:
    """One optimizer step with documents of `document_tokens` (mean over tokens); `stages` say what is recomputed."""
    layers = {moe: _Layer(model, moe, document_tokens) for moe in (False, True)}
    cost = {(moe, again): _layer_seconds(layers[moe], card, again) for moe in (False, True) for again in (False, True)}
    wire = {again: _wire_seconds(model, card, again, gpus_per_node) for again in (False, True)}
    worst_compute = worst_wires = 0.0
    for stage in stages:
        kinds = model.layers(stage.stage)
        compute = sum(cost[moe, again] for moe, again in zip(kinds, stage.recompute))
        wires = sum(wire[again][0] + moe * wire[again][1] for moe, again in zip(kinds, stage.recompute))
        if stage.stage == len(model.stages) - 1:
            compute += _head_seconds(model, card)
            if model.with_mtp:
                compute += model.spec.mtp_num_layers * (cost[True, False] + _head_seconds(model, card))
        if compute + wires > worst_compute + worst_wires:
            worst_compute, worst_wires = compute, wires
    rounds = model.num_microbatches
    idle = (worst_compute + worst_wires) * (len(stages) - 1)
    tokens = model.recipe.train.global_batch_size * model.recipe.data.seq_length
    return StepTime(
        worst_compute * rounds, worst_wires * rounds, idle, _optimizer_seconds(model, stages, card, gpus_per_node), tokens
    )


def _head_seconds(model: Model, card: Card) -> float:
    """Logits, their loss and the way back; a trained head has its own gradient."""
    sizes, spec = model.sizes, model.spec
    words = spec.vocab_size / sizes.tp
    work = 2.0 * sizes.tokens * spec.hidden_size * words * (2 if model.recipe.lora else 3)
    rate = rates.MATRIX_TFLOPS * 1e12 * card.tflops / CARDS[rates.MEASURED_CARD].tflops
    passes = 5 * sizes.tokens * words * 4  # logits written and read, softmax, its gradient
    return work / rate + passes / (card.bandwidth_gb_s * 1e9 * rates.STREAM_SHARE)


def _wire(size: float, ranks: int, spread: int, card: Card, gpus_per_node: int) -> float:
    """Seconds in which every one of `ranks` sends its share of `size` bytes to the others; `spread`: ranks from first to last."""
    if ranks == 1:
        return 0.0
    inside = max(1, ranks * min(gpus_per_node, spread) // spread)
    near = size * (inside - 1) / ranks / (card.link_gb_s / 2 * 1e9 * rates.LINK_SHARE)
    far = size * (ranks - inside) / ranks / (card.node_link_gb_s * 1e9 * rates.NODE_LINK_SHARE)
    return near + far


def _wire_seconds(model: Model, card: Card, again: bool, gpus_per_node: int) -> tuple[float, float]:
    """(of every layer: tensor parallel; of one with experts besides: dispatch and combine) for one micro batch."""
    layout, sizes = model.layout, model.sizes
    hidden = sizes.tokens * model.spec.hidden_size * sizes.d
    passes = 3 if again else 2
    tensor = 4 * passes / 2 * 2 * _wire(hidden, sizes.tp, sizes.tp, card, gpus_per_node) / 2
    rows = sizes.expert_rows * model.spec.hidden_size * sizes.d
    experts = layout.expert_model_parallel_size * layout.expert_tensor_parallel_size
    return tensor, 2 * passes * _wire(rows, experts, experts, card, gpus_per_node)


def _optimizer_seconds(model: Model, stages: list[StageMemory], card: Card, gpus_per_node: int) -> float:
    """Adam's passes over its state, gradients reduced and weights gathered over the data-parallel ranks."""
    most = max(stages, key=lambda stage: stage.gradients)
    passes = 3 * most.optimizer + 2 * most.gradients
    stream = passes / (card.bandwidth_gb_s * 1e9 * rates.STREAM_SHARE)
    layout = model.layout
    counted = model.weights(most.stage)
    lora = model.recipe.lora is not None
    dense, expert = (counted.lora_dense, counted.lora_expert) if lora else (counted.dense, counted.expert)
    ranks = layout.world_size // layout.pipeline_model_parallel_size
    size = 4.0 + model.sizes.d  # fp32 gradients one way, weights the other
    dense_wire = _wire(dense * size, layout.data_parallel_size, ranks, card, gpus_per_node)
    copies = layout.world_size // layout.expert_ranks
    return stream + dense_wire + _wire(expert * size, copies, ranks, card, gpus_per_node)
