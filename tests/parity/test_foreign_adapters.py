"""Adapters that PEFT trained without us: merged as PEFT itself merges them, or refused with the reason."""

import json

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from glm45_tune.conversion.adapter import Merged
from glm45_tune.conversion.stream import open_model
from glm45_tune.errors import CheckpointError

transformers.utils.logging.set_verbosity_error()
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
KINDS = {
    "attention": dict(
        target_modules=["q_proj", "k_proj", "o_proj"], rank_pattern={"k_proj": 5}, alpha_pattern={"o_proj": 3}
    ),
    "the narrow pattern first": dict(
        target_modules=["q_proj", "k_proj"], alpha_pattern={"layers.0.self_attn.q_proj": 32, "q_proj": 2, ".*k_proj": 5}
    ),
    "the wide pattern first": dict(
        target_modules=["q_proj", "k_proj"], alpha_pattern={"[qk]_proj": 2, "layers.0.self_attn.q_proj": 32}
    ),
    "patterns that almost match": dict(
        target_modules=["q_proj", "o_proj"],
        alpha_pattern={"proj": 9, "self_attn": 9, r"layers\.[01]\..*o_proj": 4, "o_proj": 3},
    ),
    "experts": dict(target_modules=["v_proj"], target_parameters=EXPERTS),
    "experts-reversed": dict(target_modules=["v_proj"], target_parameters=EXPERTS[::-1], use_rslora=True),
    "down-alone": dict(target_modules=["q_proj"], target_parameters=EXPERTS[1:]),
    "router": dict(target_modules=["q_proj"], target_parameters=["mlp.gate.weight", "shared_experts.up_proj.weight"]),
}


def _peft_model(directory, **config):
    base = transformers.Glm4MoeForCausalLM.from_pretrained(str(directory), dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=3, lora_alpha=7, **config))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_merged_as_peft_merges_it(checkpoints, tmp_path, kind):
    """Every weight of PEFT's merge_and_unload in fp32, to one rounding of bf16."""
    model = _peft_model(checkpoints["air"], **KINDS[kind])
    model.save_pretrained(tmp_path / "adapter")
    theirs = model.merge_and_unload().state_dict()
    base = open_model(checkpoints["air"])
    ours, changed = Merged(base, tmp_path / "adapter"), 0
    for name in ours.names:
        front, _, rest = name.partition(".mlp.experts.")
        if name.startswith("model.layers.3."):
            expected = base.read(name)
        elif rest:
            expert, projection, _ = rest.split(".")
            stack = theirs[f"{front}.mlp.experts.{'down_proj' if projection == 'down_proj' else 'gate_up_proj'}"][
                int(expert)
            ]
            expected = {"gate_proj": stack.chunk(2)[0], "up_proj": stack.chunk(2)[-1], "down_proj": stack}[projection]
        else:
            expected = theirs[name]
        assert torch.allclose(ours.read(name).float(), expected.float(), rtol=2**-8, atol=1e-6), name
        changed += not torch.equal(ours.read(name), base.read(name))
    assert changed


def test_gate_and_up_of_an_expert_with_different_A(checkpoints, tmp_path):
    """As PEFT with transformers 4 wrote them: a pair for each projection of each expert."""
    front, generator = "model.layers.1.mlp.experts.4.", torch.Generator().manual_seed(2)
    pairs = {}
    for projection, (out, inner) in {"gate_proj": (64, 128), "up_proj": (64, 128), "down_proj": (128, 64)}.items():
        pairs[f"base_model.model.{front}{projection}.lora_A.weight"] = torch.randn(3, inner, generator=generator)
        pairs[f"base_model.model.{front}{projection}.lora_B.weight"] = torch.randn(out, 3, generator=generator)
    LoraConfig(r=3, lora_alpha=6, target_modules=["gate_proj", "up_proj", "down_proj"]).save_pretrained(str(tmp_path))
    save_file(pairs, tmp_path / "adapter_model.safetensors")
    base = open_model(checkpoints["air"])
    merged = Merged(base, tmp_path)
    for projection in ("gate_proj", "up_proj", "down_proj"):
        key = f"base_model.model.{front}{projection}"
        delta = 2 * pairs[f"{key}.lora_B.weight"] @ pairs[f"{key}.lora_A.weight"]
        name = f"{front}{projection}.weight"
        assert torch.allclose(merged.read(name).float(), base.read(name).float() + delta, rtol=2**-8, atol=1e-5)


REFUSED = {
    "an activated LoRA": ({"alora_invocation_tokens": [1, 2]}, "switched on by the text"),
    "turned weights": ({"fan_in_fan_out": True}, "the other way round"),
    "blocks": ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
    "Q-A-LoRA": ({"use_qalora": True}, "use_qalora"),
    "a setting of tomorrow": ({"made_up_tomorrow": 0.5}, "made_up_tomorrow"),
    "dora": ({"use_dora": True}, "DoRA"),
    "bias": ({"bias": "lora_only"}, "trained biases"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, "trained whole"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, "changing the base"),
    "another kind": ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
}


@pytest.fixture(scope="module")
def plain(checkpoints, tmp_path_factory):
    directory = tmp_path_factory.mktemp("plain") / "adapter"
    _peft_model(checkpoints["air"], target_modules=["q_proj"], target_parameters=EXPERTS).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_plain_lora_is_refused_with_the_reason(checkpoints, plain, tmp_path, cli, kind):
    changes, reason = REFUSED[kind]
    (tmp_path / "adapter").mkdir()
    config = json.loads((plain / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config | changes))
    save_file(load_file(plain / "adapter_model.safetensors"), tmp_path / "adapter" / "adapter_model.safetensors")
    command = ["convert", "--to-hf", "--model", checkpoints["air"], "--adapter", tmp_path / "adapter", "--output"]
    code, _, err = cli(*command, tmp_path / "out")
    assert code == 2 and reason in err and "Traceback" not in err and not (tmp_path / "out").exists()


def test_experts_of_another_width_are_refused(checkpoints, plain, tmp_path, cli):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text((plain / "adapter_config.json").read_text())
    tensors = load_file(plain / "adapter_model.safetensors")
    name = next(key for key in tensors if ".mlp.experts." in key and key.endswith("lora_B.weight"))
    save_file(
        tensors | {name: torch.zeros(100, tensors[name].shape[1])}, tmp_path / "adapter" / "adapter_model.safetensors"
    )
    command = ["convert", "--to-hf", "--model", checkpoints["air"], "--adapter", tmp_path / "adapter", "--output"]
    code, _, err = cli(*command, tmp_path / "out")
    assert code == 2 and "fits neither gate_up_proj nor down_proj" in err


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda tensors: {k: t for k, t in tensors.items() if "lora_A" not in k}, "has no lora_A beside it"),
        (lambda tensors: {}, "holds no LoRA weights"),
        (lambda tensors: {k: t[:2] if "lora_A" in k else t for k, t in tensors.items()}, "differ in rank"),
    ],
)
def test_half_an_adapter_is_not_merged(checkpoints, tmp_path, change, said):
    _peft_model(checkpoints["air"], target_modules=["q_proj"]).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in change(load_file(file)).items()}, file)
    with pytest.raises(CheckpointError, match=said):
        Merged(open_model(checkpoints["air"]), tmp_path)


@pytest.mark.parametrize(
    "config, said",
    [("{", "not JSON"), ("[]", "holds list; a JSON object"), ('{"peft_type": "LORA"}', "lora_alpha is None")],
)
def test_a_broken_adapter_config_is_a_sentence(checkpoints, tmp_path, config, said):
    _peft_model(checkpoints["air"], target_modules=["q_proj"]).save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text(config)
    with pytest.raises(CheckpointError, match=said):
        Merged(open_model(checkpoints["air"]), tmp_path)
