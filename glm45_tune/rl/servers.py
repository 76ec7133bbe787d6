"""Servers that write answers: one of ours, started from the recipe, or several that run already; asked over HTTP, the least busy first.

What goes wrong is counted by kind in `faults`. A server of ours that died or hangs is started again; an answer that cannot be what
was asked for is asked for again, and in the end counts as aborted.
"""

import asyncio
import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import time
import uuid
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

import httpx

from glm45_tune.errors import UserError
from glm45_tune.objectives import EngineConfig
from glm45_tune.rl.dialects import DIALECTS, BadAnswer, check
from glm45_tune.rl.engine import Completion, Request

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


class Servers:
    """Used by one rank. Weights are what `load_directory` or `load_adapter` last gave."""

    def __init__(self, config: EngineConfig, model: str, temperature: float, stop_ids: list[int], log: Path):
        self._config, self._dialect = config, DIALECTS[config.kind]
        self._temperature, self._stop_ids, self._log = temperature, stop_ids, log
        self._model, self._adapter = model, None
        self._process: subprocess.Popen | None = None
        self.urls = list(config.urls)
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
        self.stop()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.urls = [f"http://127.0.0.1:{port}"]
        command = [part.format(model=self._model, port=port) for part in self._config.command]
        environment = {name: value for name, value in os.environ.items() if name not in _OURS}
        try:
            with open(self._log, "ab") as log:
                self._process = subprocess.Popen(
                    command,
                    env=environment,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    preexec_fn=_end_with_parent,
                )
        except OSError as error:
            raise UserError(f"rl.engine.command: {command[0]} cannot be started: {error}.") from error
        deadline = time.monotonic() + self._config.start_seconds
        while not self._answers():
            if self._process.poll() is not None:
                raise UserError(
                    f"rl.engine: the server ended with code {self._process.returncode} before it answered: {self._log}."
                )
            if time.monotonic() > deadline:
                self.stop()
                raise UserError(
                    f"rl.engine: the server did not answer within {self._config.start_seconds} s: {self._log}."
                )
            time.sleep(0.2)
        if self._adapter:
            self._say(self.urls[0], *self._dialect.load_adapter(*self._adapter))

    def _answers(self) -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(self.urls[0] + self._dialect.health, timeout=5).status_code == 200
        return False

    def stop(self) -> None:
        """End the server of ours with all its helpers."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    # -- weights ---------------------------------------------------------------------------------------------------------------

    def load_directory(self, directory: Path, anew: bool = False) -> None:
        """Give every server the weights of a model directory: in place where its kind can, or by a new start."""
        self._model = str(directory)
        if self.is_ours and (anew or self._process is None or self._dialect.reload is None):
            self.start()
            return
        for url in self.urls:
            self._say(url, *self._dialect.reload(str(directory)))

    def load_adapter(self, name: str, directory: Path) -> None:
        """Give every server a LoRA adapter under a name it has not had, and let it forget the last one."""
        last, self._adapter = self._adapter, (name, str(directory))
        if self.is_ours and self._process is None:
            self.start()
            return
        for url in self.urls:
            self._say(url, *self._dialect.load_adapter(*self._adapter))
            if last:
                self._say(url, *self._dialect.drop_adapter(last[0]))

    def probe(self, request: Request, count: int) -> dict[str, list[Completion]]:
        """URL → some answers of that server to one request, each of another seed."""
        found: dict[str, list[Completion]] = {}
        for url in self.urls:
            for seed in range(count):
                path, body = self._dialect.generate(
                    request, self._temperature, self._stop_ids, seed, self._adapter_name
                )
                try:
                    completion = self._dialect.completion(self._say(url, path, body), 0)
                    check(completion, request, self._stop_ids)
                except (BadAnswer, KeyError, TypeError, ValueError) as error:
                    raise UserError(f"rl.engine {url}: {type(error).__name__}: {error}.") from error
                found.setdefault(url, []).append(completion)
        return found

    @property
    def _adapter_name(self) -> str | None:
        return self._adapter and self._adapter[0]

    def _say(self, url: str, path: str, body: dict) -> dict:
        try:
            answer = httpx.post(url + path, json=body, timeout=self._config.timeout_seconds)
        except httpx.HTTPError as error:
            raise UserError(f"rl.engine {url}{path}: {type(error).__name__} {error}. Does the server run?") from error
        if answer.status_code != 200:
            raise UserError(f"rl.engine {url}{path}: status {answer.status_code}: {answer.text[:300]}")
        with contextlib.suppress(json.JSONDecodeError):
            found = answer.json()
            if isinstance(found, dict) and found.get("success") is False:
                raise UserError(f"rl.engine {url}{path}: {str(found)[:300]}")
            return found
        return {}

    # -- answers ---------------------------------------------------------------------------------------------------------------

    def generate(
        self, requests: list[Request], seed: int, version: int, enough: Callable[[Collection[int]], bool] | None = None
    ) -> list[Completion]:
        """An answer to each request. Raises UserError where no server can be reached any more.

        enough: asked a few times a second with the numbers of the requests that are answered; once it says yes, the others come
        back as they are, broken off.
        """
        return asyncio.run(self._generate(requests, seed, version, enough))

    async def _generate(self, requests, seed, version, enough) -> list[Completion]:
        room = asyncio.Semaphore(self._config.concurrency * len(self.urls))
        self._restarting = asyncio.Lock()
        self._is_over = False
        found: dict[int, Completion] = {}
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(timeout=self._config.timeout_seconds, limits=limits) as client:

            async def one(number: int, request: Request) -> None:
                async with room:
                    name = uuid.uuid4().hex if enough else None
                    found[number] = await self._ask(client, request, (seed * 1_000_003 + number) % 2**31, version, name)

            watch = asyncio.create_task(self._watch(client, lambda: enough(found.keys()))) if enough else None
            try:
                await asyncio.gather(*(one(number, request) for number, request in enumerate(requests)))
            finally:
                if watch:
                    watch.cancel()
        return [found[number] for number in range(len(requests))]

    async def _watch(self, client: httpx.AsyncClient, is_enough: Callable[[], bool]) -> None:
        """Wait until it is enough, then break off what is under way; again and again, as a server may not know a request yet."""
        while not is_enough():
            await asyncio.sleep(0.05)
        self._is_over = True
        while True:
            for url in self.urls:
                names = [name for name, where in self._under_way.items() if where == url]
                for path, body in self._dialect.break_off(names) if names else []:
                    with contextlib.suppress(httpx.HTTPError):
                        await client.post(url + path, json=body)
            await asyncio.sleep(0.2)

    async def _ask(
        self, client: httpx.AsyncClient, request: Request, seed: int, version: int, name: str | None = None
    ) -> Completion:
        path, body = self._dialect.generate(request, self._temperature, self._stop_ids, seed, self._adapter_name)
        body = self._dialect.named(body, name) if name else body
        reason = ""
        tried: set[str] = set()
        for _ in range(self._config.retries + 1):
            if self._is_over:
                return Completion([], [], "broken off", version)
            url = min(self.urls, key=lambda url: (url in tried, self._busy[url]))
            tried.add(url)
            self._busy[url] += 1
            if name:
                self._under_way[name] = url
            try:
                answer = await client.post(url + path, json=body)
                if answer.status_code != 200:
                    raise BadAnswer(f"status {answer.status_code}: {answer.text[:200]}")
                completion = self._dialect.completion(answer.json(), version)
                check(completion, request, self._stop_ids)
                is_broken_off = self._is_over and completion.finish == "aborted"
                return replace(completion, finish="broken off") if is_broken_off else completion
            except httpx.HTTPError as error:
                kind = "hung" if isinstance(error, httpx.TimeoutException) else "unreachable"
                self.faults[kind] += 1
                reason = f"{url}: {type(error).__name__} {error}"
                if self.is_ours:
                    await self._start_again(url)
            except (BadAnswer, KeyError, TypeError, ValueError) as error:
                if self._is_over:  # one that was broken off before its first token may lack everything
                    return Completion([], [], "broken off", version)
                self.faults["bad answer"] += 1
                reason = f"{url}: {type(error).__name__}: {error}"
            finally:
                self._busy[url] -= 1
                self._under_way.pop(name, None)
        if "BadAnswer" in reason or self.is_ours:
            self.faults["given up"] += 1
            return Completion([], [], "aborted", version)
        raise UserError(f"rl.engine: no server answers after {self._config.retries + 1} tries; the last: {reason}.")

    async def _start_again(self, url: str) -> None:
        """Once for all requests that found the same server gone."""
        async with self._restarting:
            if self.urls == [url]:
                self.faults["started again"] += 1
                self.start()  # not in a thread: a server ends with the thread that started it


def _end_with_parent() -> None:
    """A server of ours ends when the process that started it does, however that ended (Linux)."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
