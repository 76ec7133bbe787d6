"""What a hub of models is to us: a name to create, a listing with hashes, a place for content, commits, and files to read back."""

import hashlib
import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit, urlunsplit

from glm45_tune.errors import UserError

CHUNK = 1 << 20


class Fault(Exception):
    """A hub did not do what it was asked. `kind` says which sentence a person reads, `detail` what the hub said.

    status: of HTTP, where it answered at all.
    """

    def __init__(self, kind: str, detail: str = "", status: int | None = None):
        super().__init__(f"{kind}: {status or ''} {detail}")
        self.kind, self.detail, self.status = kind, detail, status


# the kinds: what may pass when it is tried again, and what may not
BROKEN, TOKEN, DENIED, TAKEN, QUOTA, MISSING, REFUSED, NONSENSE = (
    "broken", "token", "denied", "taken", "quota", "missing", "refused", "nonsense",
)  # fmt: skip
_QUOTA_WORDS = ("quota", "storage limit", "storage is full", "exceeded your", "no space", "insufficient storage")


def tells_of_quota(said: str) -> bool:
    return any(words in said.lower() for words in _QUOTA_WORDS)


def kind_of_status(status: int, said: str) -> str:
    """The kind of fault that an HTTP status and the hub's own words tell of."""
    if status in (402, 413, 507) or (400 <= status < 500 and tells_of_quota(said)):
        return QUOTA
    if status in (408, 425, 429) or status >= 500:
        return BROKEN
    return {401: TOKEN, 403: DENIED, 404: MISSING, 409: TAKEN}.get(status, REFUSED)


FIRST_WAIT_SECONDS = 0.5
TRIES = 6
CONNECT_SECONDS, READ_SECONDS = 5.0, 120.0
"""How long a hub may take for a connection, and for each part of an answer."""
_SILENT_SECONDS = 1.5
_FIRST_ANSWER_SECONDS = 45.0

Say = Callable[[str], None]
"""Hears a line for a person who waits."""


class Patience:
    """Calls again, waiting twice as long each time, while what fails is the connection or the hub's machine.

    Nonsense is asked for twice again: it may be a page about a failure, by something between us and the hub. Who waits is
    told. A hub that has not answered at all is given up sooner.
    """

    def __init__(self, title: str, say: Say):
        self._title, self._say = title, say
        self._answered = False
        self._said_at = -math.inf

    def __call__[Result](self, call: Callable[[], Result]) -> Result:
        attempt, started = 0, time.monotonic()
        while True:
            attempt += 1
            try:
                return self._once(call)
            except Fault as fault:
                tries = {BROKEN: TRIES, NONSENSE: 3}.get(fault.kind, 1)
                is_late = not self._answered and time.monotonic() - started > _FIRST_ANSWER_SECONDS
                if attempt >= tries or is_late:
                    raise
                self._tell(fault, attempt, tries)
            time.sleep(FIRST_WAIT_SECONDS * 2 ** (attempt - 1))

    def _once[Result](self, call: Callable[[], Result]) -> Result:
        if self._answered:
            return call()
        timer = threading.Timer(_SILENT_SECONDS, self._say, [f"waiting for an answer of {self._title} …"])
        timer.daemon = True
        timer.start()
        try:
            found = call()
        finally:
            timer.cancel()
        self._answered = True
        return found

    def _tell(self, fault: Fault, attempt: int, tries: int) -> None:
        now = time.monotonic()
        if now - self._said_at >= _SILENT_SECONDS:  # several threads may be at it
            self._said_at = now
            came = f"answered {fault.status}" if fault.status else "did not answer as it should"
            self._say(f"{self._title} {came}; trying again ({attempt} of {tries - 1}) …")


def origin(url: str) -> tuple[str, str, int | None]:
    """Scheme, host and port: to whom what is sent to an address goes. Raises ValueError."""
    parts = urlsplit(url)
    return parts.scheme, (parts.hostname or "").lower(), parts.port or {"https": 443, "http": 80}.get(parts.scheme)


def checked_endpoint(url: str) -> str:
    """A hub's address, without a slash at its end. Raises UserError where it is not one."""
    try:
        scheme, host, _ = origin(url)
    except ValueError:
        scheme = host = ""
    if scheme not in ("http", "https") or not host:
        raise UserError(
            f"The hub's address {without_login(url)} cannot be used: http://HOST or https://HOST is expected in HF_ENDPOINT or "
            "MODELSCOPE_ENDPOINT."
        )
    return url.rstrip("/")


def needs_socks(install: str) -> UserError:
    """What a SOCKS proxy means where the package for it is not there."""
    return UserError(
        "ALL_PROXY or HTTPS_PROXY names a SOCKS proxy, for which a package is missing. "
        f"Install it ({install}), or name an HTTP proxy."
    )


def without_login(url: str) -> str:
    """An address without user and password, ready to be shown."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


@dataclass(frozen=True)
class LocalFile:
    """A file to be pushed: its name in the repository and where it lies."""

    name: str
    path: Path

    @cached_property
    def size(self) -> int:
        return self.path.stat().st_size

    @cached_property
    def sha256(self) -> str:
        with open(self.path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @cached_property
    def git_sha1(self) -> str:
        """What git calls the blob with this content."""
        digest = hashlib.sha1(f"blob {self.size}\0".encode())
        with open(self.path, "rb") as file:
            while part := file.read(CHUNK):
                digest.update(part)
        return digest.hexdigest()


@dataclass(frozen=True)
class RemoteFile:
    """A file as a hub lists it: at least one of the hashes is there."""

    size: int
    sha256: str | None = None
    git_sha1: str | None = None

    def same_as(self, local: LocalFile) -> bool:
        """Is the content equal, by size and by the hash that the hub has?"""
        if self.size != local.size:
            return False
        return self.sha256 == local.sha256 if self.sha256 else self.git_sha1 == local.git_sha1


class Hub(Protocol):
    """A model repository on a hub, through the hub's own client.

    Every method raises Fault and nothing else, and has tried for a while when it says BROKEN.
    """

    title: str
    url: str
    login: str
    token: str | None
    patiently: Patience

    def visibility(self) -> str | None:
        """public or private; None when there is no such repository, or none that the token can see."""
        ...

    def create(self, private: bool) -> None:
        """Create the repository and the revision, where they are not there."""
        ...

    def listing(self) -> dict[str, RemoteFile]:
        """Every file of the revision by name; none when the revision is new."""
        ...

    def commit(self, files: list[LocalFile], removed: list[str], message: str) -> str:
        """Send the content of files (what has arrived before is not sent again) and commit them, and that `removed` are gone.

        Returns the commit's name.
        """
        ...

    def read(self, name: str) -> Iterator[bytes]:
        """The content of a file of the revision, in parts. Tried once: who reads begins anew."""
        ...
