"""What a model wrote, taken apart: thought, what is said, tool calls; whole, or piece by piece while it is written."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

_THOUGHT = re.compile(r"^\s*(?:<think>)?(.*?)</think>", re.DOTALL)
_CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|$)", re.DOTALL)
_ARGUMENT = re.compile(r"\s*<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL)
_TAGS = {"<think>": "thought", "</think>": "content", "<tool_call>": "call", "</tool_call>": "content"}
_TAG = re.compile("|".join(_TAGS))


@dataclass(frozen=True)
class Call:
    """A tool call as it was written: arguments are text. fault: why it could not be read, where it could not."""

    name: str
    arguments: dict[str, str]
    fault: str | None = None


@dataclass(frozen=True)
class Answer:
    """A model's text, with everything it holds."""

    text: str

    @property
    def thought(self) -> str:
        """Empty when it did not think."""
        found = _THOUGHT.match(self.text)
        return found.group(1).strip() if found else ""

    @property
    def content(self) -> str:
        """What it said besides its thought and its calls."""
        return _CALL.sub("", _THOUGHT.sub("", self.text, count=1)).strip()

    @property
    def calls(self) -> list[Call]:
        return [_read_call(found) for found in _CALL.finditer(_THOUGHT.sub("", self.text, count=1))]


def _read_call(found: re.Match) -> Call:
    name, bracket, rest = found.group(1).partition("<arg_key>")
    arguments, position, rest = {}, 0, bracket + rest
    while argument := _ARGUMENT.match(rest, position):
        arguments[argument.group(1).strip()] = argument.group(2)
        position = argument.end()
    fault = None
    if not found.group(0).endswith("</tool_call>"):
        fault = "is not closed"
    elif not name.strip() or "\n" in name.strip():
        fault = "has no name"
    elif rest[position:].strip():
        fault = f"holds {rest[position:].strip()[:40]!r} where an argument is expected"
    return Call(name.strip(), arguments, fault)


def typed(call: Call, tools: list | None) -> dict:
    """The call's arguments as values: text where its tool says string, else JSON where it is JSON."""
    properties = _parameters(call.name, tools).get("properties", {})
    return {key: _value(text, properties.get(key, {}).get("type")) for key, text in call.arguments.items()}


def _value(text: str, kind: object):
    if kind == "string":
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text


def fault_of(call: Call, tools: list | None) -> str | None:
    """Why a call is invalid: unreadable, of no tool that is there, or with arguments that its parameters do not allow."""
    if call.fault:
        return call.fault
    if call.name not in {_function(tool).get("name") for tool in tools or []}:
        return f"there is no tool {call.name!r}"
    parameters, values = _parameters(call.name, tools), typed(call, tools)
    if missing := [name for name in parameters.get("required", []) if name not in values]:
        return f"{missing[0]} is missing"
    return _fault_of_object(values, parameters)


def _fault_of_object(values: dict, schema: dict) -> str | None:
    properties = schema.get("properties", {})
    for name, value in values.items():
        if name not in properties:
            if properties and schema.get("additionalProperties") is not True:
                return f"{name} is no parameter"
        elif fault := _fault_of_value(value, properties[name]):
            return f"{name} {fault}"
    return None


_KINDS = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "array": list,
    "object": dict,
    "null": type(None),
}


def _fault_of_value(value: object, schema: dict) -> str | None:
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    fits = any(
        isinstance(value, _KINDS.get(kind, object)) and (kind == "boolean" or value is not True and value is not False)
        for kind in kinds
    )
    if kinds and not fits:
        return f"is {value!r}, not {' or '.join(kinds)}"
    if "enum" in schema and value not in schema["enum"]:
        return f"is {value!r}, none of {schema['enum']}"
    return None


def _function(tool: dict) -> dict:
    return tool.get("function", tool)


def _parameters(name: str, tools: list | None) -> dict:
    return next(
        (_function(tool).get("parameters") or {} for tool in tools or [] if _function(tool).get("name") == name), {}
    )


class Splitter:
    """Sorts pieces of a text that is being written into ("thought" | "content" | "call", text)."""

    def __init__(self, begins: str = "content"):
        self._kind, self._waiting = begins, ""

    def feed(self, piece: str) -> Iterator[tuple[str, str]]:
        text, place = self._waiting + piece, 0
        for tag in _TAG.finditer(text):
            if tag.start() > place:
                yield self._kind, text[place : tag.start()]
            self._kind, place = _TAGS[tag[0]], tag.end()
        self._waiting = text[place:]
        # what may be the beginning of a tag waits for the rest of it
        keep = max((n for tag in _TAGS for n in range(1, len(tag)) if self._waiting.endswith(tag[:n])), default=0)
        if ready := self._waiting[: len(self._waiting) - keep]:
            yield self._kind, ready
        self._waiting = self._waiting[len(ready) :]

    def end(self) -> Iterator[tuple[str, str]]:
        if self._waiting:
            yield self._kind, self._waiting
        self._waiting = ""
