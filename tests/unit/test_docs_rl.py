"""The examples of docs/rl.md do what is said of them: they are taken from the page and run."""

import json
import re
from pathlib import Path

import pytest
import yaml

from glm45_tune.objectives import BUILT_IN, RewardConfig
from glm45_tune.rl import rewards
from glm45_tune.rl.sandbox import ToolWorker, Worker

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "rl.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
RECIPE = yaml.safe_load((ROOT / "recipes" / "tiny_grpo.yaml").read_text())
PROMPT = "[gMASK]<sop><|user|>\n?<|assistant|>"
CALL = "\n<tool_call>get_seat\n<arg_key>province</arg_key>\n<arg_value>浙江</arg_value>\n</tool_call>"


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    lines = (ROOT / RECIPE["data"]["train"]).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture
def block(tmp_path, monkeypatch):
    """The example that defines a function, as a module `example` in the working directory."""
    monkeypatch.chdir(tmp_path)

    def write(name: str) -> str:
        (text,) = [block for block in BLOCKS if f"def {name}(" in block]
        (tmp_path / "example.py").write_text(text, encoding="utf-8")
        return f"example:{name}"

    return write


def scores(function: str, prompts: list[str], completions: list[str], columns: list[dict]) -> list[float]:
    worker = Worker(RewardConfig(function=function), 20.0)
    try:
        found = worker.evaluate(prompts, completions, columns)
    finally:
        worker.close()
    assert not [message for _, fault, message in found if fault], found
    return [value for value, _, _ in found]


def answers(row: dict) -> dict[str, float]:
    """Answers to a row → what each is worth."""
    right = row["solution"]
    return {
        f"\n<think>想一想。{right[:2]}</think>\n{right}": 1,
        f"\n<think></think>\n{right}": 1,
        right: 1,
        f"\n<think>想一想。</think>\n{right}不对": 0,
        f"\n<think>{right}</think>\n不知道": 0,
        f"\n<think>{right}": 0,
    }


def test_the_reward_pays_exact_answers_with_their_thoughts_in_full(block, rows):
    """On the data of recipes/tiny_grpo.yaml; and as exact_match does, which that recipe has."""
    asked = [(PROMPT, answer, row, worth) for row in rows for answer, worth in answers(row).items()]
    prompts, completions, columns, worth = map(list, zip(*asked, strict=True))
    assert scores(block("reward"), prompts, completions, columns) == worth
    assert scores("exact_match", prompts, completions, columns) == worth
    assert RECIPE["rl"]["rewards"] == [{"function": "exact_match"}]


def test_a_prompt_that_opens_the_thought_changes_nothing(block, rows):
    """As GLM-4.7's template has it."""
    said = [f"想一想。</think>{rows[0]['solution']}", rows[0]["solution"]]
    assert scores(block("reward"), [PROMPT + "<think>"] * 2, said, [rows[0]] * 2) == [1, 0]


def test_the_batched_reward_pays_short_thoughts_more(block, rows):
    right = rows[0]["solution"]
    said = [f"\n<think>{'想' * count}</think>\n{right}" for count in (1, 199, 200)] + ["\n<think>想</think>\n不对"]
    assert scores(block("brief"), [PROMPT] * 4, said, [rows[0]] * 4) == [1, 1, 0.5, 0]


def test_the_tool_answers_calls_and_ends_where_there_is_none(block):
    tool = ToolWorker(block("tools"), 20.0)
    seats = {"seats": {"浙江": "杭州"}}
    wrong = CALL.replace("get_seat", "get_weather")
    try:
        for said, contents in (
            (f"\n<think>问{CALL}</think>{CALL}", ["杭州"]),
            (CALL * 2, ["杭州", "杭州"]),
            (wrong, ["There is no tool get_weather."]),
            (CALL.replace("浙江", "月亮"), ["unknown"]),
            (CALL.removesuffix("</tool_call>"), ["This call is not closed."]),
            ("\n<think>我知道</think>\n杭州", []),
            (f"{CALL}<|observation|>\n<tool_response>\n杭州\n</tool_response><|assistant|>\n杭州", []),
        ):
            assert [message["content"] for message in tool.ask(said, seats)] == contents, said
    finally:
        tool.close()


def test_every_built_in_reward_stands_there_with_its_options():
    import inspect

    for name in BUILT_IN:
        (line,) = re.findall(rf"^\| `{name}` \|.*$", PAGE, re.MULTILINE)
        for option, parameter in list(inspect.signature(rewards.FUNCTIONS[name]).parameters.items())[3:]:
            assert f"`{option}`" in line
            default = parameter.default
            if default not in (inspect.Parameter.empty, None):
                said = str(default).lower() if isinstance(default, bool) else str(default)
                assert re.search(rf"`{option}` \(`?{said}`?\)", line), (name, option)


def test_every_key_that_the_page_names_is_one():
    from glm45_tune.objectives import EngineConfig, RLConfig
    from glm45_tune.recipe import LoggingConfig, TrainConfig

    assert set(re.findall(r"rl\.engine\.(\w+)", PAGE)) <= EngineConfig.model_fields.keys()
    assert set(re.findall(r"`rl\.(\w+)", PAGE)) <= RLConfig.model_fields.keys()
    assert set(re.findall(r"`train\.(\w+)", PAGE)) <= TrainConfig.model_fields.keys()
    assert set(re.findall(r"`logging\.(\w+)", PAGE)) <= LoggingConfig.model_fields.keys()
