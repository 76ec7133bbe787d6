"""TensorBoard and Weights & Biases: checked before the model is loaded, and never the end of a training."""

import netrc
import os
import sys
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from glm45_tune.errors import UserError
from glm45_tune.recipe import Recipe
from glm45_tune.run.files import TRACKER_FILE
from glm45_tune.system.files import write_whole

# no network: so long a tracker is waited for at the start and at the end
_MOST_SECONDS = 30
_NOT_IN_A_PROJECT = "/\\#?%:"


def check_trackers(recipe: Recipe) -> None:
    """Raise UserError when a tracker is asked for that is not installed, not logged in, or would refuse the project."""
    if recipe.logging.tensorboard:
        try:
            from torch.utils.tensorboard import SummaryWriter  # noqa: F401
        except ImportError:
            raise UserError(
                "logging.tensorboard is set, but tensorboard is not installed: pip install tensorboard."
            ) from None
    project = recipe.logging.wandb_project
    if not project:
        return
    if found := sorted(set(project) & set(_NOT_IN_A_PROJECT)):
        raise UserError(
            f"logging.wandb_project: {project!r} holds {' '.join(found)}, which wandb refuses in a project's name."
        )
    try:
        import wandb  # noqa: F401
    except ImportError:
        raise UserError("logging.wandb_project is set, but wandb is not installed: pip install wandb.") from None
    if os.environ.get("WANDB_MODE", "online") in ("online", "shared") and not _is_logged_in():
        raise UserError(
            "logging.wandb_project is set, but nobody is logged in: run wandb login, set WANDB_API_KEY, or set WANDB_MODE=offline."
        )


def _is_logged_in() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    for path in (os.environ.get("NETRC"), "~/.netrc", "~/_netrc"):
        try:
            if path and netrc.netrc(os.path.expanduser(path)).authenticators(host):
                return True
        except (OSError, ValueError, netrc.NetrcParseError):
            continue
    return False


class Tracker:
    """Sends numbers elsewhere until that fails once; then it says so and training goes on without it."""

    def __init__(self, name: str, start: Callable[[], Any], send: Callable[[Any, int, dict], None], end: str):
        self._name, self._send, self._end, self._client = name, send, end, None
        self._client = self._attempt(start)

    def write(self, step: int, values: dict[str, float]) -> None:
        if self._client is not None:
            self._attempt(lambda: self._send(self._client, step, values))

    def close(self) -> None:
        """Let the client send what it has, for a bounded time."""
        if self._client is None:
            return
        end = getattr(self._client, self._end)
        thread = threading.Thread(target=lambda: self._attempt(end), daemon=True)
        thread.start()
        thread.join(_MOST_SECONDS)
        if thread.is_alive():
            print(f"{self._name}: did not end within {_MOST_SECONDS} s; it may lack the last steps.", file=sys.stderr)

    def _attempt(self, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except Exception as error:  # a client's own faults are of every kind, and none of them is training's
            self._client = None
            first = next(iter(str(error).splitlines()), "") or type(error).__name__
            print(
                f"{self._name}: {first}. Training goes on without it; metrics.jsonl has all numbers.", file=sys.stderr
            )
            return None


def trackers_of(run: Path, recipe: Recipe, first_step: int) -> list[Tracker]:
    """Start the trackers that a recipe asks for."""
    found = []
    if recipe.logging.tensorboard:

        def board() -> Any:
            from torch.utils.tensorboard import SummaryWriter

            return SummaryWriter(run / "tensorboard", purge_step=first_step + 1)

        def add(writer: Any, step: int, values: dict[str, float]) -> None:
            for key, value in values.items():
                writer.add_scalar(key, value, step)

        found.append(Tracker("TensorBoard", board, add, "close"))
    if recipe.logging.wandb_project:
        found.append(Tracker("wandb", lambda: _wandb(run, recipe, first_step), _log, "finish"))
    return found


def _log(client: Any, step: int, values: dict[str, float]) -> None:
    client.log(values, step=step)


def _wandb(run: Path, recipe: Recipe, first_step: int) -> Any:
    import wandb

    return wandb.init(
        project=recipe.logging.wandb_project,
        dir=str(run),
        name=run.name,
        id=tracker_id(run, first_step),
        resume="allow",
        config=recipe.shown(),
        settings=wandb.Settings(init_timeout=_MOST_SECONDS),
    )


def tracker_id(run: Path, first_step: int) -> str:
    """The run's id on a tracker: its own, kept in the run directory. Earlier versions took the directory's name."""
    path = run / TRACKER_FILE
    try:
        kept = path.read_bytes().decode("ascii", "replace").strip()
    except OSError:
        kept = ""
    if kept == run.name or (kept.isascii() and kept.isalnum()):
        return kept
    begun_before = first_step and not path.exists() and (run / "wandb").is_dir()
    found = run.name if begun_before else uuid.uuid4().hex
    write_whole(path, found + "\n")
    return found
