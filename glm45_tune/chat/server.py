"""A model that answers elsewhere: vLLM, SGLang or whatever speaks OpenAI's chat completions."""

import json
import os
from collections.abc import Iterator

import httpx

from glm45_tune.errors import UserError

_TIMEOUT = httpx.Timeout(10, read=600)


class Server:
    """Answers from a server at `url` (with or without /v1), by the model it serves or the one that is named."""

    def __init__(self, url: str, model: str | None = None):
        self.url = url.rstrip("/").removesuffix("/v1") + "/v1"
        key = os.environ.get("OPENAI_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        try:
            self._client = httpx.Client(timeout=_TIMEOUT, headers=headers)
            answer = self._client.get(f"{self.url}/models")
            answer.raise_for_status()
            self.models = [entry["id"] for entry in answer.json()["data"]]
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError) as error:
            raise UserError(f"--server {url}: no server that speaks OpenAI's API answers there ({error}).") from error
        self.use(model or (self.models or [""])[0])

    def use(self, model: str) -> None:
        """Ask this one from now on: the base, or an adapter that the server has loaded."""
        if model not in self.models:
            raise UserError(f"--server {self.url}: serves no {model!r}, but {', '.join(self.models) or 'nothing'}.")
        self.model = model

    def stream(
        self, messages: list[dict], think: bool | None, tools: list | None, max_new_tokens: int
    ) -> Iterator[tuple[str, str]]:
        """("thought" | "content", text) as it is written, and of each call, whole, ("call", JSON of its name and arguments)."""
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
        calls: dict[int, dict[str, str]] = {}
        try:
            with self._client.stream("POST", f"{self.url}/chat/completions", json=asked) as answer:
                if answer.status_code != 200:
                    answer.read()
                    raise UserError(f"--server {self.url}: {answer.status_code}: {' '.join(answer.text.split())[:300]}")
                for line in answer.iter_lines():
                    if line.startswith("data: ") and line != "data: [DONE]":
                        yield from _pieces(json.loads(line.removeprefix("data: ")), calls)
        except httpx.HTTPError as error:
            raise UserError(f"--server {self.url}: the answer broke off ({type(error).__name__}: {error}).") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"--server {self.url}: what it answers is no chat completion ({error!r}).") from error
        for _, call in sorted(calls.items()):
            yield "call", json.dumps(call, ensure_ascii=False)


def _pieces(chunk: dict, calls: dict[int, dict[str, str]]) -> Iterator[tuple[str, str]]:
    for choice in chunk["choices"]:
        delta = choice["delta"]
        if thought := delta.get("reasoning_content") or delta.get("reasoning"):
            yield "thought", thought
        if delta.get("content"):
            yield "content", delta["content"]
        for part in delta.get("tool_calls") or []:
            call = calls.setdefault(part["index"], {"name": "", "arguments": ""})
            for key in call:
                call[key] += (part.get("function") or {}).get(key) or ""
