"""Rollouts from servers: an imitation of vLLM's and SGLang's interfaces over the real model, which dies, hangs and lies when told to."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch

from glm45_tune.conversion.adapter import Merged
from glm45_tune.conversion.hf_files import HfDir
from glm45_tune.conversion.stream import open_model, to_hf
from glm45_tune.conversion.verify import compare
from glm45_tune.errors import RecipeError, UserError
from glm45_tune.mcore import runtime
from glm45_tune.mcore.live import LiveModel, on_first_rank
from glm45_tune.mcore.step import Trainer
from glm45_tune.recipe import Recipe
from glm45_tune.rl.dialects import BadAnswer, check
from glm45_tune.rl.engine import Completion, Request
from glm45_tune.training import loop
from glm45_tune.training.prepare import prepare

FAKE = Path(__file__).parent / "fake_engine.py"
sys.path.insert(0, str(FAKE.parent))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("served") / "prompts.jsonl"
    rows = [{"prompt": f"第{n}个问题。" + "Tell me. " * (n % 3), "target": 3} for n in range(6)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


@pytest.fixture
def make(checkpoints, prompts, make_recipe, tmp_path, backend):
    """A checked job whose answers a server of ours writes; `orders` is the file by which it is told to misbehave."""

    def job(dialect="vllm", engine=(), steps=2, lora=True, **rl):
        orders = tmp_path / "orders"
        command = [sys.executable, str(FAKE), backend.url, dialect, "{model}", "{port}", str(orders)]
        recipe = make_recipe(
            checkpoints["air-no-mtp"], prompts, tmp_path / "run", train={"steps": steps, "global_batch_size": 2}
        )
        recipe["data"] |= {"format": "rl"}
        recipe |= {"lora": {"r": 4, "target_modules": "all-linear"}} if lora else {}
        served = {"kind": dialect, "command": command, "timeout_seconds": 60, "start_seconds": 120} | dict(engine)
        recipe["rl"] = {
            "rewards": [{"function": "length", "options": {"target": 30}}],
            "group_size": 2,
            "max_new_tokens": 6,
        }
        recipe["rl"] |= {"engine": served} | rl
        return prepare(Recipe.from_dict(recipe))

    job.orders = tmp_path / "orders"
    return job


def run(job) -> list[dict]:
    loop.run(job)
    return [json.loads(line) for line in (job.run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("dialect, lora", [("vllm", True), ("sglang", False)])
def test_a_server_gets_every_update_and_its_answers_are_on_policy(make, dialect, lora):
    """Weights by a new start (vllm) and in place (sglang), adapter merged or all weights trained; each tried: 1e-4, gaps 1e-4."""
    steps = run(make(dialect, lora=lora, steps=2, temperature=0.8))
    for number, step in enumerate(steps):
        assert step["rl/sync_gap"] <= 1e-4 and step["rl/logprob_gap_max"] <= 1e-4 and step["rl/ratio_max"] == 1
        assert step["rl/version"] == number + 1 and step["rl/aborted"] == 0 and step["train/grad_norm"] > 0
    assert not any(name.startswith("rl/engine_faults") for name in steps[-1])


def test_a_server_that_dies_hangs_or_answers_badly(make):
    """In the middle of a rollout; the run goes on with the same weights, and says what happened."""
    job = make(engine={"timeout_seconds": 10}, steps=1)
    runtime.start(job.layout)
    from glm45_tune.training.engines import ServedEngine

    trainer = Trainer(job.recipe, job.layout, job.source)
    job.run.mkdir(parents=True, exist_ok=True)
    engine = ServedEngine(job, trainer)
    try:
        engine.synchronise(0)
        for number, (fault, kind) in enumerate([("die", "unreachable"), ("hang", "hung")], start=1):
            make.orders.write_text(fault)
            answers = engine.generate([Request(job.train.samples[n].input_ids.tolist(), 4) for n in range(3)], seed=0)
            assert all(answer.finish in ("stop", "length") for answer in answers)
            metrics = engine.metrics()
            assert metrics[f"rl/engine_faults/{kind}"] >= 1 and metrics["rl/engine_faults/started again"] == number
        # a token is missing from every answer: each is asked for three times, counted, and in the end left out
        make.orders.write_text("short")
        answers = engine.generate([Request(job.train.samples[n].input_ids.tolist(), 4) for n in range(3)], seed=0)
        assert [answer.finish for answer in answers] == ["aborted"] * 3
        assert (
            engine.metrics()["rl/engine_faults/bad answer"] == 9 and engine.metrics()["rl/engine_faults/given up"] == 3
        )
        with pytest.raises(UserError, match="tokens came with"):
            engine.synchronise(1)
    finally:
        engine.close()


def test_stale_weights_are_noticed_and_a_new_start_mends_them(make):
    """The server says that it took the new weights and did not."""
    job = make("sglang", steps=2, engine={"probe_tolerance": 1e-4})
    make.orders.write_text("stale")
    steps = run(job)
    assert steps[1]["rl/engine_faults/weights not taken"] == 1 and steps[1]["rl/sync_gap"] <= 1e-4


def test_another_model_behind_a_url_is_refused(make, checkpoints, backend):
    port = 18000 + os.getpid() % 2000
    other = str(checkpoints["air-other"])
    server = subprocess.Popen([sys.executable, str(FAKE), backend.url, "sglang", other, str(port), str(make.orders)])
    try:
        make.orders.write_text("stale")
        job = make("sglang", engine={"urls": [f"http://127.0.0.1:{port}"], "command": []})
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                httpx.get(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            except httpx.HTTPError:
                time.sleep(0.3)
        with pytest.raises(UserError, match="another model or older weights"):
            loop.run(job)
    finally:
        server.kill()
        server.wait()


def test_a_server_that_is_not_there_or_does_not_start_is_said(make):
    with pytest.raises(UserError, match="Does the server run"):
        loop.run(make("sglang", engine={"urls": ["http://127.0.0.1:9"], "command": []}))
    with pytest.raises(UserError, match="ended with code 1 before it answered"):
        loop.run(make(engine={"command": [sys.executable, "-c", "raise SystemExit(1)"]}))
    with pytest.raises(RecipeError, match="either urls of running servers or a command"):
        make(engine={"command": []})
    with pytest.raises(RecipeError, match="new start alone"):
        make(engine={"urls": ["http://127.0.0.1:9"], "command": []})


def test_a_server_ends_with_a_trainer_that_is_killed(tmp_path):
    """kill −9 of the process that started it."""
    code = (
        "import sys, time; from pathlib import Path; from glm45_tune.objectives import EngineConfig\n"
        "from glm45_tune.rl.servers import Servers\n"
        "command = [sys.executable, '-m', 'http.server', '{port}', '--bind', '127.0.0.1']\n"
        "servers = Servers(EngineConfig(kind='vllm', command=command), 'x', 1.0, [1], Path(sys.argv[1]))\n"
        "servers._dialect.health = '/'\n"
        "servers.start(); print(servers._process.pid, flush=True); time.sleep(60)"
    )
    trainer = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "log")], stdout=subprocess.PIPE, text=True)
    server = int(trainer.stdout.readline())
    os.kill(trainer.pid, signal.SIGKILL)
    trainer.wait()
    trainer.stdout.close()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{server}/stat").read_text().split()[2] == "Z":
                return
        except FileNotFoundError:
            return
        time.sleep(0.1)
    os.kill(server, signal.SIGKILL)
    raise AssertionError("the server outlived its trainer")


@pytest.mark.parametrize(
    "completion",
    [
        Completion([5, 6], [-1.0], "length", 0),
        Completion([5], [-1.0], "length", 0),
        Completion([5, 6], [-1.0, -1.0], "stop", 0),
        Completion([], [], "stop", 0),
        Completion([5, 9], [-1.0, float("nan")], "stop", 0),
        Completion([5, 9], [-1.0, 0.5], "stop", 0),
    ],
)
def test_what_no_answer_can_be(completion):
    with pytest.raises(BadAnswer):
        check(completion, Request([1], 2), [9])
    check(Completion([5, 9], [-1.0, -0.1], "stop", 0), Request([1], 2), [9])


@pytest.mark.parametrize("lora", [True, False])
def test_the_weights_in_training_can_be_written_as_they_stand(make, tmp_path, lora):
    """All weights: what was loaded comes out, byte for byte. An adapter: the merge of what a checkpoint's adapter gives."""
    from glm45_tune.conversion.adapter import write_peft, write_peft_of
    from glm45_tune.mcore import checkpoint

    job = make(lora=lora)
    runtime.start(job.layout)
    trainer = Trainer(job.recipe, job.layout, job.source)
    if not lora:
        on_first_rank(trainer.module, lambda live: to_hf(LiveModel(job.source, live), tmp_path / "out", workers=1))
        assert not compare(HfDir(tmp_path / "out"), job.source).differences
        return
    with torch.no_grad():
        for name, parameter in trainer.module.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    on_first_rank(trainer.module, lambda live: write_peft_of(live, job.recipe.lora, job.source, tmp_path / "live"))
    for optimizer in checkpoint._optimizers(trainer).values():
        optimizer._init_optimizer_states_with_dummy_values()  # before the first step there is none to save
    snapshot = checkpoint.Snapshot()
    snapshot.take(trainer)
    snapshot.write(tmp_path / "saved", job.source.config, {"step": 0}, torch.distributed.new_group(backend="gloo"))
    write_peft(tmp_path / "saved", job.recipe.lora, job.source, tmp_path / "after")
    first, second = (Merged(open_model(job.recipe.model.path), tmp_path / name) for name in ("live", "after"))
    assert not compare(first, second).differences
    assert compare(first, job.source).differences


def test_a_fault_in_what_the_first_rank_does_reaches_every_rank(make):
    job = make()
    runtime.start(job.layout)
    trainer = Trainer(job.recipe, job.layout, job.source)

    def work(live):
        raise UserError("the disk is full")

    with pytest.raises(UserError, match="the disk is full"):
        on_first_rank(trainer.module, work)
    assert np.isfinite(trainer.score([1, 2, 3])).all()
