"""The sizes of a GLM-4.5 model, read from the checkpoint's own config.json. No torch, no megatron."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from glm45_tune.errors import CheckpointError
from glm45_tune.foreign import check_own, read_json, shown
from glm45_tune.quoting import path_argument

LARGEST = 2**31
"""No size of a model is larger."""
MOST_LAYERS, MOST_EXPERTS = 2**12, 2**17
"""Of all layers together: the tables of tensors grow with both, so a bad number must not make one."""


MTP_COPIES = ("embed_tokens.weight", "shared_head.head.weight")


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One `glm4_moe` model. Field names are megatron's where megatron has the concept.

    `num_layers` does not count the MTP layers; layers below `num_dense_layers` have a dense MLP, the others experts.
    """

    num_layers: int
    num_dense_layers: int
    hidden_size: int
    ffn_hidden_size: int
    moe_ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    num_moe_experts: int
    moe_router_topk: int
    num_shared_experts: int
    moe_router_topk_scaling_factor: float
    moe_router_num_groups: int
    moe_router_group_topk: int
    qk_layernorm: bool
    add_qkv_bias: bool
    vocab_size: int
    rotary_percent: float
    rotary_base: float
    layernorm_epsilon: float
    mtp_num_layers: int
    eos_token_ids: tuple[int, ...]
    # left out of repr, by which adapters know their base
    mtp_copies: tuple[str, ...] = field(default=MTP_COPIES, repr=False)
    """Which tensors of the model each MTP layer repeats in the checkpoint: GLM-4.5 both, GLM-4.6 and 4.7 none."""

    @property
    def shared_ffn_hidden_size(self) -> int:
        return self.moe_ffn_hidden_size * self.num_shared_experts

    @property
    def query_size(self) -> int:
        return self.num_attention_heads * self.kv_channels

    @property
    def kv_size(self) -> int:
        return self.num_query_groups * self.kv_channels

    def is_moe(self, layer: int) -> bool:
        return layer >= self.num_dense_layers

    @classmethod
    def from_config(cls, config: dict, where: str) -> "ModelSpec":
        """Build from a parsed config.json. `where` names it in errors. Raises CheckpointError."""
        flat = _flat(config, where)
        number = partial(_number, flat, where)
        eos = config.get("eos_token_id") or []
        eos = eos if isinstance(eos, list) else [eos]
        if not all(type(token) is int for token in eos):
            raise CheckpointError(f"{where}: eos_token_id is {shown(eos)}; token ids are expected.")
        heads, groups = number("num_attention_heads"), number("num_key_value_heads")
        spec = cls(
            num_layers=number("num_hidden_layers"),
            num_dense_layers=number("first_k_dense_replace", least=0),
            hidden_size=number("hidden_size"),
            ffn_hidden_size=number("intermediate_size"),
            moe_ffn_hidden_size=number("moe_intermediate_size"),
            num_attention_heads=heads,
            num_query_groups=groups,
            kv_channels=number("head_dim", default=number("hidden_size") // heads),
            num_moe_experts=number("n_routed_experts"),
            moe_router_topk=number("num_experts_per_tok"),
            num_shared_experts=number("n_shared_experts"),
            moe_router_topk_scaling_factor=number("routed_scaling_factor", float, 0),
            moe_router_num_groups=number("n_group", default=1),
            moe_router_group_topk=number("topk_group", default=1),
            qk_layernorm=bool(config.get("use_qk_norm", False)),
            add_qkv_bias=bool(config.get("attention_bias", False)),
            vocab_size=number("vocab_size"),
            rotary_percent=number("partial_rotary_factor", float, 0, default=0.5),
            rotary_base=number("rope_theta", float),
            layernorm_epsilon=number("rms_norm_eps", float, 0),
            mtp_num_layers=number("num_nextn_predict_layers", least=0, default=0),
            eos_token_ids=tuple(eos),
        )
        depth = spec.num_layers + spec.mtp_num_layers
        if depth > MOST_LAYERS or depth * spec.num_moe_experts > MOST_EXPERTS:
            raise CheckpointError(
                f"{where}: {depth:,} layers of {spec.num_moe_experts:,} experts; at most {MOST_LAYERS:,} layers and "
                f"{MOST_EXPERTS:,} experts in all are expected (GLM-4.5 has 93 and 14,400)."
            )
        if spec.num_dense_layers > spec.num_layers:
            raise CheckpointError(
                f"{where}: first_k_dense_replace {spec.num_dense_layers:,} exceeds num_hidden_layers {spec.num_layers:,}."
            )
        if heads % groups:
            raise CheckpointError(
                f"{where}: num_attention_heads {heads} is no multiple of num_key_value_heads {groups}."
            )
        if spec.moe_router_topk > spec.num_moe_experts:
            raise CheckpointError(
                f"{where}: num_experts_per_tok {spec.moe_router_topk} exceeds n_routed_experts {spec.num_moe_experts}."
            )
        return spec


def _flat(config: dict, where: str) -> dict:
    """The config with its rotary keys at the top, after a look at everything that is not ours to compute."""
    if config.get("model_type") != "glm4_moe":
        raise CheckpointError(
            f'{where}: model_type is {shown(config.get("model_type"))}; allowed: "glm4_moe" '
            "(GLM-4.5, GLM-4.5-Air, 4.6, 4.7 and their Base releases)."
        )
    if config.get("tie_word_embeddings"):
        raise CheckpointError(f"{where}: tie_word_embeddings is true; GLM-4.5 checkpoints keep a head of their own.")
    if not config.get("norm_topk_prob", True):
        raise CheckpointError(f"{where}: norm_topk_prob is false; only true (as in every GLM-4.5 release) is known.")
    flat = dict(config)  # transformers 5 nests the two rotary keys, older files have them flat
    for key in ("rope_parameters", "rope_scaling"):
        if not isinstance(nested := config.get(key) or {}, dict):
            raise CheckpointError(f"{where}: {key} is {shown(nested)}; an object or null is expected.")
        flat |= nested
    # older files call it type
    if (kind := flat.get("rope_type", flat.get("type", "default"))) != "default":
        raise CheckpointError(f"{where}: rope_type is {shown(kind)}; allowed: default.")
    for key, known in _FIXED.items():
        if config.get(key) is not None and config[key] != known:
            raise CheckpointError(f"{where}: {key} is {shown(config[key])}; allowed: {known!r}, as in every GLM-4.5.")
    if (activation := config.get("hidden_act", "silu")) != "silu":
        raise CheckpointError(f"{where}: hidden_act is {shown(activation)}; allowed: silu.")
    return flat


# what from_config reads, and what of a public config.json says nothing of the computation
_USED = {
    "model_type", "tie_word_embeddings", "norm_topk_prob", "rope_parameters", "rope_scaling", "rope_type", "type", "hidden_act",
    "eos_token_id", "num_attention_heads", "num_key_value_heads", "num_hidden_layers", "first_k_dense_replace", "hidden_size",
    "intermediate_size", "moe_intermediate_size", "head_dim", "n_routed_experts", "num_experts_per_tok", "n_shared_experts",
    "routed_scaling_factor", "n_group", "topk_group", "use_qk_norm", "attention_bias", "vocab_size", "partial_rotary_factor",
    "rope_theta", "rms_norm_eps", "num_nextn_predict_layers", "max_position_embeddings", "quantization_config",
}  # fmt: skip
_HARMLESS = {
    "architectures", "auto_map", "torch_dtype", "dtype", "transformers_version", "use_cache", "initializer_range",
    "attention_dropout", "pad_token_id", "bos_token_id", "output_router_logits", "router_aux_loss_coef", "_name_or_path",
    "pretraining_tp", "name_or_path", "id2label", "label2id", "return_dict", "output_attentions", "output_hidden_states",
    "is_encoder_decoder", "chunk_size_feed_forward", "problem_type", "layer_types", "mlp_layer_types",
}  # fmt: skip
# another value would be another computation
_FIXED = {
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
    "sliding_window": None,
    "use_sliding_window": False,
    "mlp_bias": False,
}


def unused_keys(config: dict) -> set[str]:
    """Keys of a config.json that nothing here reads and that say, as far as is known, something of the model."""
    return {key for key, value in config.items() if key not in _USED | _HARMLESS | _FIXED.keys() and value is not None}


def _number(config: dict, where: str, key: str, kind: type = int, least: int = 1, default: float | None = None):
    value = default if config.get(key) is None else config[key]
    if value is None:
        raise CheckpointError(f"{where}: {key} is missing.")
    if isinstance(value, bool) or not isinstance(value, int | kind) or not least <= value <= LARGEST:
        sort = "whole number" if kind is int else "number"
        raise CheckpointError(f"{where}: {key} is {shown(value)}; a {sort} from {least} to {LARGEST:,} is expected.")
    return kind(value)


def read_config(directory: str | Path) -> dict:
    """The parsed config.json of a checkpoint directory, HF or mcore. Raises CheckpointError."""
    path = Path(directory) / "config.json"
    if not Path(directory).is_dir():
        raise CheckpointError(
            f"{directory}: no such directory. Give the folder of a downloaded or converted checkpoint."
        )
    if not path.is_file() and (Path(directory) / "recipe.yaml").is_file():
        raise CheckpointError(
            f"{directory}: a run, not a model. Make one of it first: "
            f"glm45-tune export {path_argument(str(directory))} --output MODEL"
        )
    if not path.is_file():
        raise CheckpointError(
            f"{directory}: no config.json here. Give the folder of a downloaded or converted checkpoint."
        )
    check_own(path)
    return read_json(path)


def load_spec(directory: str | Path) -> ModelSpec:
    """The model sizes of a checkpoint directory, HF or mcore."""
    return ModelSpec.from_config(read_config(directory), f"{directory}/config.json")
