"""THE table: every tensor of a GLM-4.5 checkpoint under its Hugging Face name and both of megatron's, read both ways.

Import, export, direct load, adapters and verification all walk these rows; a tensor no row claims is an error.
One megatron tensor is cut from one or more HF tensors ("parts"):

    copy     the part itself
    qkv      for each query group: its query heads, its key head, its value head
    gate_up  all of gate, then all of up

A dialect is who reads the result: `hybrid` is HybridModel (a GPT layer L becomes layers 2L, attention, and 2L + 1, MLP),
`gpt` is GPTModel, which ms-swift, Megatron-Bridge and slime read. Names are those of the Transformer Engine layers, where
a norm belongs to the linear behind it; `aliases` repeat a norm under the name that megatron's local layers give it.
"""

from collections.abc import Callable, Container
from dataclasses import dataclass, replace
from functools import lru_cache

from glm45_tune.spec import ModelSpec

DIALECTS = ("hybrid", "gpt")


@dataclass(frozen=True, slots=True)
class Part:
    """One HF tensor of a row. `name` holds `{e}` where the row stacks experts."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """One megatron tensor.

    Its dim 0 is `pieces` end to end, each (index of part, first row, last row + 1). Where
    `num_experts` is set, the tensor stacks that many such experts in a new dim 0.
    """

    hybrid: str
    gpt: str
    parts: tuple[Part, ...]
    pieces: tuple[tuple[int, int, int], ...]
    num_experts: int | None = None
    aliases: tuple[tuple[str, str], ...] = ()  # (hybrid, gpt) names that repeat this tensor

    def name(self, dialect: str) -> str:
        return self.hybrid if dialect == "hybrid" else self.gpt

    def alias_names(self, dialect: str) -> list[str]:
        return [alias[DIALECTS.index(dialect)] for alias in self.aliases]

    def hf_names(self, expert: int | None = None) -> list[str]:
        return [part.name.format(e=expert) for part in self.parts]

    @property
    def height(self) -> int:
        """Rows of the merged tensor, of one expert where it stacks them."""
        return sum(part.shape[0] for part in self.parts)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole megatron tensor."""
        one = (self.height, *self.parts[0].shape[1:])
        return one if self.num_experts is None else (self.num_experts, *one)

    @property
    def is_fp32(self) -> bool:
        """The router's correction bias is kept in fp32 whatever the checkpoint's dtype is."""
        return self.hybrid.endswith("router.expert_bias")


# (megatron name in its layer, merge, HF parts with their shapes, megatron's local-layer alias)
# dims: H hidden, Q all query heads, K all key heads, D one head, F dense MLP, S shared expert, M routed expert,
# E experts, V vocabulary, 2H two hiddens side by side
_ATTENTION = (
    ("self_attention.linear_qkv.layer_norm_weight", "copy", {"input_layernorm.weight": "H"}, "input_layernorm.weight"),
    (
        "self_attention.linear_qkv.weight",
        "qkv",
        {"self_attn.q_proj.weight": "Q H", "self_attn.k_proj.weight": "K H", "self_attn.v_proj.weight": "K H"},
        None,
    ),
    ("self_attention.linear_proj.weight", "copy", {"self_attn.o_proj.weight": "H Q"}, None),
)
_QKV_BIAS = (
    (
        "self_attention.linear_qkv.bias",
        "qkv",
        {"self_attn.q_proj.bias": "Q", "self_attn.k_proj.bias": "K", "self_attn.v_proj.bias": "K"},
        None,
    ),
)
_QK_NORM = (
    ("self_attention.q_layernorm.weight", "copy", {"self_attn.q_norm.weight": "D"}, None),
    ("self_attention.k_layernorm.weight", "copy", {"self_attn.k_norm.weight": "D"}, None),
)
_DENSE = (
    (
        "mlp.linear_fc1.layer_norm_weight",
        "copy",
        {"post_attention_layernorm.weight": "H"},
        "pre_mlp_layernorm.weight",
    ),
    ("mlp.linear_fc1.weight", "gate_up", {"mlp.gate_proj.weight": "F H", "mlp.up_proj.weight": "F H"}, None),
    ("mlp.linear_fc2.weight", "copy", {"mlp.down_proj.weight": "H F"}, None),
)
_MOE = (
    # megatron's Transformer Engine and local GPT layers disagree on this one norm
    ("pre_mlp_layernorm.weight", "copy", {"post_attention_layernorm.weight": "H"}, "mlp.linear_fc1.layer_norm_weight"),
    ("mlp.router.weight", "copy", {"mlp.gate.weight": "E H"}, None),
    ("mlp.router.expert_bias", "copy", {"mlp.gate.e_score_correction_bias": "E"}, None),
    (
        "mlp.experts.experts.linear_fc1.weight",
        "gate_up",
        {"mlp.experts.{e}.gate_proj.weight": "M H", "mlp.experts.{e}.up_proj.weight": "M H"},
        None,
    ),
    ("mlp.experts.experts.linear_fc2.weight", "copy", {"mlp.experts.{e}.down_proj.weight": "H M"}, None),
    (
        "mlp.shared_experts.linear_fc1.weight",
        "gate_up",
        {"mlp.shared_experts.gate_proj.weight": "S H", "mlp.shared_experts.up_proj.weight": "S H"},
        None,
    ),
    ("mlp.shared_experts.linear_fc2.weight", "copy", {"mlp.shared_experts.down_proj.weight": "H S"}, None),
)
_MTP = (
    ("enorm.weight", "copy", {"enorm.weight": "H"}, None),
    ("hnorm.weight", "copy", {"hnorm.weight": "H"}, None),
    ("eh_proj.weight", "copy", {"eh_proj.weight": "H 2H"}, None),
    ("final_layernorm.weight", "copy", {"shared_head.norm.weight": "H"}, None),
)
# what a checkpoint may repeat in each MTP layer and megatron does not: import checks them equal, export writes them again
_ORIGINALS = {"embed_tokens.weight": "model.embed_tokens.weight", "shared_head.head.weight": "lm_head.weight"}


@lru_cache(maxsize=8)
def rows(spec: ModelSpec) -> tuple[Row, ...]:
    """Every row of this model, MTP layers included."""
    attention = _ATTENTION + _QKV_BIAS * spec.add_qkv_bias + _QK_NORM * spec.qk_layernorm
    found = [
        _row(
            spec, ("", ""), ("embedding.word_embeddings.weight", "copy", {"model.embed_tokens.weight": "V H"}, None), ""
        ),
        _row(spec, ("", ""), ("output_layer.weight", "copy", {"lm_head.weight": "V H"}, None), ""),
        Row(
            "decoder.final_norm.weight",
            "decoder.final_layernorm.weight",
            (Part("model.norm.weight", (spec.hidden_size,)),),
            ((0, 0, spec.hidden_size),),
        ),
    ]
    for layer in range(spec.num_layers):
        hf, gpt = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        mlp = _MOE if spec.is_moe(layer) else _DENSE
        found += [_row(spec, (f"decoder.layers.{2 * layer}.", gpt), template, hf) for template in attention]
        found += [_row(spec, (f"decoder.layers.{2 * layer + 1}.", gpt), template, hf) for template in mlp]
    for depth in range(spec.mtp_num_layers):
        hf, mtp = f"model.layers.{spec.num_layers + depth}.", f"mtp.layers.{depth}."
        gpt, inner = mtp + "transformer_layer.", mtp + "mtp_model_layer.layers."
        found += [_row(spec, (mtp, mtp), template, hf) for template in _MTP]
        found += [_row(spec, (f"{inner}0.", gpt), template, hf) for template in attention]
        found += [_row(spec, (f"{inner}1.", gpt), template, hf) for template in _MOE]
    return tuple(found)


def _row(spec: ModelSpec, prefixes: tuple[str, str], template: tuple, hf_prefix: str) -> Row:
    name, merge, hf, alias = template
    dims = {
        "H": spec.hidden_size,
        "2H": 2 * spec.hidden_size,
        "Q": spec.query_size,
        "K": spec.kv_size,
        "D": spec.kv_channels,
        "F": spec.ffn_hidden_size,
        "S": spec.shared_ffn_hidden_size,
        "M": spec.moe_ffn_hidden_size,
        "E": spec.num_moe_experts,
        "V": spec.vocab_size,
    }
    parts = tuple(Part(hf_prefix + part, tuple(dims[d] for d in shape.split())) for part, shape in hf.items())
    if merge == "qkv":
        q, k = spec.query_size // spec.num_query_groups, spec.kv_channels
        pieces = tuple(
            (part, group * size, (group + 1) * size)
            for group in range(spec.num_query_groups)
            for part, size in ((0, q), (1, k), (2, k))
        )
    else:
        pieces = tuple((index, 0, part.shape[0]) for index, part in enumerate(parts))
    return Row(
        prefixes[0] + name,
        prefixes[1] + name,
        parts,
        pieces,
        spec.num_moe_experts if "{e}" in parts[0].name else None,
        ((prefixes[0] + alias, prefixes[1] + alias),) if alias else (),
    )


def mtp_copies(spec: ModelSpec) -> dict[str, str]:
    """HF name of each tensor that this checkpoint's MTP layers repeat → HF name of the tensor it repeats."""
    return {
        f"model.layers.{spec.num_layers + depth}.{copy}": _ORIGINALS[copy]
        for depth in range(spec.mtp_num_layers)
        for copy in spec.mtp_copies
    }


def with_copies_of(spec: ModelSpec, names: Container[str]) -> ModelSpec:
    """The spec of a checkpoint that holds these HF names: of what MTP layers may repeat those that any of them does."""
    layers = range(spec.num_layers, spec.num_layers + spec.mtp_num_layers)
    held = [copy for copy in _ORIGINALS if any(f"model.layers.{layer}.{copy}" in names for layer in layers)]
    return replace(spec, mtp_copies=tuple(held))


def is_mtp(row: Row) -> bool:
    return row.hybrid.startswith("mtp.")


def hf_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Every HF tensor this model must have, copies included → its shape."""
    shapes = {
        name: part.shape
        for row in rows(spec)
        for expert in range(row.num_experts or 1)
        for name, part in zip(row.hf_names(expert), row.parts)
    }
    return shapes | {copy: shapes[original] for copy, original in mtp_copies(spec).items()}


def hf_places(spec: ModelSpec, holds: Callable[[Row], bool]) -> dict[str, tuple[Row, int, int | None]]:
    """HF name → (row, index of part, expert) of every tensor in rows that `holds`; a copy stands at its original's place."""
    places = {
        name: (row, part, expert)
        for row in rows(spec)
        if holds(row)
        for expert in (range(row.num_experts) if row.num_experts else (None,))
        for part, name in enumerate(row.hf_names(expert))
    }
    mtp_held = any(is_mtp(row) for row, _, _ in places.values())
    return places | {copy: places[name] for copy, name in mtp_copies(spec).items() if mtp_held}


def modules_with_extra_state(spec: ModelSpec, dialect: str) -> list[tuple[str, int]]:
    """megatron modules that ask a checkpoint for an `_extra_state` object, with how many (one an expert, else 1).

    Ours are empty (they carry FP8 scaling where a model trains in FP8), but megatron refuses to load without them.
    The linears of its local layers were seen asking. UNVERIFIED: that attention cores and norms ask under Transformer Engine.
    """
    found = []
    for row in rows(spec):
        module, _, tensor = row.name(dialect).rpartition(".")
        if tensor in ("weight", "layer_norm_weight") and not module.endswith(("router", "word_embeddings")):
            found.append((module, row.num_experts or 1))
        if module.endswith("linear_proj"):
            found.append((module.replace("linear_proj", "core_attention"), 1))
    return list(dict.fromkeys(found))
