"""The sizes to plan with: a checkpoint's own config.json where it is there, else the public one of that name."""

from pathlib import Path

from glm45_tune.errors import CheckpointError
from glm45_tune.spec import ModelSpec, load_spec, read_config

_BOTH = {
    "model_type": "glm4_moe",
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "attention_bias": True,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "num_nextn_predict_layers": 1,
    "vocab_size": 151552,
    "partial_rotary_factor": 0.5,
    "rope_theta": 1000000,
    "rms_norm_eps": 1e-05,
    "eos_token_id": [151329, 151336, 151338],
}
_AIR = _BOTH | {
    "num_hidden_layers": 46,
    "first_k_dense_replace": 1,
    "hidden_size": 4096,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "n_routed_experts": 128,
    "routed_scaling_factor": 1.0,
    "use_qk_norm": False,
}
_355B = _BOTH | {
    "num_hidden_layers": 92,
    "first_k_dense_replace": 3,
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "n_routed_experts": 160,
    "routed_scaling_factor": 2.5,
    "use_qk_norm": True,
}
# what the public config.json of each release says about sizes (huggingface.co/zai-org)
PUBLIC = {
    "GLM-4.5-Air": _AIR,
    "GLM-4.5-Air-Base": _AIR,
    "GLM-4.5-Air-FP8": _AIR,
    "GLM-4.5": _355B,
    "GLM-4.5-Base": _355B,
    "GLM-4.5-FP8": _355B,
    "GLM-4.6": _355B,
    "GLM-4.6-FP8": _355B,
    "GLM-4.7": _355B,
    "GLM-4.7-FP8": _355B,
}


def find_spec(path: str) -> tuple[ModelSpec, str]:
    """The sizes for a recipe's model.path, and where they come from: its config.json, or the public one by its last name.

    `GLM-4.5-Air`, `zai-org/GLM-4.5-Air` and `/models/GLM-4.5-Air` all name the public model. Raises CheckpointError.
    """
    if Path(path).exists():
        return load_spec(path), f"{path}/config.json"
    name = Path(path).name
    known = {key.lower(): key for key in PUBLIC}.get(name.lower())
    if known is None:
        raise CheckpointError(
            f"model.path {path}: no such directory, and no public model is called {name!r}. Give a folder with a config.json "
            f"(the weights need not be there), or a name that ends in one of: {', '.join(PUBLIC)}."
        )
    return ModelSpec.from_config(PUBLIC[known], known), f"the public config.json of {known} ({path} is not here)"


def is_fp8(path: str) -> bool:
    """Whether a recipe's model.path names a checkpoint in FP8: by its config.json, or a public one's name."""
    if Path(path).exists():
        return bool(read_config(path).get("quantization_config"))
    return Path(path).name.lower().endswith("-fp8")
