"""Rewards: the built-in ones by example, functions of a user's own that behave and that do not, each fault counted."""

import re
import textwrap
import time

import numpy as np
import pytest

from glm45_tune.errors import RecipeError
from glm45_tune.objectives import RewardConfig
from glm45_tune.rl import rewards
from glm45_tune.rl.sandbox import Worker, check_functions

THOUGHT = "\n<think>8 perhaps</think>\n8"
UNFINISHED = "\n<think>Let me see: 42, or \\boxed{7}. Hmm"
# what the model wrote in two turns, without what the tool said between them
TURNS = "\n<think>先问</think>\n<tool_call>get_weather\n</tool_call><|observation|>\n<think>知道了</think>\n21 度"


@pytest.mark.parametrize(
    "name, options, completion, columns, wanted",
    [
        ("exact_match", {}, THOUGHT, {"solution": 8}, 1),
        ("exact_match", {"column": "city"}, "杭州", {"city": "杭州"}, 1),
        ("exact_match", {}, "88", {"solution": "8"}, 0),
        ("regex", {"pattern": r"\d+"}, "about 12", {}, 1),
        ("regex", {"pattern": r"\d+", "whole": True}, "about 12", {}, 0),
        ("regex", {"pattern": "perhaps"}, THOUGHT, {}, 0),
        ("math", {}, "The answer is $\\frac{1}{2}$.", {"solution": "0.5"}, 1),
        ("math", {}, "so \\boxed{144}", {"solution": "144"}, 1),
        ("math", {}, "so \\boxed{145}", {"solution": "144"}, 0),
        ("math", {}, "$x = 3$", {"solution": "\\frac{6}{2}"}, 1),
        ("math", {}, "no idea", {"solution": "144"}, 0),
        ("json_schema", {"schema": {"type": "object", "required": ["a"]}}, '```json\n{"a": 1}\n```', {}, 1),
        ("json_schema", {}, '{"b": 1}', {"schema": {"type": "object", "required": ["a"]}}, 0),
        ("json_schema", {"schema": {"type": "object"}}, "{a: 1}", {}, 0),
        ("format", {}, THOUGHT, {}, 1),
        ("format", {"thinks": False}, THOUGHT, {}, 0),
        ("format", {"thinks": False}, "8", {}, 1),
        ("format", {}, "<think>a<think>b</think>c", {}, 0),
        ("format", {}, "<think>never ends", {}, 0),
        ("format", {}, "<think>says nothing</think>", {}, 0),
        ("length", {"target": 4}, "1234", {}, 1),
        ("length", {"target": 4}, "12", {}, 0.5),
        ("length", {"target": 4, "tolerance": 2}, "12", {}, 1),
        ("length", {"target": 4}, "x" * 100, {}, 0),
        ("regex", {"pattern": "42"}, UNFINISHED, {}, 0),
        ("regex", {"pattern": "[^0-9]*", "whole": True}, UNFINISHED, {}, 0),
        ("math", {}, UNFINISHED, {"solution": "7"}, 0),
        ("length", {"target": 40, "tolerance": 20}, UNFINISHED, {}, 0),
        ("format", {"thinks": False}, UNFINISHED, {}, 0),
        ("exact_match", {}, TURNS, {"solution": "21 度"}, 1),
        ("exact_match", {}, "\n<tool_call>f\n</tool_call><|observation|>\n21 度", {"solution": "21 度"}, 1),
        ("regex", {"pattern": "21 度", "whole": True}, TURNS, {}, 1),
        ("regex", {"pattern": "get_weather|先"}, TURNS, {}, 0),
        ("math", {}, TURNS.replace("21 度", "$7$"), {"solution": "7"}, 1),
        ("json_schema", {"schema": {"type": "object"}}, TURNS.replace("21 度", '{"a": 1}'), {}, 1),
        ("length", {"target": 4}, TURNS, {}, 1),
        ("format", {}, TURNS, {}, 1),
        ("format", {}, TURNS.replace("知道了</think>", ""), {}, 0),
        ("exact_match", {}, TURNS.rpartition("\n<think>")[0], {"solution": ""}, 1),
    ],
)  # fmt: skip
def test_what_is_built_in(name, options, completion, columns, wanted):
    assert rewards.FUNCTIONS[name]("?", completion, columns, **options) == wanted


@pytest.mark.parametrize(
    "begun, completion, said, thinks, plain",
    [
        ("<think>", "8 perhaps</think>8", "8", 1, 0),
        ("<think>", "8 perhaps", "", 0, 0),
        ("<think>", "who?</think><|observation|>8 perhaps", "", 0, 0),
        ("</think>", "8", "8", 0, 1),
        ("\n<think></think>", "\n8", "8", 0, 1),
        ("\n<think></think>", "\n<think>8", "", 0, 0),
    ],
)  # fmt: skip
def test_what_the_prompt_begins_of_a_thought_counts(begun, completion, said, thinks, plain):
    prompt = f"[gMASK]<sop><|user|>\nWhat is <think>?<|assistant|>{begun}"
    assert rewards.spoken(prompt, completion) == said
    assert (
        rewards.format(prompt, completion, {}) == thinks
        and rewards.format(prompt, completion, {}, thinks=False) == plain
    )


def test_options_a_reward_does_not_take_are_said_before_anything_runs():
    with pytest.raises(RecipeError, match=r"rl.rewards\[0\] \(regex\).*pattern"):
        rewards.check_rewards([RewardConfig(function="regex")])
    with pytest.raises(RecipeError, match="colunm"):
        rewards.check_rewards([RewardConfig(function="exact_match", options={"colunm": "a"})])


@pytest.mark.parametrize(
    "name, options, said",
    [
        ("exact_match", {"column": 5}, "column is 5"),
        ("regex", {"pattern": "("}, r"pattern '\(' is no regular expression: missing"),
        ("regex", {"pattern": 5}, "pattern is 5"),
        ("regex", {"pattern": "a", "whole": "no"}, "whole is 'no'; true or false"),
        ("format", {"thinks": "no"}, "thinks is 'no'; true or false"),
        ("length", {"target": 0}, "target is 0; a number of characters above 0"),
        ("length", {"target": "5"}, "target is '5'"),
        ("length", {"target": -5}, "target is -5"),
        ("length", {"target": 5, "tolerance": -1}, "tolerance is -1"),
        ("json_schema", {"schema": {"type": "strng"}}, "schema is no JSON schema: 'strng'"),
        ("json_schema", {"schema": 5}, "schema is no JSON schema: 5"),
    ],
)  # fmt: skip
def test_options_that_a_reward_cannot_use_are_said(name, options, said):
    with pytest.raises(RecipeError, match=rf"rl.rewards\[0\] \({name}\): options: {said}"):
        rewards.check_rewards([RewardConfig(function=name, options=options)])


@pytest.mark.parametrize(
    "name, options, said",
    [
        ("exact_match", {"column": "nosuch"}, "has no column 'nosuch'; it has prompt, answer, shape"),
        ("math", {}, "has no column 'solution'"),
        ("json_schema", {}, "has no column 'schema'"),
        ("json_schema", {"column": "shape"}, "shape is no JSON schema: 'strng'"),
    ],
)  # fmt: skip
def test_a_column_that_the_first_prompt_lacks_is_said(name, options, said):
    row = {"prompt": "?", "answer": "8", "shape": {"type": "strng"}}
    with pytest.raises(RecipeError, match=rf"rl.rewards\[0\] \({name}\): a.jsonl:1:? {said}"):
        rewards.check_columns([RewardConfig(function=name, options=options)], row, "a.jsonl:1")
    fitting = [("exact_match", {"column": "answer"}), ("json_schema", {"schema": {}}), ("a:b", {})]
    rewards.check_columns([RewardConfig(function=name, options=options) for name, options in fitting], row, "a.jsonl:1")


@pytest.fixture(scope="module")
def functions(tmp_path_factory):
    """A module of rewards beside the command, as a user has it."""
    directory = tmp_path_factory.mktemp("user")
    (directory / "my_rewards.py").write_text(
        textwrap.dedent(
            """
            import asyncio, os, time

            NUMBER = 5

            def good(prompt, completion, columns, factor=1.0):
                print("this is not an answer")
                return factor * len(completion)

            def bad(prompt, completion, columns):
                if completion == "raise": raise ValueError("what is this?")
                if completion == "hang": time.sleep(60)
                if completion == "exit": os._exit(3)
                if completion == "nan": return float("nan")
                if completion == "none": return None
                if completion == "memory": return len(bytearray(1 << 40))
                return 1.0

            async def slow(prompt, completion, columns):
                await asyncio.sleep(60 if completion == "hang" else 0.2)
                if completion == "raise": raise KeyError("key")
                return columns["value"]

            def together(prompts, completions, columns):
                if "raise" in completions: raise ValueError("all of them")
                if "few" in completions: return [1.0]
                return [sum(row["value"] for row in columns)] * len(prompts)
            together.batched = True

            async def awaited(prompts, completions, columns):
                await asyncio.sleep(60 if "hang" in completions else 0)
                return [float(len(completion)) for completion in completions]
            awaited.batched = True

            class Judge:
                async def __call__(self, prompt, completion, columns):
                    await asyncio.sleep(1)
                    return 2.0
            judge = Judge()

            def large(prompts, completions, columns):
                return [10**400, 10**5000] + [1.0] * (len(prompts) - 2)
            large.batched = True

            def patient(prompts, completions, columns):
                time.sleep(0.8 * len(prompts))
                return [1.0] * len(prompts)
            patient.batched = True
            """
        )
    )
    return directory


def evaluate(functions, monkeypatch, name, completions, timeout=5.0, **options):
    monkeypatch.chdir(functions)
    worker = Worker(RewardConfig(function=name, options=options), timeout)
    try:
        columns = [{"value": n} for n in range(len(completions))]
        return worker.evaluate(["?"] * len(completions), completions, columns)
    finally:
        worker.close()


def test_a_function_that_prints_and_takes_options(functions, monkeypatch):
    found = evaluate(functions, monkeypatch, "my_rewards:good", ["a", "", "数字"], factor=2.0)
    assert found == [(2.0, None, ""), (0.0, None, ""), (4.0, None, "")]


def test_one_answer_that_goes_wrong_costs_its_own_reward_alone(functions, monkeypatch):
    """It raises, is no number, eats memory, ends the process or hangs: the answers around it keep theirs."""
    asked = ["ok", "raise", "ok", "nan", "none", "memory", "exit", "ok", "hang", "ok"]
    started = time.monotonic()
    found = evaluate(functions, monkeypatch, "my_rewards:bad", asked, timeout=1.0)
    assert time.monotonic() - started < 30
    faults = [fault for _, fault, _ in found]
    assert faults == [None, "raised", None, "not finite", "no number", "raised", "died", None, "timeout", None]
    assert re.fullmatch(r"ValueError: what is this\? \(.*/my_rewards.py:11, bad\)", found[1][2])
    assert "MemoryError" in found[5][2]
    assert all(value == 1.0 for value, fault, _ in found if fault is None)


def test_async_functions_run_side_by_side(functions, monkeypatch):
    started = time.monotonic()
    found = evaluate(functions, monkeypatch, "my_rewards:slow", ["a"] * 20 + ["hang", "raise"], timeout=2.0)
    assert time.monotonic() - started < 12  # one after the other they take 20 × 0.2 + 60 s
    assert [value for value, _, _ in found[:20]] == list(range(20))
    assert [fault for _, fault, _ in found[20:]] == ["timeout", "raised"]


def test_batched_functions_get_all_and_fail_together(functions, monkeypatch):
    assert [value for value, _, _ in evaluate(functions, monkeypatch, "my_rewards:together", ["a", "b", "c"])] == [
        3,
        3,
        3,
    ]
    assert {fault for _, fault, _ in evaluate(functions, monkeypatch, "my_rewards:together", ["a", "raise"])} == {
        "raised"
    }
    assert {fault for _, fault, _ in evaluate(functions, monkeypatch, "my_rewards:together", ["a", "few"])} == {
        "wrong count"
    }


def test_batched_functions_may_be_async_and_have_the_time_of_all_their_answers(functions, monkeypatch):
    found = evaluate(functions, monkeypatch, "my_rewards:awaited", ["a", "bb"])
    assert found == [(1.0, None, ""), (2.0, None, "")]
    found = evaluate(functions, monkeypatch, "my_rewards:awaited", ["a", "hang"], timeout=0.5)
    assert found == [(None, "timeout", "took longer than 1.0 s")] * 2
    found = evaluate(functions, monkeypatch, "my_rewards:patient", ["a"] * 4, timeout=1.0)
    assert found == [(1.0, None, "")] * 4


def test_an_object_that_is_called_asynchronously(functions, monkeypatch):
    started = time.monotonic()
    assert evaluate(functions, monkeypatch, "my_rewards:judge", ["a"] * 20) == [(2.0, None, "")] * 20
    assert time.monotonic() - started < 15  # one after the other they take 20 s


def test_a_number_too_large_for_a_float_costs_its_own_reward_alone(functions, monkeypatch):
    found = evaluate(functions, monkeypatch, "my_rewards:large", ["a"] * 3)
    assert [fault for _, fault, _ in found] == ["not finite", "not finite", None]


def test_a_function_that_is_not_there_is_said(functions, monkeypatch):
    for name in ("my_rewards:other", "no_such_module:f"):
        found = evaluate(functions, monkeypatch, name, ["a", "b"])
        assert [fault for _, fault, _ in found] == ["cannot start"] * 2 and name in found[0][2]


def test_a_function_that_cannot_be_asked_is_said_before_anything_runs(functions, monkeypatch):
    monkeypatch.chdir(functions)
    check_functions([RewardConfig(function="my_rewards:good", options={"factor": 2.0}), RewardConfig(function="math")])
    faulty = [
        ("no_such_module:f", {}, "ModuleNotFoundError: No module named 'no_such_module'"),
        ("my_rewards:other", {}, "AttributeError: .*no attribute 'other'"),
        ("my_rewards:NUMBER", {}, "TypeError: is 5, which is no function"),
        ("my_rewards:good", {"fator": 2.0}, "TypeError: .*'fator'"),
    ]
    for name, options, said in faulty:
        with pytest.raises(RecipeError, match=rf"rl.rewards\[0\] \({name}\): cannot start: {said}"):
            check_functions([RewardConfig(function=name, options=options)])


def test_weighted_sums_and_what_a_fault_leaves(functions, monkeypatch):
    """0.5 · length + 2 · bad; an answer whose one part failed has no reward, and is not 0."""
    monkeypatch.chdir(functions)
    configs = [
        RewardConfig(function="my_rewards:good", weight=0.5),
        RewardConfig(function="my_rewards:bad", weight=2.0),
    ]
    workers = [Worker(config, 5.0) for config in configs]
    try:
        found = rewards.score(configs, workers, ["?"] * 3, ["abc", "raise", ""], [{}] * 3)
    finally:
        for worker in workers:
            worker.close()
    assert found.rewards[[0, 2]].tolist() == [3.5, 2.0] and np.isnan(found.rewards[1])
    assert found.errors == {"my_rewards:bad: raised": 1} and "what is this?" in found.messages["my_rewards:bad: raised"]
    assert found.parts["my_rewards:good"].tolist() == [3, 5, 0]
