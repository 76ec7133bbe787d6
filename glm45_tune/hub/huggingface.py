"""A model repository on Hugging Face, or on whatever hub HF_ENDPOINT names, through huggingface_hub."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator

import httpx
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, RepoFile, constants, get_token, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import build_hf_headers, disable_progress_bars, get_session, logging

from glm45_tune.errors import UserError
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
    tells_of_quota,
    without_login,
)

_HOME = "https://huggingface.co"


class HuggingFace:
    """A Hub."""

    title = "Hugging Face"
    login = "Set HF_TOKEN, or log in with `hf auth login`."

    def __init__(self, repo: str, revision: str, say: Say):
        endpoint = checked_endpoint(os.environ.get("HF_ENDPOINT") or _HOME)
        self.repo, self.revision, self.token = repo, revision, get_token()
        self.url = f"{without_login(endpoint)}/{repo}"
        self.patiently = Patience(self.title, say)
        _guard_client(endpoint)
        self._api = HfApi(endpoint=endpoint, token=self.token, library_name="glm45_tune")
        self._exists = False
        if endpoint != _HOME:
            constants.HF_HUB_DISABLE_XET = True  # only Hugging Face's own storage speaks it; all others speak git LFS
        logging.set_verbosity_error()  # what fails is said once, by us
        if not sys.stderr.isatty():
            disable_progress_bars()

    def visibility(self) -> str | None:
        try:
            info = self._ask(lambda: self._api.repo_info(self.repo))
        except Fault as fault:
            if fault.kind == MISSING:
                return None
            raise
        self._exists = True
        return "public" if info.private is False else "private"

    def create(self, private: bool) -> None:
        if not self._exists:
            try:
                self._ask(lambda: self._api.create_repo(self.repo, private=private))
            except Fault as fault:
                if fault.kind != TAKEN:
                    raise
                self._exists = True
        if self.revision != constants.DEFAULT_REVISION:
            self._ask(lambda: self._api.create_branch(self.repo, branch=self.revision, exist_ok=True))

    def listing(self) -> dict[str, RemoteFile]:
        return self._ask(self._listing)

    def _listing(self) -> dict[str, RemoteFile]:
        try:
            entries = list(self._api.list_repo_tree(self.repo, recursive=True, revision=self.revision))
        except HfHubHTTPError as error:
            if error.response.status_code != 404:
                raise
            entries = []  # a repository without a commit has no tree
        return {
            entry.path: RemoteFile(entry.size, entry.lfs.sha256 if entry.lfs else None, entry.blob_id)
            for entry in entries
            if isinstance(entry, RepoFile)
        }

    def commit(self, files: list[LocalFile], removed: list[str], message: str) -> str:
        # one commit, so that what others see is never half a model; made anew for each try, which finds what has arrived
        def send() -> str:
            there = self._listing() if removed else {}  # of a try whose answer was lost, nothing is removed twice
            operations = [CommitOperationAdd(file.name, str(file.path)) for file in files]
            operations += [CommitOperationDelete(name, is_folder=False) for name in removed if name in there]
            return self._api.create_commit(self.repo, operations, commit_message=message, revision=self.revision).oid

        return self._ask(send)

    def _ask[Result](self, call: Callable[[], Result]) -> Result:
        def once() -> Result:
            with self._faults():
                return call()

        return self.patiently(once)

    def read(self, name: str) -> Iterator[bytes]:
        url = hf_hub_url(self.repo, name, revision=self.revision, endpoint=self._api.endpoint)
        headers = build_hf_headers(token=self.token)
        with self._faults(), get_session().stream("GET", url, headers=headers, follow_redirects=True) as response:
            if response.status_code != 200:
                raise Fault(kind_of_status(response.status_code, ""), name, response.status_code)
            yield from response.iter_bytes(CHUNK)

    @contextlib.contextmanager
    def _faults(self) -> Iterator[None]:
        """What the client raises, as a Fault."""
        try:
            yield
        except HFValidationError as error:
            raise Fault(REFUSED, str(error)) from error
        except HfHubHTTPError as error:
            raise self._of_status(error) from error
        except (httpx.TransportError, ConnectionError, TimeoutError) as error:
            raise Fault(BROKEN, f"{type(error).__name__}: {error}") from error
        except RuntimeError as error:  # of one file among several; the cause is the HTTP error
            if isinstance(error.__cause__, HfHubHTTPError):
                raise self._of_status(error.__cause__) from error
            if isinstance(error.__cause__, httpx.TransportError | ConnectionError | TimeoutError):
                raise Fault(BROKEN, f"{error} {error.__cause__}") from error
            raise Fault(NONSENSE, f"{error} {error.__cause__ or ''}") from error
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, httpx.HTTPError) as error:
            said = f"{type(error).__name__}: {error}"
            kind = QUOTA if tells_of_quota(said) else REFUSED if "Invalid metadata in README.md" in said else NONSENSE
            raise Fault(kind, said) from error

    def _of_status(self, error: HfHubHTTPError) -> Fault:
        said = error.server_message or error.response.text[:200]
        status = error.response.status_code
        kind = kind_of_status(status, said)
        return Fault(TAKEN if self._exists and kind in (DENIED, MISSING) else kind, said, status)


class _AtHome:
    """Takes the login off whatever goes to another origin than the hub's, such as an address that the hub's answer names."""

    def __init__(self, endpoint: str):
        self._home = origin(endpoint)

    def __call__(self, request: httpx.Request) -> None:
        if origin(str(request.url)) != self._home:
            for name in ("Authorization", "Cookie"):
                request.headers.pop(name, None)


def _guard_client(endpoint: str) -> None:
    """Make the client's session wait no longer than we do, and keep the login at home. Raises UserError."""
    try:
        session = get_session()
    except ImportError as error:
        raise needs_socks("pip install 'httpx[socks]'") from error
    except ValueError as error:
        raise UserError(f"A proxy of the environment (HTTPS_PROXY, ALL_PROXY) cannot be used: {error}.") from error
    session.timeout = httpx.Timeout(READ_SECONDS, connect=CONNECT_SECONDS)
    others = [hook for hook in session.event_hooks["request"] if not isinstance(hook, _AtHome)]
    session.event_hooks = session.event_hooks | {"request": [*others, _AtHome(endpoint)]}
