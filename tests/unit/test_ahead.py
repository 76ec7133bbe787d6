"""Answers written while the trainer updates, and answers of several versions: the order of versions, the bound, what is kept, resume."""

import json
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from glm45_tune.data.chat import Sample
from glm45_tune.errors import RecipeError
from glm45_tune.mcore import runtime
from glm45_tune.mcore.step import Trainer
from glm45_tune.recipe import Recipe
from glm45_tune.rl.engine import Completion, Request
from glm45_tune.training import loop
from glm45_tune.training.ahead import Ahead
from glm45_tune.training.engines import ServedEngine
from glm45_tune.training.prepare import prepare
from glm45_tune.training.rollout import Prompts

FAKE = Path(__file__).parent / "fake_engine.py"
sys.path.insert(0, str(FAKE.parent))


# -- against an engine that is a table -----------------------------------------------------------------------------------------


class Table:
    """Writes tokens whose ids count up from the prompt's, `length(prompt)` of them; what is broken off got `quantum` of them."""

    def __init__(self, length, quantum: int):
        self._length, self._quantum, self.version, self.is_waited_for = length, quantum, 0, bool

    def write(self, requests: list[Request], seed: int, enough) -> list[Completion]:
        wanted = [self._length(request.token_ids[0]) - (len(request.token_ids) - 1) for request in requests]
        quantum, version = self._quantum, self.version
        while max(wanted) > quantum and not enough([n for n, count in enumerate(wanted) if count <= quantum]):
            time.sleep(0.001)  # the trainer is busy
            quantum += self._quantum * self.is_waited_for()
        found = []
        for request, count in zip(requests, wanted):
            ids = [request.token_ids[-1] + 1 + n for n in range(min(count, quantum))]
            finish = "stop" if count <= quantum else "broken off"
            found.append(Completion(ids, [-0.01 * (version + 1)] * len(ids), finish, version))
        return found


def make_ahead(length, quantum=4, staleness=2, extra=2, updates=1) -> tuple[Ahead, Table]:
    """Two prompts a step, two answers each, over 5 prompts whose only token is their number times 1000."""
    samples = [Sample(np.array([1000 * (n + 1)], np.int32), np.zeros(1, np.float32), "x", n) for n in range(5)]
    rl = SimpleNamespace(
        staleness=staleness, extra_prompts=extra, updates_per_rollout=updates, group_size=2, max_new_tokens=900
    )
    train, data = SimpleNamespace(global_batch_size=2, seed=1), SimpleNamespace(seq_length=1000)
    job = SimpleNamespace(
        recipe=SimpleNamespace(rl=rl, asked_rl=rl, train=train, data=data),
        train=SimpleNamespace(samples=samples),
        num_steps=99,
    )
    engine = Table(length, quantum)
    ahead = Ahead(job, engine, Prompts(job))
    engine.is_waited_for = ahead._is_wanted.is_set
    return ahead, engine


def steps_of(ahead: Ahead, engine: Table, count: int, updates: int = 1):
    """(version, answers, metrics) of each step of a run that makes `updates` updates a step."""
    version = 0
    for step in range(count):
        if not ahead.is_writing:
            engine.version = version
            ahead.start(step, version)
        answers, metrics = ahead.take(version)
        yield version, answers, metrics
        engine.version = version
        ahead.start(step + 1, version)
        version += updates


@pytest.fixture
def short_and_long():
    """prompt → tokens of its answers: one prompt of five needs six times as many as the others."""
    return lambda prompt: 24 if prompt == 2000 else 4


@pytest.mark.parametrize("updates", [1, 3])
def test_one_step_ahead_every_token_is_one_rollout_old(one_rank, short_and_long, updates):
    """Nothing is broken off: from the second step on all is written by the weights that the step before began with."""
    ahead, engine = make_ahead(short_and_long, staleness=1, extra=0, updates=updates)
    for version, answers, metrics in steps_of(ahead, engine, 6, updates):
        age = updates if version else 0
        assert metrics["rl/staleness_mean"] == metrics["rl/staleness_max"] == age
        assert metrics["rl/broken_off"] == metrics["rl/too_old"] == metrics["rl/partial_answers"] == 0
        assert [answer.group for answer in answers] == [0, 0, 1, 1] and all(a.version == version - age for a in answers)
    ahead.close()


def partial_run(short_and_long, count=40):
    ahead, engine = make_ahead(short_and_long, staleness=3, extra=2)
    found = list(steps_of(ahead, engine, count))
    ahead.close()
    return found, ahead


def test_what_is_broken_off_goes_on_token_by_token_and_no_prompt_is_lost(one_rank):
    """Tokens count up from the prompt through every break; each has the version and the log-probability it was written with."""
    found, ahead = partial_run(lambda prompt: 9 if prompt == 2000 else 4)
    several = 0
    for version, answers, _ in found:
        for answer in answers:
            prompt = answer.token_ids[0]
            assert answer.token_ids == list(range(prompt, prompt + 1 + (9 if prompt == 2000 else 4)))
            assert answer.versions[0] == -1 and answer.versions[1:] == sorted(answer.versions[1:])
            assert answer.logprobs[1:] == [-0.01 * (v + 1) for v in answer.versions[1:]]
            assert version - answer.oldest <= 3 and answer.finish == "stop"
            several += len(set(answer.versions[1:])) > 1
    assert several == sum(metrics["rl/partial_answers"] for _, _, metrics in found) > 0
    assert sum(metrics["rl/broken_off"] for _, _, metrics in found) > 0
    taken = Counter(answers[n].sample.line for _, answers, _ in found for n in (0, 2))
    pending = Counter(number % 5 for number in ahead.pending)
    assert (
        sum(taken.values()) == 80 and len(set((taken + pending).values())) <= 2
    )  # five prompts in turn, none twice, none lost
    assert max((taken + pending).values()) - min((taken + pending).values()) <= 1


def test_what_is_older_than_the_bound_is_never_trained_and_a_twin_without_the_check_is_seen(
    one_rank, short_and_long, monkeypatch
):
    """Answers that no three rollouts can finish are begun anew, counted, and still done in the end."""
    found, _ = partial_run(short_and_long)
    assert max(metrics["rl/staleness_max"] for _, _, metrics in found) <= 3
    assert sum(metrics["rl/too_old"] for _, _, metrics in found) > 0
    monkeypatch.setattr(Ahead, "_renew", lambda *_: None)
    twin, _ = partial_run(short_and_long)
    assert max(metrics["rl/staleness_max"] for _, _, metrics in twin) > 3


def test_what_became_too_old_while_it_waited_is_written_anew_before_the_step(one_rank):
    """More updates passed than were foreseen: the step waits for answers within the bound."""
    ahead, engine = make_ahead(lambda prompt: 4, staleness=1, extra=0)
    ahead.start(0, 0)
    ahead._order.result()
    engine.version = 5
    answers, metrics = ahead.take(5)
    ahead.close()
    assert metrics["rl/too_old"] == 4 and metrics["rl/staleness_max"] == 0 and {a.oldest for a in answers} == {5}


def test_a_fault_of_the_writing_thread_is_raised_where_the_step_waits(one_rank, short_and_long):
    ahead, engine = make_ahead(short_and_long)
    engine.write = lambda *_: 1 / 0
    ahead.start(0, 0)
    with pytest.raises(ZeroDivisionError):
        ahead.take(0)
    ahead.close()


def test_a_run_that_ends_early_breaks_off_what_is_being_written(one_rank):
    ahead, _ = make_ahead(lambda prompt: 500)
    ahead.start(0, 0)
    assert not ahead._order.done()
    ahead.close()
    assert ahead._order.done() and all(answer.length == 4 for group in ahead._groups for answer in group.answers)


# -- against servers -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("ahead") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"第{n}个问题。"}, ensure_ascii=False) + "\n" for n in range(6)))
    return path


@pytest.fixture
def make(checkpoints, prompts, make_recipe, tmp_path, backend):
    """A checked job of two prompts a step whose answers a server of ours writes; see test_servers.py."""

    def job(dialect="sglang", steps=3, save=None, held_out=None, **rl):
        command = [sys.executable, str(FAKE), backend.url, dialect, "{model}", "{port}", str(tmp_path / "orders")]
        recipe = make_recipe(checkpoints["air-no-mtp"], prompts, tmp_path / "run")
        recipe["train"] = {"steps": steps, "global_batch_size": 2, "save_interval": save}
        recipe["data"] |= {"format": "rl", "eval": held_out}
        recipe["train"] |= {"eval_interval": held_out and 1}
        recipe["optimizer"] |= {"lr": 3e-3, "min_lr": 3e-3}
        recipe["lora"] = {"r": 4, "target_modules": "all-linear"}
        served = {"kind": dialect, "command": command, "timeout_seconds": 120, "start_seconds": 120}
        recipe["rl"] = {
            "rewards": [{"function": "length", "options": {"target": 30}}],
            "group_size": 2,
            "max_new_tokens": 6,
        }
        recipe["rl"] |= {"engine": served, "staleness": 1} | rl
        return prepare(Recipe.from_dict(recipe))

    return job


def slow(job, number: int) -> str:
    """The order that makes answers to a prompt slow: by the token that tells it from the others."""
    one, other = (Prompts(job).sample(n).input_ids for n in (number, number + 1))
    place = int(np.flatnonzero(one != other)[0])
    return f"slow {place} {one[place]}"


def test_a_step_trains_on_what_was_written_during_the_last_one_and_a_killed_run_goes_on(make):
    """Versions 0, 0, 1: each step's answers are by the weights that the step before began with, on the server and in the sample.

    The run that lost its last step trains the prompts that it had under way, each of the six once.
    """
    job = make(save=2)
    for attempt in range(2):
        loop.run(job)
        steps = [json.loads(line) for line in (job.run / "metrics.jsonl").read_text().splitlines()]
        samples = [json.loads(line) for line in (job.run / "samples.jsonl").read_text().splitlines()]
        assert [step["rl/staleness_max"] for step in steps] == [0, 1, 0 if attempt else 1]
        assert [sample["version"] for sample in samples] == [0] * 8 + [1 + attempt] * 4
        assert {Counter(sample["prompt"] for sample in samples)[s["prompt"]] for s in samples} == {2} and len(
            samples
        ) == 12
        for step in steps:
            assert step["rl/ratio_max"] == 1 and step["rl/sync_gap"] <= 1e-4 and step["rl/aborted"] == 0
            assert (step["rl/logprob_gap_max"] <= 1e-4) == (step["rl/staleness_max"] == 0)  # old weights wrote them
            assert step["perf/waited_seconds"] >= 0
        facts = json.loads((job.run / "checkpoints" / "step_000002" / "complete.json").read_text())
        assert facts["prompts_taken"] == 6 and facts["prompts_again"] == [4, 5]
        (job.run / "checkpoints" / "step_000003" / "complete.json").unlink()


def test_what_is_held_out_is_asked_between_what_is_written_ahead(make, prompts):
    """By the weights that write for the next step, after the last step by the last ones; the steps are those of a run without."""
    loop.run(make(held_out=str(prompts), steps=3))
    job = make(held_out=str(prompts), steps=3)
    steps = [json.loads(line) for line in (job.run / "metrics.jsonl").read_text().splitlines()]
    assert [step["rl/staleness_max"] for step in steps] == [0, 1, 1]
    assert all(step["eval/without_reward"] == 0 and step["rl/ratio_max"] == 1 for step in steps)
    samples = [json.loads(line) for line in (job.run / "samples.jsonl").read_text().splitlines()]
    assert [sample["version"] for sample in samples] == [0] * 8 + [1] * 4


def test_a_server_goes_on_with_new_weights_where_it_was_broken_off(make, tmp_path):
    """Every token's log-probability is that of the weights of its version, 1e-4, and not that of the other ones."""
    job = make(staleness=2, extra_prompts=1, max_new_tokens=8)
    (tmp_path / "orders").write_text(slow(job, 2))
    runtime.start(job.layout)
    trainer = Trainer(job.recipe, job.layout, job.source)
    job.run.mkdir(parents=True, exist_ok=True)
    engine = ServedEngine(job, trainer)
    ahead = Ahead(job, engine, Prompts(job))
    noise, taken, weights = torch.Generator().manual_seed(0), [], []
    parameters = [p for name, p in trainer.module.named_parameters() if name.endswith("lora_B")]
    try:
        for version in range(3):
            engine.synchronise(version)
            ahead.start(version, version)
            taken += ahead.take(version)[0]
            if version == 0:
                (tmp_path / "orders").unlink()
                assert any(answer.length for group in ahead._groups for answer in group.answers if not answer.finish)
            with torch.no_grad():
                weights.append([parameter.clone() for parameter in parameters])
                for parameter in parameters:
                    parameter += 0.03 * torch.randn(parameter.shape, generator=noise)
            several = [answer for answer in taken if len(set(answer.versions)) > 2]
            if several:
                break
        assert several and engine.metrics().keys() == {"rl/sync_gap"}
    finally:
        ahead.close()
        engine.close()
    scores = []
    for values in weights:
        with torch.no_grad():
            for parameter, value in zip(parameters, values):
                parameter.copy_(value)
        scores.append([np.array([0.0, *trainer.score(answer.token_ids)]) for answer in several])
    for number, answer in enumerate(several):
        versions, logprobs = np.array(answer.versions), np.array(answer.logprobs)
        for version in set(answer.versions) - {-1}:
            own = versions == version
            assert np.abs(scores[version][number] - logprobs)[own].max() <= 1e-4
            assert np.abs(scores[(version + 1) % len(weights)][number] - logprobs)[own].max() > 1e-3


def test_vllms_answers_under_way_come_back_as_they_are(make, tmp_path):
    """One of two is slow: it is broken off with what it has once the other is there; and without names nothing is."""
    job = make("vllm")
    (tmp_path / "orders").write_text(slow(job, 1))
    runtime.start(job.layout)
    job.run.mkdir(parents=True, exist_ok=True)
    engine = ServedEngine(job, Trainer(job.recipe, job.layout, job.source))
    try:
        engine._servers.start()
        engine._version = 7
        asked = [Request(Prompts(job).sample(n).input_ids.tolist(), 20) for n in range(2)]
        found = engine.write(asked, 0, lambda found: len(found) == 1)
        assert sorted(answer.finish == "broken off" for answer in found) == [False, True]
        (cut,) = [answer for answer in found if answer.finish == "broken off"]
        assert len(cut.token_ids) == len(cut.logprobs) < 20 and cut.version == 7 and not engine._servers.faults
        assert all(answer.finish in ("stop", "length") for answer in engine.generate(asked, 0))
    finally:
        engine.close()


@pytest.mark.parametrize(
    "rl, said",
    [
        ({"engine": {"kind": "local"}}, "engine local writes in the training ranks"),
        ({"tools": "a:b", "max_turns": 2}, "answers of one turn"),
        ({"importance_sampling": "none"}, "needs importance_sampling"),
        ({"extra_prompts": 2}, "needs a staleness of at least 2, and it is 1"),
        ({"staleness": -1}, "staleness"),
    ],
)
def test_what_does_not_go_with_staleness_is_said(make, rl, said):
    with pytest.raises(RecipeError, match=said):
        make(**rl)
