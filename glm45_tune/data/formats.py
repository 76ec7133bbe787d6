"""The shapes in which people keep conversations, each turned into messages, or into plain text.

messages         {"messages": [{"role", "content", "reasoning_content", "tool_calls", "loss", "loss_scale"}], "tools"}
sharegpt         {"conversations": [{"from", "value"}], "system", "tools"}
alpaca           {"instruction", "input", "output", "system", "history"}
prompt           {"prompt", "completion"}, text or messages each
query            {"query", "response", "history", "system"}
text             {"text"}: continued pre-training
"""

import json

from glm45_tune.errors import DataError

# a format is recognised by the field that only it has
FORMATS = {
    "messages": "messages",
    "sharegpt": "conversations",
    "alpaca": "instruction",
    "prompt": "completion",
    "query": "query",
    "text": "text",
}
_ALIASES = {
    "human": "user",
    "gpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool_response": "tool",
}
_KEPT = ("tools", "enable_thinking")


def canonical(row: dict, form: str | None = None) -> dict:
    """The row as {"messages": [...], …} or {"text": …}; form None recognises it. Raises DataError."""
    if form is None:
        form = next((name for name, field in FORMATS.items() if field in row), None)
    if form is None:
        raise DataError(
            f"no known format: the row has {', '.join(map(repr, row)) or 'no fields'}; a row needs one of "
            f"{', '.join(map(repr, FORMATS.values()))}"
        )
    if FORMATS[form] not in row:
        raise DataError(f"is missing, which format {form} needs", FORMATS[form])
    kept = {key: row[key] for key in _KEPT if row.get(key) is not None}
    if form == "text":
        if not isinstance(row["text"], str):
            raise DataError(f"is {type(row['text']).__name__}; a string is expected", "text")
        return {"text": row["text"]}
    return {"messages": _READERS[form](row), **kept}


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
    return [_with_known_role(message) for message in _list(row, "messages")]


def _with_known_role(message: object) -> object:
    """Aliases of roles; a `function_call` message holds the call as JSON text."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str) or message["role"] not in _ALIASES:
        return message
    changed = {**message, "role": _ALIASES[message["role"]]}
    if message["role"] == "function_call":
        try:
            calls = json.loads(message.get("content") or "")
        except (ValueError, TypeError) as error:
            raise DataError(f"is not JSON: {error}", "content of a function_call") from None
        calls = calls if isinstance(calls, list) else [calls]
        changed |= {"content": "", "tool_calls": [{"type": "function", "function": call} for call in calls]}
    return changed


def _system(row: dict) -> list[dict]:
    return [{"role": "system", "content": _text(row, "system")}] if row.get("system") else []


def _sharegpt(row: dict) -> list:
    turns = []
    for number, turn in enumerate(_list(row, "conversations")):
        if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
            raise DataError('is no {"from", "value"}', f"conversations[{number}]")
        rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
        turns.append(_with_known_role({"role": turn["from"], "content": turn["value"], **rest}))
    return _system(row) + turns


def _history(row: dict) -> list[dict]:
    turns = []
    for number, pair in enumerate(_list(row, "history") if row.get("history") else []):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise DataError("is no [question, answer]", f"history[{number}]")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return turns


def _alpaca(row: dict) -> list:
    question = "\n".join(filter(None, (_text(row, "instruction"), _text(row, "input"))))
    answer = {"role": "assistant", "content": _text(row, "output")}
    return [*_system(row), *_history(row), {"role": "user", "content": question}, answer]


def _prompt(row: dict) -> list:
    prompt, completion = row.get("prompt"), row["completion"]
    front = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else _list(row, "prompt")
    back = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else _list(row, "completion")
    return _system(row) + [_with_known_role(message) for message in front + back]


def _query(row: dict) -> list:
    answer = {"role": "assistant", "content": _text(row, "response")}
    return [*_system(row), *_history(row), {"role": "user", "content": _text(row, "query")}, answer]


_READERS = {"messages": _messages, "sharegpt": _sharegpt, "alpaca": _alpaca, "prompt": _prompt, "query": _query}
