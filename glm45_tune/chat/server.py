"""A model that answers elsewhere: vLLM, SGLang or whatever speaks OpenAI's chat completions."""

import asyncio
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import aclosing

from glm45_tune.errors import StoppedError, UserError
from glm45_tune.web import Client, WebError, origin

_MODELS_SECONDS = 30.0
_ANSWER_SECONDS = 600.0
"""For an answer; one second a token that is asked for comes on top."""
_ANSWER_BYTES = 64 << 20
_MOST_CALLS = 1000


class Server:
    """Answers from a server at `url` (with or without /v1), by the model it serves or the one that is named."""

    def __init__(self, url: str, model: str | None = None):
        self._root = url.rstrip("/").removesuffix("/v1") + "/v1"
        self._headers = _headers_for(self._root)
        self.models = asyncio.run(self._served())
        self.use(model or (self.models or [""])[0])

    def use(self, model: str) -> None:
        """Ask this one from now on: the base, or an adapter that the server has loaded."""
        if model not in self.models:
            served = ", ".join(self.models[:20]) + (", …" if len(self.models) > 20 else "")
            raise UserError(f"--server {self.url}: serves no {model!r}, but {served or 'nothing'}.")
        self.model = model

    async def _served(self) -> list[str]:
        self.url = self._root
        try:
            async with Client(self._root, self._headers) as client:
                self.url = client.shown
                found = await client.json("GET", "/models", None, _MODELS_SECONDS)
            entries = found.get("data") if isinstance(found, dict) else None
            if not isinstance(entries, list):
                raise WebError("bad answer", "/v1/models does not list models")
            return [_of(str, _of(dict, entry, "a model").get("id"), "a model's id") for entry in entries]
        except WebError as error:
            raise UserError(
                f"--server {self.url}: no server that speaks OpenAI's API answers there ({error}).{self._on_keys(error)}"
            ) from error

    def _on_keys(self, error: WebError) -> str:
        if error.status not in (401, 403) or self._headers:
            return ""
        return f" OPENAI_API_KEY goes to the server that OPENAI_BASE_URL names, and to no other: OPENAI_BASE_URL={self.url}."

    def answer(
        self,
        messages: list[dict],
        think: bool | None,
        tools: list | None,
        max_new_tokens: int,
        hear: Callable[[str, str], None],
    ) -> list[dict[str, str]]:
        """Ask, and call hear("thought" | "content", text) as it is written.

        → the calls: name and arguments, as text.
        """
        asked = {
            "model": self.model,
            "messages": messages,
            "stream": True,
            "max_tokens": max_new_tokens,
            "temperature": 0,
        }
        if think is not None:
            asked["chat_template_kwargs"] = {"enable_thinking": think}
        if tools:
            asked["tools"] = tools
        try:
            return asyncio.run(self._answer(asked, _ANSWER_SECONDS + max_new_tokens, hear))
        except WebError as error:
            if error.kind != "bad answer":
                raise StoppedError(f"--server {self.url}: the answer broke off: {error}.") from error
            if error.status:
                raise UserError(f"--server {self.url}: {error}{self._on_keys(error)}") from error
            raise UserError(f"--server {self.url}: what it answers is no chat completion: {error}.") from error

    async def _answer(self, asked: dict, seconds: float, hear: Callable[[str, str], None]) -> list[dict[str, str]]:
        calls: dict[int, dict[str, list[str]]] = defaultdict(lambda: {"name": [], "arguments": []})
        async with (
            Client(self._root, self._headers) as client,
            aclosing(client.events("/chat/completions", asked, seconds, _ANSWER_BYTES)) as chunks,
        ):
            async for chunk in chunks:
                for kind, text in _pieces(chunk, calls):
                    hear(kind, text)
        return [{key: "".join(parts) for key, parts in call.items()} for _, call in sorted(calls.items())]


def _headers_for(url: str) -> dict[str, str]:
    """OPENAI_API_KEY for the server of OPENAI_BASE_URL (by default OpenAI's), and for no other."""
    key = os.environ.get("OPENAI_API_KEY")
    named = os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"
    if not key or origin(url) is None or origin(url) != origin(named):
        return {}
    if not key.isascii() or not key.isprintable():
        raise UserError("OPENAI_API_KEY: holds characters that no key has, such as a line end. Export it anew.")
    return {"Authorization": f"Bearer {key}"}


def _pieces(said: object, calls: dict[int, dict[str, list[str]]]) -> Iterator[tuple[str, str]]:
    """What a chunk says; parts of calls are put into `calls`.

    Raises WebError where it is not as the interface has it.
    """
    chunk = _of(dict, said, "a chunk")
    if "choices" not in chunk and (fault := chunk.get("error") or chunk.get("message")):
        raise WebError("bad answer", f"the server broke it off and says {str(fault)[:300]!r}")
    for choice in _of(list, chunk.get("choices"), "choices"):
        choice = _of(dict, choice, "a choice")
        if (number := choice.get("index", 0)) != 0 or type(number) is not int:
            raise WebError("bad answer", f"choice {number!r} came, and one choice was asked for")
        delta = _given(choice, "delta", dict)
        # a server that has both names for the thought says it twice
        thought = _given(delta, "reasoning_content", str) or _given(delta, "reasoning", str)
        yield from (
            (kind, text) for kind, text in (("thought", thought), ("content", _given(delta, "content", str))) if text
        )
        for part in _given(delta, "tool_calls", list):
            place = _of(dict, part, "a tool call").get("index")
            if type(place) is not int or not 0 <= place < _MOST_CALLS:
                raise WebError("bad answer", f"a tool call has the index {place!r}")
            function = _given(part, "function", dict)
            for key, parts in calls[place].items():
                parts.append(_given(function, key, str))


def _given[T](holder: dict, key: str, kind: type[T]) -> T:
    """What stands there; where nothing or null does, an empty one."""
    value = holder.get(key)
    return kind() if value is None else _of(kind, value, key)


def _of[T](kind: type[T], value: object, what: str) -> T:
    if not isinstance(value, kind):
        words = {dict: "an object", list: "a list", str: "text"}
        raise WebError("bad answer", f"{what} is {type(value).__name__}, and {words[kind]} is expected")
    return value
