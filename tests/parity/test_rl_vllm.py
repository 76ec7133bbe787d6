"""The loop of reinforcement learning against a real vLLM on the CPU: three updates, each on the server before it writes again."""

import json
from pathlib import Path

import pytest

from glm45_tune.objectives import EngineConfig
from glm45_tune.recipe import Recipe
from glm45_tune.rl.engine import Request
from glm45_tune.rl.servers import Servers
from glm45_tune.training import loop
from glm45_tune.training.prepare import prepare

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-vllm" / "bin" / "python"

pytestmark = pytest.mark.skipif(
    not (ROOT / ".venv-vllm" / "installed").exists(), reason="no .venv-vllm (scripts/setup_vllm.sh needs Python 3.11)"
)


COMMAND = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", "{model}", "--port", "{port}"]
COMMAND += ["--host", "127.0.0.1", "--enforce-eager", "--enable-scale-out"]


@pytest.fixture
def on_a_cpu(monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("VLLM_NO_USAGE_STATS", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_answers_under_way_come_back_as_they_are_and_go_on(checkpoints, on_a_cpu, tmp_path):
    """Long answers are broken off when a short one is there: tokens and log-probabilities of what was written, and no fault."""
    # a random model writes an end of text sooner or later: of three kinds one is left
    command = [*COMMAND, "--dtype", "float32", "--max-model-len", "2048", "--generation-config", "vllm"]
    config, model = EngineConfig(kind="vllm", command=command, start_seconds=900), checkpoints["air-no-mtp"]
    ends = json.loads((model / "config.json").read_text())["eos_token_id"]
    servers = Servers(config, str(model), 1.0, ends, tmp_path / "log")
    servers.start()
    try:
        asked = [Request([5, 6, 7], 8), *(Request([5, 6, last], 1900) for last in range(8, 16))]
        servers.generate(asked[:1], 0, 3)  # a server's first answer may take seconds, and the others stand behind it
        for seed in range(3):  # beside other work a server may hear of the end only when all is written
            found = servers.generate(asked, seed, 3, lambda found: 0 in found)
            assert found[0].finish == "length" and not servers.faults
            assert {answer.finish for answer in found[1:]} <= {"broken off", "stop"}, found
            broken_off = [n for n, answer in enumerate(found) if answer.finish == "broken off" and answer.token_ids]
            if broken_off:
                break
        assert broken_off and all(len(found[n].token_ids) == len(found[n].logprobs) < 1900 for n in broken_off), found
        (more,) = servers.generate(
            [Request([*asked[broken_off[0]].token_ids, *found[broken_off[0]].token_ids], 8)], 0, 4
        )
        assert more.finish in ("length", "stop") and more.version == 4
        (nothing,) = servers.generate(asked[1:2], 0, 4, lambda found: True)
        assert nothing.finish == "broken off" and not servers.faults
    finally:
        servers.stop()


@pytest.mark.parametrize("dtype, law, num_steps", [("float32", 1e-5, 3), ("bfloat16", 0.1, 1)])
def test_updates_against_a_real_server(checkpoints, make_recipe, on_a_cpu, tmp_path, dtype, law, num_steps):
    """Mean |log-probability gap| of the server's answers to the trainer within the law after every update, ratio exactly 1."""
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"第{n}个问题。" + "Tell me. " * (n % 3)} for n in range(6)]
    prompts.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    command = [*COMMAND, "--dtype", dtype, "--max-model-len", "160", "--logprobs-mode", "processed_logprobs"]
    recipe = make_recipe(
        checkpoints["air"], prompts, tmp_path / "run", train={"steps": num_steps, "global_batch_size": 2}
    )
    recipe["model"]["params_dtype"] = {"float32": "fp32", "bfloat16": "bf16"}[dtype]
    recipe["data"] |= {"format": "rl"}
    recipe |= {
        "lora": {"r": 4, "target_modules": "all-linear"},
        "rl": {
            "rewards": [{"function": "length", "options": {"target": 30}}],
            "engine": {"kind": "vllm", "command": command, "start_seconds": 900, "probe_tolerance": 10 * law},
            "group_size": 4,
            "max_new_tokens": 16,
            "temperature": 0.9,
        },
    }
    loop.run(prepare(Recipe.from_dict(recipe)))
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == num_steps
    for step in steps:
        print({name: step[f"rl/{name}"] for name in ("logprob_gap_mean", "logprob_gap_max", "sync_gap")})
        assert 0 < step["rl/logprob_gap_mean"] <= law and step["rl/sync_gap"] <= law
        assert step["rl/ratio_max"] == 1 and step["rl/aborted"] == 0 and step["train/grad_norm"] > 0
    assert not [name for name in steps[-1] if name.startswith("rl/engine_faults")]
