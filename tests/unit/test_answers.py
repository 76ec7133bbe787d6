"""Answers taken apart: thoughts, text and calls, whole and in pieces of any size; calls against the tools they are for."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm45_tune.chat.answers import Answer, Splitter, fault_of, typed

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "days": {"type": "integer"},
                    "unit": {"type": "string", "enum": ["C", "F"]},
                    "places": {"type": "array"},
                },
                "required": ["city"],
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
]


def written(name: str, arguments: dict) -> str:
    """A call as GLM-4.5's template writes it."""
    lines = [f"<tool_call>{name}"]
    for key, value in arguments.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        lines += [f"<arg_key>{key}</arg_key>", f"<arg_value>{text}</arg_value>"]
    return "\n".join([*lines, "</tool_call>"])


def test_thought_text_and_calls():
    calls = [("get_weather", {"city": "3", "days": 3, "places": ["a", {"b": None}]}), ("now", {})]
    text = "\n<think>我想 <b> </think>\n好的。\n" + "\n".join(written(*call) for call in calls)
    answer = Answer(text)
    assert answer.thought == "我想 <b>" and answer.content == "好的。"
    assert [(call.name, typed(call, TOOLS)) for call in answer.calls] == calls
    assert [fault_of(call, TOOLS) for call in answer.calls] == [None, None]
    # GLM-4.7 writes no line ends, and its prompt opens the thought
    tight = Answer("thinking</think>ok" + written(*calls[0]).replace("\n", ""))
    assert tight.thought == "thinking" and typed(tight.calls[0], TOOLS) == calls[0][1]


BROKEN = {
    "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>x</arg_value>": "is not closed",
    "<tool_call>\n</tool_call>": "has no name",
    "<tool_call>get_weather\n<arg_key>city</arg_key>\nx</tool_call>": "where an argument is expected",
    written("get_wether", {"city": "x"}): "no tool 'get_wether'",
    written("get_weather", {}): "city is missing",
    written("get_weather", {"city": "x", "colour": "red"}): "colour is no parameter",
    written("get_weather", {"city": "x", "days": "many"}): "days is 'many', not integer",
    written("get_weather", {"city": "x", "days": True}): "days is True, not integer",
    written("get_weather", {"city": "x", "unit": "K"}): "none of ['C', 'F']",
}


@pytest.mark.parametrize("text", BROKEN)
def test_a_call_that_is_not_valid_says_why(text):
    (call,) = Answer(text).calls
    assert BROKEN[text] in fault_of(call, TOOLS)


_WORDS = st.lists(
    st.one_of(
        st.sampled_from(["<think>", "</think>", "<tool_call>", "</tool_call>", "<arg_key>", "<", "</", "<th", ">"]),
        st.text(max_size=6),
    ),
    max_size=12,
).map("".join)


@settings(deadline=None)
@given(_WORDS, st.integers(0, 1000))
def test_pieces_of_any_size_are_sorted_as_the_whole_is(text, seed):
    """Nothing is lost or doubled but the tags, whatever the cuts; and nothing raises."""

    def sort(pieces):
        splitter, found = Splitter(), []
        for piece in pieces:
            found += splitter.feed(piece)
        for kind, part in [*found, *splitter.end()]:
            yield from ((kind, letter) for letter in part)

    draw = random.Random(seed)
    cuts = sorted(draw.choices(range(len(text) + 1), k=5))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]
    whole = list(sort([text]))
    assert list(sort(pieces)) == whole and list(sort(text)) == whole
    for tag in ("<think>", "</think>", "<tool_call>", "</tool_call>"):
        text = text.replace(tag, "")
    assert len(whole) >= len(text)
    Answer(text).calls  # noqa: B018
