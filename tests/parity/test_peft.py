"""Adapters against PEFT: base + adapter there, ours here, and the merged model, all the same function."""

import json

import pytest
import torch
import transformers
from peft import PeftModel

from glm45_tune.conversion.adapter import Merged
from glm45_tune.conversion.stream import open_model
from glm45_tune.hub.export import export
from glm45_tune.mcore import checkpoint, lora
from glm45_tune.mcore.load import load_weights, sharded_tensors
from glm45_tune.mcore.model import GLM45Model
from glm45_tune.mcore.step import Trainer
from glm45_tune.recipe import LoraConfig, Recipe
from glm45_tune.training import record, run_directory
from glm45_tune.training.prepare import prepare
from glm45_tune.training.sft import Supervised

transformers.utils.logging.set_verbosity_error()

TARGETS = {
    "attention": ["linear_qkv", "linear_proj"],
    "all-linear": "all-linear",
    "hf-attention": ["q_proj", "v_proj"],
    "gate-and-up-apart": ["gate_proj", "up_proj"],
    "up-alone": ["up_proj", "k_proj"],
    "experts-down": ["mlp.experts.linear_fc2"],
    "shared-alone": ["shared_experts.linear_fc1"],
}


def _logits(model, tokens):
    with torch.no_grad():
        return model(tokens, torch.arange(len(tokens)), [0, len(tokens)])


def _tokens(spec, count=64):
    return torch.randint(0, spec.vocab_size, (count,), generator=torch.Generator().manual_seed(5))


def _close(a, b, tolerance=1e-5) -> bool:
    return ((a - b).abs().max() / (b.max() - b.min())).item() <= tolerance


def _trained_run(directory, data, run, make_recipe, layout, lora_section, train=None):
    """A run directory with a checkpoint whose lora_B is not zero, and the model in memory."""
    recipe = Recipe.from_dict(make_recipe(directory, data, run, lora=lora_section, train=train or {}))
    job = prepare(recipe)
    trainer = Trainer(recipe, layout, job.source)
    Supervised(job, trainer).train_step(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for shard in sharded_tensors(trainer.module):
            if shard.key.endswith("lora_B"):
                shard.data.copy_(torch.randn(shard.data.shape, generator=generator) * 0.1)
    with run_directory.opened(recipe, job.facts | record.facts(job)):
        pass
    checkpoint.save(trainer, checkpoint.step_directory(run, 1), job.source.config, {"step": 1})
    return trainer.module[0].eval()


def test_lora_starts_as_the_base_bit_for_bit(checkpoints, one_rank):
    source = open_model(checkpoints["air"])
    base, tuned = GLM45Model(source.spec, one_rank), GLM45Model(source.spec, one_rank)
    load_weights(base, source)
    lora.attach(tuned, LoraConfig(r=4, target_modules="all-linear"), seed=1)
    load_weights(tuned, source)
    tokens = _tokens(source.spec)
    assert torch.equal(_logits(base.eval(), tokens), _logits(tuned.eval(), tokens))
    with torch.no_grad():  # the twin: one lora_B that is not zero
        next(p for n, p in tuned.named_parameters() if n.endswith("lora_B")).fill_(0.01)
    assert not torch.equal(_logits(base, tokens), _logits(tuned, tokens))


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("rslora", [False, True], ids=["", "rslora"])
def test_peft_reads_our_adapter(checkpoints, corpus, one_rank, make_recipe, tmp_path, targets, rslora):
    """fp32 logits, 1e-5 of their range; merged by us in fp32: the same."""
    section = {"r": 4, "lora_alpha": 12, "use_rslora": rslora, "target_modules": TARGETS[targets]}
    model = _trained_run(checkpoints["air"], corpus, tmp_path / "run", make_recipe, one_rank, section)
    export(tmp_path / "run", tmp_path / "adapter", adapter_only=True)
    base = transformers.Glm4MoeForCausalLM.from_pretrained(str(checkpoints["air"]), dtype=torch.float32)
    tokens = _tokens(model.spec)
    with torch.no_grad():
        plain = base(tokens[None]).logits[0]
        theirs = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()(tokens[None]).logits[0]
    assert _close(_logits(model, tokens), theirs)
    assert not _close(plain, theirs, 1e-3)  # the twin: without the adapter it is another function

    source = open_model(checkpoints["air"])
    merged = GLM45Model(source.spec, one_rank)
    load_weights(merged, _InFp32(Merged(source, tmp_path / "adapter")))
    assert _close(_logits(merged.eval(), tokens), theirs)


class _InFp32:
    """A Merged reader whose base is widened first, so that merging does not round to bf16."""

    def __init__(self, merged: Merged):
        self.spec, self.path, self.names = merged.spec, merged.path, merged.names
        read = merged.base.read
        merged.base.read = lambda *where: read(*where).float()
        self.read = merged.read


def test_the_merged_export_loads_in_transformers_and_is_the_tuned_model(
    checkpoints, corpus, one_rank, make_recipe, tmp_path
):
    """Every key found, none missing; logits within bf16 rounding of the adapter's."""
    section = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
    model = _trained_run(checkpoints["355b"], corpus, tmp_path / "run", make_recipe, one_rank, section)
    export(tmp_path / "run", tmp_path / "merged")
    loaded, info = transformers.Glm4MoeForCausalLM.from_pretrained(
        str(tmp_path / "merged"), dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert all(key.startswith("model.layers.5.") for key in info["unexpected_keys"])  # the MTP layer, kept for serving
    tokens = _tokens(model.spec)
    with torch.no_grad():
        theirs = loaded(tokens[None]).logits[0]
    assert _close(_logits(model, tokens), theirs, 2e-2)
    base = open_model(checkpoints["355b"])
    merged = open_model(tmp_path / "merged")
    assert set(base.names) == set(merged.names)
    assert torch.equal(base.read("model.layers.5.eh_proj.weight"), merged.read("model.layers.5.eh_proj.weight"))


def test_dropout_trains_and_its_adapter_still_loads(checkpoints, corpus, one_rank, make_recipe, tmp_path):
    section = {"r": 4, "lora_dropout": 0.5, "target_modules": "all-linear"}
    model = _trained_run(checkpoints["air"], corpus, tmp_path / "run", make_recipe, one_rank, section)
    tokens = _tokens(model.spec)
    model.train()
    assert not torch.equal(_logits(model, tokens), _logits(model, tokens))
    model.eval()
    export(tmp_path / "run", tmp_path / "adapter", adapter_only=True)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["lora_dropout"] == 0.0
    base = transformers.Glm4MoeForCausalLM.from_pretrained(str(checkpoints["air"]), dtype=torch.float32)
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()(tokens[None]).logits[0]
    assert _close(_logits(model, tokens), theirs)


def test_an_adapter_of_another_model_is_refused(checkpoints, corpus, one_rank, make_recipe, tmp_path, cli):
    section = {"r": 4, "target_modules": "all-linear"}
    _trained_run(checkpoints["air"], corpus, tmp_path / "run", make_recipe, one_rank, section)
    export(tmp_path / "run", tmp_path / "adapter", adapter_only=True)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    save_file(tensors | {name: torch.zeros(7, 4)}, path)
    code, _, err = cli(
        "convert",
        "--to-hf",
        "--model",
        checkpoints["air"],
        "--adapter",
        tmp_path / "adapter",
        "--output",
        tmp_path / "out",
    )
    assert code == 2 and "q_proj" in err and "another model" in err and not (tmp_path / "out").exists()
