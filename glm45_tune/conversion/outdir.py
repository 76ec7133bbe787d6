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


def check_free(output: Path, kind: str, *inputs: str | Path) -> None:
    """Raise UserError unless `output` may be written: not there, empty, or of the same kind and written by us.

    inputs: what the result is made from; it is never replaced by the result.
    """
    if output.exists() and not output.is_dir():
        raise UserError(f"{output}: exists and is a file. Choose another output directory.")
    if not output.is_dir() or not any(output.iterdir()):
        return
    if output.resolve() in {Path(path).resolve() for path in inputs}:
        raise UserError(f"{output}: is what the result is made from. Choose another output directory.")
    if not (output / MARKER).is_file():
        raise UserError(
            f"{output}: exists, is not empty and holds no {MARKER}, so it is not ours to replace. Choose another."
        )
    found = json.loads((output / MARKER).read_text(encoding="utf-8")).get("kind")
    if found != kind:
        raise UserError(f"{output}: holds a {found!r}, which a {kind!r} does not replace. Choose another output directory.")


@contextlib.contextmanager
def whole(output: str | Path, kind: str, *inputs: str | Path, **facts: object) -> Iterator[Path]:
    """Yield a directory to fill; on success it becomes `output`, with a marker that holds `kind`, versions and `facts`.

    On failure nothing appears under `output` and what stood there stays.
    """
    output = Path(output)
    check_free(output, kind, *inputs)
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
