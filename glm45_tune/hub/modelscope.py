"""A model repository on ModelScope, or on whatever hub MODELSCOPE_ENDPOINT names, through modelscope's client."""

import base64
import contextlib
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import requests
from modelscope_hub import HubApi
from modelscope_hub.config import HubConfig
from modelscope_hub.constants import (
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

from glm45_tune.hub.hub import (
    BROKEN,
    CHUNK,
    DENIED,
    MISSING,
    NONSENSE,
    QUOTA,
    REFUSED,
    TAKEN,
    Fault,
    LocalFile,
    RemoteFile,
    kind_of_status,
    patiently,
)

_MODEL = "model"
_BATCH = 256  # files in a commit; the hub's own limit is higher
_BATCH_BYTES = 8 << 20  # of those that travel inside it
_ASKED_AT_ONCE = 64
_THREADS = 4


class ModelScope:
    """A Hub."""

    title = "ModelScope"
    login = "Set MODELSCOPE_API_TOKEN, or log in with `modelscope login`."

    def __init__(self, repo: str, revision: str):
        logging.getLogger("modelscope_hub").setLevel(logging.CRITICAL)  # what fails is said once, by us
        config = HubConfig()
        self.repo, self.revision, self.token = repo, revision, config.token
        self.url = f"{config.endpoint}/models/{repo}"
        self._api = HubApi(config)
        self._wire = self._api.legacy  # the client's own requests: its upload_folder tries a dead hub again for hours
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
            try:
                self._ask(
                    lambda: self._api.create_repo(self.repo, _MODEL, visibility="private" if private else "public")
                )
            except AlreadyExistsError:
                self._exists = True

    def listing(self) -> dict[str, RemoteFile]:
        def entries() -> list:
            try:
                return self._api.list_repo_files(self.repo, _MODEL, revision=self.revision)
            except NotExistError:
                return []  # a repository without a commit has no revision yet

        found = self._ask(entries)
        return {entry.path: RemoteFile(entry.size, entry.sha256) for entry in found if entry.type != "tree"}

    def commit(self, files: list[LocalFile], message: str) -> str:
        pointed = [file for file in files if _is_lfs(file)]
        for first in range(0, len(pointed), _ASKED_AT_ONCE):
            self._send(pointed[first : first + _ASKED_AT_ONCE])
        found = ""
        for batch in _batches(files):
            operations = [_operation(file) for file in batch]
            said = self._ask(partial(self._wire.create_commit, self.repo, _MODEL, operations, message, self.revision))
            found = str(said.get("CommitId") or said.get("Id") or "") if isinstance(said, dict) else ""
        return found

    def _send(self, files: list[LocalFile]) -> None:
        """The content of files that a commit only points to, where the hub does not have it."""
        by_digest = {file.sha256: file for file in files}
        objects = [{"oid": digest, "size": file.size} for digest, file in by_digest.items()]

        def send(digest: str, url: str) -> None:
            with open(by_digest[digest].path, "rb") as content:
                self._wire.upload_blob(url, content, by_digest[digest].size)

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

        return patiently(once)

    def read(self, name: str) -> Iterator[bytes]:
        with self._faults(), self._wire.download_stream(self.repo, _MODEL, name, self.revision) as response:
            yield from response.iter_content(CHUNK)

    @contextlib.contextmanager
    def _faults(self) -> Iterator[None]:
        """What the client raises, as a Fault."""
        try:
            yield
        except AlreadyExistsError:
            raise
        except (NetworkError, RateLimitError) as error:
            raise Fault(BROKEN, error.message) from error
        except APIError as error:
            kind = kind_of_status(error.status_code or 500, error.message)
            if isinstance(error, QuotaExceededError):
                kind = QUOTA
            raise Fault(TAKEN if self._exists and kind in (DENIED, MISSING) else kind, error.message) from error
        except HubError as error:
            raise Fault(REFUSED, error.message) from error
        except (requests.exceptions.InvalidJSONError, requests.exceptions.InvalidURL) as error:
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


def _batches(files: list[LocalFile]) -> Iterator[list[LocalFile]]:
    """Files of one commit each: many that are pointed to, or some that travel inside it."""
    batch: list[LocalFile] = []
    size = 0
    for file in files:
        inside = 0 if _is_lfs(file) else file.size
        if batch and (len(batch) == _BATCH or size + inside > _BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(file)
        size += inside
    if batch:
        yield batch


def _operation(file: LocalFile) -> dict:
    facts = {"action": "create", "path": file.name, "size": file.size}
    if _is_lfs(file):
        return facts | {"type": "lfs", "sha256": file.sha256, "content": "", "encoding": ""}
    content = base64.b64encode(file.path.read_bytes()).decode()
    return facts | {"type": "normal", "sha256": "", "content": content, "encoding": "base64"}
