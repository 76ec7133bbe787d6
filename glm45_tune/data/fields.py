"""The fields that rows, messages, calls and tools may have: which are used, what other tools call them, which are refused.

Nothing else is dropped in silence: a field that looks like a misspelt one is an error, any other is counted by its name.
"""

import difflib
from collections.abc import Iterable

from glm45_tune.errors import DataError

# each: our name → what others call it
ROW_ALIASES = {"tools": ("functions", "tool_defs", "tool_definitions")}
_MESSAGE_ALIASES = {"reasoning_content": ("reasoning", "thinking"), "loss": ("train",)}
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_MESSAGE = ("role", "content", "reasoning_content", "tool_calls", "loss", "loss_scale")
_COMMON = ("tools", "enable_thinking", "channel")
# they tie a result to its call; the template goes by the order
_HARMLESS = ("tool_call_id",)
_MEDIA = ("image", "images", "video", "videos", "audio", "audios", "objects")
_LIKENESS = 0.86  # "tool" is like "tools", "prompt_id" is not like "prompt"


def renamed(row: dict, aliases: dict[str, tuple[str, ...]], where: str = "") -> dict:
    """The row with other tools' names replaced by ours. Raises DataError where two names of one thing are both given."""
    found = row
    for name, others in aliases.items():
        given = [other for other in others if not _is_empty(row.get(other))]
        if not given:
            continue
        if len(given) > 1 or not _is_empty(row.get(name)):
            both = given[:2] if len(given) > 1 else [name, *given]
            raise DataError(f"and {both[1]} are both given, and mean the same; give one", f"{where}{both[0]}")
        if found is row:
            found = dict(row)
        found[name] = found.pop(given[0])
    return found


def unused_of_row(row: dict, used: Iterable[str]) -> list[str]:
    """Fields of a row that nothing reads. Raises DataError for pictures, sound and misspelt names."""
    known = {*used, *_COMMON}
    return _unused(row, known, known, "")


def unused_of_messages(messages: Iterable[object]) -> list[str]:
    """The same of its messages and their calls, each named once, such as `messages[].name`."""
    found: dict[str, None] = {}
    for message in messages:
        if not isinstance(message, dict):
            continue
        known = (*_MESSAGE, *(other for others in _MESSAGE_ALIASES.values() for other in others), *_HARMLESS)
        known += ("weight", "function_call")
        found |= dict.fromkeys(f"messages[].{name}" for name in _unused(message, known, known, " of a message"))
        calls = message.get("tool_calls")
        for call in calls if isinstance(calls, list) else ():
            function = call.get("function", call) if isinstance(call, dict) else None
            if not isinstance(function, dict):
                continue
            known = ("name", "arguments", "parameters", *(("id", "type", "index") if function is call else ()))
            names = _unused(function, known, known, " of a call")
            if function is not call:
                names += _unused(call, ("id", "type", "index", "function"), ("function",), " of a call")
            found |= dict.fromkeys(f"tool_calls[].{name}" for name in names)
    return list(found)


def _unused(fields: dict, known: Iterable[str], near: Iterable[str], what: str) -> list[str]:
    known, found = set(known), []
    for name, value in fields.items():
        if name in known or _is_empty(value):
            continue
        if name in _MEDIA:
            raise DataError("holds more than text, and the model takes text only; leave the row or the field out", name)
        like = difflib.get_close_matches(str(name), list(near), 1, _LIKENESS)
        if like:
            raise DataError(f"is not a known field{what}. Did you mean {like[0]}?", name)
        found.append(str(name)[:60])
    return found


def _is_empty(value: object) -> bool:
    """What exports write into every row for what a row does not have."""
    return value is None or value == "" or value == [] or value == {}


def read_message(message: dict, where: str) -> dict:
    """A message under our names: thoughts, calls and weights as other tools write them. Raises DataError."""
    found = renamed(message, _MESSAGE_ALIASES, f"{where}.")
    if not _is_empty(call := found.get("function_call")):
        if not _is_empty(found.get("tool_calls")):
            raise DataError("and tool_calls are both given, and mean the same; give one", f"{where}.function_call")
        found = {**found, "tool_calls": [{"type": "function", "function": call}]}
    if (weight := found.get("weight")) is not None:
        if found.get("loss") is not None or found.get("loss_scale") is not None:
            raise DataError("and loss or loss_scale are both given, and mean the same; give one", f"{where}.weight")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < 1e6:
            raise DataError(f"is {weight!r}; a number from 0 on is expected", f"{where}.weight")
        # what nobody trains may say that it is not trained, and 1 is what every message has
        found = {**found, "loss_scale": weight} if found.get("role") == "assistant" or weight else found
    return found


def call_arguments(function: dict) -> object:
    """A call's arguments; none where they are null or empty text. Some tools call them parameters."""
    name = "parameters" if "arguments" not in function and "parameters" in function else "arguments"
    arguments = function.get(name)
    return {} if arguments is None or arguments == "" else arguments


def read_tool(tool: object, where: str) -> dict:
    """A tool's definition as the template expects it, wrapped where it stands bare. Raises DataError."""
    if not isinstance(tool, dict):
        raise DataError(f"is {type(tool).__name__}; an object is expected", where)
    function = tool.get("function", tool)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise DataError('is not a definition: {"type": "function", "function": {"name", "parameters"}}', where)
    if tool.get("type", "function") != "function" and function is not tool:
        raise DataError(f"is {tool['type']!r}; allowed: function", f"{where}.type")
    if function is tool:
        return {"type": "function", "function": tool}
    return tool if "type" in tool else {"type": "function", **tool}
