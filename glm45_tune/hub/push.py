"""Put a model directory on a hub: only what changed, as often as it takes, read back and compared by hash."""

import hashlib
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from glm45_tune.conversion.outdir import read_marker
from glm45_tune.errors import UserError, VerificationError
from glm45_tune.foreign import short
from glm45_tune.hub import hub as kinds
from glm45_tune.hub.contents import Contents, contents_of, is_loaded, some
from glm45_tune.hub.hub import Fault, Hub, LocalFile, Say

_THREADS = 4

Tick = Callable[[int], None]


@dataclass(frozen=True)
class Pushed:
    """What a push did: names of files sent, removed from the repository, and kept there though they are not here.

    left_out: what is here and was not sent.
    """

    url: str
    commit: str | None
    sent: list[str]
    unchanged: int
    removed: list[str]
    kept: list[str]
    left_out: list[str]
    num_bytes: int
    read_back: bool

    def document(self) -> dict:
        return dict(self.__dict__)


def push(
    directory: str | Path,
    to: str,
    revision: str | None = None,
    message: str | None = None,
    public: bool = False,
    verify: bool = True,
    tick: Tick = lambda size: None,
    say: Say = lambda text: None,
) -> Pushed:
    """Push a directory to `hf:ORG/NAME` or `ms:ORG/NAME` by the hub's own client and its own login.

    The repository is what was pushed then: files there that a loader reads and that are not here go in the same commit
    (`contents.is_loaded`). `tick` hears bytes read back, `say` a line where one waits or something is removed. Raises UserError with
    one sentence for whatever the hub refuses; VerificationError when what the hub holds then is not what lies here. Given again,
    it sends what is missing there.
    """
    directory = Path(directory)
    contents = contents_of(directory)
    if contents.left_out:
        say(f"{directory}: not sent, as links and dot entries never are: {some(contents.left_out)}")
    hub = open_hub(to, revision, say)
    if not hub.token:
        raise UserError(f"{to}: no token for {hub.title}. {hub.login}")
    try:
        return _push(hub, contents, message or _message(directory), public, verify, tick, say)
    except Fault as fault:
        raise UserError(_sentence(fault, to, hub)) from fault
    except OSError as error:  # of a file here that cannot be read, or is gone
        raise UserError(f"{error.filename or directory}: cannot be read: {error.strerror or error}.") from error


def open_hub(to: str, revision: str | None, say: Say = lambda text: None) -> Hub:
    """The repository that `hf:ORG/NAME` or `ms:ORG/NAME` names. Raises UserError."""
    found = re.fullmatch(r"(hf|ms):([A-Za-z0-9][\w.-]*)/([A-Za-z0-9][\w.-]*)", to, re.ASCII)
    if not found:
        raise UserError(
            f"--to {to}: hf:ORG/NAME or ms:ORG/NAME is expected, an organisation (or your own account) and a name of letters, "
            "digits, '-', '_' and '.'."
        )
    if found[1] == "hf":
        from glm45_tune.hub.huggingface import HuggingFace

        return HuggingFace(f"{found[2]}/{found[3]}", revision or "main", say)
    try:
        from glm45_tune.hub.modelscope import ModelScope
    except ImportError as error:
        raise UserError(f"{to}: needs {error.name}: pip install modelscope.") from None
    return ModelScope(f"{found[2]}/{found[3]}", revision or "master", say)


def _push(hub: Hub, contents: Contents, message: str, public: bool, verify: bool, tick: Tick, say: Say) -> Pushed:
    if hub.visibility() == "public" and not public:
        raise UserError(
            f"{hub.url}: is there and public. Say --public to push to it all the same, or choose another name."
        )
    hub.create(private=not public)
    files = contents.files
    changed, others = _difference(hub, files)
    removed, kept = [name for name in others if is_loaded(name)], [name for name in others if not is_loaded(name)]
    if removed:
        say(f"{hub.url}: removing {len(removed)} files that belong to another model: {some(removed)}")
    commit = None
    if changed or removed:
        commit = hub.commit(changed, removed, message)
        wrong, others = _difference(hub, files)
        if wrong:
            raise VerificationError(
                f"{hub.url}: {len(wrong)} of {len(files)} files are listed with another hash than here, such as {wrong[0].name}."
            )
        if left := [name for name in others if is_loaded(name)]:
            raise VerificationError(f"{hub.url}: {len(left)} files should be gone and are still listed: {some(left)}.")
        if verify:
            _read_back(hub, changed, tick)
    return Pushed(
        url=hub.url,
        commit=commit,
        sent=[file.name for file in changed],
        unchanged=len(files) - len(changed),
        removed=removed,
        kept=kept,
        left_out=contents.left_out,
        num_bytes=sum(file.size for file in changed),
        read_back=verify and bool(changed),
    )


def _difference(hub: Hub, files: list[LocalFile]) -> tuple[list[LocalFile], list[str]]:
    """The files that the hub does not have, or has otherwise; and the names of those that are only there."""
    remote = hub.listing()
    with ThreadPoolExecutor(_THREADS) as pool:
        same = pool.map(lambda file: file.name in remote and remote[file.name].same_as(file), files)
    changed = [file for file, is_same in zip(files, same) if not is_same]
    return changed, sorted(remote.keys() - {file.name for file in files})


def _read_back(hub: Hub, files: list[LocalFile], tick: Tick) -> None:
    """Read every file from the hub and compare its hash. Nothing is kept."""

    def digest(file: LocalFile) -> str:
        found = hashlib.sha256()
        for part in hub.read(file.name):
            found.update(part)
            tick(len(part))
        return found.hexdigest()

    def is_right(file: LocalFile) -> bool:
        return hub.patiently(lambda: digest(file)) == file.sha256

    with ThreadPoolExecutor(_THREADS) as pool:
        wrong = [file.name for file, right in zip(files, pool.map(is_right, files)) if not right]
    if wrong:
        raise VerificationError(
            f"{hub.url}: {len(wrong)} of {len(files)} files came back different, such as {wrong[0]}."
        )


def _message(directory: Path) -> str:
    facts = read_marker(directory) or {}
    return f"Upload {directory.resolve().name}" + (f" (step {facts['step']})" if "step" in facts else "")


def without_secrets(said: str, token: str | None) -> str:
    """Words of a hub or its client, on one line, without the token and without what signs an address."""
    for secret in {token, quote(token, safe="")} if token else ():
        said = said.replace(secret, "***")
    said = re.sub(r"\?[^\s'\"<>()]+", "?***", said)  # an address's query
    said = re.sub(r"//[^/@\s'\"]+@", "//***@", said)
    return short(" ".join(said.split()), 300)


def _sentence(fault: Fault, to: str, hub: Hub) -> str:
    again = "Local files are as they were; the same command goes on where this one stopped."
    said = without_secrets(fault.detail, hub.token) or "nothing said"
    if fault.status:
        said = f"{fault.status}: {said}"
    broken = (
        f"{to}: {hub.title} kept answering {said}. {again}"
        if fault.status
        else f"{to}: the connection to {hub.title} kept breaking ({said}). {again}"
    )
    return {
        kinds.TOKEN: f"{to}: {hub.title} does not accept the token ({said}): it is wrong or expired. {hub.login}",
        kinds.DENIED: f"{to}: the token may not write there ({said}). Take one that may, or a name that is yours.",
        kinds.TAKEN: f"{to}: the name is taken, and this token may not write to it ({said}). Take one that may if it is yours, or "
        "choose another name.",
        kinds.QUOTA: f"{to}: {hub.title} has no room for it ({said}). Make room or get more. {again}",
        kinds.MISSING: f"{to}: not found ({said}). Is the organisation's or the revision's name right, and may the token see it?",
        kinds.REFUSED: f"{to}: {hub.title} refuses: {said}.",
        kinds.NONSENSE: f"{to}: what answers at {hub.url} does not speak {hub.title}'s language ({said}). {again}",
        kinds.BROKEN: broken,
    }[fault.kind]
