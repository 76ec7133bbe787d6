"""What a micro batch leaves on the card, tensor by tensor, between its forward and its backward. THE table of activations.

One Term is one tensor: its bytes on this rank, and what wants it. Nothing is kept for the sake of a frozen weight. Legend:
T tokens of a micro batch on this tensor group, S = T / tensor ranks (sequence parallel), N rows at this rank's experts (S · top-k ·
expert tensor ranks; routing is taken to be even), R those that travel to them, a token once for all its choices there, F an
expert's width here, d bytes of a number, h hidden size.
`*_terms` stay until backward comes to them; `*_working` live for a moment of it.
"""

import math
from dataclasses import dataclass

from glm45_tune.layout import Layout
from glm45_tune.recipe import Recipe
from glm45_tune.spec import ModelSpec

DTYPE_BYTES = {"bf16": 2, "fp32": 4}
# logits in memory at a time (mcore/layers/loss.py)
LOGITS_AT_ONCE = 2**27


@dataclass(frozen=True, slots=True)
class Term:
    """A tensor on one rank."""

    what: str
    bytes: int
    why: str


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the table needs to know of a run."""

    spec: ModelSpec
    layout: Layout
    recipe: Recipe
    is_whole: bool = False
    """Count a layer as it is when nothing inside it is left to be computed again."""

    @property
    def d(self) -> int:
        return DTYPE_BYTES[self.recipe.model.params_dtype]

    @property
    def tp(self) -> int:
        return self.layout.tensor_model_parallel_size

    @property
    def cp(self) -> int:
        return self.layout.context_parallel_size

    @property
    def tokens(self) -> int:
        """T: the tokens of this rank's micro batch."""
        return -(-self.recipe.train.micro_batch_size * self.recipe.data.seq_length // self.cp)

    @property
    def cut_tokens(self) -> int:
        """S: those that a tensor rank holds between its linears."""
        return -(-self.tokens // self.tp)

    @property
    def expert_rows(self) -> int:
        """N: the rows of this rank's experts, a token once for each choice."""
        return self.cut_tokens * self.spec.moe_router_topk * self.layout.expert_tensor_parallel_size

    @property
    def travelling_rows(self) -> int:
        """R, the rows that come to a rank's experts from all ranks.

        A token comes once, however many of its choices (taken for random) are there.
        """
        ranks = self.layout.expert_model_parallel_size
        each = ranks * (1 - (1 - 1 / ranks) ** self.spec.moe_router_topk)
        return math.ceil(self.cut_tokens * each) * self.layout.expert_tensor_parallel_size

    @property
    def expert_width(self) -> int:
        """F: the width of an expert on this rank."""
        return self.spec.moe_ffn_hidden_size // self.layout.expert_tensor_parallel_size

    @property
    def hidden(self) -> int:
        """Bytes of a hidden state as tensor ranks share it."""
        return self.cut_tokens * self.spec.hidden_size * self.d

    @property
    def norm_input(self) -> int:
        """Bytes that a norm keeps: its input, and one number a token."""
        return self.hidden + 4 * self.cut_tokens

    @property
    def gathered(self) -> int:
        """Bytes of a hidden state that every tensor rank holds whole."""
        return self.tokens * self.spec.hidden_size * self.d

    @property
    def travels(self) -> bool:
        """Whether rows come to the experts from other ranks."""
        return self.layout.expert_model_parallel_size * self.layout.expert_tensor_parallel_size > 1

    @property
    def is_full(self) -> bool:
        return self.recipe.lora is None

    @property
    def in_fp8(self) -> bool:
        """Whether the frozen matrices are kept in FP8."""
        return self.recipe.model.frozen_dtype == "fp8" and not self.is_full

    @property
    def by_fp8(self) -> bool:
        """Whether they are multiplied in FP8."""
        return self.in_fp8 and self.recipe.model.frozen_products != "bf16"

    @property
    def sends_fp8(self) -> bool:
        """Whether rows go to other ranks' experts in FP8."""
        return (
            self.by_fp8 and not self.learns("mlp.experts.linear_fc1") and self.layout.expert_tensor_parallel_size == 1
        )

    def rows_for(self, matrix: str, size: int) -> int:
        """Bytes of rows of `size` that this matrix is multiplied with: one a number in FP8, and theirs where an adapter wants them."""
        if not self.by_fp8:
            return size
        return size // self.d + size * self.learns(matrix)

    def pairs(self, matrix: str) -> int:
        """Low-rank pairs beside a matrix."""
        return 0 if self.is_full else len(self.recipe.lora.targets_of(matrix))

    def learns(self, matrix: str) -> bool:
        """Whether this matrix or its adapter wants a gradient, and so its input."""
        return self.is_full or self.pairs(matrix) > 0

    def again(self, module: str) -> bool:
        """Whether this part of a layer is computed again in backward: of selective, and of block and auto in the layers they leave."""
        train = self.recipe.train
        if self.is_whole or train.recompute_granularity is None:
            return False
        if train.recompute_granularity == "full" and train.recompute_method == "uniform":
            return False
        default = ["core_attn"] if train.recompute_granularity == "selective" else []
        return module in (train.recompute_modules or default)


def _terms(*rows: tuple[str, int, str, bool]) -> list[Term]:
    return [Term(what, size, why) for what, size, why, is_kept in rows if is_kept and size]


def _adapter(sizes: Sizes, matrix: str, rows: int, inputs: int) -> list[Term]:
    """Between A and B, and where the dropout fell."""
    pairs = sizes.pairs(matrix)
    if not pairs:
        return []
    lora = sizes.recipe.lora
    return _terms(
        (f"{matrix}: between A and B", rows * lora.r * pairs * sizes.d, "gradient of lora_B", True),
        (f"{matrix}: dropout's mask", rows * inputs, "gradient of lora_A", lora.lora_dropout > 0),
    )


def _input_of(sizes: Sizes, matrix: str) -> int:
    """Bytes of a column-parallel matrix's input where it learns: adapters keep it gathered, megatron's own linear cut."""
    return sizes.hidden if sizes.is_full else sizes.gathered


def attention_terms(sizes: Sizes) -> list[Term]:
    """Of the attention half of a layer."""
    spec, d, T = sizes.spec, sizes.d, sizes.tokens
    query, kv, heads = spec.query_size // sizes.tp, spec.kv_size // sizes.tp, spec.num_attention_heads // sizes.tp
    qkv, proj = "self_attention.linear_qkv", "self_attention.linear_proj"
    seen = T * sizes.cp  # context ranks gather the keys and values of a row
    if sizes.again("attention"):
        return [Term("layer input", sizes.hidden, "the attention half's recompute")]
    core = sizes.again("core_attn")
    return [
        *_terms(
            ("layer input", sizes.norm_input, "norm", True),
            ("normed", _input_of(sizes, qkv), "linear_qkv", sizes.learns(qkv)),
            ("linear_qkv's output", T * (query + 2 * kv) * d, "k norm; value is a view of it", spec.qk_layernorm),
            ("query before its norm", T * query * d, "q norm", spec.qk_layernorm),
            (
                "scales of the two norms",
                T * (heads + spec.num_query_groups // sizes.tp) * 4,
                "their backward",
                spec.qk_layernorm,
            ),
            ("query", T * query * d, "attention", True),
            ("key, value", seen * (1 if spec.qk_layernorm else 2) * kv * d, "attention", True),
            ("attention output", T * query * d, "attention, linear_proj", not core or sizes.learns(proj)),
            ("log-sum-exp", T * heads * 4, "attention", not core),
        ),
        *_adapter(sizes, qkv, T, spec.hidden_size),
        *_adapter(sizes, proj, T, query),
    ]


def _swiglu_terms(sizes: Sizes, front: str, width: int) -> list[Term]:
    """Of a dense SwiGLU behind its input."""
    fc1, fc2, T = f"{front}.linear_fc1", f"{front}.linear_fc2", sizes.tokens
    return [
        *_terms(
            (f"{front}: gate, up", T * 2 * width * sizes.d, "SwiGLU", True),
            (f"{front}: their product", T * width * sizes.d, "linear_fc2", sizes.learns(fc2)),
        ),
        *_adapter(sizes, fc1, T, sizes.spec.hidden_size),
        *_adapter(sizes, fc2, T, width),
    ]


def dense_terms(sizes: Sizes) -> list[Term]:
    """Of the MLP half of a dense layer."""
    fc1 = "mlp.linear_fc1"
    kept = [Term("MLP input", sizes.norm_input, "norm")]
    if sizes.again("mlp"):
        return [*kept, Term("normed", sizes.hidden, "the MLP's recompute")]
    kept += _terms(("normed", _input_of(sizes, fc1), "linear_fc1", sizes.learns(fc1)))
    return kept + _swiglu_terms(sizes, "mlp", sizes.spec.ffn_hidden_size // sizes.tp)


def moe_terms(sizes: Sizes) -> list[Term]:
    """Of the MoE half of a layer: router, shared expert, routed experts."""
    spec, S, N, F, d = sizes.spec, sizes.cut_tokens, sizes.expert_rows, sizes.expert_width, sizes.d
    R, K = sizes.travelling_rows, sizes.spec.moe_router_topk
    kept = [Term("MoE input", sizes.norm_input, "norm")]
    if sizes.again("moe"):
        return [*kept, Term("normed", sizes.hidden, "the MoE layer's recompute")]
    shared, fc1, fc2 = "mlp.shared_experts.linear_fc1", "mlp.experts.linear_fc1", "mlp.experts.linear_fc2"
    by_index = sizes.learns(fc1) and not sizes.travels  # sorted rows are taken again from the tokens
    gathers = sizes.pairs(shared) > 0 and sizes.tp > 1
    normed = sizes.is_full or by_index or (sizes.pairs(shared) and not gathers)
    return [
        *kept,
        *_terms(
            ("normed", sizes.hidden, "router, shared expert or experts", bool(normed)),
            ("normed, gathered", sizes.gathered, shared, gathers),
            (
                "router scores, choices",
                S * (spec.num_moe_experts * 4 + K * 12 + 4),
                "sigmoid, top-k",
                True,
            ),
            ("where rows go", (R * K if sizes.travels else N) * 28, "permute, combine, probabilities", True),
            ("where rows go between ranks", S * K * 24, "dispatch", sizes.travels),
            ("rows at the experts", R * spec.hidden_size * d, fc1, sizes.learns(fc1) and sizes.travels),
            ("mlp.experts: gate, up", N * 2 * F * d, "SwiGLU", True),
        ),
        *_adapter(sizes, fc1, N, spec.hidden_size),
        *_adapter(sizes, fc2, N, F),
        *_swiglu_terms(sizes, "mlp.shared_experts", spec.shared_ffn_hidden_size // sizes.tp),
    ]


def mlp_terms(sizes: Sizes, is_moe: bool) -> list[Term]:
    return moe_terms(sizes) if is_moe else dense_terms(sizes)


def layer_terms(sizes: Sizes, is_moe: bool) -> list[Term]:
    """Everything one layer keeps when it is not computed again whole."""
    return attention_terms(sizes) + mlp_terms(sizes, is_moe)


def mtp_terms(sizes: Sizes) -> list[Term]:
    """What an MTP layer keeps beside its attention and experts: its two norms' inputs, eh_proj's, its last norm's."""
    both = 2 * sizes.gathered if sizes.is_full or sizes.tp == 1 else 0
    return [
        Term("embedding, hidden, output", 3 * sizes.hidden, "enorm, hnorm, last norm"),
        Term("joined", both, "eh_proj"),
    ]


def head_terms(sizes: Sizes) -> list[Term]:
    """What the end of the model keeps, once for each prediction."""
    return [
        Term("final norm's input", sizes.norm_input, "norm"),
        Term("head's input" if sizes.is_full else "gradient of the head's input", sizes.gathered, "loss"),
    ]


def row_terms(sizes: Sizes) -> list[Term]:
    """What a micro batch brings along once: tokens, positions, labels, weights, and the rotary table."""
    T, rotary = sizes.tokens, int(sizes.spec.kv_channels * sizes.spec.rotary_percent)
    return [
        Term("tokens, positions, labels, weights", T * 28, "batch"),
        Term("rotary table", 2 * T * rotary * 4, "fp32"),
    ]


def _most(*moments: list[Term]) -> list[Term]:
    return max(moments, key=total)


def layer_working(sizes: Sizes, is_moe: bool) -> list[Term]:
    """Alive at the worst moment of a layer's backward, beside what is kept."""
    residual = Term("gradient of the residual", 2 * sizes.hidden, "two are alive")
    return [residual, *_most(_attention_working(sizes), *(_moe_moments(sizes) if is_moe else _dense_moments(sizes)))]


def _attention_working(sizes: Sizes) -> list[Term]:
    spec, d, T = sizes.spec, sizes.d, sizes.tokens
    query, kv = spec.query_size // sizes.tp, spec.kv_size // sizes.tp
    return [
        Term("gradient of attention output", T * query * d, "attention backward"),
        Term("gradients of query, key, value", T * (query + 2 * kv * sizes.cp) * d, "attention backward"),
        Term("gradient of query in fp32", T * query * 4, "attention's workspace"),
    ]


def _dense_moments(sizes: Sizes) -> list[list[Term]]:
    width, d = sizes.spec.ffn_hidden_size // sizes.tp, sizes.d
    weights = 3 * sizes.spec.hidden_size * width * d if sizes.is_full else 0
    return [
        [
            Term("gradients of product, gate, up", sizes.tokens * 3 * width * d, "SwiGLU backward"),
            Term("gradients of the weights", weights, "before they join the buffer"),
        ]
    ]


def _moe_moments(sizes: Sizes) -> list[list[Term]]:
    """Of the experts: around SwiGLU's backward, and around the gradient of their input."""
    spec, N, F, d = sizes.spec, sizes.expert_rows, sizes.expert_width, sizes.d
    rows, narrow = N * spec.hidden_size * d, N * F * d
    fc1, fc2 = "mlp.experts.linear_fc1", "mlp.experts.linear_fc2"
    here = spec.num_moe_experts // sizes.layout.expert_model_parallel_size
    weight = here * spec.hidden_size * F * d if sizes.is_full else 0
    drops = sizes.recipe.lora is not None and sizes.recipe.lora.lora_dropout > 0
    arrived = ("gradient as it arrived", sizes.travelling_rows * spec.hidden_size * d, "dispatch", sizes.travels)
    return [
        _terms(
            arrived,
            ("gradient of output rows", sizes.rows_for(fc2, rows), "combine backward", True),
            ("gradient of the product", narrow, "SwiGLU backward", True),
            ("gradients of gate, up", sizes.rows_for(fc1, 2 * narrow), "SwiGLU backward", True),
            ("product again", narrow, "linear_fc2", sizes.learns(fc2)),
            ("the product after dropout", narrow, "LoRA", drops and sizes.pairs(fc2) > 0),
            ("gradient of linear_fc2", weight, "before it joins the buffer", True),
        ),
        _terms(
            arrived,
            ("gradients of gate, up", sizes.rows_for(fc1, 2 * narrow), "linear_fc1", True),
            ("gradient of input rows", rows, "linear_fc1", True),
            ("input rows again", rows, "linear_fc1", sizes.learns(fc1)),
            ("the input rows after dropout", rows, "LoRA", drops and sizes.pairs(fc1) > 0),
            ("gradients of linear_fc1 and linear_fc2", 3 * weight, "before they join the buffer", True),
        ),
    ]


def head_working(sizes: Sizes) -> list[Term]:
    """Alive while the loss is computed or goes back."""
    words, d = sizes.spec.vocab_size // sizes.tp, sizes.d
    logits = Term("logits of a piece", min(LOGITS_AT_ONCE, sizes.tokens * words) * d, "loss")
    head = words * sizes.spec.hidden_size
    if sizes.is_full:
        return [
            logits,
            Term("gradient of the head in fp32", head * 4, "sum over pieces"),
            Term("its part, or the whole rounded", head * d, "before it joins the buffer"),
            Term("gradient of the head's input", sizes.gathered, "loss backward"),
        ]
    back = [Term("gradient of the head's input", sizes.gathered // d * (4 + d), "times each token's factor")]
    return _most([logits], back)


def total(terms: list[Term]) -> int:
    return sum(term.bytes for term in terms)
