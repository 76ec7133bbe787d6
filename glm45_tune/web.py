"""What is asked of servers over HTTP, bounded in time and in bytes.

Whatever a server does becomes an answer or a `WebError`.

A deadline is for the whole answer, not for a read. Redirects are not followed. A server on this
machine is never asked through a proxy; for others HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY
hold, and an error says which proxy was asked.
"""

import asyncio
import ipaddress
import json
import os
import re
import ssl
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from functools import cache
from typing import Literal
from urllib.request import proxy_bypass_environment

import httpx

from glm45_tune.redaction import redacted_text
from glm45_tune.terminal import visible

CONNECT_SECONDS = 10.0
SMALL_BYTES = 1 << 20
"""Of an answer that says little, such as a list of models; and of a line of a stream."""
_FAULT_BYTES = 1 << 16
_SHOWN = 300


Kind = Literal["unreachable", "hung", "cut", "bad answer"]


class WebError(Exception):
    """A server that could not be asked, or that did not answer as it must."""

    def __init__(self, kind: Kind, message: str, status: int | None = None):
        super().__init__(message)
        self.kind: Kind = kind
        self.status = status


class Client:
    """Asks one server. Used as `async with`, within one event loop."""

    def __init__(self, url: str, headers: dict[str, str] | None = None):
        self.url = url.rstrip("/")
        self.shown = visible(redacted_text(self.url))
        try:
            parsed = httpx.URL(url)
        except (httpx.InvalidURL, TypeError, ValueError) as error:
            raise WebError("unreachable", f"is not a URL: {error}") from error
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise WebError("unreachable", "is not an address such as http://host:8000")
        self._proxy, self._via = proxy_of(parsed)
        # one connection a request, as many as there are requests: the caller bounds those
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        try:
            self._client = httpx.AsyncClient(
                headers={"Accept-Encoding": "identity", **(headers or {})},
                timeout=httpx.Timeout(None, connect=CONNECT_SECONDS),
                limits=limits,
                proxy=self._proxy,
                trust_env=False,
                verify=_tls(),
            )
        except ImportError as error:
            raise WebError("unreachable", f"is asked{self._via}: that needs pip install 'httpx[socks]'") from error
        except (ValueError, httpx.InvalidURL) as error:
            raise WebError("unreachable", f"cannot be asked{self._via}: {redacted_text(str(error))}") from error

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *_) -> None:
        await self._client.aclose()

    async def ask(self, method: str, path: str, body: object, seconds: float, most: int = SMALL_BYTES) -> bytes:
        """The answer, of at most `most` bytes."""
        async with self._asked(method, path, body, seconds) as answer:
            return await _read(answer, most)

    async def json(self, method: str, path: str, body: object, seconds: float, most: int = SMALL_BYTES) -> object:
        """The document that is the answer."""
        return document_of(await self.ask(method, path, body, seconds, most))

    async def is_well(self, path: str, seconds: float) -> bool:
        """Does it answer there with 200?"""
        try:
            async with self._asked("GET", path, None, seconds):
                return True
        except WebError:
            return False

    async def events(self, path: str, body: object, seconds: float, most: int) -> AsyncGenerator[object]:
        """The documents of a stream of server-sent events, until `[DONE]`.

        A stream that ends before it raises a WebError.
        """
        async with self._asked("POST", path, body, seconds) as answer:
            event: list[bytes] = []
            first, is_stream = b"", False
            async for line in _lines(answer, most):
                first = first or line
                field, _, value = line.removeprefix(b"\xef\xbb\xbf").partition(b":")
                if field == b"data":
                    is_stream, value = True, value.removeprefix(b" ")
                    if not event and value.strip() == b"[DONE]":
                        return
                    event.append(value)
                    if len(event) == 1 and (found := _whole(value)) is not None:  # no blank line need end it
                        event = []
                        yield found
                    elif len(event) > 1000 or sum(map(len, event)) > SMALL_BYTES:
                        raise WebError("bad answer", "sends an event of too many lines")
                elif not line and event:
                    yield document_of(b"\n".join(event))
                    event = []
            if first and not is_stream:
                raise WebError("bad answer", f"answers with what is not a stream of events: {_clipped(first)}")
            raise WebError("cut", "its stream ended without [DONE]")

    @asynccontextmanager
    async def _asked(self, method: str, path: str, body: object, seconds: float) -> AsyncIterator[httpx.Response]:
        """The answer, its head read. What goes wrong until the block ends becomes a WebError."""
        content = None if body is None else json.dumps(body).encode()  # ASCII: half a surrogate pair can travel too
        headers = {} if body is None else {"Content-Type": "application/json"}
        try:
            async with (
                asyncio.timeout(seconds),
                self._client.stream(method, self.url + path, content=content, headers=headers) as answer,
            ):
                if answer.status_code != 200:
                    raise WebError("bad answer", await _refusal(answer), answer.status_code)
                if (coding := answer.headers.get("Content-Encoding", "identity")) != "identity":
                    raise WebError("bad answer", f"answers in {coding[:40]!r}, which was not asked for")
                yield answer
        except WebError as error:
            raise WebError(error.kind, f"{error}{self._via}", error.status) from error.__cause__
        except TimeoutError as error:
            raise WebError("hung", f"did not answer whole within {seconds:g} s{self._via}") from error
        except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError) as error:
            said = f"{type(error).__name__} {error}".strip(" .")
            kind = (
                "unreachable"
                if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.ProxyError)
                else "cut"
            )
            raise WebError(kind, visible(redacted_text(said[:_SHOWN])) + self._via) from error


@cache
def _tls() -> ssl.SSLContext:
    return httpx.create_ssl_context()


def proxy_of(url: httpx.URL) -> tuple[str | None, str]:
    """The proxy by which a server is to be asked, and words that name it; None and "" without one."""
    if _is_loopback(url.host) or _is_spared(url):
        return None, ""
    for name in (f"{url.scheme}_proxy", "all_proxy"):
        spelled = name if name in os.environ else name.upper()
        if value := os.environ.get(spelled):
            proxy = value if "://" in value else f"http://{value}"
            return proxy, f" (through the proxy {visible(redacted_text(proxy))} of {spelled}; NO_PROXY spares a host)"
    return None, ""


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def _is_loopback(host: str) -> bool:
    address = _address(host)
    if address is None:
        return host == "localhost" or host.endswith(".localhost")
    return address.is_loopback or address.is_unspecified


def _is_spared(url: httpx.URL) -> bool:
    """Does NO_PROXY name the host: by itself, by its domain, or by a network such as 10.0.0.0/8?"""
    port = url.port or {"http": 80, "https": 443}[url.scheme]
    if proxy_bypass_environment(f"{url.host}:{port}"):
        return True
    address = _address(url.host)
    for part in os.environ.get("no_proxy", os.environ.get("NO_PROXY", "")).split(","):
        try:
            if address is not None and "/" in part and address in ipaddress.ip_network(part.strip(), strict=False):
                return True
        except ValueError:
            continue
    return False


def origin(url: str) -> tuple[str, str, int | None] | None:
    """Scheme, host and port, which two URLs of one server share; None where it is not a URL."""
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, TypeError, ValueError):
        return None
    return parsed.scheme, parsed.host, parsed.port or {"http": 80, "https": 443}.get(parsed.scheme)


def document_of(data: bytes) -> object:
    """JSON, as a WebError where it is not: bytes that are not UTF-8, nesting without end."""
    try:
        return json.loads(data.decode())
    except UnicodeDecodeError as error:
        raise WebError("bad answer", f"answers with bytes that are not UTF-8 ({error.reason})") from error
    except (ValueError, RecursionError) as error:
        what = (
            "JSON that is nested too deeply"
            if isinstance(error, RecursionError)
            else f"what is not JSON: {_clipped(data)}"
        )
        raise WebError("bad answer", f"answers with {what}") from error


def _whole(data: bytes) -> object | None:
    """The document of a line that is one by itself."""
    try:
        return document_of(data)
    except WebError:
        return None


async def _read(answer: httpx.Response, most: int) -> bytes:
    parts, size = [], 0
    async for part in answer.aiter_raw():
        size += len(part)
        if size > most:
            raise WebError("bad answer", f"answers with more than {most:,} bytes")
        parts.append(part)
    return b"".join(parts)


async def _lines(answer: httpx.Response, most: int) -> AsyncIterator[bytes]:
    """The lines of a stream, ended by LF, CR LF or CR; the last one also by the stream's end."""
    waiting, held, size = [], 0, 0
    async for part in answer.aiter_raw():
        size, held = size + len(part), held + len(part)
        if size > most:
            raise WebError("bad answer", f"answers with more than {most:,} bytes")
        waiting.append(part)
        if b"\n" in part or b"\r" in part or waiting[-2:-1] and waiting[-2].endswith(b"\r"):
            # a CR at the end may be half of a CR LF
            *lines, rest = re.split(rb"\r\n|\n|\r(?!\Z)", b"".join(waiting))
            waiting, held = [rest], len(rest)
            for line in lines:
                yield line
        if held > SMALL_BYTES:
            raise WebError("bad answer", f"sends a line of more than {SMALL_BYTES:,} bytes")
    for line in b"".join(waiting).split(b"\r"):
        yield line


async def _refusal(answer: httpx.Response) -> str:
    """What a server says that does not answer with 200, from the first bytes of it."""
    if answer.is_redirect:
        target = visible(redacted_text(answer.headers.get("Location", "nowhere")))[:_SHOWN]
        return f"status {answer.status_code}: redirects to {target}, which is not followed. Name that address instead"
    data = b""
    async for part in answer.aiter_raw():
        data = (data + part)[:_FAULT_BYTES]
        if len(data) == _FAULT_BYTES:
            break
    return f"status {answer.status_code}: {_clipped(data)}"


def _clipped(data: bytes) -> str:
    text = " ".join(data[: 4 * _SHOWN].decode(errors="replace").split())
    return visible(redacted_text(text))[:_SHOWN]
