"""Put a model directory on a hub: only what changed, as often as it takes, read back and compared by hash."""

import hashlib
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from glm45_tune.conversion.outdir import MARKER, read_marker
from glm45_tune.errors import UserError, VerificationError
from glm45_tune.hub import hub as kinds
from glm45_tune.hub.hub import Fault, Hub, LocalFile, patiently

_THREADS = 4
_LEFT_OUT = (".git", ".cache", "__pycache__")

Tick = Callable[[int], None]


@dataclass(frozen=True)
class Pushed:
    """What a push did."""

    url: str
    commit: str | None
    sent: list[str]
    unchanged: int
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
) -> Pushed:
    """Push a directory to `hf:ORG/NAME` or `ms:ORG/NAME` by the hub's own client and its own login.

    `tick` hears bytes read back. Raises UserError with one sentence for whatever the hub refuses; VerificationError when what
    the hub holds then is not what lies here. Given again, it sends what is missing there.
    """
    directory = Path(directory)
    files = local_files(directory)
    hub = open_hub(to, revision)
    if not hub.token:
        raise UserError(f"{to}: no token for {hub.title}. {hub.login}")
    try:
        return _push(hub, files, message or _message(directory), public, verify, tick)
    except Fault as fault:
        raise UserError(_sentence(fault, to, hub)) from fault


def open_hub(to: str, revision: str | None) -> Hub:
    """The repository that `hf:ORG/NAME` or `ms:ORG/NAME` names. Raises UserError."""
    found = re.fullmatch(r"(hf|ms):([A-Za-z0-9][\w.-]*)/([A-Za-z0-9][\w.-]*)", to, re.ASCII)
    if not found:
        raise UserError(
            f"--to {to}: hf:ORG/NAME or ms:ORG/NAME is expected, an organisation (or your own account) and a name of letters, "
            "digits, '-', '_' and '.'."
        )
    if found[1] == "hf":
        from glm45_tune.hub.huggingface import HuggingFace

        return HuggingFace(f"{found[2]}/{found[3]}", revision or "main")
    try:
        from glm45_tune.hub.modelscope import ModelScope
    except ImportError as error:
        raise UserError(f"{to}: needs {error.name}: pip install modelscope.") from None
    return ModelScope(f"{found[2]}/{found[3]}", revision or "master")


def local_files(directory: Path) -> list[LocalFile]:
    """The files of a finished directory, sorted. Raises UserError for what should not be on a hub."""
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory.")
    if directory.name.endswith(".partial"):
        raise UserError(f"{directory}: is being written, or was left unfinished. Export it again.")
    marker = read_marker(directory) or {}
    if marker.get("kind") == "run":
        raise UserError(f"{directory}: is a run, not a model. `glm45-tune export {directory} --output DIR` first.")
    for name, facts in marker.get("files", {}).items():
        shard = directory / name
        if name.endswith(".safetensors") and (not shard.is_file() or shard.stat().st_size != facts["size"]):
            came = f"has {shard.stat().st_size:,} bytes" if shard.is_file() else "is missing"
            raise UserError(f"{shard}: {came}; {MARKER} says {facts['size']:,} bytes. Export it again.")
    found = [
        LocalFile(path.relative_to(directory).as_posix(), path)
        for path in sorted(directory.rglob("*"))
        if path.is_file() and not set(path.relative_to(directory).parts) & set(_LEFT_OUT)
    ]
    if not found:
        raise UserError(f"{directory}: holds no files.")
    return found


def _push(hub: Hub, files: list[LocalFile], message: str, public: bool, verify: bool, tick: Tick) -> Pushed:
    if hub.visibility() == "public" and not public:
        raise UserError(
            f"{hub.url}: is there and public. Say --public to push to it all the same, or choose another name."
        )
    hub.create(private=not public)
    changed = _changed(hub, files)
    commit = None
    if changed:
        commit = hub.commit(changed, message)
        if wrong := _changed(hub, files):
            raise VerificationError(
                f"{hub.url}: {len(wrong)} of {len(files)} files are listed with another hash than here, such as {wrong[0].name}."
            )
        if verify:
            _read_back(hub, changed, tick)
    sent = [file.name for file in changed]
    return Pushed(hub.url, commit, sent, len(files) - len(sent), sum(f.size for f in changed), verify and bool(changed))


def _changed(hub: Hub, files: list[LocalFile]) -> list[LocalFile]:
    """The files that the hub does not have, or has otherwise."""
    remote = hub.listing()
    with ThreadPoolExecutor(_THREADS) as pool:
        same = pool.map(lambda file: file.name in remote and remote[file.name].same_as(file), files)
    return [file for file, is_same in zip(files, same) if not is_same]


def _read_back(hub: Hub, files: list[LocalFile], tick: Tick) -> None:
    """Read every file from the hub and compare its hash. Nothing is kept."""

    def digest(file: LocalFile) -> str:
        found = hashlib.sha256()
        for part in hub.read(file.name):
            found.update(part)
            tick(len(part))
        return found.hexdigest()

    def is_right(file: LocalFile) -> bool:
        return patiently(lambda: digest(file)) == file.sha256

    with ThreadPoolExecutor(_THREADS) as pool:
        wrong = [file.name for file, right in zip(files, pool.map(is_right, files)) if not right]
    if wrong:
        raise VerificationError(
            f"{hub.url}: {len(wrong)} of {len(files)} files came back different, such as {wrong[0]}."
        )


def _message(directory: Path) -> str:
    facts = read_marker(directory) or {}
    return f"Upload {directory.resolve().name}" + (f" (step {facts['step']})" if "step" in facts else "")


def _sentence(fault: Fault, to: str, hub: Hub) -> str:
    again = "Local files are as they were; the same command goes on where this one stopped."
    said = " ".join(fault.detail.replace(hub.token, "***").split())[:300] if fault.detail else "nothing said"
    return {
        kinds.TOKEN: f"{to}: {hub.title} does not accept the token (401: {said}): it is wrong or expired. {hub.login}",
        kinds.DENIED: f"{to}: the token may not write there (403: {said}). Take one that may, or a name that is yours.",
        kinds.TAKEN: f"{to}: the name is taken, and this token may not write to it ({said}). Take one that may if it is yours, or "
        "choose another name.",
        kinds.QUOTA: f"{to}: {hub.title} has no room for it ({said}). Make room or get more. {again}",
        kinds.MISSING: f"{to}: not found (404: {said}). Is the organisation's or the revision's name right, and may the token see it?",
        kinds.REFUSED: f"{to}: {hub.title} refuses: {said}.",
        kinds.NONSENSE: f"{to}: what answers at {hub.url} does not speak {hub.title}'s language ({said}). {again}",
        kinds.BROKEN: f"{to}: the connection to {hub.title} kept breaking ({said}). {again}",
    }[fault.kind]
