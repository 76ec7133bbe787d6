"""From a conversation to token ids and the weight with which each is trained, by the checkpoint's own chat template.

The ids are the template's, plus one closing token where a conversation ends on an assistant turn. What is trained is what
the model will have to write at inference: everything between `<|assistant|>` and the next turn, and the role token that ends
the turn. An empty thought is what non-thinking prompts already contain, so it is context unless asked for.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from glm45_tune.errors import DataError

ROLE_TOKENS = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>", "tool": "<|observation|>"}


@dataclass(frozen=True, slots=True)
class Sample:
    """input_ids int32 [n]; loss_mask float32 [n], the weight with which each token is predicted; where it came from."""

    input_ids: np.ndarray
    loss_mask: np.ndarray
    source: str
    line: int
    text: str


def load_tokenizer(directory: str | Path):
    """The checkpoint's tokenizer; raises DataError where it, its template or one of GLM's role tokens is missing."""
    from transformers import AutoTokenizer

    if not (Path(directory) / "tokenizer.json").is_file():
        raise DataError(f"{directory}: no tokenizer.json here. A checkpoint's tokenizer files belong beside its weights.")
    tokenizer = AutoTokenizer.from_pretrained(str(directory))
    if not tokenizer.chat_template:
        raise DataError(f"{directory}: the tokenizer has no chat template (chat_template.jinja).")
    for token in ROLE_TOKENS.values():
        if tokenizer.convert_tokens_to_ids(token) in (None, tokenizer.unk_token_id):
            raise DataError(f"{directory}: the tokenizer has no token {token}; it is not GLM-4.5's.")
    return tokenizer


class ChatRenderer:
    """Renders rows of `{"messages": [...], "tools": [...], "enable_thinking": …}` for training."""

    def __init__(self, tokenizer, enable_thinking: bool | None = None, train_empty_think: bool = False):
        self.tokenizer = tokenizer
        self.enable_thinking = enable_thinking
        self.train_empty_think = train_empty_think
        self._role_ids = {role: tokenizer.convert_tokens_to_ids(token) for role, token in ROLE_TOKENS.items()}
        self._empty_think = self._empty_thought()

    def _empty_thought(self) -> list[int]:
        """What the template puts behind `<|assistant|>` when thinking is off: "\\n<think></think>" in 4.5, "</think>" in 4.7."""
        question = [{"role": "user", "content": "?"}]
        without, prompt = (
            self.tokenizer.apply_chat_template(
                question, tokenize=False, add_generation_prompt=generation, enable_thinking=False
            )
            for generation in (False, True)
        )
        return self._ids(prompt.removeprefix(without))[1:]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def render(self, row: dict, source: str, line: int) -> Sample:
        """Raises DataError naming `source` and `line` when the row cannot be rendered or would train nothing."""
        try:
            messages, tools = check_messages(row), check_tools(row)
            thinking = row.get("enable_thinking", self.enable_thinking)
            if thinking is not None and not isinstance(thinking, bool):
                raise DataError(f"enable_thinking is {thinking!r}; allowed: true, false or absent")
            options = {} if thinking is None else {"enable_thinking": thinking}
            text = self._template(messages, tools, options)
            ids, mask = self._weigh(self._ids(text), messages, bool(tools), thinking)
        except DataError as error:
            raise DataError(f"{source}:{line}: {error}") from None
        return Sample(np.asarray(ids, np.int32), np.asarray(mask, np.float32), source, line, text)

    def _template(self, messages: list[dict], tools: list | None, options: dict) -> str:
        import jinja2

        try:
            return self.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **options)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise DataError(f"the checkpoint's chat template refuses this conversation: {error}") from error

    def _weigh(self, ids: list[int], messages: list[dict], has_tools: bool, thinking: bool | None):
        roles = ["system"] * has_tools
        roles += [
            message["role"]
            for before, message in zip([None, *messages], messages)
            # one <|observation|> opens a run of tool results
            if message["role"] != "tool" or before is None or before["role"] != "tool"
        ]
        kinds = {token: role for role, token in self._role_ids.items()}
        starts = [position for position, token in enumerate(ids) if token in kinds]
        found = [kinds[ids[position]] for position in starts]
        if found != roles:
            raise DataError(
                f"a message's text holds one of the control tokens {', '.join(ROLE_TOKENS.values())}, which would be read "
                "as a turn of its own. Remove it, or write it differently"
            )
        last = messages[-1]
        if last["role"] == "assistant":  # what the engine would stop at; it follows, so it is learned
            ids = ids + [self._role_ids["tool" if last.get("tool_calls") else "user"]]
        mask = [0.0] * len(ids)
        for role, start, end in zip(found, starts, [*starts[1:], len(ids) - (last["role"] == "assistant")]):
            if role != "assistant":
                continue
            first = start + 1
            empty = ids[first : first + len(self._empty_think)] == self._empty_think
            if empty and not (self.train_empty_think and thinking is not False):
                first += len(self._empty_think)
            ends_turn = end < len(ids) and kinds[ids[end]] in ("user", "tool")
            mask[first : end + ends_turn] = [1.0] * (end + ends_turn - first)
        if not any(mask):
            raise DataError("nothing in this row would be trained: no assistant message in it says anything")
        return ids, mask


def check_messages(row: dict) -> list[dict]:
    """The row's messages as the template takes them: content a string or text parts, tool arguments an object."""
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        came = "missing" if "messages" not in row else repr(messages)[:40]
        raise DataError(f'messages is {came}; a list of {{"role", "content"}} is expected')
    return [_check_message(message, f"messages[{number}]") for number, message in enumerate(messages)]


def _check_message(message: object, where: str) -> dict:
    if not isinstance(message, dict):
        raise DataError(f"{where} is {type(message).__name__}; an object with role and content is expected")
    role, content = message.get("role"), message.get("content")
    if role not in ROLE_TOKENS:
        raise DataError(f"{where}.role is {json.dumps(role, ensure_ascii=False)}; allowed: {', '.join(ROLE_TOKENS)}")
    if content is None:
        if role != "assistant":
            raise DataError(f"{where}.content is null; only an assistant message may leave it out")
        content = ""  # the template would print the word None
    elif isinstance(content, list):
        for number, part in enumerate(content):
            if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
                raise DataError(f'{where}.content[{number}] is no {{"type": "text", "text": …}}; the model takes text only')
        content = "".join(part["text"] for part in content)
    elif not isinstance(content, str):
        raise DataError(f"{where}.content is {type(content).__name__}; allowed: a string, text parts or null")
    checked = {"role": role, "content": content}
    reasoning = message.get("reasoning_content")
    if reasoning is not None:
        if role != "assistant" or not isinstance(reasoning, str):
            raise DataError(f"{where}.reasoning_content: a string, on an assistant message only")
        checked["reasoning_content"] = reasoning
    if calls := message.get("tool_calls"):
        if role != "assistant" or not isinstance(calls, list):
            raise DataError(f"{where}.tool_calls: a list, on an assistant message only")
        checked["tool_calls"] = [_check_call(call, f"{where}.tool_calls[{n}]") for n, call in enumerate(calls)]
    return checked


def _check_call(call: object, where: str) -> dict:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(f'{where}: {{"function": {{"name", "arguments"}}}} is expected')
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):  # OpenAI's wire form; the template iterates an object
        try:
            arguments = json.loads(arguments)
        except ValueError as error:
            raise DataError(f"{where}.function.arguments is not JSON: {error}") from None
    if not isinstance(arguments, dict):
        raise DataError(f"{where}.function.arguments is {type(arguments).__name__}; an object is expected")
    return {"type": "function", "function": {"name": function["name"], "arguments": arguments}}


def check_tools(row: dict) -> list | None:
    """The row's tool definitions, which may be given as JSON text."""
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise DataError(f"tools is not JSON: {error}") from None
    if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise DataError("tools: a list of objects is expected")
    return tools or None
