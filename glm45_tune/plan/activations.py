"""What a micro batch leaves on the card, tensor by tensor, between its forward and its backward. THE table of activations.

One Term is one kept tensor: its bytes on this rank, and why it is kept. A tensor that only a frozen weight would want is not
kept. Legend: T tokens of the micro batch on this rank's tensor group, S = T / tensor ranks (sequence parallel), N expert rows
of this rank (S · top-k · expert tensor ranks, routing taken as even), d bytes of a number, h hidden size.
"""

from dataclasses import dataclass

from glm45_tune.layout import Layout
from glm45_tune.recipe import Recipe
from glm45_tune.spec import ModelSpec

# rows of logits made at once in the loss; larger micro batches go through in pieces of this many
HEAD_ROWS = 8192
DTYPE_BYTES = {"bf16": 2, "fp32": 4}


@dataclass(frozen=True, slots=True)
class Term:
    """A tensor kept (or, of `working`, alive for a moment) on one rank."""

    what: str
    bytes: int
    why: str


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the table needs to know of a run."""

    spec: ModelSpec
    layout: Layout
    recipe: Recipe
    tokens: int

    @classmethod
    def of(cls, spec: ModelSpec, layout: Layout, recipe: Recipe) -> "Sizes":
        return cls(spec, layout, recipe, recipe.train.micro_batch_size * recipe.data.seq_length)

    @property
    def d(self) -> int:
        return DTYPE_BYTES[self.recipe.model.params_dtype]

    @property
    def tp(self) -> int:
        return self.layout.tensor_model_parallel_size

    @property
    def cut_tokens(self) -> int:
        return -(-self.tokens // self.tp)

    @property
    def expert_rows(self) -> int:
        return self.cut_tokens * self.spec.moe_router_topk * self.layout.expert_tensor_parallel_size

    @property
    def expert_width(self) -> int:
        return self.spec.moe_ffn_hidden_size // self.layout.expert_tensor_parallel_size

    @property
    def dispatches(self) -> bool:
        """Whether experts see rows that came over the wire."""
        return self.layout.expert_model_parallel_size * self.layout.expert_tensor_parallel_size > 1

    def pairs(self, matrix: str) -> int:
        """Low-rank pairs beside a matrix."""
        lora = self.recipe.lora
        return len(lora.targets_of(matrix)) if lora else 0

    def learns(self, matrix: str) -> bool:
        """Whether a gradient of this matrix or of its adapter is wanted, so that its input must be at hand."""
        return self.recipe.lora is None or self.pairs(matrix) > 0


def _when(*terms: tuple[str, int, str, bool]) -> list[Term]:
    return [Term(what, size, why) for what, size, why, kept in terms if kept and size]


def _narrow(sizes: Sizes, rows: int, *matrices: str) -> tuple[str, int, str, bool]:
    pairs = sum(sizes.pairs(matrix) for matrix in matrices)
    rank = sizes.recipe.lora.r if sizes.recipe.lora else 0
    return "LoRA between A and B", rows * rank * pairs * sizes.d, "gradient of lora_B", pairs > 0


def attention_terms(sizes: Sizes) -> list[Term]:
    """Of the attention half of a layer."""
    spec, d, T, S = sizes.spec, sizes.d, sizes.tokens, sizes.cut_tokens
    query, kv = spec.query_size // sizes.tp, spec.kv_size // sizes.tp
    train = sizes.recipe.train
    again = train.recompute_granularity == "selective" and "core_attn" in train.recompute_modules
    return _when(
        ("layer input", S * spec.hidden_size * d, "norm", True),
        ("normed input", S * spec.hidden_size * d, "linear_qkv learns", sizes.learns("self_attention.linear_qkv")),
        ("query, key before their norm", T * (query + kv) * d, "qk norm", spec.qk_layernorm),
        ("query, key, value", T * (query + 2 * kv) * d, "attention", True),
        (
            "attention output",
            T * query * d,
            "attention, linear_proj",
            not again or sizes.learns("self_attention.linear_proj"),
        ),
        ("log-sum-exp", T * spec.num_attention_heads // sizes.tp * 4, "attention", not again),
        _narrow(sizes, T, "self_attention.linear_qkv", "self_attention.linear_proj"),
    )


def _gated_terms(sizes: Sizes, front: str, rows: int, width: int) -> list[Term]:
    """Of a SwiGLU MLP behind its input: gate and up, and their product where fc2 learns."""
    fc1, fc2 = f"{front}.linear_fc1", f"{front}.linear_fc2"
    return _when(
        (f"{front} gate and up", rows * 2 * width * sizes.d, "SwiGLU", True),
        (f"{front} product", rows * width * sizes.d, "linear_fc2 learns", sizes.learns(fc2)),
        _narrow(sizes, rows, fc1, fc2),
    )


def dense_terms(sizes: Sizes) -> list[Term]:
    """Of the MLP half of a dense layer."""
    spec, S = sizes.spec, sizes.cut_tokens
    hidden = S * spec.hidden_size * sizes.d
    return [
        *_when(("MLP input", hidden, "norm", True), ("normed", hidden, "linear_fc1 learns", sizes.learns("mlp.linear_fc1"))),
        *_gated_terms(sizes, "mlp", sizes.tokens, spec.ffn_hidden_size // sizes.tp),
    ]


def moe_terms(sizes: Sizes) -> list[Term]:
    """Of the MoE half of a layer: router, shared expert, routed experts."""
    spec, S, N, d = sizes.spec, sizes.cut_tokens, sizes.expert_rows, sizes.d
    hidden, fc1 = S * spec.hidden_size * d, "mlp.experts.linear_fc1"
    full = sizes.recipe.lora is None
    by_index = sizes.learns(fc1) and not sizes.dispatches  # rows are taken again from the normed tokens
    normed = full or by_index or sizes.learns("mlp.shared_experts.linear_fc1")
    return [
        *_when(
            ("MoE input", hidden, "norm", True),
            ("normed", hidden, "router, shared or routed experts learn", normed),
            ("router scores", 3 * S * spec.num_moe_experts * 4, "sigmoid, top-k and its normalisation, fp32", True),
            ("routing map", S * spec.num_moe_experts, "which token goes where", True),
            ("row indices and probabilities", N * (8 + 8 + 4), "permute, combine", True),
            ("expert rows", N * spec.hidden_size * d, "experts' linear_fc1 learns", sizes.learns(fc1) and sizes.dispatches),
        ),
        *_gated_terms(sizes, "mlp.shared_experts", sizes.tokens, spec.shared_ffn_hidden_size // sizes.tp),
        *_gated_terms(sizes, "mlp.experts", N, sizes.expert_width),
    ]


def layer_terms(sizes: Sizes, is_moe: bool) -> list[Term]:
    """Everything one layer keeps when nothing of it is computed again."""
    return attention_terms(sizes) + (moe_terms(sizes) if is_moe else dense_terms(sizes))


def head_terms(sizes: Sizes) -> list[Term]:
    """What the end of the model keeps: the final norm's input and the head's."""
    hidden = sizes.cut_tokens * sizes.spec.hidden_size * sizes.d
    return _when(
        ("final norm input", hidden, "norm", True), ("head input", hidden, "head learns", sizes.recipe.lora is None)
    )


def row_terms(sizes: Sizes) -> list[Term]:
    """What a micro batch brings along once: tokens, positions, labels, weights, and the rotary table."""
    spec, T = sizes.spec, sizes.tokens
    rotary = int(spec.kv_channels * spec.rotary_percent)
    return [
        Term("tokens, positions, labels, weights", T * (8 + 8 + 8 + 4), "batch"),
        Term("rotary table", 2 * T * rotary * 4, "cos and sin, fp32"),
    ]


def layer_working(sizes: Sizes, is_moe: bool) -> list[Term]:
    """Alive at the worst moment of a layer's backward, beside what is kept."""
    spec, S, N, d = sizes.spec, sizes.cut_tokens, sizes.expert_rows, sizes.d
    hidden = S * spec.hidden_size * d
    if not is_moe:
        width = spec.ffn_hidden_size // sizes.tp
        return _when(
            ("gradient of the residual", 2 * hidden, "two are alive", True),
            ("gradient of gate, up and product", sizes.tokens * 3 * width * d, "SwiGLU backward", True),
        )
    return _when(
        ("gradient of the residual", 2 * hidden, "two are alive", True),
        ("gradient of expert output rows", N * spec.hidden_size * d, "combine backward", True),
        ("gradient of gate, up", N * 2 * sizes.expert_width * d, "SwiGLU backward", True),
        ("gradient of expert input rows", N * spec.hidden_size * d, "experts' dgrad", True),
        ("rows on the wire", N * spec.hidden_size * d, "all-to-all buffer", sizes.dispatches),
    )


def head_working(sizes: Sizes) -> list[Term]:
    """Alive while the loss is computed: logits of a piece of the row, and their gradient."""
    rows = min(sizes.tokens, HEAD_ROWS)
    words = sizes.spec.vocab_size // sizes.tp
    return [
        Term("logits", rows * words * sizes.d, "head"),
        Term("logits in fp32", rows * words * 4, "cross entropy"),
        Term("gradient of the logits", rows * words * 4, "cross entropy backward"),
        Term("gradient of the final hidden states", 2 * sizes.cut_tokens * sizes.spec.hidden_size * sizes.d, "head dgrad"),
    ]


def total(terms: list[Term]) -> int:
    return sum(term.bytes for term in terms)
