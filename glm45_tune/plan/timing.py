"""Seconds of a step: matrix work, attention, memory traffic, wires, the pipeline's bubble, the optimizer. An estimate.

A layer costs its matrix products and attention at the measured rates, the memory that LoRA's narrow products move, and a remainder
(norms, rope, permutation, SwiGLU, launches) that grows with tokens · hidden size: what is left of the measured layer in rates.py.
"""

from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np

from glm45_tune.layout import Layout
from glm45_tune.plan import rates
from glm45_tune.plan.cards import CARDS, Card
from glm45_tune.plan.memory import Model, StageMemory
from glm45_tune.plan.models import find_spec
from glm45_tune.plan.weights import attention, mlp
from glm45_tune.recipe import Recipe
from glm45_tune.spec import ModelSpec

_REFERENCE = {
    "model": {"path": "GLM-4.5-Air"},
    "data": {"train": "none", "seq_length": rates.TOKENS},
    "lora": {"r": 32, "lora_alpha": 64},
    "train": {"steps": 1, "global_batch_size": 1},
    "output_dir": "none",
}


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of one optimizer step on the slowest stage, by what they go to."""

    matrices: float
    attention: float
    other: float
    """Norms, rope, permutation, SwiGLU, LoRA's narrow products, launches."""
    wires: float
    bubble: float
    optimizer: float
    tokens: int

    @property
    def parts(self) -> dict[str, float]:
        names = ("matrices", "attention", "other", "wires", "bubble", "optimizer")
        return {name: getattr(self, name) for name in names}

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    @property
    def bubble_share(self) -> float:
        return self.bubble / self.total


class _Layer:
    """Work of one layer for one micro batch on one rank: FLOP of matrices (forward, backward) and of attention; bytes of LoRA."""

    def __init__(self, model: Model, is_moe: bool, document_tokens: float):
        sizes, spec = model.sizes, model.spec
        self.forward = self.backward = self.again = self.whole_again = 0.0
        self.lora_forward = self.lora_backward = 0.0
        lora, train = model.recipe.lora, model.recipe.train
        # each half is run again by itself, or both together, and the output of what runs again is left out
        together = train.recompute_granularity == "full" and train.recompute_method == "uniform"
        unread = ("linear_fc2",) if together else ("linear_fc2", "linear_proj")
        for matrix in (*attention(spec, model.layout), *mlp(spec, model.layout, is_moe)):
            rows = sizes.expert_rows if matrix.is_expert else sizes.tokens
            work = 2.0 * rows * matrix.inputs * matrix.outputs
            narrow = 2.0 * rows * (lora.r if lora else 0) * (matrix.inputs + matrix.outputs) * sizes.pairs(matrix.name)
            self.forward += work + narrow
            half = "attention" if matrix.name.startswith("self_attention") else "moe" if is_moe else "mlp"
            self.again += (
                (work + narrow) * sizes.again(half) * (not matrix.name.endswith(("linear_fc2", "linear_proj")))
            )
            self.whole_again += (work + narrow) * (not matrix.name.endswith(unread))
            self.backward += work * (2 if lora is None else 1) + 2 * narrow
            if narrow:
                # inputs and outputs read for the four narrow products; the pair's two wide ones summed into what is there; an
                # expert's inputs are written again
                again = 4 if matrix.is_expert else 3
                self.lora_forward += rows * sizes.d * (matrix.inputs + 2 * matrix.outputs)
                self.lora_backward += rows * sizes.d * (2 * matrix.outputs + again * matrix.inputs)
        # causal: half of every document's square, QK^T and PV
        self.attention = 2.0 * sizes.tokens * document_tokens * spec.query_size / sizes.tp
        # what attention takes of every token, however short its document, in units of the measured row
        self.attended = sizes.tokens * spec.query_size / sizes.tp / (rates.TOKENS * rates.ATTENTION_QUERY_SIZE)
        self.attends_again = sizes.again("core_attn") or sizes.again("attention")
        self.traffic = sizes.cut_tokens * spec.hidden_size * sizes.d
        self.matrix_tflops = rates.FP8_TFLOPS if sizes.by_fp8 else rates.MATRIX_TFLOPS
        # bytes moved for the sake of FP8 weights: turned for backward, or cast each time
        size = sum(matrix.size for matrix in (*attention(spec, model.layout), *mlp(spec, model.layout, is_moe)))
        casts = sizes.in_fp8 and not sizes.by_fp8
        turns = sizes.by_fp8 and not model.recipe.model.frozen_turned
        self.frozen_forward, self.frozen_backward = 3 * size * casts, 3 * size * casts + 2 * size * turns


@cache
def _remainders() -> tuple[float, float]:
    """Seconds on the measured card per byte of a layer's input (tokens · hidden · bytes): forward + backward, forward alone."""
    spec, _ = find_spec("GLM-4.5-Air")
    layer = _Layer(Model(spec, Layout(), Recipe.from_dict(_REFERENCE)), True, rates.DOCUMENT_TOKENS)
    card = CARDS[rates.MEASURED_CARD]
    lora = _streamed(layer.lora_forward + layer.lora_backward, card)
    both = rates.LAYER_MS / 1e3 - sum(_known(layer, card, True, True)) - lora
    return both / layer.traffic, rates.FORWARD_SHARE * both / layer.traffic


def _known(layer: _Layer, card: Card, forward: bool, backward: bool) -> tuple[float, float]:
    """Seconds of the matrix products and of the attention of a layer."""
    scale = card.tflops / CARDS[rates.MEASURED_CARD].tflops * 1e12
    matrices = (forward * layer.forward + backward * layer.backward) / (layer.matrix_tflops * scale)
    attended = forward * _attention_seconds(layer, card) + backward * (
        2.5 * layer.attention / (rates.ATTENTION_BACKWARD_TFLOPS * scale)
        + _passed(layer, card, rates.ATTENTION_BACKWARD_MS)
    )
    return matrices, attended


def _attention_seconds(layer: _Layer, card: Card) -> float:
    """Seconds of a layer's attention forward."""
    scale = card.tflops / CARDS[rates.MEASURED_CARD].tflops * 1e12
    work = layer.attention / (rates.ATTENTION_FORWARD_TFLOPS * scale)
    return work + _passed(layer, card, rates.ATTENTION_FORWARD_MS)


def _passed(layer: _Layer, card: Card, milliseconds: float) -> float:
    """Seconds of what the measured row took so many milliseconds for, by its memory traffic."""
    return layer.attended * milliseconds / 1e3 * CARDS[rates.MEASURED_CARD].bandwidth_gb_s / card.bandwidth_gb_s


def _streamed(size: float, card: Card) -> float:
    """Seconds in which so many bytes pass through a card's memory."""
    return size / (card.bandwidth_gb_s * 1e9 * rates.STREAM_SHARE)


def _layer_seconds(layer: _Layer, card: Card, again: bool) -> np.ndarray:
    """Seconds of matrices, attention and the rest of one layer, forward and backward, and forward again."""
    both, forward = _remainders()
    slower = CARDS[rates.MEASURED_CARD].bandwidth_gb_s / card.bandwidth_gb_s
    moved = _streamed(layer.lora_forward + layer.lora_backward + layer.frozen_forward + layer.frozen_backward, card)
    seconds = np.array([*_known(layer, card, True, True), both * layer.traffic * slower + moved])
    if not again:  # what selective recompute does inside the layer
        scale = card.tflops / CARDS[rates.MEASURED_CARD].tflops * 1e12
        matrices = layer.again / (layer.matrix_tflops * scale)
        moved = _streamed(layer.lora_forward + layer.frozen_forward, card)
        rest = (forward * layer.traffic * slower + moved) * layer.again / layer.forward
        seconds += [matrices, layer.attends_again * _attention_seconds(layer, card), rest]
    else:
        matrices, attended = _known(layer, card, True, False)
        share = layer.whole_again / layer.forward
        moved = _streamed(layer.lora_forward + layer.frozen_forward, card) * share
        seconds += [matrices * share, attended, forward * layer.traffic * slower + moved]
    return seconds


def step_seconds(
    model: Model, stages: list[StageMemory], card: Card, document_tokens: float, gpus_per_node: int = 8
) -> StepTime:
    """One optimizer step with documents of `document_tokens` (mean over tokens); `stages` say what is recomputed."""
    layers = {moe: _Layer(model, moe, document_tokens) for moe in (False, True)}
    wire = {again: _wire_seconds(model, card, again, gpus_per_node) for again in (False, True)}
    cost = {}
    for moe, again in product((False, True), (False, True)):
        wires = wire[again][0] + moe * wire[again][1]
        cost[moe, again] = np.append(_layer_seconds(layers[moe], card, again), wires)
    # preference tuning runs the reference forward besides: the base, its adapter off
    preference = getattr(model.recipe, "preference", None)
    looks_back = bool(preference and preference.reference == "adapter_off")
    reference = {moe: looks_back * (cost[moe, True] - cost[moe, False]) for moe in (False, True)}
    worst = np.zeros(4)
    for stage in stages:
        kinds = model.layers(stage.stage)
        seconds = sum(cost[kind] for kind in zip(kinds, stage.recompute)) + sum(reference[moe] for moe in kinds)
        if stage.stage == len(model.stages) - 1:
            predictions = 1 + (model.spec.mtp_num_layers if model.with_mtp else 0)
            seconds = seconds + (predictions - 1) * cost[True, False]
            seconds = seconds + predictions * np.array([*_head_seconds(model, card), 0.0])
        worst = max(worst, seconds, key=np.sum)
    matrices, attended, other, wires = (worst * model.num_microbatches).tolist()
    tokens = model.recipe.train.global_batch_size * model.recipe.data.seq_length
    idle = float(worst.sum()) * (len(stages) - 1) / model.interleaved
    optimizer = _optimizer_seconds(model, stages, card, gpus_per_node)
    return StepTime(matrices, attended, other, wires, idle, optimizer, tokens)


def _head_work(model: Model) -> float:
    """FLOP of logits and the way back, for one prediction; a trained head has its own gradient."""
    sizes, spec = model.sizes, model.spec
    return 2.0 * sizes.tokens * spec.hidden_size * spec.vocab_size / sizes.tp * (2 if model.recipe.lora else 3)


@dataclass(frozen=True, slots=True)
class Work:
    """FLOP of training, whatever is recomputed.

    Of every token's layers, of its predictions (where they count, else no head runs), and of every
    square of a document's length.
    """

    per_token: float
    per_counted: float
    per_square: float

    def of(self, lengths: list[int], counted: int) -> float:
        """FLOP of one step over documents of these lengths, of whose tokens that many are trained on."""
        squares = sum(length**2 for length in lengths)
        return self.per_token * sum(lengths) + self.per_counted * counted + self.per_square * squares


def work(spec: ModelSpec, recipe: Recipe) -> Work:
    """What `step_seconds` counts as matrices and attention, for one token on one rank."""
    model = Model(spec, Layout(), recipe)
    num_mtp = spec.mtp_num_layers if model.with_mtp else 0
    counts = {False: spec.num_dense_layers, True: spec.num_layers - spec.num_dense_layers + num_mtp}
    layers = {moe: _Layer(model, moe, 1.0) for moe in counts}
    matrices = sum(count * (layers[moe].forward + layers[moe].backward) for moe, count in counts.items())
    attended = sum(count * 3.5 * layers[moe].attention for moe, count in counts.items())
    tokens = model.sizes.tokens
    return Work(matrices / tokens, (1 + num_mtp) * _head_work(model) / tokens, attended / tokens)


def _head_seconds(model: Model, card: Card) -> tuple[float, float, float]:
    """Logits, their loss and the way back."""
    sizes, spec = model.sizes, model.spec
    words, work = spec.vocab_size / sizes.tp, _head_work(model)
    rate = rates.MATRIX_TFLOPS * 1e12 * card.tflops / CARDS[rates.MEASURED_CARD].tflops
    passes = 5 * sizes.tokens * words * 4  # logits written and read, softmax, its gradient
    return work / rate, 0.0, _streamed(passes, card)


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
    # attention and MLP: a gather and a scatter each, forward, backward and the gathers again
    tensor = (10 if again else 8) * _wire(hidden, sizes.tp, sizes.tp, card, gpus_per_node)
    rows = sizes.travelling_rows * model.spec.hidden_size * sizes.d
    experts = layout.expert_model_parallel_size * layout.expert_tensor_parallel_size
    wire, wait = _wire(rows, experts, experts, card, gpus_per_node), (experts > 1) * rates.EXCHANGE_SECONDS
    dispatches = 2 if again or sizes.again("moe") else 1
    # dispatch, combine and the ways back; dispatched rows take a byte a number where they travel in FP8
    return tensor, (dispatches * (1 / sizes.d if sizes.sends_fp8 else 1) + 3) * wire + (dispatches + 3) * wait


def _optimizer_seconds(model: Model, stages: list[StageMemory], card: Card, gpus_per_node: int) -> float:
    """Adam's passes over its state, gradients reduced and weights gathered over the data-parallel ranks."""
    most = max(stages, key=lambda stage: stage.gradients)
    # torch's AdamW, one operation after the other, reads and writes 20 words a weight where its state is 3. Of the gradient: zeros
    # written 1, a product's half word written and read 1, the sum read and written 2, measured 1, clipped 2; the weight read and
    # written as half a word 1.5
    passes = 20 / 3 * most.optimizer + 8.5 * most.gradients
    stream = _streamed(passes, card)
    layout = model.layout
    counted = model.weights(most.stage)
    lora = model.recipe.lora is not None
    dense, expert = (counted.lora_dense, counted.lora_expert) if lora else (counted.dense, counted.expert)
    ranks = layout.world_size // layout.pipeline_model_parallel_size
    size = 4.0 + model.sizes.d  # fp32 gradients one way, weights the other
    dense_wire = _wire(dense * size, ranks // layout.tensor_model_parallel_size, ranks, card, gpus_per_node)
    copies = layout.world_size // layout.expert_ranks
    return stream + dense_wire + _wire(expert * size, copies, ranks, card, gpus_per_node)
