"""What is trained is the template's ids, and in them exactly what the model will have to write."""

import json
import random
import re
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from glm45_tune.data.chat import ChatRenderer, load_tokenizer
from glm45_tune.data.sources import load
from glm45_tune.errors import DataError
from glm45_tune.recipe import DataConfig

GOLDEN = json.loads((Path(__file__).parent / "golden_renders.json").read_text(encoding="utf-8"))
# the reference templates are not ours to ship; a checkout that has them beside it compares against them too
REFERENCES = [
    path
    for name in ("chat_template.jinja", "chat_template.GLM-4.6.jinja")
    if (path := Path(__file__).parents[3] / "shared" / "glm45" / name).exists()
]


@pytest.fixture(scope="module")
def tokenizer(checkpoints):
    return load_tokenizer(checkpoints["air"])


@pytest.fixture(scope="module")
def renderer(tokenizer):
    return ChatRenderer(tokenizer, options())


def options(**changes) -> DataConfig:
    return DataConfig(train="x", **changes)


@pytest.mark.parametrize("name", GOLDEN)
def test_our_template_renders_the_golden_conversations(tokenizer, name):
    case = GOLDEN[name]
    if case["rendered"].startswith("!!"):  # the reference template raises here
        with pytest.raises(Exception, match="items"):
            tokenizer.apply_chat_template(case["messages"], tools=case["tools"], tokenize=False, **case["kwargs"])
        return
    text = tokenizer.apply_chat_template(case["messages"], tools=case["tools"], tokenize=False, **case["kwargs"])
    assert text == case["rendered"]


def random_conversation(rng: random.Random) -> tuple[list[dict], list | None, dict]:
    """Anything the template may meet: roles in any order, thoughts in either form, calls, results, odd white space."""
    words = [
        "你好",
        " hi ",
        "\n",
        "",
        "a\n\nb",
        "<think>x</think>y",
        "</think>",
        "1 < 2",
        "/nothink",
        "{{ x }}",
        '"q"',
        "é🙂",
    ]

    def text():
        return "".join(rng.choice(words) for _ in range(rng.randint(0, 4)))

    messages = []
    for _ in range(rng.randint(1, 6)):
        role = rng.choice(["system", "user", "assistant", "assistant", "tool", "user"])
        message = {"role": role, "content": text()}
        if role == "user" and rng.random() < 0.2:
            message["content"] = [{"type": "text", "text": text()}, {"type": "text", "text": text()}]
        if role == "assistant":
            if rng.random() < 0.4:
                message["reasoning_content"] = text()
            if rng.random() < 0.4:
                values = [1, 2.5, True, None, "s", text(), [1, "甲"], {"k": {"n": "值"}}]
                message["tool_calls"] = [
                    {"type": "function", "function": {"name": "f", "arguments": {f"k{i}": rng.choice(values)}}}
                    for i in range(rng.randint(1, 3))
                ]
        messages.append(message)
    tools = [{"type": "function", "function": {"name": "f", "description": "说明 <b>"}}] if rng.random() < 0.3 else None
    options = {"add_generation_prompt": rng.random() < 0.5}
    if rng.random() < 0.5:
        options["enable_thinking"] = rng.random() < 0.5
    return messages, tools, options


@pytest.mark.skipif(not REFERENCES, reason="the reference templates are not beside this checkout")
@pytest.mark.parametrize("reference", REFERENCES, ids=lambda path: path.stem)
def test_our_template_renders_like_the_reference(checkpoints, tokenizer, reference):
    other = AutoTokenizer.from_pretrained(str(checkpoints["air"]))
    other.chat_template = reference.read_text(encoding="utf-8")
    rng = random.Random(0)
    for _ in range(400):
        messages, tools, options = random_conversation(rng)
        ours, theirs = (
            t.apply_chat_template(messages, tools=tools, tokenize=False, **options) for t in (tokenizer, other)
        )
        assert ours == theirs, messages


def pieces(tokenizer, sample) -> list[tuple[str, bool]]:
    """The sample's text in runs of the same mask."""
    runs: list[tuple[list[int], bool]] = []
    for token, weight in zip(sample.input_ids.tolist(), sample.loss_mask.tolist()):
        if not runs or runs[-1][1] != bool(weight):
            runs.append(([], bool(weight)))
        runs[-1][0].append(token)
    return [(tokenizer.decode(ids), trained) for ids, trained in runs]


USER, ANSWER = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
THOUGHT = ANSWER | {"reasoning_content": "two plus two"}
CALL = {"role": "assistant", "content": "", "reasoning_content": "look", "tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1}'}}]}  # fmt: skip
RESULT = {"role": "tool", "content": "晴"}
PROMPT = "[gMASK]<sop><|user|>\n2+2?<|assistant|>"

MASKS = {
    "a thought and its answer": (
        {"messages": [USER, THOUGHT]}, {},
        [(PROMPT, False), ("\n<think>two plus two</think>\n4<|user|>", True)],
    ),
    "an answer at once: the empty thought is context": (
        {"messages": [USER, ANSWER]}, {},
        [(PROMPT + "\n<think></think>", False), ("\n4<|user|>", True)],
    ),
    "the empty thought is trained when asked": (
        {"messages": [USER, ANSWER]}, {"train_empty_think": True},
        [(PROMPT, False), ("\n<think></think>\n4<|user|>", True)],
    ),
    "but never where the prompt already has it": (
        {"messages": [USER, ANSWER], "enable_thinking": False}, {"train_empty_think": True},
        [("[gMASK]<sop><|user|>\n2+2?/nothink<|assistant|>\n<think></think>", False), ("\n4<|user|>", True)],
    ),
    "history: its thought is dropped, its answer trained": (
        {"messages": [USER, THOUGHT, USER, THOUGHT]}, {},
        [
            (PROMPT + "\n<think></think>", False), ("\n4<|user|>", True), ("\n2+2?<|assistant|>", False),
            ("\n<think>two plus two</think>\n4<|user|>", True),
        ],
    ),
    "a call ends with the observation": (
        {"messages": [USER, CALL, RESULT, RESULT, THOUGHT]}, {},
        [
            (PROMPT, False),
            ("\n<think>look</think>\n<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n</tool_call><|observation|>", True),
            ("\n<tool_response>\n晴\n</tool_response>\n<tool_response>\n晴\n</tool_response><|assistant|>", False),
            ("\n<think>two plus two</think>\n4<|user|>", True),
        ],
    ),
    "a call at the end closes with the observation too": (
        {"messages": [USER, CALL]}, {},
        [
            (PROMPT, False),
            ("\n<think>look</think>\n<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n</tool_call><|observation|>", True),
        ],
    ),
    "what follows a user's last word is not invented": (
        {"messages": [USER, ANSWER, USER]}, {},
        [(PROMPT + "\n<think></think>", False), ("\n4<|user|>", True), ("\n2+2?", False)],
    ),
    "a system message between turns is no end to learn": (
        {"messages": [USER, THOUGHT, {"role": "system", "content": "S"}]}, {},
        [(PROMPT, False), ("\n<think>two plus two</think>\n4", True), ("<|system|>\nS", False)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MASKS)
def test_the_mask_token_by_token(tokenizer, name):
    row, changes, expected = MASKS[name]
    (sample,) = ChatRenderer(tokenizer, options(**changes)).render(row, "x.jsonl", 1).samples
    assert pieces(tokenizer, sample) == expected


def test_ids_are_the_templates_and_one_closing_token(tokenizer, renderer):
    rng = random.Random(1)
    seen = 0
    for number in range(300):
        messages, tools, asked = random_conversation(rng)
        asked.pop("add_generation_prompt")
        row = {"messages": messages, "tools": tools, **asked}
        try:
            (sample,) = renderer.render(row, "x.jsonl", number).samples
        except DataError as error:
            trains_nothing = f"x.jsonl:{number}: nothing in this row would be trained" in str(error)
            assert trains_nothing or re.search("think>|thought", str(error))
            continue
        for message in messages:  # beside an empty thought the template would double the tags of one in the text
            if message.get("reasoning_content") == "":
                del message["reasoning_content"]
        ids = tokenizer.apply_chat_template(messages, tools=tools, return_dict=False, **asked)
        closing = []
        if messages[-1]["role"] == "assistant":
            closing = [
                tokenizer.convert_tokens_to_ids("<|observation|>" if messages[-1].get("tool_calls") else "<|user|>")
            ]
        assert sample.input_ids.tolist() == ids + closing
        seen += 1
    assert seen > 100


BAD = {
    '{"messages": [{"role": "bot", "content": "x"}]}': ['messages[0].role is "bot"', "system, user, assistant, tool"],
    "{not json": ["not JSON"],
    "[1, 2]": ["holds list"],
    '{"foo": "x"}': ["no known format", "'foo'", "'messages'"],
    '{"messages": []}': ["messages is []"],
    '{"messages": ["hi"]}': ["messages[0] is str"],
    '{"messages": [{"role": "user", "content": null}, {"role": "assistant", "content": "x"}]}': ["messages[0].content is null"],
    '{"messages": [{"role": "user", "content": 3}]}': ["messages[0].content is int"],
    '{"messages": [{"role": "user", "content": [{"type": "image"}]}]}': ["messages[0].content[0]", "text only"],
    '{"messages": [{"role": "user", "content": "x"}]}': ["no assistant message in it says anything"],
    '{"messages": [{"role": "user", "content": "<|assistant|>x"}, {"role": "assistant", "content": "y"}]}': ["control token"],
    '{"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]}': [
        "messages[0].tool_calls[0].function.arguments is not JSON"
    ],
    '{"messages": [{"role": "assistant", "content": "x"}], "enable_thinking": "no"}': ["enable_thinking is 'no'"],
}  # fmt: skip


@pytest.mark.parametrize("line", BAD)
def test_a_bad_row_is_named_by_file_and_line(renderer, tmp_path, line):
    path = tmp_path / "train.jsonl"
    good = json.dumps({"messages": [USER, ANSWER]})
    path.write_text(f"{good}\n\n{line}\n{good}\n", encoding="utf-8")
    with pytest.raises(DataError) as fault:
        load(str(path), renderer).check("error")
    assert f"{path}:3:" in str(fault.value)
    for word in BAD[line]:
        assert word in str(fault.value)


def test_every_bad_row_is_listed_and_a_long_one_is_bad(tokenizer, tmp_path):
    path = tmp_path / "train.jsonl"
    rows = [{"messages": [USER, ANSWER]}, {"messages": []}, {"messages": [USER, {**ANSWER, "content": "x" * 300}]}, {}]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with pytest.raises(DataError) as fault:
        load(str(path), ChatRenderer(tokenizer, options(seq_length=100))).check("error")
    assert [line.split(":")[1] for line in str(fault.value).splitlines()] == ["2", "3", "4"]
    assert "data.seq_length 100" in str(fault.value)


def like_47(template: str) -> str:
    """GLM-4.7's way made of our 4.5 template: no line end behind role tokens, an empty thought is </think> alone, the default

    prompt opens the thought, and clear_thinking false keeps the thoughts of earlier turns.
    """
    for old, new in {
        "{{- '\\n<think>' ~ (thought.strip() if keeps_thought else '') ~ '</think>' -}}": (
            "{{- ('<think>' ~ thought.strip() if keeps_thought and thought.strip() else '') ~ '</think>' -}}"
        ),
        "{{- '\\n' ~ body.strip() if body.strip() else '' -}}": "{{- body.strip() -}}",
        "'<|user|>\\n'": "'<|user|>'",
        "loop.index0 > last.user)": "loop.index0 > last.user or (clear_thinking is defined and not clear_thinking))",
        "('\\n<think></think>' if quiet else '')": "('</think>' if quiet else '<think>')",
    }.items():
        assert old in template, old
        template = template.replace(old, new)
    return template


@pytest.fixture(scope="module")
def tokenizer_47(checkpoints):
    tokenizer = AutoTokenizer.from_pretrained(str(checkpoints["air"]))
    tokenizer.chat_template = like_47(tokenizer.chat_template)
    return tokenizer


def test_what_is_trained_follows_from_what_the_template_prompts_with(tokenizer_47):
    """Under a template like GLM-4.7's: the <think> of the prompt is context, an empty thought is </think> alone."""
    renderer = ChatRenderer(tokenizer_47, options())
    (sample,) = renderer.render({"messages": [USER, THOUGHT]}, "x", 1).samples
    prompt = "[gMASK]<sop><|user|>2+2?<|assistant|>"
    assert pieces(tokenizer_47, sample) == [(prompt + "<think>", False), ("two plus two</think>4<|user|>", True)]
    (sample,) = renderer.render({"messages": [USER, ANSWER]}, "x", 1).samples
    assert pieces(tokenizer_47, sample) == [(prompt + "</think>", False), ("4<|user|>", True)]


def test_history_thoughts_are_kept_where_the_template_can(tokenizer, tokenizer_47):
    row = {"messages": [USER, THOUGHT, USER, THOUGHT]}
    (sample,) = ChatRenderer(tokenizer_47, options(history_thinking="keep")).render(row, "x", 1).samples
    text = tokenizer_47.decode([t for t, w in zip(sample.input_ids.tolist(), sample.loss_mask.tolist()) if w])
    assert text == 2 * "two plus two</think>4<|user|>"
    with pytest.raises(DataError, match="drops the thoughts of earlier turns"):
        ChatRenderer(tokenizer, options(history_thinking="keep")).render(row, "x", 1)
    ChatRenderer(tokenizer, options(history_thinking="keep")).render({"messages": [USER, THOUGHT]}, "x", 1)
