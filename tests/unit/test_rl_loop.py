"""The loop of reinforcement learning with the local engine: exact first updates, resume, bad rewards, refills, tools, replay."""

import json
import math
import os
import signal
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from glm45_tune.errors import STOPPED, DataError, RecipeError, StoppedError, UserError
from glm45_tune.recipe import Recipe
from glm45_tune.rl.engine import Completion
from glm45_tune.rl.losses import answer_weights
from glm45_tune.training import loop
from glm45_tune.training.nonfinite import NonFinite
from glm45_tune.training.policy import PolicyGradient
from glm45_tune.training.prepare import prepare
from glm45_tune.training.rollout import Answer, Roller

LORA = {"lora": {"r": 4, "target_modules": "all-linear"}}
REWARDS = """
import asyncio

def evens(prompt, completion, columns):
    "Worth more the more even its characters: something that every answer of a random model has in some measure."
    return sum(ord(c) % 2 == 0 for c in completion) / max(len(completion), 1)

def same(prompt, completion, columns):
    return 1.0

def sometimes(prompt, completion, columns):
    if len(completion) % 2: raise ValueError("an odd answer")
    return evens(prompt, completion, columns)

def never(prompt, completion, columns):
    raise ConnectionError("no judge at this address")

def oddly(prompt, completion, columns):
    return float(columns["number"] % 2) * evens(prompt, completion, columns)

def waits(prompt, completion, columns):
    import os, time
    while os.path.exists(os.path.join(os.path.dirname(__file__), "wait")): time.sleep(0.05)
    return evens(prompt, completion, columns)

def tool_of_tokens(said, columns):
    text = columns["said"]
    return [{"role": "tool", "content": text}, {"role": "user", "content": [{"type": "text", "text": text}]}]

def tools(completion, columns):
    return [{"role": "tool", "content": "21 度"}] if "度" not in completion else None

def tool_raises(said, columns):
    raise ValueError("no such city")

def tool_text(said, columns): return "21 度"
def tool_message(said, columns): return {"role": "tool", "content": "21 度"}
def tool_number(said, columns): return [{"role": "tool", "content": 21}]
def tool_words(said, columns): return ["21 度"]
async def tool_later(said, columns): return None
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with prompts of different lengths and a module of rewards."""
    directory = tmp_path_factory.mktemp("rl")
    rows = [{"prompt": f"第{n}个问题。" + "Tell me. " * (n % 4), "number": n} for n in range(10)]
    (directory / "prompts.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    (directory / "loop_rewards.py").write_text(REWARDS)
    return directory


@pytest.fixture
def make(checkpoints, place, make_recipe, tmp_path, monkeypatch):
    """A checked job of a small recipe; sections are merged over it."""
    monkeypatch.chdir(place)

    def job(name="run", model="air", **sections):
        recipe = make_recipe(checkpoints[model], place / "prompts.jsonl", tmp_path / name, **LORA)
        recipe |= {"rl": {"rewards": [{"function": "loop_rewards:evens"}], "group_size": 4, "max_new_tokens": 12}}
        for section, values in sections.items():
            recipe[section] = values if values is None else recipe[section] | values
        recipe["data"] |= {"format": "rl"}
        return prepare(Recipe.from_dict(recipe))

    return job


def run(job) -> list[dict]:
    loop.run(job)
    return [json.loads(line) for line in (job.run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "model, rl",
    [
        ("air", {"kl_estimator": "k3", "kl_coef": 0.1, "router_replay": "trainer"}),
        ("355b", {"loss": "gspo", "loss_average": "token", "temperature": 0.7, "router_replay": "engine"}),
        ("air", {"loss": "cispo", "kl_estimator": "k1", "kl_coef": 0.1, "advantage": "leave_one_out"}),
    ],
)  # fmt: skip
def test_a_first_update_is_exactly_on_policy(make, model, rl):
    """Recomputed log-probabilities: ratio exactly 1, divergence from the reference exactly 0; the engine's within 1e-5 of them."""
    first, second = run(make(model=model, rl=rl, train={"steps": 2}))
    assert first["rl/ratio_mean"] == first["rl/ratio_max"] == 1 and first["rl/clipped_share"] == 0
    assert first.get("rl/kl", 0) == 0 and (second["rl/kl"] > 0 if "kl_coef" in rl else "rl/kl" not in second)
    assert 0 < first["rl/logprob_gap_mean"] <= 1e-5 or first["rl/logprob_gap_max"] == 0
    assert first["rl/effective_sample_size"] == pytest.approx(1, abs=1e-5) and first["train/grad_norm"] > 0
    assert second["rl/ratio_max"] == 1 and second["rl/version"] == 2
    if rl.get("router_replay") == "engine":
        assert first["rl/router_agreement"] > 0.999 and first["rl/replay_gaps"] == 0


def test_later_updates_of_a_rollout_leave_the_old_policy(make):
    """Four updates from one rollout: ratios differ from 1, some are clipped; as many versions pass."""
    (step,) = run(make(rl={"updates_per_rollout": 4, "epsilon": 0.01}, train={"steps": 1}, optimizer={"lr": 5e-3}))
    assert step["rl/ratio_max"] > 1.01 and step["rl/clipped_share"] > 0 and step["rl/version"] == 4


def test_the_gradient_is_that_of_the_formula_whatever_the_packing(make):
    """GRPO's gradient from packed micro batches against answers one by one: loss and every adapter's gradient, 1e-5."""
    from glm45_tune.mcore import runtime
    from glm45_tune.mcore.step import Trainer

    job = make(rl={"advantage": "centred"})
    runtime.start(job.layout)
    found = {}
    for size in (1, 2):
        trainer = Trainer(job.recipe, job.layout, job.source)
        method = PolicyGradient(job, trainer)
        answers = method._roller.roll(0).answers
        method.close()
        if size == 2:
            lengths = [len(answer.token_ids) for answer in answers]
            weights = answer_weights(np.array([answer.length for answer in answers]), "sequence", 12)
            parameters = [p for p in trainer.module.parameters() if p.requires_grad]
            trainer._wrapped[0].zero_grad_buffer()
            total = 0.0
            for answer, weight in zip(answers, weights):
                ids = torch.tensor(answer.token_ids)
                model = trainer.module[0].eval()
                logp = -model(ids, torch.arange(len(ids)), [0, len(ids)], torch.roll(ids, -1)[None])[0, :-1]
                mask = torch.tensor(answer.written[1:], dtype=torch.float32)
                loss = -(weight * answer.advantage * (logp - logp.detach()).exp() * mask).sum()
                loss.backward()
                total += loss.item()
            assert len(lengths) == 16
            # megatron's hooks sum gradients into main_grad as they do in training
            found[size] = total, [parameter.main_grad.clone() for parameter in parameters]
        else:
            batches = method._with_old(method._batches(answers))
            assert len(batches) < len(answers)
            trainer._wrapped[0].zero_grad_buffer()
            trainer.optimizer.zero_grad()
            trainer._wrapped[0].train()
            sums = trainer._sum(trainer._run(iter(batches), len(batches), method._objective, forward_only=False))
            parameters = [p for p in trainer.module.parameters() if p.requires_grad]
            found[size] = sums["loss"], [parameter.main_grad.clone() for parameter in parameters]
    assert found[1][0] == pytest.approx(found[2][0], abs=1e-6)
    largest = max(gradient.abs().max() for gradient in found[2][1])
    for a, b in zip(found[1][1], found[2][1], strict=True):
        assert (a - b).abs().max() <= 1e-5 * largest
    assert largest > 0


def test_a_run_stopped_and_started_again_has_the_same_prompts_left(make):
    """Six steps over ten prompts against three and three: the same rewards and losses, step for step."""
    whole = run(make("whole", train={"steps": 6}))
    job = make("stopped", train={"steps": 6, "save_interval": 3})
    run(job)
    for path in (job.run / "checkpoints" / "step_000006").iterdir():
        path.unlink()
    again = run(make("stopped", train={"steps": 6, "save_interval": 3}))
    for a, b in zip(whole, again, strict=True):
        for name in ("rl/reward_mean", "train/loss", "train/grad_norm", "rl/response_tokens_mean", "rl/version"):
            assert a[name] == b[name], (a["step"], name)
    facts = json.loads((job.run / "checkpoints" / "step_000006" / "complete.json").read_text())
    assert facts["prompts_taken"] == 24
    samples = [json.loads(line) for line in (job.run / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [step for step in range(1, 7) for _ in range(4)]


def test_held_out_prompts_are_answered_and_training_does_not_notice(make, place):
    """The same draw at each evaluation: with a learning rate of next to nothing the same reward. The best checkpoint is the dearest."""
    (place / "held_out.jsonl").write_text('{"prompt": "多少？", "number": 1}\n{"prompt": "Why?", "number": 2}\n')
    still = {"lr": 1e-12, "min_lr": 1e-12}
    plain = run(make("plain", train={"steps": 3}))
    held_out = {
        "train": {"steps": 3, "eval_interval": 1, "save_best": True},
        "data": {"eval": str(place / "held_out.jsonl")},
    }
    job = make("held out", **held_out)
    steps = run(job)
    for a, b in zip(plain, steps, strict=True):
        assert all(a[name] == b[name] for name in ("rl/reward_mean", "train/loss", "train/grad_norm"))
    worth = [step["eval/reward_mean"] for step in steps]
    assert all(0 < value < 1 for value in worth) and [step["eval/reward/loop_rewards:evens"] for step in steps] == worth
    assert all(0 < step["eval/response_tokens_mean"] <= 12 and step["eval/without_reward"] == 0 for step in steps)
    saved = {path.name for path in (job.run / "checkpoints").iterdir()}
    assert f"step_{1 + worth.index(max(worth)):06d}" in saved
    first, *others = [step["eval/reward_mean"] for step in run(make("still", optimizer=still, **held_out))]
    assert others == [first, first]


def test_a_reward_that_fails_is_counted_and_its_answers_left_out_or_the_run_stops(make, capsys):
    sections = {"rl": {"rewards": [{"function": "loop_rewards:sometimes"}], "group_size": 8}, "train": {"steps": 1}}
    (step,) = run(make(**sections))
    assert 0 < step["rl/without_reward"] < 32
    assert step["rl/reward_errors/loop_rewards:sometimes: raised"] == step["rl/without_reward"]
    assert "an odd answer" in capsys.readouterr().err and math.isfinite(step["rl/reward_mean"])
    sections["rl"]["on_reward_error"] = "stop"
    with pytest.raises(UserError, match="sometimes: raised for .* of 32 answers: ValueError: an odd answer"):
        loop.run(make("stops", **sections))


def test_a_step_without_a_reward_moves_nothing(make, monkeypatch):
    """Nor does the optimizer's momentum of the steps before it."""
    job, seen = make(train={"steps": 3}), []
    judged, update = Roller._judge, PolicyGradient._update

    def third_fails(self, answers, counts, parts):
        judged(self, answers, counts, parts)
        for answer in answers if len(seen) == 2 else ():
            answer.reward = math.nan

    def moved(self, answers, lr):
        weights = [p.detach().clone() for p in self._trainer.module.parameters() if p.requires_grad]
        found = update(self, answers, lr)
        after = [p for p in self._trainer.module.parameters() if p.requires_grad]
        seen.append(any(not torch.equal(a, b) for a, b in zip(weights, after)))
        return found

    monkeypatch.setattr(Roller, "_judge", third_fails)
    monkeypatch.setattr(PolicyGradient, "_update", moved)
    run(job)
    assert seen == [True, True, False]


def test_a_reward_that_fails_for_every_answer_ends_the_run(make, capsys):
    """In one step it may be the answers; in several it is the function, or what it asks."""
    sections = {"rl": {"rewards": [{"function": "loop_rewards:never"}]}, "train": {"steps": 9, "max_skipped_steps": 2}}
    job = make(**sections)
    with pytest.raises(
        StoppedError, match="no answer got a reward in 2 steps in a row, up to step 2 .*max_skipped_steps"
    ):
        loop.run(job)
    said = capsys.readouterr().err
    assert "step 1 is left out: none of its 16 answers got a reward" in said and "ConnectionError: no judge" in said


def test_the_batch_of_a_step_that_is_not_finite_is_its_answers(make, capsys):
    job = make(train={"steps": 1})
    run(job)
    NonFinite(job, 0, writes=True).see(1, {"is_skipped": True, "train/loss": math.nan, "train/grad_norm": math.nan})
    lines = [json.loads(line) for line in (job.run / "nonfinite" / "step_000001.jsonl").read_text().splitlines()]
    assert len(lines) == 16 and all(
        line["source"].endswith("prompts.jsonl") and "个问题" in line["text"] for line in lines
    )
    assert all(0 < sum(line["loss_mask"]) <= 12 and len(line["input_ids"]) == len(line["loss_mask"]) for line in lines)


def test_groups_of_equal_rewards_teach_nothing_and_dynamic_sampling_replaces_them(make):
    (step,) = run(make(rl={"rewards": [{"function": "loop_rewards:same"}]}, train={"steps": 1}))
    assert step["rl/equal_groups_share"] == 1 and step["train/grad_norm"] == 0
    odd = {"rewards": [{"function": "loop_rewards:oddly"}], "dynamic_sampling": True}
    first, second = run(make("filled", rl=odd, train={"steps": 2}))
    assert first["rl/answers"] > 16 and 0 < first["rl/kept_share"] < 1 and first["train/grad_norm"] > 0
    none = {"rewards": [{"function": "loop_rewards:same"}], "dynamic_sampling": True, "max_refills": 1}
    (step,) = run(make("none", rl=none, train={"steps": 1}))
    assert step["rl/kept_share"] == 0 and step["rl/answers"] == 32 and step["train/grad_norm"] == 0


def test_turns_with_tools_train_what_the_model_wrote_alone(make):
    """What the tools said is in the conversation, under the template's own marks, and has no weight."""
    job = make(rl={"tools": "loop_rewards:tools", "max_turns": 3, "max_new_tokens": 40}, data={"seq_length": 256})
    from glm45_tune.mcore import runtime
    from glm45_tune.mcore.step import Trainer

    runtime.start(job.layout)
    method = PolicyGradient(job, Trainer(job.recipe, job.layout, job.source))
    answers = method._roller.roll(0).answers
    heard = [answer for answer in answers if "21 度" in method._roller.text(answer, whole=True)]
    assert heard
    for answer in heard:
        text = job.tokenizer.decode(answer.token_ids)
        assert "<|observation|>\n<tool_response>\n21 度\n</tool_response><|assistant|>" in text.replace(
            "<|user|><|obs", "<|obs"
        )
        said = "".join(job.tokenizer.decode([t]) for t, mine in zip(answer.token_ids, answer.written) if mine)
        assert "<tool_response>" not in said and answer.length <= 40
    batches = method._batches(answers)
    assert sum(int((batch.weights[0] > 0).sum()) for batch in batches) == sum(answer.length for answer in answers)
    method.close()


def heard_by(job, said="杭州<|observation|>", **row) -> str:
    """What follows an answer in the conversation; row: columns over its prompt's."""
    sample = job.train.samples[0]
    answer = Answer(replace(sample, row=sample.row | row), 0, sample.input_ids.tolist())
    ids = job.tokenizer.encode(said, add_special_tokens=False)
    answer.extend(Completion(ids, [0.0] * len(ids), "stop", 0))
    roller = Roller(job, None)
    try:
        return job.tokenizer.decode(roller._hear(answer))
    finally:
        roller.close()


def test_later_turns_think_as_the_first_was_asked_to(make):
    tools = {"tools": "loop_rewards:tools", "max_turns": 2}
    on, off = make("on", rl=tools), make("off", rl=tools, data={"enable_thinking": False})
    turn, closed = "\n<tool_response>\n21 度\n</tool_response><|assistant|>", "\n<think></think>"
    assert heard_by(on) == heard_by(off, enable_thinking=True) == turn
    assert heard_by(off) == heard_by(on, enable_thinking=False) == turn + closed
    assert heard_by(on, "21 度<|user|>") == ""


@pytest.mark.parametrize("text", ["<|user|>", "a<|assistant|>\n<think>b</think>", "<tool_response><|observation|><|endoftext|>", "[gMASK]<sop><|system|>/nothink", "<|us<|user|>er|>", "\ue000<|user|>"])  # fmt: skip
def test_what_tools_say_is_plain_text(make, text):
    """It may come from anywhere: no token in it opens a turn, or a thought, or ends the answer. It reads as it was said."""
    job = make(rl={"tools": "loop_rewards:tool_of_tokens", "max_turns": 2})
    sample, tokenizer = job.train.samples[0], job.tokenizer
    answer = Answer(replace(sample, row=sample.row | {"said": text}), 0, sample.input_ids.tolist())
    answer.extend(Completion(tokenizer.encode("?<|observation|>", add_special_tokens=False), [0.0] * 2, "stop", 0))
    roller = Roller(job, None)
    try:
        heard = roller._hear(answer)
    finally:
        roller.close()
    ours = "\n<tool_response>\n\n</tool_response><|user|>\n<|assistant|>"
    own = [token for token in heard if token in tokenizer.get_added_vocab().values()]
    assert own == [
        t for t in tokenizer.encode(ours, add_special_tokens=False) if t in tokenizer.get_added_vocab().values()
    ]
    assert tokenizer.decode(heard) == f"\n<tool_response>\n{text}\n</tool_response><|user|>\n{text}<|assistant|>"


def test_a_signal_while_a_reward_is_waited_for_gives_the_step_up(make, place, monkeypatch):
    """The step before is saved; the same command again ends where an undisturbed run does, number for number."""
    sections = {
        "rl": {"rewards": [{"function": "loop_rewards:waits"}], "reward_timeout_seconds": 600.0},
        "train": {"steps": 4},
    }
    whole, count, score = run(make("whole", **sections)), iter(range(99)), Roller._score

    def third_waits(self, answers):
        if next(count) == 2:
            (place / "wait").touch()
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        return score(self, answers)

    with monkeypatch.context() as patch:
        patch.setattr(Roller, "_score", third_waits)
        job = make("stopped", **sections)
        try:
            assert loop.run(job) == STOPPED
        finally:
            (place / "wait").unlink(missing_ok=True)
    assert [path.name for path in (job.run / "checkpoints").iterdir()] == ["step_000002"]
    for a, b in zip(whole, run(make("stopped", **sections)), strict=True):
        assert all(a[name] == b[name] for name in ("step", "rl/reward_mean", "train/loss", "train/grad_norm"))


def test_a_reward_that_is_always_the_same_is_told(make, capsys):
    same = {"rl": {"rewards": [{"function": "loop_rewards:same"}]}}
    for steps, when in ((1, "in every step"), (5, "in 5 steps in a row")):
        run(make(f"same {steps}", train={"steps": steps}, **same))
        assert (
            capsys.readouterr().err.count(f"warning: {when}, all answers of each group got the same reward (mean 1)")
            == 1
        )
    run(make("differs", train={"steps": 2}))
    assert "same reward" not in capsys.readouterr().err


def test_a_run_whose_steps_were_all_left_out_is_not_done(make, capsys):
    """Though they were fewer than max_skipped_steps."""
    never = {"rl": {"rewards": [{"function": "loop_rewards:never"}]}}
    with pytest.raises(StoppedError, match="all 2 steps were left out, so nothing was trained"):
        loop.run(make(train={"steps": 2, "max_skipped_steps": 9}, **never))
    assert "done" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, said",
    [
        ("tool_raises", r"raised ValueError: no such city \(.*loop_rewards.py:\d+, tool_raises\), asked about .*prompts.jsonl:1"),
        ("tool_text", "returned str '21 度'; a list of messages"),
        ("tool_message", "returned dict .*; a list of messages"),
        ("tool_number", r"returned what is no list of messages: messages\[0\].content is int"),
        ("tool_words", r"returned what is no list of messages: messages\[0\] is str"),
    ],
)  # fmt: skip
def test_what_a_tool_wrongly_does_is_said(make, name, said):
    with pytest.raises(UserError, match=f"rl.tools loop_rewards:{name}: {said}"):
        heard_by(make(rl={"tools": f"loop_rewards:{name}", "max_turns": 2}))


@pytest.mark.parametrize(
    "name, said",
    [
        ("loop_rewards:no_tool", "no such Python function: loop_rewards has no no_tool"),
        ("no_such_tools:f", "no such Python function: No module named 'no_such_tools'"),
        ("broken_tools:f", "the module broken_tools cannot be imported: SyntaxError"),
        ("loop_rewards:tool_later", "is an async function; a plain function"),
        ("loop_rewards:__name__", "is str; a plain function"),
    ],
)
def test_tools_that_are_none_are_said_before_a_rank_starts(make, place, name, said):
    (place / "broken_tools.py").write_text("def f(:\n")
    with pytest.raises(RecipeError, match=f"rl.tools {name}: {said}"):
        make(rl={"tools": name, "max_turns": 2})


def test_prompts_too_long_and_options_that_do_not_fit_are_said(make, place):
    with pytest.raises(RecipeError, match=r"regex.*pattern"):
        make(rl={"rewards": [{"function": "regex"}]})
    with pytest.raises(RecipeError, match=r"loop_rewards:nofn\): cannot start"):
        make(rl={"rewards": [{"function": "loop_rewards:nofn"}]})
    with pytest.raises(RecipeError, match=r"exact_match\): .*prompts.jsonl:1 has no column 'solution'; it has prompt"):
        make(rl={"rewards": [{"function": "exact_match"}]})
    with pytest.raises(RecipeError, match="no room for a prompt"):
        make(rl={"max_new_tokens": 160})
    with pytest.raises(RecipeError, match="kl_coef needs lora"):
        make(rl={"kl_estimator": "k3", "kl_coef": 0.1}, lora=None)
    with pytest.raises(RecipeError, match="updates_per_rollout 3 does not divide"):
        make(rl={"updates_per_rollout": 3})
    with pytest.raises(DataError, match="exceed data.seq_length 20"):
        make(data={"seq_length": 20}, rl={"max_new_tokens": 8})
