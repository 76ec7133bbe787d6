"""A small random GLM-4.5 checkpoint in the exact layout of the hub's: for trying every command on a laptop, and for tests."""

import dataclasses
import json
from pathlib import Path

import torch

from glm45_tune.conversion.fp8 import Quantized
from glm45_tune.conversion.hf_files import plan_hf
from glm45_tune.conversion.names import hf_shapes, mtp_copies
from glm45_tune.conversion.outdir import whole
from glm45_tune.conversion.tensors import ALL, HfReader
from glm45_tune.conversion.write import write_file
from glm45_tune.spec import MTP_COPIES, ModelSpec
from glm45_tune.tiny import tokenizer as tiny_tokenizer

_AIR = dict(num_hidden_layers=3, first_k_dense_replace=1, use_qk_norm=False, routed_scaling_factor=1.0)
_355B = dict(num_hidden_layers=5, first_k_dense_replace=3, use_qk_norm=True, routed_scaling_factor=2.5)
LIKE = {"air": _AIR, "355b": _355B}


def config(like: str, mtp: bool, vocab_size: int, eos_token_ids: list[int]) -> dict:
    """config.json as zai-org writes it: `like` is "air" or "355b", sizes are small."""
    return {
        "architectures": ["Glm4MoeForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "pad_token_id": eos_token_ids[0],
        "eos_token_id": eos_token_ids,
        "head_dim": 32,
        "hidden_act": "silu",
        "hidden_size": 128,
        "partial_rotary_factor": 0.5,
        "initializer_range": 0.02,
        "intermediate_size": 320,
        "max_position_embeddings": 131072,
        "model_type": "glm4_moe",
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
        "num_attention_heads": 8,
        "n_group": 1,
        "topk_group": 1,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "num_nextn_predict_layers": int(mtp),
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.54.0",
        "use_cache": True,
        "vocab_size": vocab_size,
        **LIKE[like],
    }


class RandomModel:
    """An HfReader whose tensors are drawn when they are read, the same for the same seed.

    Norms, biases and the router's correction bias are drawn too: at 1 and 0 they would hide a tensor that is mixed up.
    """

    path = Path("random weights")

    def __init__(self, spec: ModelSpec, seed: int, config: dict | None = None):
        self.spec, self.config, self._seed = spec, config or {}, seed
        self._shapes = hf_shapes(spec)
        self.names = list(self._shapes)
        self._order = {name: number for number, name in enumerate(self.names)}
        self._copies = mtp_copies(spec)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16

    def read(self, name: str, first: int = 0, last: int | None = None, columns: slice = ALL) -> torch.Tensor:
        name = self._copies.get(name, name)
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._order[name])
        drawn = torch.randn(self._shapes[name], generator=generator)
        if name.endswith(("norm.weight", "layernorm.weight")):
            drawn = 1 + 0.1 * drawn
        elif name.endswith(".bias"):
            drawn = 0.05 * drawn
        elif name.endswith("e_score_correction_bias"):
            drawn = 0.02 * drawn
        elif name == "model.embed_tokens.weight":
            drawn = 0.5 * drawn
        else:
            drawn = drawn / self._shapes[name][-1] ** 0.5
        drawn = drawn.to(self.dtype(name))[first:last]
        return drawn if columns == ALL else drawn[:, columns].contiguous()

    def stamp(self) -> object:
        return [repr(self.spec), self._seed]


def write(
    output: str | Path,
    like: str = "air",
    mtp: bool = True,
    seed: int = 0,
    fp8: str | None = None,
    mtp_copies: tuple[str, ...] = MTP_COPIES,
) -> None:
    """Write the checkpoint. Raises UserError when `output` exists and is not ours.

    fp8: "channel" or "block". mtp_copies: what the MTP layer repeats; GLM-4.6 and 4.7 repeat nothing.
    """
    tokenizer = tiny_tokenizer.build()
    vocab_size = -(-tokenizer.get_vocab_size() // 128) * 128
    eos = [tokenizer.token_to_id(token) for token in ("<|endoftext|>", "<|user|>", "<|observation|>")]
    settings = config(like, mtp, vocab_size, eos)
    spec = dataclasses.replace(ModelSpec.from_config(settings, "config.json"), mtp_copies=mtp_copies)
    source: HfReader = RandomModel(spec, seed, settings)
    if fp8:
        source = Quantized(source, fp8)
    with whole(output, "tiny", like=like, seed=seed) as staging:
        for file in plan_hf(source, max_shard_bytes=600_000):
            write_file(staging / file.name, source, file)
        (staging / "config.json").write_text(json.dumps(source.config, indent=2) + "\n", encoding="utf-8")
        generation = {"_from_model_config": True, "do_sample": True, "eos_token_id": eos, "pad_token_id": eos[0]}
        (staging / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
        tiny_tokenizer.save(tokenizer, staging)
