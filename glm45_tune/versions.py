"""Which versions are at work, without importing them."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path

import glm45_tune

_LIBRARIES = ("torch", "megatron-core", "transformers", "peft")


def versions() -> dict[str, str]:
    """Name → version of this program, Python and what the numbers depend on; `commit` where it runs from a checkout."""
    found = {"glm45-tune": glm45_tune.__version__, "python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found | ({"commit": commit} if (commit := _commit()) else {})


def _commit() -> str | None:
    """The commit of the checkout that this package lies in; None where it was installed by other means."""
    root = Path(glm45_tune.__file__).parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
