"""A merged export in a real vLLM on the CPU gives transformers' log-probabilities."""

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch
import transformers

from glm45_tune.conversion.adapter import Merged
from glm45_tune.conversion.stream import open_model, to_hf

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
transformers.utils.logging.set_verbosity_error()

pytestmark = pytest.mark.skipif(
    not (ROOT / ".venv-vllm" / "installed").exists(), reason="no .venv-vllm (scripts/setup_vllm.sh needs Python 3.11)"
)


def transformers_logprobs(directory, prompts) -> list[torch.Tensor]:
    model = transformers.Glm4MoeForCausalLM.from_pretrained(str(directory), dtype=torch.float32).eval()
    found = []
    for ids in prompts:
        ids = torch.tensor(ids)
        with torch.no_grad():
            logprobs = model(ids[None]).logits[0, :-1].log_softmax(-1)
        found.append(logprobs.gather(1, ids[1:, None])[:, 0])
    return found


def test_vllm_serves_the_merged_model(checkpoints, tmp_path):
    """Within 1e-3 of transformers for every token of four prompts; the base model's are further away than that (the twin)."""
    adapter = tmp_path / "adapter"
    _random_adapter(adapter)
    to_hf(Merged(open_model(checkpoints["air"]), adapter), tmp_path / "merged")
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(0, 600, (count,), generator=generator).tolist() for count in (5, 17, 40, 64)]
    (tmp_path / "asked.json").write_text(json.dumps(prompts))
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": "2",
    }
    arguments = [str(tmp_path / name) for name in ("merged", "asked.json", "answer.json")]
    log = tmp_path / "vllm.log"
    with open(log, "w") as file:
        server = subprocess.Popen(
            [str(PYTHON), str(Path(__file__).parent / "vllm_logprobs.py"), *arguments],
            env=environment,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
        try:
            code = server.wait(timeout=300)
        finally:
            os.killpg(server.pid, signal.SIGKILL)  # vLLM's engine and worker processes outlive it
    assert code == 0, log.read_text()[-4000:]
    served = [torch.tensor(values) for values in json.loads((tmp_path / "answer.json").read_text())]
    expected = transformers_logprobs(tmp_path / "merged", prompts)
    base = transformers_logprobs(checkpoints["air"], prompts)
    assert max((a - b).abs().max().item() for a, b in zip(served, expected)) <= 1e-3
    assert max((a - b).abs().max().item() for a, b in zip(served, base)) > 1e-2


def _random_adapter(directory: Path) -> None:
    from peft import LoraConfig, get_peft_model

    config = transformers.Glm4MoeConfig(
        num_hidden_layers=3,
        first_k_dense_replace=1,
        hidden_size=128,
        intermediate_size=320,
        moe_intermediate_size=64,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        n_routed_experts=8,
        num_experts_per_tok=2,
        attention_bias=True,
        vocab_size=768,
    )
    model = get_peft_model(
        transformers.Glm4MoeForCausalLM(config),
        LoraConfig(r=4, target_modules=["q_proj", "o_proj"], target_parameters=["mlp.experts.gate_up_proj"]),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(directory)
