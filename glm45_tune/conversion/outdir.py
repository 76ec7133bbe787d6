"""Output directories appear under their final name only when they are whole."""

import contextlib
import importlib.metadata
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import glm45_tune
from glm45_tune.errors import UserError

MARKER = "glm45_tune.json"


def check_free(output: Path) -> None:
    """Raise UserError when `output` exists and is not ours to replace: empty, or written by us, is."""
    if output.exists() and not output.is_dir():
        raise UserError(f"{output}: exists and is a file. Choose another output directory.")
    if output.is_dir() and any(output.iterdir()) and not (output / MARKER).is_file():
        raise UserError(
            f"{output}: exists, is not empty and holds no {MARKER}, so it is not ours to replace. Choose another."
        )


@contextlib.contextmanager
def whole(output: str | Path, kind: str, **facts: object) -> Iterator[Path]:
    """Yield a directory to fill; on success it becomes `output`, with a marker that holds `kind`, versions and `facts`.

    On failure nothing appears under `output` and what stood there stays.
    """
    output = Path(output)
    check_free(output)
    staging = output.with_name(output.name + ".partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        versions = {"glm45_tune": glm45_tune.__version__, "torch": importlib.metadata.version("torch")}
        marker = {"kind": kind, "versions": versions, **facts}
        (staging / MARKER).write_text(json.dumps(marker, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    if output.exists():
        shutil.rmtree(output)
    staging.rename(output)
