"""Servers that write answers: one of ours, started from the recipe, or several that run already; asked over HTTP, the least busy first.

What goes wrong is counted by kind in `faults`. A server of ours that died or hangs is started again; an answer that cannot be what
was asked for is asked for again, and in the end counts as aborted.
"""

import asyncio
import contextlib
import os
import socket
import time
import uuid
from collections import Counter
from collections.abc import Callable, Collection
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from urllib.parse import quote

from glm45_tune.errors import ToldToStop, UserError
from glm45_tune.guard import Guarded
from glm45_tune.objectives import EngineConfig
from glm45_tune.redaction import redacted_text, resolved, secrets_of, without
from glm45_tune.rl.dialects import DIALECTS, BadAnswer, check
from glm45_tune.rl.engine import Completion, Request
from glm45_tune.spec import ModelSpec
from glm45_tune.web import SMALL_BYTES, Client, WebError, document_of

# what a process of the job has and a server must not take for its own
_OURS = (
    "PYTHONPATH",
    "VIRTUAL_ENV",
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHDYNAMO_DISABLE",
)
_HEALTH_SECONDS = 5.0
_TOKEN_BYTES = 1 << 13  # of an answer for each token: its id, its log-probability, its experts in every layer
# what reading an answer raises where it is not built as its interface has it
_MALFORMED = (BadAnswer, KeyError, TypeError, ValueError, AttributeError, IndexError)


class Servers:
    """Used by one rank. Weights are what `load_directory` or `load_adapter` last gave."""

    def __init__(
        self,
        config: EngineConfig,
        model: str,
        temperature: float,
        stop_ids: list[int],
        log: Path,
        spec: ModelSpec | None = None,
        is_told: Callable[[], bool] = lambda: False,
    ):
        """Find or start the servers; spec: of the model, by which answers are checked.

        is_told: says whether this process was told to stop. Then `generate` raises.
        """
        self._config, self._dialect = config, DIALECTS[config.kind]
        self._temperature, self._stop_ids, self._log, self._spec = temperature, stop_ids, log, spec
        self._is_told = is_told
        self._model, self._adapter = model, None
        self._process: Guarded | None = None
        self.urls = resolved(list(config.urls), "rl.engine.urls", partial(quote, safe=""))
        self._named = dict(zip(self.urls, config.urls, strict=True))  # URL → as the recipe has it
        self._secrets = secrets_of({"urls": list(config.urls), "api_key": config.api_key})
        key = resolved(config.api_key, "rl.engine.api_key")
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._busy: Counter = Counter()
        self.faults: Counter = Counter()
        self._under_way: dict[str, str] = {}  # name → URL, of what can be broken off
        self._is_over = False

    # -- starting and stopping -------------------------------------------------------------------------------------------------

    @property
    def is_ours(self) -> bool:
        return bool(self._config.command)

    def start(self) -> None:
        """Start the server of ours on the weights it is to have, and wait until it answers. Raises UserError."""
        asyncio.run(self._start())

    async def _start(self) -> None:
        self.stop()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.urls = [f"http://127.0.0.1:{port}"]
        command = [_filled(part, model=self._model, port=str(port)) for part in self._config.command]
        environment = {name: value for name, value in os.environ.items() if name not in _OURS}
        try:
            with open(self._log, "ab") as log:
                self._process = Guarded(command, env=environment, stdout=log, stderr=log)
        except OSError as error:
            raise UserError(f"rl.engine.command: {command[0]} cannot be started: {error}.") from error
        deadline = time.monotonic() + self._config.start_seconds
        async with Client(self.urls[0], self._headers) as client:
            while not await client.is_well(self._dialect.health, _HEALTH_SECONDS):
                if self._process.poll() is not None:
                    raise UserError(
                        f"rl.engine: the server ended with code {self._process.returncode} before it answered: {self._log}."
                    )
                if time.monotonic() > deadline:
                    self.stop()
                    raise UserError(
                        f"rl.engine: the server did not answer within {self._config.start_seconds} s: {self._log}."
                    )
                await asyncio.sleep(0.2)
        if self._adapter:
            await self._say(self.urls[0], *self._dialect.load_adapter(*self._adapter))

    def stop(self) -> None:
        """End the server of ours with all it started."""
        if self._process is not None:
            self._process.end()
            self._process = None

    # -- weights ---------------------------------------------------------------------------------------------------------------

    def load_directory(self, directory: Path, anew: bool = False) -> None:
        """Give every server the weights of a model directory: in place where its kind can, or by a new start."""
        self._model = str(directory)
        if self.is_ours and (anew or self._process is None or self._dialect.reload is None):
            self.start()
            return
        asyncio.run(self._tell_all([self._dialect.reload(str(directory))]))

    def load_adapter(self, name: str, directory: Path) -> None:
        """Give every server a LoRA adapter under a name it has not had, and let it forget the last one."""
        last, self._adapter = self._adapter, (name, str(directory))
        if self.is_ours and self._process is None:
            self.start()
            return
        orders = [self._dialect.load_adapter(*self._adapter)]
        asyncio.run(self._tell_all(orders + ([self._dialect.drop_adapter(last[0])] if last else [])))

    async def _tell_all(self, orders: list[tuple[str, dict]]) -> None:
        for url in self.urls:
            for path, body in orders:
                await self._say(url, path, body)

    def probe(self, request: Request, count: int) -> dict[str, list[Completion]]:
        """URL → some answers of that server to one request, each of another seed."""
        return asyncio.run(self._probe(request, count))

    async def _probe(self, request: Request, count: int) -> dict[str, list[Completion]]:
        found: dict[str, list[Completion]] = {}
        for url in self.urls:
            for seed in range(count):
                path, body = self._dialect.generate(
                    request, self._temperature, self._stop_ids, seed, self._adapter_name
                )
                try:
                    answer = document_of(await self._say(url, path, body, _most_bytes(request)))
                    completion = self._dialect.completion(answer, 0)
                    completion = check(completion, request, self._stop_ids, self._spec)
                except (WebError, *_MALFORMED) as error:
                    raise UserError(f"rl.engine {self._shown(url)}: {self._fault_of(error)}.") from error
                found.setdefault(url, []).append(completion)
        return found

    @property
    def _adapter_name(self) -> str | None:
        return self._adapter and self._adapter[0]

    async def _say(self, url: str, path: str, body: dict, most: int = SMALL_BYTES) -> bytes:
        """What a server answers; of an order some say a word that is not JSON. Raises UserError where it refuses."""
        where = f"rl.engine {self._shown(url)}{path}"
        try:
            async with Client(url, self._headers) as client:
                said = await client.ask("POST", path, body, self._config.timeout_seconds, most)
        except WebError as error:
            hint = " Does the server run?" if error.kind == "unreachable" else ""
            raise UserError(f"{where}: {self._fault_of(error)}.{hint}") from error
        with contextlib.suppress(WebError):
            found = document_of(said)
            if isinstance(found, dict) and found.get("success") is False:
                raise UserError(f"{where}: {without(str(found), self._secrets)[:300]}")
        return said

    def _shown(self, url: str) -> str:
        return redacted_text(self._named.get(url, url))

    def _fault_of(self, error: Exception) -> str:
        said = str(error) if isinstance(error, WebError) else f"{type(error).__name__}: {str(error)[:300]}"
        return without(said, self._secrets)

    # -- answers ---------------------------------------------------------------------------------------------------------------

    def generate(
        self, requests: list[Request], seed: int, version: int, enough: Callable[[Collection[int]], bool] | None = None
    ) -> list[Completion]:
        """An answer to each request.

        Raises UserError where no server can be reached any more, ToldToStop after a signal.

        enough: asked a few times a second with the numbers of the requests that are answered; once
        it says yes, the others come back as they are, broken off.
        """
        return asyncio.run(self._generate(requests, seed, version, enough))

    async def _generate(self, requests, seed, version, enough) -> list[Completion]:
        room = asyncio.Semaphore(self._config.concurrency * len(self.urls))
        self._restarting = asyncio.Lock()
        self._is_over = False
        found: dict[int, Completion] = {}
        async with AsyncExitStack() as stack:
            clients = _Clients(stack, self._headers)

            async def one(number: int, request: Request) -> None:
                async with room:
                    name = uuid.uuid4().hex if enough else None
                    found[number] = await self._ask(
                        clients, request, (seed * 1_000_003 + number) % 2**31, version, name
                    )

            watch = asyncio.create_task(self._watch(clients, lambda: enough(found.keys()))) if enough else None
            work = asyncio.gather(*(one(number, request) for number, request in enumerate(requests)))
            try:
                while not (await asyncio.wait([work], timeout=0.2))[0]:
                    if self._is_told():
                        raise ToldToStop("rl.engine was waited for")
                await work
            finally:
                for task in filter(None, (work, watch)):
                    task.cancel()
        return [found[number] for number in range(len(requests))]

    async def _watch(self, clients: "_Clients", is_enough: Callable[[], bool]) -> None:
        """Wait until it is enough, then break off what is under way; again and again, as a server may not know a request yet."""
        while not is_enough():
            await asyncio.sleep(0.05)
        self._is_over = True
        while True:
            for url in self.urls:
                names = [name for name, where in self._under_way.items() if where == url]
                for path, body in self._dialect.break_off(names) if names else []:
                    with contextlib.suppress(WebError):
                        await (await clients.of(url)).ask("POST", path, body, self._config.timeout_seconds)
            await asyncio.sleep(0.2)

    async def _ask(
        self, clients: "_Clients", request: Request, seed: int, version: int, name: str | None = None
    ) -> Completion:
        path, body = self._dialect.generate(request, self._temperature, self._stop_ids, seed, self._adapter_name)
        body = self._dialect.named(body, name) if name else body
        reason, is_answered = "", False
        tried: set[str] = set()
        for _ in range(self._config.retries + 1):
            if self._is_over:
                return Completion([], [], "broken off", version)
            async with self._restarting:  # one that is being started is asked once it answers
                url = min(self.urls, key=lambda url: (url in tried, self._busy[url]))
            tried.add(url)
            self._busy[url] += 1
            if name:
                self._under_way[name] = url
            try:
                client = await clients.of(url)
                answer = await client.json("POST", path, body, self._config.timeout_seconds, _most_bytes(request))
                completion = self._dialect.completion(answer, version)
                completion = check(completion, request, self._stop_ids, self._spec)
                is_broken_off = self._is_over and completion.finish == "aborted"
                return replace(completion, finish="broken off") if is_broken_off else completion
            except (WebError, *_MALFORMED) as error:
                kind = error.kind if isinstance(error, WebError) else "bad answer"
                is_answered = kind == "bad answer"
                # one that was broken off before its first token may lack everything
                if is_answered and self._is_over:
                    return Completion([], [], "broken off", version)
                self.faults["unreachable" if kind == "cut" else kind] += 1
                reason = f"{self._shown(url)}: {self._fault_of(error)}"
                if not is_answered and self.is_ours:
                    await self._start_again(url)
            finally:
                self._busy[url] -= 1
                if name:
                    self._under_way.pop(name, None)
        if is_answered or self.is_ours:
            self.faults["given up"] += 1
            return Completion([], [], "aborted", version)
        raise UserError(f"rl.engine: no server answers after {self._config.retries + 1} tries; the last: {reason}.")

    async def _start_again(self, url: str) -> None:
        """Once for all requests that found the same server gone."""
        async with self._restarting:
            if self.urls == [url]:
                self.faults["started again"] += 1
                await self._start()


class _Clients:
    """A client for each server that is asked, for as long as the stack is open."""

    def __init__(self, stack: AsyncExitStack, headers: dict[str, str]):
        self._stack, self._headers, self._found = stack, headers, {}

    async def of(self, url: str) -> Client:
        if url not in self._found:
            self._found[url] = await self._stack.enter_async_context(Client(url, self._headers))
        return self._found[url]


def _filled(part: str, **values: str) -> str:
    """A part of a command with {model} and {port} filled in; other braces, of JSON say, stay."""
    try:
        return part.format(**values)
    except (KeyError, IndexError, ValueError, AttributeError):
        for name, value in values.items():
            part = part.replace(f"{{{name}}}", value)
        return part


def _most_bytes(request: Request) -> int:
    return SMALL_BYTES + _TOKEN_BYTES * (len(request.token_ids) + request.max_new_tokens)
