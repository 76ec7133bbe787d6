"""eval: what it counts is what was said, and a run's base and tuned model score what those models score by themselves."""

import hashlib
import json
import math
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from glm45_tune.chat.model import ChatModel
from glm45_tune.data.chat import ChatRenderer, load_tokenizer
from glm45_tune.recipe import DataConfig

TOOLS = [
    {
        "type": "function",
        "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
    }
]


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """Questions of different lengths, one with tools, one whose answer counts half."""
    path = tmp_path_factory.mktemp("asked") / "asked.jsonl"
    rows = []
    for number in range(5):
        answer = {"role": "assistant", "content": "答案 " * (number + 1), "reasoning_content": "想。" * (number % 2)}
        rows.append({"messages": [{"role": "user", "content": f"第{number}个问题。" * (number + 1)}, answer]})
    rows[1]["messages"][1]["loss_scale"] = 0.5
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    rows.append({"messages": [rows[0]["messages"][0], {"role": "assistant", "tool_calls": [call]}], "tools": TOOLS})
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def perplexity(directory, path, **options) -> float:
    """By transformers' own logits, one conversation at a time, in fp32 sums."""
    renderer = ChatRenderer(load_tokenizer(directory), DataConfig(train="-", seq_length=4096, **options))
    model = transformers.AutoModelForCausalLM.from_pretrained(str(directory), dtype="auto").eval()
    loss = weight = 0.0
    for line, text in enumerate(path.read_text(encoding="utf-8").splitlines()):
        (sample,) = renderer.render(json.loads(text), "f", line).samples
        ids, mask = torch.tensor(sample.input_ids, dtype=torch.long), torch.tensor(sample.loss_mask)
        with torch.no_grad():
            logprobs = model(ids[None]).logits[0, :-1].float().log_softmax(-1)
        loss -= (logprobs.gather(1, ids[1:, None])[:, 0] * mask[1:]).sum().item()
        weight += mask[1:].sum().item()
    return math.exp(loss / weight)


def in_fp32(directory):
    """The same weights in fp32, in place: between bf16 models of random weights rounding alone moves a perplexity by 1 %."""
    for path in directory.glob("*.safetensors"):
        save_file({name: tensor.float() for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_run_and_its_base_score_what_they_score_alone(request, kind, checkpoints, asked, tmp_path, cli):
    run, base = request.getfixturevalue(f"{kind}_run"), checkpoints["air" if kind == "lora" else "355b"]
    common = ("--data", asked, "--max-new-tokens", 6, "--json")
    code, out, err = cli("eval", run, *common)
    assert code == 0, err
    before, after = json.loads(out)
    assert before["model"].endswith("base") and after["model"].endswith("tuned") and before["num_questions"] == 6
    assert cli("export", run, "--output", tmp_path / "tuned")[0] == 0
    for alone, beside in zip(
        json.loads(cli("eval", base, tmp_path / "tuned", *common)[1]), (before, after), strict=True
    ):
        if kind == "full" or beside is before:  # of LoRA, PEFT and our export round sums differently
            assert alone["rows"] == beside["rows"]
        assert alone["perplexity"] == pytest.approx(beside["perplexity"], rel=5e-3)
    shutil.copytree(base, tmp_path / "base")
    for directory in (tmp_path / "base", tmp_path / "tuned"):
        in_fp32(directory)
        (alone,) = json.loads(cli("eval", directory, *common)[1])
        assert alone["perplexity"] == pytest.approx(perplexity(directory, asked), rel=1e-4)
    assert after["perplexity"] < 0.9 * before["perplexity"]  # it was trained on such text
    assert not list(run.glob(".eval_*"))

    (kept,) = [entry for entry in json.loads((run / "eval.json").read_text()) if entry["data"] == asked.name]
    assert kept["think"] is None and kept["tuned"]["rows"] and kept["sha256"]
    assert cli("eval", run, *common)[0] == 0  # in the place of the first
    assert len([e for e in json.loads((run / "eval.json").read_text()) if e["data"] == asked.name]) == 1
    assert cli("export", run, "--output", tmp_path / "tuned")[0] == 0
    card = (tmp_path / "tuned" / "README.md").read_text(encoding="utf-8")
    assert f"| {asked.name} | 6 | tuned | 0% |" in card and kept["sha256"] in card
    (run / "eval.json").unlink()


def test_what_is_said_is_what_is_counted(checkpoints, asked, cli, monkeypatch):
    """Six answers made by hand: a thought, the right text, the right call, a call to no tool, nothing, the wrong text."""
    from glm45_tune.chat.answers import Answer

    said = [
        "\n<think>hm</think>\n答案",
        "\n答案 答案 ",
        "\n<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n</tool_call>",
        "",
        "\n答案",
        "\n<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n</tool_call>",
    ]
    monkeypatch.setattr(ChatModel, "generate", lambda self, prompts, most: [Answer(text) for text in said])
    code, out, _ = cli("eval", checkpoints["air"], "--data", asked, "--json")
    (score,) = json.loads(out)
    assert code == 0 and score["exact"] == 3 / 6 and score["thinks"] == 1 / 6 and score["non_thinking"] == 5 / 6
    assert score["num_calls"] == 2 and score["valid_calls"] == 1 / 2  # the third question has no tools
    assert [row["exact"] for row in score["rows"]] == [True, True, False, False, False, True]


def test_what_cannot_be_evaluated_is_one_sentence(lora_run, checkpoints, asked, tmp_path, cli):
    from glm45_tune.hub.export import export

    export(lora_run, tmp_path / "adapter", adapter_only=True)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"messages": [{"role": "user", "content": "q"}]}\n')
    air, adapter = checkpoints["air"], tmp_path / "adapter"
    for arguments, words in (
        ((air, "--data", bad), "bad.jsonl:1: the last message must be the assistant's"),
        ((air, "--data", tmp_path / "none.jsonl"), "no such"),
        ((checkpoints["air-other"], "--data", asked, "--adapter", adapter), "is another model"),
        ((lora_run, "--data", asked, "--adapter", adapter), "has an adapter of its own"),
        ((lora_run, "--data", asked, "--step", "3"), "no complete checkpoint of step 3"),
        ((air, "--data", asked, "--device-map", "nowhere"), "device_map nowhere"),
        ((air, "--data", asked, "--step", "3"), "is no run, so it has no step 3"),
        ((air, "--data", asked, "--output", asked), "holds no scores, so it is not replaced"),
    ):
        code, _, err = cli("eval", *arguments)
        assert code == 2 and words in err and "Traceback" not in err, err


def written(path, *rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


Q, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "答案"}


def test_a_row_that_is_refused_is_refused_before_anything_is_asked(
    checkpoints, lora_run, asked, tmp_path, cli, monkeypatch
):
    monkeypatch.setattr(ChatModel, "generate", lambda *arguments: pytest.fail("asked"))
    for row, words in (
        ({"messages": [Q, A | {"loss": False}]}, "bad.jsonl:2: the last message, the answer wanted, has loss false"),
        (
            {"messages": [Q | {"content": "<|user|>"}, A]},
            "bad.jsonl:2: a message's text holds one of the control tokens",
        ),
        ({"messages": [Q, A], "enable_thinking": "no"}, "bad.jsonl:2: enable_thinking is 'no'"),
    ):
        bad = written(tmp_path / "bad.jsonl", {"messages": [Q, A]}, row)
        for model in (checkpoints["air"], lora_run):
            code, _, err = cli("eval", model, "--data", asked, "--data", bad)
            assert code == 2 and words in err, err


def test_a_run_keeps_scores_of_a_sample_and_of_what_has_no_hash(lora_run, tmp_path, cli, monkeypatch):
    rows = [{"messages": [Q, A | {"content": f"答案{n}"}]} for n in range(4)]
    file = written(tmp_path / "some.jsonl", *rows)
    (tmp_path / "asked_rows.py").write_text(f"def ok():\n    return {rows}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    sources = ("--data", f"{file}#3", "--data", "asked_rows:ok")
    code, _, err = cli("eval", lora_run, *sources, "--max-new-tokens", 2, "--output", tmp_path / "scores.json")
    assert code == 0, err
    assert [score["num_questions"] for score in json.loads((tmp_path / "scores.json").read_text())] == [3, 4, 3, 4]
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    kept = {entry["data"]: entry["sha256"] for entry in json.loads((lora_run / "eval.json").read_text())}
    assert kept == {"some.jsonl#3": digest, "asked_rows:ok": None}
    assert cli("export", lora_run, "--output", tmp_path / "tuned")[0] == 0
    card = (tmp_path / "tuned" / "README.md").read_text(encoding="utf-8")
    assert f"some.jsonl#3 is sha256 `{digest}`, asked_rows:ok is not a file." in card
    (lora_run / "eval.json").unlink()


def test_a_row_is_asked_as_it_says_unless_the_command_says_more(checkpoints, tmp_path, cli, monkeypatch):
    from glm45_tune.chat.answers import Answer

    prompts, scores = [], []
    monkeypatch.setattr(
        ChatModel, "generate", lambda self, asked, most: [prompts.append(p) or Answer("") for p in asked]
    )
    files = [
        written(tmp_path / f"{n}.jsonl", {"messages": [Q, A]} | more)
        for n, more in enumerate(({}, {"enable_thinking": False}))
    ]
    for file in files:
        for flag in ((), ("--think",), ("--no-think",)):
            code, out, err = cli("eval", checkpoints["air"], "--data", file, *flag, "--json")
            assert code == 0, err
            scores.append(json.loads(out)[0]["perplexity"])
    assert [prompt.endswith("<think></think>") for prompt in prompts] == [False, False, True, True, False, True]
    assert scores[0] == scores[1] == scores[4] and scores[2] == scores[3] == scores[5] != scores[0]


def test_the_perplexity_is_of_the_answer_wanted_alone(checkpoints, tmp_path, cli):
    found = []
    for more in ({}, {"loss": False}):
        file = written(tmp_path / "two.jsonl", {"messages": [Q, A | {"content": "zzz @@"} | more, Q, A]})
        code, out, err = cli("eval", checkpoints["air"], "--data", file, "--max-new-tokens", 1, "--json")
        assert code == 0, err
        found.append(json.loads(out)[0]["perplexity"])
    assert found[0] == found[1]


def test_a_run_of_prompts_is_asked_what_any_other_is(checkpoints, asked):
    """The format of its own data is not that of the questions."""
    from glm45_tune.chat.evaluate import evaluate, load_questions

    model, questions = ChatModel(checkpoints["air"]), {"f": load_questions(str(asked))}
    found = [evaluate(model, questions, None, 1, DataConfig(train="-", format=form)) for form in (None, "rl")]
    assert found[0] == found[1]
