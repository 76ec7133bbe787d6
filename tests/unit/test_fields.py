"""Nothing of a row is dropped or altered in silence: what is known is used, the rest is an error or a named count."""

import json
import string

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm45_tune.data.chat import ChatRenderer, load_tokenizer
from glm45_tune.data.files import read_rows
from glm45_tune.data.sources import read_source
from glm45_tune.data.thoughts import CLOSE, OPEN
from glm45_tune.errors import DataError
from glm45_tune.recipe import DataConfig

Q, A = {"role": "user", "content": "Q?"}, {"role": "assistant", "content": "An answer."}
TOOL = {"name": "f", "description": "does f", "parameters": {"type": "object", "properties": {}}}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"a": None}}}]}
RESULT = {"role": "tool", "content": "done"}


@pytest.fixture(scope="module")
def tokenizer(checkpoints):
    return load_tokenizer(checkpoints["air"])


def render(tokenizer, row, **options):
    return ChatRenderer(tokenizer, DataConfig(train="-", **options)).render(row, "x.jsonl", 1)


def text(tokenizer, row, **options) -> str:
    (sample,) = render(tokenizer, row, **options).samples
    return tokenizer.decode(sample.input_ids, skip_special_tokens=False)


def trained(tokenizer, row, **options) -> str:
    (sample,) = render(tokenizer, row, **options).samples
    return tokenizer.decode(sample.input_ids[sample.loss_mask > 0], skip_special_tokens=False)


SAME = {
    "reasoning": ({**A, "reasoning": "T"}, {**A, "reasoning_content": "T"}),
    "thinking": ({**A, "thinking": "T"}, {**A, "reasoning_content": "T"}),
    "a thought in the text": ({**A, "content": "<think>\nT\n</think>\n\nAn answer."}, {**A, "reasoning_content": "T"}),
    "beside an empty thought": (
        {**A, "reasoning_content": "", "content": "<think>T</think>An answer."},
        {**A, "reasoning_content": "T"},
    ),
    "weight 1": ({**A, "weight": 1}, A),
    "weight 0.5": ({**A, "weight": 0.5}, {**A, "loss_scale": 0.5}),
    "train": ({**A, "train": True}, {**A, "loss": True}),
    "empty fields of exports": ({**A, "function_call": None, "audio": None, "annotations": [], "refusal": None}, A),
}


@pytest.mark.parametrize("name", SAME)
def test_what_other_tools_call_a_field_is_understood(tokenizer, name):
    theirs, ours = SAME[name]
    one, other = (render(tokenizer, {"messages": [Q, message]}) for message in (theirs, ours))
    assert one.samples[0].input_ids.tolist() == other.samples[0].input_ids.tolist()
    assert one.samples[0].loss_mask.tolist() == other.samples[0].loss_mask.tolist()
    assert not one.counts


@pytest.mark.parametrize("field", [{"weight": 0}, {"train": False}, {"loss": False}, {"loss_scale": 0}])
def test_what_says_that_it_is_not_trained_is_not(tokenizer, field):
    row = {"messages": [Q, {**A, **field}, Q, {**A, "content": "Trained."}]}
    assert trained(tokenizer, row) == "\nTrained.<|user|>"


def test_a_system_text_beside_messages_is_the_system_message(tokenizer):
    row = {"system": "SYS", "messages": [Q, A]}
    assert text(tokenizer, row) == text(tokenizer, {"messages": [{"role": "system", "content": "SYS"}, Q, A]})
    with pytest.raises(DataError, match="system is given beside a system message"):
        render(tokenizer, {"system": "SYS", "messages": [{"role": "system", "content": "S"}, Q, A]})
    with pytest.raises(DataError, match=r"x.jsonl:1: messages\[1\].content"):
        render(tokenizer, {"system": "SYS", "messages": [Q, {**A, "content": 7}]})


@pytest.mark.parametrize("name", ["tools", "functions", "tool_defs"])
@pytest.mark.parametrize("tool", [TOOL, {"function": TOOL}, {"type": "function", "function": TOOL}])
def test_tools_are_what_the_template_expects_however_they_are_given(tokenizer, name, tool):
    row = {"messages": [Q, CALL, RESULT, A]}
    wanted = text(tokenizer, {**row, "tools": [{"type": "function", "function": TOOL}]})
    for form in ([tool], json.dumps([tool])):
        assert text(tokenizer, {**row, name: form}) == wanted


REFUSED = {
    "a typo of a message's field": (
        {"messages": [Q, {**A, "reasoning_contents": "T"}]},
        "Did you mean reasoning_content",
    ),
    "a typo of a row's field": ({"messages": [Q, A], "tool": [TOOL]}, "Did you mean tools"),
    "pictures": ({"messages": [Q, A], "images": ["a.png"]}, "text only"),
    "a picture of a message": ({"messages": [{**Q, "image": "a.png"}, A]}, "text only"),
    "two names of the thought": ({"messages": [Q, {**A, "reasoning": "a", "thinking": "b"}]}, "both given"),
    "the thought twice": ({"messages": [Q, {**A, "reasoning": "a", "reasoning_content": "b"}]}, "both given"),
    "weight and loss": ({"messages": [Q, {**A, "weight": 1, "loss": True}]}, "both given"),
    "a weight in words": ({"messages": [Q, {**A, "weight": "1"}]}, "a number from 0 on"),
    "tools twice": ({"messages": [Q, A], "tools": [TOOL], "functions": [TOOL]}, "both given"),
    "a tool without a name": ({"messages": [Q, A], "tools": [{"type": "function"}]}, "not a definition"),
    "a tool that is not a function": (
        {"messages": [Q, A], "tools": [{"type": "web", "function": TOOL}]},
        "allowed: function",
    ),
    "a tool that the row does not have": (
        {"messages": [Q, CALL, RESULT, A], "tools": [{**TOOL, "name": "g"}]},
        "the row's tools are g",
    ),
    "a call as text": ({"messages": [Q, {**A, "content": '<tool_call>{"name": "f"}</tool_call>'}]}, "written as text"),
    "a call in GLM's form as text": (
        {
            "messages": [
                Q,
                {**A, "content": "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n</tool_call>"},
            ]
        },
        "written as text",
    ),
    "tags around a result": (
        {"messages": [Q, CALL, {**RESULT, "content": "<tool_response>\nx\n</tool_response>"}, A]},
        "the template writes around it",
    ),
    "a thought where it is told not to think": (
        {"messages": [Q, {**A, "reasoning_content": "T"}], "enable_thinking": False},
        "enable_thinking is false",
    ),
    "a mention of a tag": ({"messages": [Q, {**A, "content": "It closes with </think> there."}]}, "lose or double"),
    "two thoughts": ({"messages": [Q, {**A, "content": "<think>a</think>One.<think>b</think>Two."}]}, "lose or double"),
    "text before a thought": ({"messages": [Q, {**A, "content": "Hm. <think>a</think>One."}]}, "lose or double"),
    "a thought that does not end": ({"messages": [Q, {**A, "content": "<think>a"}]}, "lose or double"),
    "a thought beside one in the text": (
        {"messages": [Q, {**A, "reasoning_content": "a", "content": "<think>b</think>c"}]},
        "given beside a thought",
    ),
    "a call's weight that is not its turn's": (
        {"messages": [Q, A, {"role": "tool_call", "content": '{"name": "f", "arguments": {}}', "loss": False}]},
        "a turn has one weight",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_lost_or_trained_otherwise_is_an_error_that_names_the_row(tokenizer, name):
    row, words = REFUSED[name]
    with pytest.raises(DataError, match=words) as fault:
        render(tokenizer, row)
    assert str(fault.value).startswith("x.jsonl:1: ")


@pytest.mark.parametrize("form", ["alpaca", "sharegpt", "query", "prompt", "chosen"])
def test_every_shape_is_held_to_the_same(tokenizer, form):
    said = "Hm. <think>a</think>One."
    row = {
        "alpaca": {"instruction": "Q", "output": said},
        "sharegpt": {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": said}]},
        "query": {"query": "Q", "response": said},
        "prompt": {"prompt": "Q", "completion": said},
        "chosen": {"messages": [Q, {**A, "content": said}]},
    }[form]
    with pytest.raises(DataError, match="lose or double"):
        render(tokenizer, row)


@given(
    st.dictionaries(st.text(string.ascii_lowercase + "_", min_size=3, max_size=14), st.just("value"), max_size=3),
    st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_no_field_vanishes(tokenizer, fields, of_message):
    """A field that is not read is an error, or counted by its name."""
    known = {
        "messages",
        "system",
        "tools",
        "enable_thinking",
        "channel",
        "role",
        "content",
        "loss",
        "loss_scale",
        "weight",
    }
    known |= {
        "label",
        "tool_calls",
        "train",
        "reasoning",
        "thinking",
        "functions",
        "chosen",
        "rejected",
        "conversations",
    }
    known |= {"tool_call_id", "reasoning_content", "function_call", "tool_defs", "text", "prompt", "query"}
    fields = {name: value for name, value in fields.items() if name not in known}
    row = {"messages": [Q, {**A, **fields}]} if of_message else {"messages": [Q, A], **fields}
    try:
        counts = render(tokenizer, row).counts
    except DataError as error:
        assert any(name in str(error) for name in fields)
        return
    front = "messages[]." if of_message else ""
    assert set(counts) == {f"rows with the unused field {front}{name}" for name in fields}


_PIECES = st.lists(
    st.sampled_from(
        [OPEN, CLOSE, "<tool_call>", "</tool_call>", "<tool_response>", "a", "Ünï", " ", "\n", "<", "think>"]
    ),
    max_size=8,
).map("".join)


@given(_PIECES, st.none() | _PIECES)
@settings(max_examples=400, deadline=None)
def test_every_letter_is_trained_once_or_the_row_is_refused(tokenizer, content, reasoning):
    message = {
        "role": "assistant",
        "content": content,
        **({} if reasoning is None else {"reasoning_content": reasoning}),
    }
    try:
        made = text(tokenizer, {"messages": [Q, message]})
    except DataError:
        return
    turn = made.partition("<|assistant|>")[2].removesuffix("<|user|>")
    thought, said = turn.removeprefix("\n<think>").split("</think>")
    letters = [
        letter for letter in (reasoning or "") + content.replace(OPEN, "").replace(CLOSE, "") if not letter.isspace()
    ]
    assert [letter for letter in thought + said if not letter.isspace()] == letters


@pytest.mark.parametrize("arguments", ["", None, "{}", {}])
def test_a_call_may_have_no_arguments(tokenizer, arguments):
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
    assert "<tool_call>f\n" in text(tokenizer, {"messages": [Q, call, RESULT, A], "tools": [TOOL]})


def test_a_null_that_the_model_shall_write_is_kept(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "rows_with_nulls.py").write_text(f"def rows():\n    yield { ({'messages': [Q, CALL, RESULT, A]})!r}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    ((_, _, row),) = read_source("rows_with_nulls:rows")
    assert "<arg_key>a</arg_key>\n<arg_value>null</arg_value>" in text(tokenizer, row)


def test_only_the_nulls_that_a_columnar_file_makes_up_are_left_out(tmp_path):
    rows = [
        {"prompt": "a", "solution": None, "extra": {"x": 1}, "list": [None, 1]},
        {"prompt": "b", "solution": "s", "extra": {"y": 2}, "list": []},
    ]
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert [row for _, row in read_rows(tmp_path / "rows.parquet")] == rows


def test_a_call_that_has_no_result_does_not_teach_another_end(tokenizer):
    """The model stops behind a call at <|observation|>; a user's turn in its place is not what it shall write."""
    said = trained(tokenizer, {"messages": [Q, CALL, Q, A], "tools": [TOOL]})
    assert said.count("<|user|>") == 1 and said.endswith("An answer.<|user|>")


def test_an_earlier_turn_that_asks_to_be_trained_is_counted(tokenizer):
    row = {"messages": [Q, {**A, "loss": True}, Q, A]}
    assert sum(render(tokenizer, row, turns="last").counts.values()) == 1


def test_thoughts_in_the_text_count_as_thoughts_of_earlier_turns(tokenizer):
    inline = {**A, "content": "<think>T</think>An answer."}
    with pytest.raises(DataError, match="history_thinking"):
        render(tokenizer, {"messages": [Q, inline, Q, A]}, history_thinking="keep")
