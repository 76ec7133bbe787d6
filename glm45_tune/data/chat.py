"""From a conversation to token ids and the weight with which each is trained, by the checkpoint's own chat template.

The ids are the template's, plus one closing token where a conversation ends on an assistant turn. What is trained is what
the model will have to write at inference: everything between `<|assistant|>` and the next turn, and the role token that ends
the turn. An empty thought is what non-thinking prompts already contain, so it is context unless asked for.
"""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from glm45_tune.data.deadline import in_time
from glm45_tune.data.fields import THOUGHTS, call_arguments, read_message, read_tool
from glm45_tune.data.formats import ALIASES, canonical, field_of, unused_fields
from glm45_tune.data.length import Fitted, Tokens, fit, why_left_out
from glm45_tune.data.thoughts import check_tags, split_thought
from glm45_tune.errors import DataError
from glm45_tune.recipe import DataConfig

NO_TEMPLATE = (
    "the checkpoint has no chat template (base models have none). It can learn plain text, the field text; for conversations put "
    "the chat_template.jinja of its chat model beside its tokenizer"
)
HALF_A_PAIR = "the text is no valid Unicode: it holds half of a surrogate pair"
ROLE_TOKENS = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>", "tool": "<|observation|>"}
FRONT = ("[gMASK]", "<sop>")  # what GLM begins every text with
ENDS_TEXT = "<|endoftext|>"


@dataclass(frozen=True, slots=True)
class Sample:
    """input_ids int32 [n]; loss_mask float32 [n], the weight with which each token is predicted; where it came from.

    row: of an RL prompt, the row as it was read; of a labelled answer its {"label": bool}; else its {"channel": name} if it has one.
    """

    input_ids: np.ndarray
    loss_mask: np.ndarray
    source: str
    line: int
    row: dict | None = None

    @property
    def channel(self) -> str:
        """Whose loss it counts to: its row's `channel`, else its file."""
        return (self.row or {}).get("channel") or self.source


@dataclass(frozen=True, slots=True)
class Rendering:
    """What became of one row: samples, and how often something was cut or left out, by reason."""

    samples: list[Sample]
    counts: Counter
    left_out: list[str]
    """Why conversations of the row are not among the samples, a sentence each."""


def load_tokenizer(directory: str | Path):
    """The checkpoint's tokenizer; raises DataError where it or one of GLM's role tokens is missing. Base models have no chat template."""
    from transformers import AutoTokenizer

    if not (Path(directory) / "tokenizer.json").is_file():
        raise DataError(
            f"{directory}: no tokenizer.json here. A checkpoint's tokenizer files belong beside its weights."
        )
    try:
        # False: code that a checkpoint brings is not run, nor is the user asked about it
        tokenizer = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False)
    except Exception as error:  # what damage raises is of many kinds, and of tokenizers Exception itself
        raise DataError(f"{directory}: its tokenizer cannot be read: {str(error)[:500] or error!r}.") from error
    for token in ROLE_TOKENS.values():
        if tokenizer.convert_tokens_to_ids(token) in (None, tokenizer.unk_token_id):
            raise DataError(f"{directory}: the tokenizer has no token {token}; it is not GLM-4.5's.")
    return tokenizer


class ChatRenderer:
    """Renders rows for training, as `options` (the recipe's data section) say."""

    kind = "sft"  # what its rows are for
    per_row = 1  # samples that belong together: a pair's two

    def __init__(self, tokenizer, options: DataConfig):
        self.tokenizer, self.options = tokenizer, options
        self._role_ids = {role: tokenizer.convert_tokens_to_ids(token) for role, token in ROLE_TOKENS.items()}
        # control tokens; None: one that opens no turn
        self._kinds = {token: role for role, token in self._role_ids.items()}
        self._front = [tokenizer.convert_tokens_to_ids(token) for token in FRONT]
        others = [*self._front, tokenizer.convert_tokens_to_ids(ENDS_TEXT)]
        self._kinds |= {token: None for token in others if token not in (None, tokenizer.unk_token_id)}
        self._is_control = np.zeros(len(tokenizer), bool)  # by token id
        self._is_control[list(self._kinds)] = True
        self._given, self._empty_think = self._prompted(), self._prompted(enable_thinking=False)

    def _prompted(self, **options) -> list[int]:
        """Return what the template puts behind `<|assistant|>` in a generation prompt, as token ids.

        That is nothing in 4.5 by default, and "\n<think></think>" when thinking is off; in 4.7 it
        is "</think>" then.
        """
        question = [{"role": "user", "content": "?"}]
        if not self.tokenizer.chat_template:
            return []
        try:
            without, prompt = in_time(
                lambda: [
                    self.tokenizer.apply_chat_template(
                        question, tokenize=False, add_generation_prompt=generation, **options
                    )
                    for generation in (False, True)
                ]
            )
        except Exception as error:  # a template is a program and may raise anything
            where = self.tokenizer.name_or_path
            raise DataError(
                f"{where}: its chat template cannot render a simple question: {repr(error)[:500]}"
            ) from error
        return self._ids(prompt.removeprefix(without))[1:]

    def _ids(self, text: str) -> list[int]:
        try:
            # "fast" leaves out the character offsets, a quarter of the time
            (encoding,) = self.tokenizer.backend_tokenizer.encode_batch_fast([text], add_special_tokens=False)
            return encoding.ids
        except TypeError:
            raise DataError(HALF_A_PAIR) from None

    def render(self, row: dict, source: str, line: int) -> Rendering:
        """Raises DataError naming `source` and `line` when the row cannot be rendered or would train nothing."""
        try:
            made = canonical(row, self.options.format, self.kind)
            unused = unused_fields(row, made, self.options.format, self.kind)
            fitted = self._tokens(made)
            counts = fitted.counts
            counts.update(f"rows with the unused field {name}" for name in unused)
            if any(map(_is_empty, made.get("messages", ()))):
                counts["rows with an empty answer, of which the end alone is trained"] += 1
            if self.options.turns == "last" and _asks_for_earlier(made.get("messages", ())):
                counts["rows that ask for an earlier turn, which turns: last leaves out"] += 1
            kept = self._kept(row)
        except DataError as error:
            field = error.field and field_of(row, error.field)
            located = DataError(
                f"{source}:{line}: " + (str(error).replace(error.field, field, 1) if field else str(error))
            )
            located.field = field
            raise located from None
        samples = [Sample(piece.ids, piece.mask, source, line, kept) for piece in fitted.pieces]
        return Rendering(samples, counts, fitted.left_out)

    def _kept(self, row: dict) -> dict | None:
        """What a sample keeps of its row besides tokens."""
        channel = row.get("channel")
        if channel is not None and not isinstance(channel, str):
            raise DataError(f"is {channel!r}; a name is expected, under which the row's loss is said", "channel")
        return {"channel": channel} if channel else None

    def _tokens(self, row: dict) -> Fitted:
        """What becomes of a row in canonical form."""
        found = [self._document(row["text"])] if "text" in row else self._conversations(row)
        return self._fitted(found)

    def _check_length(self, length: int) -> None:
        if length > self.options.seq_length and self.options.overlong == "error":
            raise DataError(
                f"{length} tokens exceed data.seq_length {self.options.seq_length}. Raise it, shorten the row, or say with "
                "data.overlong what should become of it"
            )

    def _fitted(self, found: list[Tokens]) -> Fitted:
        limit, policy = self.options.seq_length, self.options.overlong
        kept, counts, left_out = [], Counter(), []
        for tokens in found:
            self._check_length(len(tokens.ids))
            pieces = fit(tokens, limit, policy)
            trained = [piece for piece in pieces if piece.mask.any()]
            if len(tokens.ids) > limit:
                counts[
                    {"drop": "dropped", "truncate": "truncated", "split": "split"}[policy] if pieces else "dropped"
                ] += 1
                counts["pieces that would train nothing"] += len(pieces) - len(trained)
                if not pieces:
                    left_out.append(why_left_out(len(tokens.ids), tokens.head, limit, policy))
                elif not trained:
                    left_out.append(f"left out: nothing of what fits into {limit:,} tokens would be trained")
            elif not trained:
                raise DataError("nothing in this row would be trained: no assistant message in it says anything")
            kept += trained
        return Fitted(kept, +counts, left_out)

    def _document(self, text: str) -> Tokens:
        """Plain text as GLM was pre-trained on it: behind [gMASK]<sop>, ended by <|endoftext|>, all of it trained."""
        head = self._ids("".join(FRONT))
        body = self._ids(text) + [self.tokenizer.convert_tokens_to_ids(ENDS_TEXT)]
        mask = np.ones(len(head) + len(body), np.float32)
        mask[: len(head)] = 0
        return Tokens(np.array(head + body, np.int32), mask, len(head), [len(head)])

    def _conversations(self, row: dict) -> list[Tokens]:
        """The row's conversation; with `turns: expand` one for each assistant turn, ending with it."""
        messages, tools, thinking = self._checked(row)
        answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        if self.options.turns == "all":
            return [self._conversation(messages, tools, thinking, set(answers))]
        if self.options.turns == "last":
            return [self._conversation(messages, tools, thinking, set(answers[-1:]))]
        trained = [number for number in answers if messages[number]["weight"]]
        return [self._conversation(messages[: n + 1], tools, thinking, {n}) for n in trained] or [
            self._conversation(messages, tools, thinking, set())
        ]

    def _checked(self, row: dict, field: str = "messages") -> tuple[list[dict], list | None, bool | None]:
        """A row's messages, tools and `enable_thinking`, which fit together. Raises DataError."""
        messages, tools, thinking = check_messages(row, field), check_tools(row), self._thinking(row)
        names = {tool["function"]["name"] for tool in tools or ()}
        last_user = max((n for n, message in enumerate(messages) if message["role"] == "user"), default=-1)
        for number, message in enumerate(messages):
            if thinking is False and number > last_user and (message.get("reasoning_content") or "").strip():
                raise DataError(
                    "is a thought, and enable_thinking is false: the model would learn to think where it is told not to. "
                    "Leave one of them out",
                    f"{field}[{number}].reasoning_content",
                )
            for place, call in enumerate(message.get("tool_calls", ())):
                if tools and call["function"]["name"] not in names:
                    raise DataError(
                        f"is {call['function']['name']!r}; the row's tools are {', '.join(sorted(names))}",
                        f"{field}[{number}].tool_calls[{place}].function.name",
                    )
        return messages, tools, thinking

    def _thinking(self, row: dict) -> bool | None:
        thinking = row.get("enable_thinking", self.options.enable_thinking)
        if thinking is not None and not isinstance(thinking, bool):
            raise DataError(f"is {thinking!r}; allowed: true, false or absent", "enable_thinking")
        return thinking

    def _templated(self, messages: list[dict], tools: list | None, thinking: bool | None, prompt: bool = False) -> str:
        """The conversation by the checkpoint's template; `prompt`: with what asks for an answer behind it."""
        if not self.tokenizer.chat_template:
            raise DataError(NO_TEMPLATE)
        options = {} if thinking is None else {"enable_thinking": thinking}
        plain = [{key: value for key, value in message.items() if key != "weight"} for message in messages]

        def apply(**more) -> str:
            return self.tokenizer.apply_chat_template(
                plain, tools=tools, tokenize=False, add_generation_prompt=prompt, **options, **more
            )

        try:
            if self.options.history_thinking == "template":
                return apply()
            text = apply(clear_thinking=False)  # the templates that can keep thoughts call it so
            if _has_history_thoughts(messages) and text == apply():
                raise DataError(
                    "this checkpoint's chat template drops the thoughts of earlier turns: history_thinking keep cannot be had"
                )
            return text
        except DataError:
            raise
        except Exception as error:  # a template is a program that came with the checkpoint: it may raise anything
            raise DataError(f"the checkpoint's chat template refuses this conversation: {error!r}") from error

    def _turns(
        self, ids: list[int], messages: list[dict], tools: list | None, follows: str | None
    ) -> tuple[list, list, list]:
        """Find the turns of a conversation's ids: (places of role tokens, numbers of their messages, roles).

        The number is that of the message which the token opens, -1 for the tools. follows: whose
        token stands at the end, behind all messages.
        """
        starts = np.flatnonzero(self._is_control[ids]).tolist()
        if ids[: len(FRONT)] == self._front:
            starts = starts[len(FRONT) :]
        owners = [-1] * bool(tools)  # the tool definitions have a role token of their own, and are no message
        before = None
        for number, message in enumerate(messages):
            if message["role"] != "tool" or before != "tool":  # one <|observation|> opens a run of tool results
                owners.append(number)
            before = message["role"]
        roles = ["system" if number < 0 else messages[number]["role"] for number in owners]
        if [self._kinds[ids[start]] for start in starts] != (roles if follows is None else [*roles, follows]):
            raise DataError(
                f"a message's text holds one of the control tokens {', '.join((*ROLE_TOKENS.values(), ENDS_TEXT, *FRONT))}, "
                "which would be read as a turn of its own or as the end of one. Remove it, or write it differently"
            )
        return starts, owners, roles

    def _conversation(
        self, messages: list[dict], tools: list | None, thinking: bool | None, trained: set[int]
    ) -> Tokens:
        """trained: which messages' weights count."""
        text = self._templated(messages, tools, thinking)
        self._check_nothing_is_lost(text, messages)
        ids, last, follows = self._ids(text), messages[-1], None
        if last["role"] == "assistant":  # what the engine would stop at; it follows, so it is learned
            follows = "tool" if last.get("tool_calls") else "user"
            ids.append(self._role_ids[follows])
        starts, owners, roles = self._turns(ids, messages, tools, follows)
        mask = np.zeros(len(ids), np.float32)
        for number, start, end in zip(owners, starts, [*starts[1:], len(ids)]):
            if number in trained:
                self._weigh(ids, mask, start + 1, end, messages[number]["weight"], thinking)
                # the model stops behind a call at <|observation|>: no other token that follows one is its end
                if messages[number].get("tool_calls") and end < len(ids) and self._kinds[ids[end]] != "tool":
                    mask[end] = 0
        users = [start for start, role in zip(starts, roles) if role == "user"]
        head = (
            users[0] if users and "assistant" not in roles[: roles.index("user")] else starts[0] if starts else len(ids)
        )
        turns = [start for start in users if start >= head] or [head]
        return Tokens(np.array(ids, np.int32), mask, head, turns)

    def _check_nothing_is_lost(self, text: str, messages: list[dict]) -> None:
        """Raise DataError where a message's text is not in what the template makes of the conversation, once for each."""
        place = 0
        for number, message in enumerate(messages):
            said = message["content"].strip()
            found = text.find(said, place)
            if found < 0:
                raise DataError(
                    "is not in what the chat template makes of it: a part would be lost", f"messages[{number}].content"
                )
            place = found + len(said)

    def _weigh(
        self, ids: list[int], mask: np.ndarray, first: int, end: int, weight: float, thinking: bool | None
    ) -> None:
        """Weight an assistant turn [first, end) and the token behind it, if that is one that ends a turn."""
        if ids[first : first + len(self._empty_think)] == self._empty_think:
            if thinking is False or not self.options.train_empty_think:
                first += len(self._empty_think)
        elif ids[first : first + len(self._given)] == self._given:
            first += len(self._given)
        ends_turn = end < len(ids) and self._kinds[ids[end]] in ("user", "tool")
        mask[first : end + ends_turn] = weight


def _is_empty(message: dict) -> bool:
    """Whether an assistant's message that is trained says nothing, thinks nothing and calls nothing."""
    says = message.get("content") or any(message.get(name) for name in ("tool_calls", *THOUGHTS, "function_call"))
    return message["role"] == "assistant" and not says and message.get("loss") is not False


def _asks_for_earlier(messages: list) -> bool:
    """Whether a turn before the last one says `loss: true`."""
    turns = [message for message in messages if message["role"] == "assistant"]
    return any(message.get("loss") is True or message.get("train") is True for message in turns[:-1])


def _has_history_thoughts(messages: list[dict]) -> bool:
    last_user = max((n for n, message in enumerate(messages) if message["role"] == "user"), default=-1)
    return any(message.get("reasoning_content") for message in messages[:last_user])


def check_messages(row: dict, field: str = "messages") -> list[dict]:
    """The row's messages as the template takes them: content a string or text parts, tool arguments an object."""
    messages = row.get(field)
    if not isinstance(messages, list) or not messages:
        came = "missing" if field not in row else repr(messages)[:40]
        raise DataError(f'is {came}; a list of {{"role", "content"}} is expected', field)
    return [_check_message(message, f"{field}[{number}]") for number, message in enumerate(messages)]


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)[:80]


def _check_message(message: object, where: str) -> dict:
    if not isinstance(message, dict):
        raise DataError(f"is {type(message).__name__}; an object with role and content is expected", where)
    message = read_message(message, where)
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or role not in ROLE_TOKENS:
        raise DataError(
            f"is {_json(role)}; allowed: {', '.join(ROLE_TOKENS)}, or as other tools say {', '.join(ALIASES)}",
            f"{where}.role",
        )
    if content is None:
        if role != "assistant":
            raise DataError("is null; only an assistant message may leave it out", f"{where}.content")
        if not (message.get("tool_calls") or message.get("reasoning_content")):
            raise DataError(
                "is null or missing; an assistant message needs text, a thought or a tool call", f"{where}.content"
            )
        content = ""  # the template would print the word None
    elif isinstance(content, list):
        for number, part in enumerate(content):
            if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
                fault = 'is no {"type": "text", "text": …}; the model takes text only'
                raise DataError(fault, f"{where}.content[{number}]")
        content = "".join(part["text"] for part in content)
    elif not isinstance(content, str):
        raise DataError(f"is {type(content).__name__}; allowed: a string, text parts or null", f"{where}.content")
    reasoning = message.get("reasoning_content")
    if reasoning is not None and (role != "assistant" or not isinstance(reasoning, str)):
        raise DataError("must be a string, on an assistant message", f"{where}.reasoning_content")
    if role == "assistant":
        content, reasoning = split_thought(content, reasoning, where)
    check_tags(role, content, f"{where}.content")
    checked = {"role": role, "content": content, "weight": _weight(message, role, where)}
    if reasoning is not None:
        checked["reasoning_content"] = reasoning
    if calls := message.get("tool_calls"):
        if role != "assistant" or not isinstance(calls, list):
            raise DataError("must be a list, on an assistant message", f"{where}.tool_calls")
        checked["tool_calls"] = [_check_call(call, f"{where}.tool_calls[{n}]") for n, call in enumerate(calls)]
    return checked


def _weight(message: dict, role: str, where: str) -> float:
    """How much a message counts: loss_scale where it is given, else 1, or 0 where loss is false."""
    loss, scale = message.get("loss"), message.get("loss_scale")
    if loss is not None and not isinstance(loss, bool):
        raise DataError(f"is {loss!r}; allowed: true or false", f"{where}.loss")
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 <= scale < 1e6):
        raise DataError(f"is {scale!r}; a number from 0 on is expected", f"{where}.loss_scale")
    if role != "assistant" and (loss or scale):
        raise DataError(f"asks to train a {role} message; only what the assistant writes is trained", f"{where}.loss")
    return 0.0 if loss is False or role != "assistant" else 1.0 if scale is None else float(scale)


def _check_call(call: object, where: str) -> dict:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError('is no {"function": {"name", "arguments"}}', where)
    arguments = call_arguments(function)
    if isinstance(arguments, str):  # OpenAI's wire form; the template iterates an object
        try:
            arguments = json.loads(arguments)
        except ValueError as error:
            raise DataError(f"is not JSON: {error}", f"{where}.function.arguments") from None
    if not isinstance(arguments, dict):
        raise DataError(f"is {type(arguments).__name__}; an object is expected", f"{where}.function.arguments")
    return {"type": "function", "function": {"name": function["name"], "arguments": arguments}}


def check_tools(row: dict) -> list | None:
    """The row's tool definitions, which may be given as JSON text."""
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError as error:
            raise DataError(f"is not JSON: {error}", "tools") from None
    if tools and not isinstance(tools, list):
        raise DataError("must be a list of objects", "tools")
    return [read_tool(tool, f"tools[{number}]") for number, tool in enumerate(tools or [])] or None
