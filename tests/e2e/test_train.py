"""Runs through the public commands: what a person types, what stands there afterwards, and what happens when it is killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from glm45_tune.conversion.stream import open_model
from glm45_tune.conversion.verify import compare

ROOT = Path(__file__).parents[2]


def command(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    """The command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "glm45_tune", *map(str, arguments)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def children(process: int) -> list[int]:
    return [
        int(each)
        for each in subprocess.run(["pgrep", "-P", str(process)], capture_output=True, text=True).stdout.split()
    ]


def losses(run: Path) -> list[float]:
    return [json.loads(line)["train/loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def write_recipe(checkpoints, corpus, make_recipe, tmp_path):
    def write(name="recipe", model="air", **sections) -> Path:
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(make_recipe(checkpoints[model], corpus, tmp_path / name, **sections)))
        return path

    return write


LORA = {"lora": {"r": 4, "target_modules": "all-linear"}}


def test_two_ranks_train_with_everything_on_and_the_run_can_be_read(write_recipe, tmp_path, checkpoints, cli):
    """Our own launch; expert parallel, MTP, aux loss, recompute, held-out rows, TensorBoard; then a merged export."""
    recipe = write_recipe(
        model="355b",
        **LORA,
        parallel={"expert_model_parallel_size": 2},
        data={"eval_ratio": 0.2},
        train={"steps": 4, "eval_interval": 2, "save_interval": 2, "recompute_granularity": "selective"},
        logging={"tensorboard": True},
    )
    document = yaml.safe_load(recipe.read_text())
    document["model"] |= {"mtp_loss_scaling_factor": 0.1, "moe_aux_loss_coeff": 1e-3}
    recipe.write_text(yaml.safe_dump(document))
    ended = command("train", recipe)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "2 ranks on cpu" in ended.stderr and "step 4/4" in ended.stderr
    run = tmp_path / "recipe"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    wanted = {
        "train/loss", "train/grad_norm", "train/learning_rate", "train/tokens", "train/trained_tokens", "train/aux_loss",
        "train/mtp_loss", "perf/step_seconds", "perf/tokens_per_second_per_gpu", "perf/peak_memory_gib", "data/fill_ratio",
        "moe/expert_load_max_over_mean",
    }  # fmt: skip
    assert wanted <= lines[0].keys()
    assert [("eval/loss" in line) for line in lines] == [False, True, False, True]
    assert lines[-1]["train/loss"] < lines[0]["train/loss"] and lines[0]["train/grad_norm"] > 0
    assert 1 <= lines[0]["moe/expert_load_max_over_mean"] <= 8 and lines[0]["train/aux_loss"] > 0.5
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step_000002", "step_000004"]
    assert (run / "adapter" / "adapter_config.json").is_file() and list((run / "tensorboard").iterdir())
    assert yaml.safe_load((run / "recipe.yaml").read_text())["lora"]["r"] == 4

    assert cli("export", run, "--output", tmp_path / "merged")[0] == 0
    base, merged = open_model(checkpoints["355b"]), open_model(tmp_path / "merged")
    changed = {difference["name"] for difference in compare(base, merged).differences}
    assert (
        "model.layers.4.mlp.experts.7.down_proj.weight" in changed
        and "model.layers.5.self_attn.q_proj.weight" in changed
    )
    assert not any("norm" in name or "gate.weight" in name for name in changed)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_run_killed_between_two_steps_ends_as_if_it_had_not_been(write_recipe, tmp_path, kind):
    """kill −9 of one rank; the same command again; equal losses, step for step."""
    sections = {**(LORA if kind == "lora" else {}), "train": {"steps": 8, "save_interval": 3}}
    sections["parallel"] = {"expert_model_parallel_size": 2}
    assert command("train", write_recipe("whole", **sections)).returncode == 0
    recipe = write_recipe("killed", **sections)
    started = subprocess.Popen(
        [sys.executable, "-m", "glm45_tune", "train", str(recipe)], stderr=subprocess.PIPE, text=True
    )
    metrics = tmp_path / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 4):
        assert time.monotonic() < deadline and started.poll() is None
        time.sleep(0.02)
    (starter,) = children(started.pid)
    os.kill(children(starter)[-1], signal.SIGKILL)
    assert started.wait(timeout=60) == 1  # one rank gone ends them all
    started.stderr.close()
    again = command("train", recipe)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "resumed after step 3" in again.stderr or "resumed after step 6" in again.stderr
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


def test_torchrun_and_another_layout_go_on_where_a_run_stopped(write_recipe, tmp_path, cli):
    """Steps 1–3 under expert parallel 2, 4–6 by torchrun under pipeline 2: the losses of one layout, 1e-5 relative."""
    whole = write_recipe("whole", **LORA, train={"steps": 6})
    assert cli("train", whole)[0] == 0
    recipe = write_recipe(
        "moved", **LORA, train={"steps": 6, "save_interval": 3}, parallel={"expert_model_parallel_size": 2}
    )
    assert command("train", recipe).returncode == 0
    run = tmp_path / "moved"
    for path in (run / "checkpoints" / "step_000006").iterdir():
        path.unlink()  # as if it had been stopped after step 3
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "glm45_tune",
    ]
    layout = ["parallel.expert_model_parallel_size=1", "parallel.pipeline_model_parallel_size=2"]
    ended = subprocess.run([*torchrun, "train", str(recipe), *layout], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-3000:]
    for a, b in zip(losses(run), losses(tmp_path / "whole"), strict=True):
        assert abs(a / b - 1) <= 1e-5


def test_a_streamed_run_stopped_and_moved_goes_on_with_the_same_rows(write_recipe, corpus, tmp_path, cli):
    """data.streaming: six steps on two data-parallel ranks; 4–6 again on one, from the third's checkpoint: equal losses, 1e-5.

    Of 25 rows a window holds 10, so the run goes on within a window of the second epoch; the bad row is counted at the end.
    """
    path = tmp_path / "rows.jsonl"
    path.write_text(corpus.read_text(encoding="utf-8") + "{}\n", encoding="utf-8")
    data = {"train": str(path), "streaming": True, "streaming_window": 10, "on_bad_row": "skip", "seq_length": 256}
    train = {"steps": 6, "save_interval": 3, "global_batch_size": 4}
    recipe = write_recipe("moved", **LORA, data=data, train=train)
    assert command("train", recipe, "parallel.world_size=2").returncode == 0
    run = tmp_path / "moved"
    whole = losses(run)
    for file in (run / "checkpoints" / "step_000006").iterdir():
        file.unlink()  # as if it had been stopped after step 3
    code, _, err = cli("train", recipe)
    assert code == 0 and "resumed after step 3" in err, err[-3000:]
    assert "streamed in windows of 10 rows" in err and "bad rows skipped" in err.splitlines()[-1]
    for a, b in zip(losses(run), whole, strict=True):
        assert abs(a / b - 1) <= 1e-5


def test_a_merged_export_answers_and_chat_streams_it(checkpoints, tmp_path, cli):
    ended = command("chat", checkpoints["air"], "--prompt", "你好", "--no-think", "--max-new-tokens", "8")
    assert ended.returncode == 0 and ended.stdout.strip()
    data = ROOT / "data_examples" / "seats_new_phrasing.jsonl"
    (score,) = json.loads(cli("eval", checkpoints["air"], "--data", data, "--max-new-tokens", "4", "--json")[1])
    assert score["num_questions"] == 34 and score["exact"] == 0.0 and len(score["rows"]) == 34


def test_wandb_offline_or_a_clear_sentence(write_recipe, tmp_path, cli):
    recipe = write_recipe(logging={"wandb_project": "glm"})
    try:
        import wandb  # noqa: F401
    except ImportError:
        code, _, err = cli("train", recipe)
        assert code == 2 and "pip install wandb" in err
        return
    ended = command("train", recipe, WANDB_MODE="offline")
    assert ended.returncode == 0 and list((tmp_path / "recipe" / "wandb").glob("offline-run-*"))


def test_without_wandb_the_sentence_is_clear(write_recipe, cli, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    code, _, err = cli("train", write_recipe(logging={"wandb_project": "glm"}))
    assert code == 2 and "pip install wandb" in err and "Traceback" not in err


def test_a_base_model_without_a_template_learns_text_and_says_what_conversations_need(
    checkpoints, corpus, make_recipe, tmp_path, cli
):
    base, rows, recipe = tmp_path / "base", tmp_path / "rows.jsonl", tmp_path / "recipe.yaml"
    shutil.copytree(checkpoints["air"], base, ignore=shutil.ignore_patterns("chat_template.jinja"))
    rows.write_text("".join(json.dumps({"text": f"Line {number} of a book. " * 9}) + "\n" for number in range(8)))
    recipe.write_text(yaml.safe_dump(make_recipe(base, rows, tmp_path / "run", lora={"r": 2}, train={"steps": 1})))
    assert cli("train", recipe)[0] == 0 and cli("export", tmp_path / "run", "--output", tmp_path / "tuned")[0] == 0
    assert not (tmp_path / "tuned" / "chat_template.jinja").exists()
    code, _, said = cli("train", recipe, f"data.train={corpus}", f"output_dir={tmp_path / 'other'}")
    assert code == 2 and f"{corpus}:1: the checkpoint has no chat template" in said.replace("\n", "")
    code, _, said = cli("chat", tmp_path / "tuned", "--prompt", "?")
    assert code == 2 and "put the chat_template.jinja of its chat model beside its tokenizer" in said.replace("\n", " ")


def test_auto_recompute_is_the_least_that_the_free_memory_allows(
    train_here, make_recipe, checkpoints, corpus, tmp_path, monkeypatch, capsys
):
    """Room for all but two of the layers' activations, room for all, and room for none: the same losses, and it says what it chose."""
    from glm45_tune.plan.memory import GIB, Model
    from glm45_tune.recipe import Recipe
    from glm45_tune.spec import ModelSpec
    from glm45_tune.training import card

    spec = ModelSpec.from_config(json.loads((checkpoints["355b"] / "config.json").read_text()), "config.json")
    document = make_recipe(
        checkpoints["355b"], corpus, tmp_path / "plain", **LORA, train={"steps": 2, "recompute_granularity": "auto"}
    )
    recipe = Recipe.from_dict(document)
    model = Model(spec, recipe.parallel.layout(), recipe)
    needed = [model.memory(0, model.first_layers(0, again)).needed / GIB for again in range(spec.num_layers + 1)]
    assert all(more > less for more, less in zip(needed, needed[1:]))
    runs = []
    for chosen, free in ((0, 100.0), (2, needed[2]), (spec.num_layers, 0.5)):
        monkeypatch.setattr(card, "_free_gib", lambda free=free: free)
        runs.append(losses(train_here(document | {"output_dir": str(tmp_path / str(chosen))})))
        assert f"recompute auto: the first {chosen} layers" in capsys.readouterr().err
    assert runs[0] == runs[1] == runs[2]
