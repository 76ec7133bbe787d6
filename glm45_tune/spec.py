"""The sizes of a GLM-4.5 model, read from the checkpoint's own config.json. No torch, no megatron."""

import json
from dataclasses import dataclass
from pathlib import Path

from glm45_tune.errors import CheckpointError


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
        if config.get("model_type") != "glm4_moe":
            raise CheckpointError(
                f'{where}: model_type is {config.get("model_type")!r}; allowed: "glm4_moe" '
                "(GLM-4.5, GLM-4.5-Air, 4.6, 4.7 and their Base releases)."
            )
        if config.get("tie_word_embeddings"):
            raise CheckpointError(f"{where}: tie_word_embeddings is true; GLM-4.5 checkpoints keep a head of their own.")
        if not config.get("norm_topk_prob", True):
            raise CheckpointError(f"{where}: norm_topk_prob is false; only true (as in every GLM-4.5 release) is known.")
        # transformers 5 nests the two rotary keys, older files have them flat
        rope = {**config, **(config.get("rope_parameters") or {}), **(config.get("rope_scaling") or {})}
        if (kind := rope.get("rope_type", "default")) != "default":
            raise CheckpointError(f"{where}: rope_type is {kind!r}; allowed: default.")

        def need(key: str, source: dict = config):
            if source.get(key) is None:
                raise CheckpointError(f"{where}: {key} is missing.")
            return source[key]

        eos = config.get("eos_token_id") or []
        heads, groups = need("num_attention_heads"), need("num_key_value_heads")
        spec = cls(
            num_layers=need("num_hidden_layers"),
            num_dense_layers=need("first_k_dense_replace"),
            hidden_size=need("hidden_size"),
            ffn_hidden_size=need("intermediate_size"),
            moe_ffn_hidden_size=need("moe_intermediate_size"),
            num_attention_heads=heads,
            num_query_groups=groups,
            kv_channels=config.get("head_dim") or need("hidden_size") // heads,
            num_moe_experts=need("n_routed_experts"),
            moe_router_topk=need("num_experts_per_tok"),
            num_shared_experts=need("n_shared_experts"),
            moe_router_topk_scaling_factor=float(need("routed_scaling_factor")),
            moe_router_num_groups=config.get("n_group") or 1,
            moe_router_group_topk=config.get("topk_group") or 1,
            qk_layernorm=bool(config.get("use_qk_norm", False)),
            add_qkv_bias=bool(config.get("attention_bias", False)),
            vocab_size=need("vocab_size"),
            rotary_percent=float(rope.get("partial_rotary_factor", 0.5)),
            rotary_base=float(need("rope_theta", rope)),
            layernorm_epsilon=float(need("rms_norm_eps")),
            mtp_num_layers=config.get("num_nextn_predict_layers") or 0,
            eos_token_ids=tuple(eos) if isinstance(eos, list) else (eos,),
        )
        if heads % groups:
            raise CheckpointError(f"{where}: num_attention_heads {heads} is no multiple of num_key_value_heads {groups}.")
        if spec.moe_router_topk > spec.num_moe_experts:
            raise CheckpointError(
                f"{where}: num_experts_per_tok {spec.moe_router_topk} exceeds n_routed_experts {spec.num_moe_experts}."
            )
        return spec


def read_config(directory: str | Path) -> dict:
    """The parsed config.json of a checkpoint directory, HF or mcore. Raises CheckpointError."""
    path = Path(directory) / "config.json"
    if not Path(directory).is_dir():
        raise CheckpointError(f"{directory}: no such directory. Give the folder of a downloaded or converted checkpoint.")
    if not path.is_file():
        raise CheckpointError(f"{directory}: no config.json here. Give the folder of a downloaded or converted checkpoint.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: holds {type(config).__name__}; a JSON object is expected.")
    return config


def load_spec(directory: str | Path) -> ModelSpec:
    """The model sizes of a checkpoint directory, HF or mcore."""
    return ModelSpec.from_config(read_config(directory), f"{directory}/config.json")
