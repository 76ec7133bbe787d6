"""A key that a recipe names or holds is used, and stands in no file, message, tracker or argument."""

import json
import os
import subprocess
import sys
import time
import types
from pathlib import Path

import psutil
import pytest
import wandb
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from glm45_tune.errors import RecipeError
from glm45_tune.hub.export import export
from glm45_tune.objectives import RewardConfig
from glm45_tune.recipe import Recipe
from glm45_tune.redaction import HIDDEN, redacted, redacted_text, secrets_of
from glm45_tune.report import page
from glm45_tune.rl.sandbox import Worker
from glm45_tune.training import loop
from glm45_tune.training.prepare import prepare

SECRETS = {
    "api_key": {"api_key": "abcdef"},
    "apiKey": {"apiKey": "abcdef"},
    "a name that ends so": {
        "JUDGE_KEY": "abcdef",
        "hf-token": "abcdef",
        "client_secret": "abcdef",
        "authtoken": "abcdef",
    },
    "password": {"password": "abcdef"},
    "a header": {"headers": {"Authorization": "Bearer abcdef", "x-api-key": "abcdef"}},
    "a list under the name": {"api_keys": ["abcdef", {"value": "abcdef"}]},
    "a bearer token in a text": {"header": "Authorization: Bearer abcdef"},
    "OpenAI's form": {"text": "use sk-abcdef-0123456789"},
    "Hugging Face's form": {"text": "hf_abcdef0123456789"},
    "GitHub's form": {"text": "ghp_abcdef0123456789"},
    "a token of three parts": {"text": "eyJabcdef01.eyJabcdef01.abcdef"},
    "user and password in a URL": {"url": "http://me:abcdef@host:8000/v1"},
    "a token in a URL": {"url": "https://abcdef@host/v1"},
    "a password that holds an @": {"url": "https://me:x@abcdef@host/v1"},
    "a query": {"url": "http://host/v1?model=m&api_key=abcdef&n=1"},
    "a key of a query": {"url": "http://host/v1?key=abcdef"},
    "an option with its value": {"command": ["serve", "--api-key=abcdef"]},
    "an option before its value": {"command": ["serve", "--api-key", "abcdef", "--port", "8"]},
    "a variable before a command": {"command": ["sh", "-c", "OPENAI_API_KEY=abcdef serve"]},
}
HARMLESS = {
    "column": "key",
    "pattern": "token: (\\d+)",
    "max_tokens": 5,
    "required_keys": ["name", "age"],
    "stop_tokens": ["</answer>"],
    "url": "http://host:8000/v1?n=1",
    "reference": "${env:JUDGE_KEY}",
    "api_key": "${env:JUDGE_KEY}",
    "header": "Bearer ${env:JUDGE_KEY}",
    "judge": "http://me:${env:JUDGE_KEY}@host:8000/v1?token=${env:JUDGE_TOKEN}",
    "command": ["serve", "{model}", "--tokenizer", "there", "--port", "{port}"],
    "mail": "write to me@host.org",
    "text": "monkey=1, the task-force, a risk-averse key: value",
    "nothing": None,
    "target_modules": ["linear_qkv", "linear_proj"],
    "path": "data/part=3/rows.jsonl",
}


@pytest.mark.parametrize("name", SECRETS)
def test_what_looks_like_a_secret_is_hidden(name):
    hidden = json.dumps(redacted(SECRETS[name]))
    assert "abcdef" not in hidden and HIDDEN in hidden
    assert any("abcdef" in secret for secret in secrets_of(SECRETS[name]))
    assert redacted(redacted(SECRETS[name])) == redacted(SECRETS[name])
    for word in ("host", "serve", "--port", "model=m"):  # what is no secret stays
        assert (word in hidden) == (word in json.dumps(SECRETS[name]))


def test_what_is_no_secret_stays_as_it_is():
    assert redacted(HARMLESS) == HARMLESS
    for said in (
        "messages[0].content holds a control token: <|user|>",
        "lora.lora_alpha: unknown key. Did you mean r?",
    ):
        assert redacted_text(said) == said


@pytest.mark.parametrize("piece", ["1", "a-", "eyJ-", "a://", "key", "Bearer ", "sk-", "://@", "_key="])
def test_a_long_text_is_searched_in_a_moment(piece):
    started = time.process_time()
    redacted_text(piece * (200_000 // len(piece)))
    assert time.process_time() - started < 2


DOCUMENTS = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=20)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(document=DOCUMENTS, place=st.sampled_from(["api_key", "judge_token", "password", "Authorization", "apiSecret"]))
def test_a_secret_is_hidden_wherever_it_stands(document, place):
    secret = "Zq7-secret"
    for whole in ({"options": [document, {place: secret}]}, {place: [document, {"deep": [secret]}]}):
        assert secret not in json.dumps(redacted(whole)) and secret in secrets_of(whole)


JUDGE = """
def judge(prompt, completion, columns, key="", other="", url=""):
    assert key == "named-by-the-environment" and other == "sk-literal-0123456789", "another key"
    if "1" in prompt: raise ValueError(f"the judge at {url} says that {key} and {other} of {url[10:17]} are used up")
    return 1.0

def kind(prompt, completion, columns, **options):
    print(options)
    return float(len(completion))
"""
OPTIONS = {
    "key": "${env:JUDGE_KEY}",
    "other": "sk-literal-0123456789",
    "url": "http://me:hunter2@judge.example/?token=abcdef0123",
}
ALL = ("named-by-the-environment", "sk-literal-0123456789", "hunter2", "abcdef0123")


@pytest.fixture
def recipe(checkpoints, make_recipe, tmp_path, monkeypatch):
    (tmp_path / "judges.py").write_text(JUDGE)
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "{n}?"}}\n' for n in range(4)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JUDGE_KEY", "named-by-the-environment")
    lora = {"r": 4, "target_modules": "all-linear"}
    document = make_recipe(
        checkpoints["air"], tmp_path / "prompts.jsonl", tmp_path / "run", lora=lora, train={"steps": 1}
    )
    document["data"] |= {"format": "rl"}
    rewards = [
        {"function": "judges:judge", "options": OPTIONS, "weight": 0.0},
        {"function": "judges:kind", "options": OPTIONS},
    ]
    return document | {"rl": {"rewards": rewards, "group_size": 2, "max_new_tokens": 4}}


def test_a_run_with_secrets_leaves_them_nowhere(recipe, tmp_path, monkeypatch, capfd):
    """Run, resumed, reported, exported with its card; with both trackers on."""
    configs = []
    tracker = types.SimpleNamespace(log=lambda *_, **__: None, finish=lambda: None)
    monkeypatch.setattr(wandb, "init", lambda **how: configs.append(how) or tracker)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    recipe["logging"] = {"wandb_project": "p", "tensorboard": True}
    for steps in (1, 2):
        recipe["train"]["steps"] = steps
        loop.run(prepare(Recipe.from_dict(recipe)))
    run = tmp_path / "run"
    page.write(run)
    export(run, tmp_path / "adapter", adapter_only=True)
    said = "".join(capfd.readouterr())
    assert "another key" not in said and "are used up" in said  # the judge had both
    assert "rl.rewards[0].options.other" in said and "${env:NAME}" in said  # and what to do is told
    written = [path for root in (run, tmp_path / "adapter") for path in root.rglob("*") if path.is_file()]
    assert {"recipe.yaml", "report.html", "README.md"} <= {path.name for path in written}
    for secret in ALL:
        assert secret not in said and secret not in json.dumps([config.get("config") for config in configs])
        assert not [path for path in written if secret.encode() in path.read_bytes()]
    kept = yaml.safe_load((run / "recipe.yaml").read_text())["rl"]["rewards"][0]["options"]
    assert kept["key"] == "${env:JUDGE_KEY}" and kept["other"] == HIDDEN
    assert (run / "recipe.yaml").stat().st_mode & 0o077 == 0
    with pytest.raises(RecipeError, match=r"rl.rewards\[0\].options.other: holds \*\*\*: a secret was left out"):
        prepare(Recipe.load(run / "recipe.yaml"))


def test_a_page_of_an_older_run_hides_what_its_recipe_holds(recipe, tmp_path):
    loop.run(prepare(Recipe.from_dict(recipe)))
    run = tmp_path / "run"
    (run / "recipe.yaml").write_text(Recipe.from_dict(recipe).to_yaml(with_secrets=True))
    shown = page.write(run).read_text()
    export(run, tmp_path / "adapter", adapter_only=True)
    for text in (shown, (tmp_path / "adapter" / "README.md").read_text()):
        assert "judges:judge" in text and not [secret for secret in ALL if secret in text]


def test_options_are_not_in_the_list_of_processes(recipe):
    worker = Worker(RewardConfig(function="judges:kind", options=OPTIONS), 5.0)
    try:
        assert worker.evaluate(["?"], ["ab"], [{}]) == [(2.0, None, "")]
        children = psutil.Process().children(recursive=True)
        told = [" ".join(child.cmdline()) + json.dumps(child.environ()) for child in children]
        assert any("glm45_tune.rl.child" in text for text in told)
        assert not [secret for secret in ALL if any(secret in text for text in told)]
    finally:
        worker.close()


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"rewards": [{"function": "judges:kind", "options": {"key": "${env:NOT_THERE}"}}]}, r"options.key: the environment has no NOT_THERE"),
        ({"engine": {"kind": "vllm", "urls": ["http://${env:NOT_THERE}@a"], "sync": "lora"}}, r"rl.engine.urls\[0\]: the environment has no"),
        ({"engine": {"kind": "vllm", "command": ["serve", "--api-key", "sk-0123456789"]}}, r"rl.engine.command\[2\]: a secret in a command"),
        ({"engine": {"kind": "vllm", "command": ["serve", "--api-key=${env:JUDGE_KEY}"]}}, r"rl.engine.command\[1\]: .*seen in the list of processes"),
        ({"tools": "judges:kind", "rewards": [{"function": "judges:kind", "options": {"key": HIDDEN}}]}, "a secret was left out"),
    ],
)  # fmt: skip
def test_a_secret_that_cannot_be_used_so_is_said(recipe, changes, said):
    recipe["rl"] |= changes
    with pytest.raises(RecipeError, match=said) as error:
        prepare(Recipe.from_dict(recipe))
    assert "sk-0123456789" not in str(error.value)


def test_a_variable_elsewhere_in_a_recipe_is_said(recipe):
    recipe["output_dir"] = "runs/${env:JUDGE_KEY}"
    with pytest.raises(RecipeError, match="output_dir: .*: an environment variable can be named in rl.rewards"):
        prepare(Recipe.from_dict(recipe))


def test_a_wrong_recipe_is_quoted_without_its_secrets(recipe):
    for wrong in ({"options": "api_key=abcdef0123"}, {"options": {}, "optoins": 1, "weight": "Bearer abcdef0123"}):
        recipe["rl"]["rewards"] = [{"function": "judges:kind"} | wrong]
        with pytest.raises(RecipeError) as error:
            Recipe.from_dict(recipe)
        assert "abcdef0123" not in str(error.value)


def test_several_ranks_have_the_secrets_of_the_recipe(recipe, tmp_path):
    """They are other processes, and read them from a file that nobody else can."""
    recipe["parallel"] = {"world_size": 2}
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(recipe))
    ended = subprocess.run(
        [sys.executable, "-m", "glm45_tune", "train", str(path)], capture_output=True, text=True, timeout=300, check=False,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert "are used up" in ended.stderr and not [secret for secret in ALL if secret in ended.stderr]
