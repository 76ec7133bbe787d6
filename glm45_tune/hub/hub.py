"""What a hub of models is to us: a name to create, a listing with hashes, a place for content, commits, and files to read back."""

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

CHUNK = 1 << 20


class Fault(Exception):
    """A hub did not do what it was asked. `kind` says which sentence a person reads, `detail` what the hub said."""

    def __init__(self, kind: str, detail: str = ""):
        super().__init__(f"{kind}: {detail}")
        self.kind, self.detail = kind, detail


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


def patiently[Result](call: Callable[[], Result], tries: int = TRIES) -> Result:
    """Call again, waiting twice as long each time, while what fails is the connection or the hub's machine.

    Nonsense is asked for twice again: it may be a page about a failure, by something between us and the hub.
    """
    attempt = 0
    while True:
        attempt += 1
        try:
            return call()
        except Fault as fault:
            if attempt >= {BROKEN: tries, NONSENSE: 3}.get(fault.kind, 1):
                raise
        time.sleep(FIRST_WAIT_SECONDS * 2 ** (attempt - 1))


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
    """A model repository on a hub, through the hub's own client. Every method raises Fault and nothing else, and has tried

    for a while when it says BROKEN.
    """

    title: str
    url: str
    login: str
    token: str | None

    def visibility(self) -> str | None:
        """public or private; None when there is no such repository, or none that the token can see."""
        ...

    def create(self, private: bool) -> None:
        """Create the repository and the revision, where they are not there."""
        ...

    def listing(self) -> dict[str, RemoteFile]:
        """Every file of the revision by name; none when the revision is new."""
        ...

    def commit(self, files: list[LocalFile], message: str) -> str:
        """Send the content of files (what has arrived before is not sent again) and commit them. Returns the commit's name."""
        ...

    def read(self, name: str) -> Iterator[bytes]:
        """The content of a file of the revision, in parts. Tried once: who reads begins anew."""
        ...
