"""Preference tuning and reinforcement learning give the same numbers under every parallel layout."""

import json
from pathlib import Path

import pytest

WORKER = Path(__file__).parent / "rl_worker.py"
LAYOUTS = {
    "one": {},
    "tensor": {"tensor_model_parallel_size": 2},
    "pipeline": {"pipeline_model_parallel_size": 2},
    "context": {"context_parallel_size": 2},
    "expert": {"expert_model_parallel_size": 2},
}
RL = {
    "rewards": [{"function": "length", "options": {"target": 25}}], "group_size": 4, "max_new_tokens": 24,
    "engine": {"kind": "sglang", "urls": ["http://127.0.0.1:9"]}, "updates_per_rollout": 2, "epsilon": 0.05,
    "kl_estimator": "k3", "kl_coef": 0.1, "importance_sampling": "token", "importance_cap": 3.0,
}  # fmt: skip
KINDS = {
    "gspo": {"rl": RL | {"loss": "gspo", "router_replay": "trainer"}},
    "grpo": {"rl": RL | {"loss_average": "token", "router_replay": "engine", "engine": RL["engine"] | {"kind": "vllm", "sync": "lora"}}},
    "dpo": {"preference": {"sft_weight": 0.1, "length_normalised": True, "beta": 1.0}},
    "kto": {"preference": {"loss": "kto"}},
}  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory, checkpoints, make_recipe, ranks) -> dict[str, list[dict]]:
    """KIND-LAYOUT → metrics of two steps. One start for a single rank, one for two."""
    home = tmp_path_factory.mktemp("rl_layouts")
    prompts = [{"prompt": f"第{n}个问题。" + "Tell me. " * (n % 3)} for n in range(8)]
    pairs = [row | {"chosen": "好 " * (1 + n % 4), "rejected": "no " * (2 + n % 3)} for n, row in enumerate(prompts)]
    for name, rows in (("prompts", prompts), ("pairs", pairs)):
        (home / f"{name}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    def case(kind: str, layout: str, sections: dict, **more) -> dict:
        is_rl, sizes = "rl" in sections, LAYOUTS[layout] | {"world_size": 1 if layout == "one" else 2}
        recipe = make_recipe(
            checkpoints["355b"], home / ("prompts.jsonl" if is_rl else "pairs.jsonl"), home / f"{kind}-{layout}"
        )
        recipe |= sections | {"lora": {"r": 4, "target_modules": "all-linear"}, "parallel": sizes}
        recipe["data"]["format"] = "rl" if is_rl else "preference"
        full = {"recompute_granularity": "full"} if layout in ("pipeline", "one") else {}
        recipe["train"] = {"steps": 2, "global_batch_size": 4, **full}
        return {"name": f"{kind}-{layout}", "recipe": recipe, **more}

    many = [case(kind, layout, sections) for kind, sections in KINDS.items() for layout in LAYOUTS]
    local = {"rl": {name: value for name, value in RL.items() if name != "engine"} | {"router_replay": "engine"}}
    many += [case("local", layout, local, writes=True) for layout in ("tensor", "expert")]
    for count in (1, 2):
        chosen = [case for case in many if case["recipe"]["parallel"]["world_size"] == count]
        (home / f"cases{count}.json").write_text(json.dumps(chosen))
        ranks(count, WORKER, [str(home / f"cases{count}.json"), str(home)])
    return {case["name"]: json.loads((home / f"{case['name']}.json").read_text()) for case in many}


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "one"])
@pytest.mark.parametrize("kind", KINDS)
def test_two_steps_are_the_same_under_every_layout(results, kind, layout):
    """Losses, gradient norms and everything that is counted, 1e-5 in fp32; full recompute on one rank and in the pipeline."""
    for one, other in zip(results[f"{kind}-one"], results[f"{kind}-{layout}"], strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            if name.startswith(("perf/", "moe/", "data/")):
                continue
            assert other[name] == pytest.approx(value, rel=2e-5, abs=2e-6), name
        assert one["train/grad_norm"] > 1e-3


@pytest.mark.parametrize("layout", ["tensor", "expert"])
def test_ranks_write_together_what_they_read_together(results, layout):
    """The local engine under tensor and expert parallelism: its log-probabilities are the trainer's to 1e-5, its experts too."""
    for step in results[f"local-{layout}"]:
        assert 0 < step["rl/logprob_gap_max"] <= 1e-5 and step["rl/replay_gaps"] == 0 and step["rl/answers"] == 16
    assert results[f"local-{layout}"][0]["rl/router_agreement"] > 0.9  # of two updates, the second with other weights
