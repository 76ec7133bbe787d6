"""A model repository on ModelScope, or on whatever hub MODELSCOPE_ENDPOINT names, through modelscope's client."""

import base64
import contextlib
import importlib.util
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import requests
from modelscope_hub import HubApi
from modelscope_hub.config import HubConfig
from modelscope_hub.constants import (
    DEFAULT_ENDPOINT,
    MODEL_LFS_SUFFIX,
    UPLOAD_INLINE_METADATA_PATHS,
    UPLOAD_LFS_FORCE_THRESHOLD_BYTES,
    Visibility,
)
from modelscope_hub.errors import (
    AlreadyExistsError,
    APIError,
    HubError,
    NetworkError,
    NotExistError,
    QuotaExceededError,
    RateLimitError,
)
from requests.adapters import BaseAdapter, HTTPAdapter
from urllib3.util import Retry

from glm45_tune.hub.hub import (
    BROKEN,
    CHUNK,
    CONNECT_SECONDS,
    DENIED,
    MISSING,
    NONSENSE,
    QUOTA,
    READ_SECONDS,
    REFUSED,
    TAKEN,
    Fault,
    LocalFile,
    Patience,
    RemoteFile,
    Say,
    checked_endpoint,
    kind_of_status,
    needs_socks,
    origin,
    without_login,
)

_MODEL = "model"
_NONSENSE = (
    requests.exceptions.InvalidJSONError,
    requests.exceptions.InvalidURL,
    requests.exceptions.InvalidSchema,
    requests.exceptions.MissingSchema,
)
_BATCH = 256  # files in a commit; the hub's own limit is higher
_BATCH_BYTES = 8 << 20  # of those that travel inside it
_ASKED_AT_ONCE = 64
_THREADS = 4


class ModelScope:
    """A Hub."""

    title = "ModelScope"
    login = "Set MODELSCOPE_API_TOKEN, or log in with `modelscope login`."

    def __init__(self, repo: str, revision: str, say: Say):
        logging.getLogger("modelscope_hub").setLevel(logging.CRITICAL)  # what fails is said once, by us
        config = HubConfig()
        self.repo, self.revision, self.token = repo, revision, config.token
        endpoint = checked_endpoint(config.endpoint or DEFAULT_ENDPOINT)
        self.url = f"{without_login(endpoint)}/models/{repo}"
        self.patiently = Patience(self.title, say)
        _check_proxy(endpoint)
        self._api = HubApi(config)
        self._wire = self._api.legacy  # the client's own requests: its upload_folder tries a dead hub again for hours
        self._home = _homes(endpoint)
        self._api.openapi._max_retries = 1  # we try again ourselves, and say so
        for client in (self._api.openapi, self._wire):
            for session in (client._session, client._read_session):
                for prefix in ("https://", "http://"):
                    session.mount(prefix, _AtHome(session.get_adapter(prefix), self._home))
        self._exists = False

    def visibility(self) -> str | None:
        try:
            info = self._ask(lambda: self._api.get_repo(self.repo, _MODEL))
        except Fault as fault:
            if fault.kind == MISSING:
                return None
            raise
        self._exists = True
        return "public" if info.visibility == Visibility.PUBLIC else "private"

    def create(self, private: bool) -> None:
        if not self._exists:
            visibility = "private" if private else "public"
            try:
                self._ask(lambda: self._api.create_repo(self.repo, _MODEL, visibility=visibility))
            except Fault as fault:
                if fault.kind != TAKEN:
                    raise
                self._exists = True

    def listing(self) -> dict[str, RemoteFile]:
        return self._ask(self._listing)

    def _listing(self) -> dict[str, RemoteFile]:
        try:
            found = self._api.list_repo_files(self.repo, _MODEL, revision=self.revision)
        except NotExistError:
            found = []  # a repository without a commit has no revision yet
        return {entry.path: RemoteFile(entry.size, entry.sha256) for entry in found if entry.type != "tree"}

    def commit(self, files: list[LocalFile], removed: list[str], message: str) -> str:
        pointed = [file for file in files if _is_lfs(file)]
        for first in range(0, len(pointed), _ASKED_AT_ONCE):
            self._send(pointed[first : first + _ASKED_AT_ONCE])
        found = ""
        # what goes goes first: of several commits, none leaves parts of two models side by side
        for batch in _batches([*map(_Removed, removed), *files]):
            found = self._ask(partial(self._commit, batch, message))
        return found

    def _commit(self, batch: list["LocalFile | _Removed"], message: str) -> str:
        gone = any(isinstance(entry, _Removed) for entry in batch)
        there = self._listing() if gone else {}  # of a try whose answer was lost, nothing is removed twice
        operations = [
            _removal(entry.name) if isinstance(entry, _Removed) else _operation(entry)
            for entry in batch
            if isinstance(entry, LocalFile) or entry.name in there
        ]
        if not operations:
            return ""
        said = self._wire.create_commit(self.repo, _MODEL, operations, message, self.revision)
        return str(said.get("CommitId") or said.get("Id") or "") if isinstance(said, dict) else ""

    def _send(self, files: list[LocalFile]) -> None:
        """The content of files that a commit only points to, where the hub does not have it."""
        by_digest = {file.sha256: file for file in files}
        objects = [{"oid": digest, "size": file.size} for digest, file in by_digest.items()]

        def send(digest: str, url: str) -> None:
            try:
                with open(by_digest[digest].path, "rb") as content:
                    self._wire.upload_blob(url, content, by_digest[digest].size)
            except APIError as error:
                if error.status_code in (401, 403) and origin(url) not in self._home:
                    host = origin(url)[1]
                    raise Fault(
                        REFUSED,
                        f"{host}, where it stores content, wants a login that is not in the address",
                        error.status_code,
                    ) from error
                raise

        wanted = self._ask(lambda: self._wire.validate_blobs(self.repo, _MODEL, objects))
        with ThreadPoolExecutor(_THREADS) as pool:
            sent = [pool.submit(self._ask, partial(send, digest, url)) for digest, url in wanted.items() if url]
            try:
                for future in sent:
                    future.result()
            finally:
                pool.shutdown(cancel_futures=True)

    def _ask[Result](self, call: Callable[[], Result]) -> Result:
        def once() -> Result:
            with self._faults():
                return call()

        return self.patiently(once)

    def read(self, name: str) -> Iterator[bytes]:
        with self._faults(), self._wire.download_stream(self.repo, _MODEL, name, self.revision) as response:
            yield from response.iter_content(CHUNK)

    @contextlib.contextmanager
    def _faults(self) -> Iterator[None]:
        """What the client raises, as a Fault."""
        try:
            yield
        except AlreadyExistsError as error:
            raise Fault(TAKEN, error.message, error.status_code) from error
        except NetworkError as error:
            raise Fault(BROKEN, error.message) from error
        except RateLimitError as error:
            raise Fault(BROKEN, error.message, error.status_code) from error
        except APIError as error:
            kind = kind_of_status(error.status_code or 500, error.message)
            if isinstance(error, QuotaExceededError):
                kind = QUOTA
            kind = TAKEN if self._exists and kind in (DENIED, MISSING) else kind
            raise Fault(kind, error.message, error.status_code) from error
        except HubError as error:
            raise Fault(REFUSED, error.message) from error
        except _NONSENSE as error:
            raise Fault(NONSENSE, str(error)) from error
        except (requests.RequestException, ConnectionError, TimeoutError) as error:
            raise Fault(BROKEN, f"{type(error).__name__}: {error}") from error
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise Fault(NONSENSE, f"{type(error).__name__}: {error}") from error


def _is_lfs(file: LocalFile) -> bool:
    """Does the commit only point to it? The client's own rule."""
    if file.path.name.upper() in UPLOAD_INLINE_METADATA_PATHS or not file.size:
        return False
    return file.size > UPLOAD_LFS_FORCE_THRESHOLD_BYTES or file.path.suffix.lower() in MODEL_LFS_SUFFIX


class _AtHome(HTTPAdapter):
    """Sends through another adapter, once. The login is taken off whatever goes to another host than the hub's own.

    Every request passes here, those that follow a redirect too.
    """

    def __init__(self, inner: BaseAdapter, home: set[tuple]):
        super().__init__()
        self._inner, self._home = inner, home
        if isinstance(inner, HTTPAdapter):
            inner.max_retries = Retry(0, read=False)  # a status comes back as the answer it is

    def send(self, request, stream=False, timeout=None, verify=True, cert=None, proxies=None):
        if origin(request.url or "") not in self._home:
            for name in ("Authorization", "Cookie"):
                request.headers.pop(name, None)
        timeout = (CONNECT_SECONDS, READ_SECONDS) if timeout is None or isinstance(timeout, tuple) else timeout
        return self._inner.send(request, stream, timeout, verify, cert, proxies)

    def close(self) -> None:
        self._inner.close()


def _homes(endpoint: str) -> set[tuple]:
    """The hub's own origin, and of a hub with a name its storage beside it, as the client has it: lfs.modelscope.cn."""
    scheme, host, port = origin(endpoint)
    labels = host.split(".")
    base = ".".join(labels[1:] if len(labels) > 2 else labels)
    return {(scheme, host, port), *(("https", f"{front}.{base}", 443) for front in ("lfs", "pre-lfs") if port == 443)}


def _check_proxy(endpoint: str) -> None:
    """Raise UserError where a SOCKS proxy stands before the hub and nothing here speaks to it."""
    proxy = requests.utils.select_proxy(endpoint, requests.utils.get_environ_proxies(endpoint))
    if proxy and proxy.lower().startswith("socks") and importlib.util.find_spec("socks") is None:
        raise needs_socks("pip install PySocks")


@dataclass(frozen=True)
class _Removed:
    """A file that a commit takes out."""

    name: str


def _batches(entries: list[LocalFile | _Removed]) -> Iterator[list[LocalFile | _Removed]]:
    """Entries of one commit each: many that are pointed to or go, or some that travel inside it."""
    batch: list[LocalFile | _Removed] = []
    size = 0
    for entry in entries:
        inside = 0 if isinstance(entry, _Removed) or _is_lfs(entry) else entry.size
        if batch and (len(batch) == _BATCH or size + inside > _BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(entry)
        size += inside
    if batch:
        yield batch


def _removal(name: str) -> dict:
    return {"action": "delete", "path": name, "type": "normal", "size": 0, "sha256": "", "content": "", "encoding": ""}


def _operation(file: LocalFile) -> dict:
    facts = {"action": "create", "path": file.name, "size": file.size}
    if _is_lfs(file):
        return facts | {"type": "lfs", "sha256": file.sha256, "content": "", "encoding": ""}
    content = base64.b64encode(file.path.read_bytes()).decode()
    return facts | {"type": "normal", "sha256": "", "content": content, "encoding": "base64"}
