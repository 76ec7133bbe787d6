"""A conversation on the terminal, word by word: thoughts dim, calls shown and answered by the person."""

import io
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from rich.text import Text

from glm45_tune.chat.answers import Answer, Splitter, fault_of, typed
from glm45_tune.chat.model import ChatModel
from glm45_tune.chat.server import Server
from glm45_tune.console import Terminal
from glm45_tune.data.chat import check_tools
from glm45_tune.errors import DataError, UserError
from glm45_tune.terminal import is_text, visible

_STYLES = {"thought": "dim", "content": "", "call": "cyan"}
_OPENING = "Type a question. /help lists what else can be typed; an empty line or Ctrl-D ends."
_HELP = """\
/think, /no-think, /default   ask for thoughts, against them, or leave it to the template
/adapter DIR, /adapter off    another adapter on the same model; of a server, the name of a model that it serves
/tools FILE, /tools off       tool definitions, a JSON list; a call is shown and asks for its result
/new                          forget this conversation
an empty line or Ctrl-D       end"""


@dataclass
class Turn:
    """What the model answered: text, thought, and calls, each with its name, arguments and what is wrong with it."""

    content: str = ""
    thought: str = ""
    calls: list[dict] = field(default_factory=list)

    def message(self) -> dict:
        """As the template and the servers want it."""
        found: dict = {"role": "assistant", "content": self.content}
        if self.thought:
            found["reasoning_content"] = self.thought
        if self.calls:
            found["tool_calls"] = [
                {"id": f"call_{n}", "type": "function", "function": {key: call[key] for key in ("name", "arguments")}}
                for n, call in enumerate(self.calls)
            ]
        return found


class Local:
    """A ChatModel in this process."""

    def __init__(self, model: str | Path, adapter: str | Path | None, device_map: str | None):
        self.model = ChatModel(model, adapter, device_map)

    def use(self, adapter: str | None) -> None:
        self.model.put_adapter(adapter)

    def answer(self, messages: list[dict], think: bool | None, tools: list | None, most: int, show: Callable) -> Turn:
        prompt = self.model.prompt(messages, think, tools)
        splitter, text = Splitter("thought" if prompt.rstrip().endswith("<think>") else "content"), ""
        for piece in self.model.stream(prompt, most):
            text += piece
            for kind, part in splitter.feed(piece):
                show(kind, part)
        for kind, part in splitter.end():
            show(kind, part)
        said = Answer(text)
        calls = [{"name": c.name, "arguments": typed(c, tools), "fault": fault_of(c, tools)} for c in said.calls]
        return Turn(said.content, said.thought, calls)


class Remote:
    """A server; a call's arguments travel as JSON text there."""

    def __init__(self, url: str, model: str | None):
        self.server, self._served = Server(url, model), model

    def use(self, model: str | None) -> None:
        self.server.use(model or self._served or self.server.models[0])

    def answer(self, messages: list[dict], think: bool | None, tools: list | None, most: int, show: Callable) -> Turn:
        splitter = Splitter()  # a server without a reasoning parser sends thoughts as content
        thoughts: list[str] = []
        rest: list[str] = []

        def take(parts: Iterable[tuple[str, str]]) -> None:
            for kind, text in parts:
                show(kind, text)
                (thoughts if kind == "thought" else rest).append(text)

        def hear(kind: str, text: str) -> None:
            take(splitter.feed(text) if kind == "content" else [(kind, text)])

        calls = self.server.answer([_on_the_wire(message) for message in messages], think, tools, most, hear)
        take(splitter.end())
        return Turn("".join(rest).strip(), "".join(thoughts).strip(), [_call(call) for call in calls])


def _read_any_bytes() -> None:
    """Let bytes that are not UTF-8 come as halves of surrogate pairs, see `is_text`."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")


def _on_the_wire(message: dict) -> dict:
    calls = [
        call
        | {"function": call["function"] | {"arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False)}}
        for call in message.get("tool_calls", [])
    ]
    return message | ({"tool_calls": calls} if calls else {})


def _call(call: dict[str, str]) -> dict:
    fault, arguments = None, {}
    try:
        arguments = json.loads(call["arguments"] or "{}")
        json.dumps(arguments)  # it is shown and sent back
    except (ValueError, RecursionError):
        fault, arguments = f"has arguments that are no JSON: {call['arguments'][:60]!r}", {}
    return {"name": call["name"], "arguments": arguments, "fault": fault}


def load_tools(path: str | Path) -> list:
    """Tool definitions: a JSON list, or an object that holds one as `tools`. Raises UserError."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        return check_tools({"tools": found.get("tools") if isinstance(found, dict) else found}) or []
    except (OSError, ValueError, RecursionError, DataError) as error:
        raise UserError(f"--tools {path}: {error}. A JSON file with a list of tool definitions is expected.") from error


@dataclass
class Talk:
    """One conversation. prompt: ask this and end; else questions come from the terminal until an empty line."""

    side: Local | Remote
    think: bool | None = None
    tools: list | None = None
    max_new_tokens: int = 512
    messages: list[dict] = field(default_factory=list)

    def run(self, prompt: str | None) -> None:
        # what a model says may look like markup
        self._terminal = Terminal(stderr=True, markup=False, emoji=False)
        self._output = Terminal(highlight=False, soft_wrap=True, markup=False, emoji=False)
        if prompt is not None:
            self._say(prompt)
            return
        self._terminal.print(_OPENING, style="dim", highlight=False)
        _read_any_bytes()
        while question := self._ask("> "):
            if question.startswith("/"):
                self._order(*question.split(maxsplit=1))
            else:
                self._say(question, with_results=True)

    def _ask(self, sign: str) -> str:
        while True:
            try:
                line = self._terminal.input(Text(visible(sign), "bold")).strip()
            except EOFError:
                return ""
            if is_text(line):
                return line
            self._terminal.print(
                "That line holds bytes that are not UTF-8, so it is left out. Type it again.", style="red"
            )

    def _order(self, order: str, value: str = "") -> None:
        try:
            if order in ("/think", "/no-think", "/default"):
                self.think = {"/think": True, "/no-think": False}.get(order)
            elif order == "/adapter" and value:
                self.side.use(None if value == "off" else value)
            elif order == "/tools" and value:
                self.tools = None if value == "off" else load_tools(value)
            elif order == "/new":
                self.messages.clear()
            else:
                self._terminal.print(_HELP, highlight=False)
        except UserError as error:
            self._terminal.print(str(error), style="red")

    def _say(self, question: str, with_results: bool = False) -> None:
        self.messages.append({"role": "user", "content": question})
        turn = self._answered()
        while turn.calls and with_results:
            for number, call in enumerate(turn.calls):
                result = self._ask(f"result of {call['name']}> ")
                self.messages.append({"role": "tool", "tool_call_id": f"call_{number}", "content": result})
            turn = self._answered()

    def _answered(self) -> Turn:
        shown: list[str] = []

        def show(kind: str, text: str) -> None:
            if kind == "call":
                return  # shown whole, below
            if shown and kind != shown[-1]:
                self._output.print()
            text = text if shown and kind == shown[-1] else text.lstrip("\n")
            self._output.print(visible(text), end="", style=_STYLES[kind])
            if text:
                shown.append(kind)

        turn = self.side.answer(self.messages, self.think, self.tools, self.max_new_tokens, show)
        self._output.print()
        for call in turn.calls:
            line = f"{call['name']}({json.dumps(call['arguments'], ensure_ascii=False)})"
            fault = f"  [{call['fault']}]" if call["fault"] else ""
            self._output.print(visible(line + fault), style=_STYLES["call"])
        self.messages.append(turn.message())
        return turn


def talk(
    model: str | Path | None,
    adapter: str | None,
    think: bool | None,
    prompt: str | None,
    max_new_tokens: int,
    server: str | None = None,
    tools: str | Path | None = None,
    device_map: str | None = None,
) -> None:
    """Talk with a directory's model in this process, or with the one (of the name `model`) that `server` serves."""
    if prompt is not None and not prompt.strip():
        raise UserError("chat: --prompt is empty. Give it a question, or leave it out to type questions.")
    if prompt is not None and not is_text(prompt):
        raise UserError("chat: --prompt holds bytes that are not UTF-8. Is the terminal set to another encoding?")
    definitions = load_tools(tools) if tools else None
    if server:
        side: Local | Remote = Remote(server, str(adapter or model) if adapter or model else None)
    elif model is None:
        raise UserError("chat: give a model's directory, or --server URL.")
    else:
        side = Local(model, adapter, device_map)
    Talk(side, think, definitions, max_new_tokens).run(prompt)
