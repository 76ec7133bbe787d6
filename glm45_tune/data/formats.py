"""The shapes in which people keep conversations, each turned into messages, or into plain text.

One answer to learn:
messages         {"messages": [{"role", "content", "reasoning_content", "tool_calls", "loss", "loss_scale"}], "tools", "system"}
sharegpt         {"conversations": [{"from", "value"}], "system", "tools"}
alpaca           {"instruction", "input", "output", "system", "history"}
prompt           {"prompt", "completion"}, text or messages each
query            {"query", "response", "history", "system"}
text             {"text"}: continued pre-training

Two answers to compare:
preference       {"chosen", "rejected"}, text or messages each, behind any of the prompts below or with the prompt in both;
                 or any shape above with "rejected_response" (text) or "rejected_messages" (a conversation)

One answer and what was thought of it, for KTO:
any shape with one answer, and "label": true or false

A prompt to answer:
rl               {"prompt"}, text or messages; or, where the format is named, "messages", "conversations", "query" or
                 "instruction". Every other field of the row is kept for the reward
"""

import json
import re

from glm45_tune.data.fields import ROW_ALIASES, renamed, unused_of_messages, unused_of_row
from glm45_tune.errors import DataError

# a format is recognised by the fields that only it has: any of them, the first format that has one
FORMATS = {
    "preference": ("rejected", "rejected_response", "rejected_messages"),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction",),
    "prompt": ("completion",),
    "query": ("query",),
    "rl": ("prompt",),
    "text": ("text",),
}
# what an answer follows: the first of these that a pair or an RL prompt has
PROMPT_FIELDS = ("prompt", "messages", "conversations", "query", "instruction")
# what a row is for, by its format; every other format is "sft": an answer to learn
KINDS = {"preference": "preference", "rl": "rl"}
# what of a row becomes part of a conversation, by the field that holds its question
_USED = {
    "messages": ("messages", "system"),
    "conversations": ("conversations", "system"),
    "instruction": ("instruction", "input", "system", "history"),
    "prompt": ("prompt", "system", "history"),
    "query": ("query", "system", "history"),
}
_ANSWER_FIELDS = {"alpaca": "output", "prompt": "completion", "query": "response"}
ALIASES = {
    "human": "user",
    "developer": "system",
    "gpt": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "observation": "tool",
    "tool_response": "tool",
}
_CALLS = ("function_call", "tool_call")
_KEPT = ("tools", "enable_thinking")


def field_of(row: dict, field: str) -> str:
    """What the row itself calls a field of its messages: `conversations[1].from` for `messages[2].role` behind a system text."""
    found, form = re.match(r"messages\[(\d+)\](.*)", field), format_of(row)
    if not found or form not in ("messages", "sharegpt"):
        return field
    name, key, number, rest = "messages", "role", int(found[1]) - bool(row.get("system")), found[2]
    if form == "sharegpt":
        name, key = "conversations", "from"
        rest = {".role": ".from", ".content": ".value"}.get(rest, rest)
    places, before = [], None
    for place, turn in enumerate(row[name] if isinstance(row[name], list) else []):
        role = turn.get(key) if isinstance(turn, dict) else None
        if not (role in _CALLS and before == "assistant"):  # such a call became part of the turn before it
            places.append(place)
            before = ALIASES.get(role, role) if isinstance(role, str) else None
    if number >= len(places):
        return field  # the messages are another field's: the recipe names a format
    return "system" if number < 0 else f"{name}[{places[number]}]{rest}"


def format_of(row: dict) -> str | None:
    """The format a row's fields tell, if any does; a field that is null is none, unless all are."""
    found = (name for name, fields in FORMATS.items() if any(row.get(field) is not None for field in fields))
    empty = (name for name, fields in FORMATS.items() if any(field in row for field in fields))
    return next(found, None) or next(empty, None)


def canonical(row: dict, form: str | None = None, kind: str = "sft") -> dict:
    """The row as {"messages": [...], …} or {"text": …}; form None recognises it. Raises DataError, also for another kind of row.

    kind "preference" gives {"messages", "rejected_messages"}, two whole conversations; "rl" messages that await an answer;
    "labelled" {"messages", "label"}, the label as it is in the row.
    """
    row, form = _recognised(row, form)
    is_labelled = kind == "labelled"
    if KINDS.get(form, "sft") != ("sft" if is_labelled else kind) or (is_labelled and form == "text"):
        raise DataError(_OTHER_KIND[kind, KINDS.get(form, "sft")])
    if form not in KINDS and not any(field in row for field in FORMATS[form]):
        raise DataError(f"is missing, which format {form} needs", FORMATS[form][0])
    kept = {key: row[key] for key in (*_KEPT, *(["label"] if is_labelled else [])) if row.get(key) is not None}
    if form == "text":
        if not isinstance(row["text"], str):
            raise DataError(f"is {type(row['text']).__name__}; a string is expected", "text")
        return {"text": row["text"]}
    if form == "preference":
        chosen, rejected = _both(row)
        return {"messages": chosen, "rejected_messages": rejected, **kept}
    return {"messages": _front(row) if form == "rl" else _READERS[form](row), **kept}


def unused_fields(row: dict, made: dict, form: str | None = None, kind: str = "sft") -> list[str]:
    """What of a row, and of the messages `made` of it by `canonical`, nothing reads, by name. Raises DataError, see `fields.py`.

    The columns of an RL prompt are for its rewards, which read what they like.
    """
    messages = unused_of_messages([*made.get("messages", ()), *made.get("rejected_messages", ())])
    if kind == "rl":
        return messages
    row, form = _recognised(row, form)
    return unused_of_row(row, (*_used(row, form), *(["label"] if kind == "labelled" else []))) + messages


def _recognised(row: dict, form: str | None) -> tuple[dict, str]:
    """The row under our names, without columns that are null in it, and its format."""
    if None in row.values():  # merged sets have every column in every row
        given = {key: value for key, value in row.items() if value is not None}
        row = given if format_of(given) else row
    row = renamed(row, ROW_ALIASES)
    form = form or format_of(row)
    if form is None:
        fields = dict.fromkeys(field for fields in FORMATS.values() for field in fields)
        raise DataError(
            f"no known format: the row has {', '.join(map(repr, row)) or 'no fields'}; a row needs one of "
            f"{', '.join(map(repr, fields))}"
        )
    return row, form


def _used(row: dict, form: str) -> tuple[str, ...]:
    """The fields of a row of this form that are read."""
    if form == "text":
        return ("text",)
    front = next((name for name in PROMPT_FIELDS if name in row), None)
    if form != "preference":
        front = {"sharegpt": "conversations", "alpaca": "instruction"}.get(form, form)
        return (*_USED[front], *([_ANSWER_FIELDS[form]] if form in _ANSWER_FIELDS else []))
    if "rejected" in row or "chosen" in row:
        return ("chosen", "rejected", *(_USED[front] if front else ()))
    base = format_of({key: value for key, value in row.items() if not key.startswith("rejected_")})
    rejected = "rejected_messages" if "rejected_messages" in row else "rejected_response"
    return (rejected, *(_used(row, base) if base in _READERS else ()))


# (what is wanted, what came)
_OTHER_KIND = {
    (
        "sft",
        "rl",
    ): "is a prompt for RL, without the answer that supervised training learns: it belongs in the field completion",
    ("sft", "preference"): "is a pair for preference tuning; supervised training learns one answer a row",
    (
        "preference",
        "sft",
    ): "has one answer; preference tuning compares two: chosen and rejected, or rejected_response beside it "
    "(loss kto also takes one with a label, where the first row and all others are such)",
    ("preference", "rl"): "has a prompt alone; preference tuning compares two answers: chosen and rejected",
    (
        "labelled",
        "preference",
    ): "is a pair, and the first row is one answer with a label; all rows are to be of one sort",
    ("labelled", "rl"): "is a prompt without an answer; kto learns from answers with a label: the field completion",
    ("labelled", "sft"): "is plain text, which answers nothing; kto learns from answers with a label",
    ("rl", "sft"): "holds its answer; RL takes prompts: the field prompt alone, or messages with data.format rl",
    ("rl", "preference"): "is a pair for preference tuning; RL takes prompts: the field prompt alone",
}


def _text(row: dict, key: str) -> str:
    value = row.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"is {type(value).__name__}; a string is expected", key)
    return value


def _list(row: dict, key: str) -> list:
    value = row.get(key)
    if not isinstance(value, list):
        raise DataError(f"is {'missing' if key not in row else type(value).__name__}; a list is expected", key)
    return value


def _messages(row: dict) -> list:
    messages, system = _known(_list(row, "messages")), _system(row)
    if system and any(_role(message) == "system" for message in messages):
        raise DataError("is given beside a system message; give one of them", "system")
    return system + messages


def _known(messages: list) -> list:
    """Messages with their aliases resolved; calls that follow each other, or an assistant's text, are one assistant turn."""
    made: list = []
    for message in messages:
        is_call = _role(message) in _CALLS
        message = _with_known_role(message)
        if is_call and made and _role(made[-1]) == "assistant":
            _check_one_weight(made[-1], message)
            made[-1] = {**made[-1], "tool_calls": [*(made[-1].get("tool_calls") or []), *message["tool_calls"]]}
        else:
            made.append(message)
    return made


def _check_one_weight(turn: dict, call: dict) -> None:
    """A call joins the turn before it, which has one weight."""
    for name in ("loss", "loss_scale", "weight", "train"):
        if name in call and call[name] != turn.get(name):
            raise DataError(
                f"is {call[name]!r}, and the turn that the call belongs to says {turn.get(name)!r}: a turn has one weight",
                f"{name} of a call",
            )


def _with_known_role(message: object) -> object:
    """Aliases of roles; a `function_call` or `tool_call` message holds the call as JSON text."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str) or message["role"] not in ALIASES:
        return message
    changed = {**message, "role": ALIASES[message["role"]]}
    if message["role"] in _CALLS:
        try:
            calls = json.loads(message.get("content") or "")
        except (ValueError, TypeError) as error:
            raise DataError(f"is not JSON: {error}", f"content of a {message['role']}") from None
        calls = calls if isinstance(calls, list) else [calls]
        if not calls:
            raise DataError("holds no call; one, or a list of some, is expected", f"content of a {message['role']}")
        changed |= {"content": "", "tool_calls": [{"type": "function", "function": call} for call in calls]}
    return changed


def _system(row: dict) -> list[dict]:
    return [{"role": "system", "content": _text(row, "system")}] if row.get("system") else []


def _sharegpt(row: dict) -> list:
    turns = enumerate(_list(row, "conversations"))
    messages = _known([_turn(turn, f"conversations[{number}]") for number, turn in turns])
    if (system := _system(row)) and any(_role(message) == "system" for message in messages):
        raise DataError("is given beside a system message; give one of them", "system")
    return system + messages


def _is_turn(value: object) -> bool:
    return isinstance(value, dict) and "from" in value and "role" not in value


def _turn(turn: object, where: str) -> dict:
    """A turn as ShareGPT writes it, as a message."""
    if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
        raise DataError('is no {"from", "value"}', where)
    rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
    return {"role": turn["from"], "content": turn["value"], **rest}


def _history(row: dict) -> list[dict]:
    turns = []
    for number, pair in enumerate(_list(row, "history") if row.get("history") else []):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise DataError("is no [question, answer]", f"history[{number}]")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return turns


def _alpaca(row: dict) -> list:
    return _front(row, "instruction") + _answer(row.get("output"), "output")


def _prompt(row: dict) -> list:
    return _front(row, "prompt") + _answer(row["completion"], "completion")


def _query(row: dict) -> list:
    return _front(row, "query") + _answer(row.get("response"), "response")


_READERS = {"messages": _messages, "sharegpt": _sharegpt, "alpaca": _alpaca, "prompt": _prompt, "query": _query}


def _front(row: dict, field: str | None = None) -> list:
    """What an answer is to follow: `field`, or the first of PROMPT_FIELDS there is."""
    field = field or next((name for name in PROMPT_FIELDS if name in row), None)
    if field == "messages":
        return _messages(row)
    if field == "conversations":
        return _sharegpt(row)
    if field == "prompt" and not isinstance(row.get("prompt"), str):
        return _system(row) + _known(_list(row, "prompt"))
    if field is None:
        raise DataError(
            f"is missing, and so are {', '.join(PROMPT_FIELDS[1:])}, which may stand in its place", "prompt"
        )
    question = _text(row, field)
    if field == "instruction":
        question = "\n".join(filter(None, (question, _text(row, "input"))))
    if not question and row.get(field) is None:
        raise DataError("is null; a question is expected, which the answer is to", field)
    return [*_system(row), *_history(row), {"role": "user", "content": question}]


def _answer(value: object, key: str) -> list:
    """An answer given as text, as one message, or as messages."""
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not value:
        came = "missing" if value is None else repr(value)[:40]
        raise DataError(f"is {came}; text, a message or a list of messages is expected", key)
    return _known([_turn(message, f"{key}[{n}]") if _is_turn(message) else message for n, message in enumerate(value)])


def _both(row: dict) -> tuple[list, list]:
    """The chosen and the rejected conversation of a preference row, each from its beginning."""
    if "rejected" in row or "chosen" in row:
        for key in ("chosen", "rejected"):
            if row.get(key) is None:
                raise DataError("is missing; a preference row has chosen and rejected", key)
        chosen, rejected = (_answer(row[key], key) for key in ("chosen", "rejected"))
        if not any(key in row for key in PROMPT_FIELDS):
            return chosen, rejected  # the prompt is the beginning that both share
        front = _front(row)
        return _behind(front, chosen, "chosen"), _behind(front, rejected, "rejected")
    form = format_of({key: value for key, value in row.items() if not key.startswith("rejected_")})
    if form not in _READERS:
        raise DataError(
            "needs the chosen conversation beside it: messages, conversations, query and response, …",
            "rejected_response",
        )
    chosen = _READERS[form](row)
    front = chosen[
        : 1 + max((n for n, message in enumerate(chosen) if _role(message) not in ("assistant", "tool")), default=-1)
    ]
    if "rejected_messages" in row:
        rejected = _answer(_list(row, "rejected_messages"), "rejected_messages")
        whole = rejected[:1] == chosen[:1]
        return chosen, rejected if whole else _behind(front, rejected, "rejected_messages")
    if not isinstance(row["rejected_response"], str):
        raise DataError(f"is {type(row['rejected_response']).__name__}; a string is expected", "rejected_response")
    if not chosen or _role(chosen[-1]) != "assistant":
        raise DataError("rejects an answer, but the conversation does not end on one", "rejected_response")
    return chosen, [*chosen[:-1], {"role": "assistant", "content": row["rejected_response"]}]


def _role(message: object) -> object:
    return message.get("role") if isinstance(message, dict) else None


def _behind(front: list, answer: list, key: str) -> list:
    """The answer behind its prompt; it may repeat the prompt."""
    if answer[: len(front)] == front:
        return answer
    if _role(answer[0]) not in ("assistant", "tool"):
        raise DataError(f"begins with a {_role(answer[0])} message that is not the prompt's", key)
    return front + answer
