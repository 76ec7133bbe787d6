"""Which files of a directory a push sends, and which of a repository a push replaces."""

import os
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from glm45_tune.conversion.hf_files import INDEX
from glm45_tune.conversion.outdir import MARKER, read_marker
from glm45_tune.errors import UserError
from glm45_tune.foreign import read_json, short
from glm45_tune.hub.hub import LocalFile
from glm45_tune.quoting import path_argument

_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
_EXPECTED = (
    "a Hugging Face model (config.json beside model.safetensors, or beside "
    f"{INDEX} and every file it names) or a PEFT adapter ({' beside '.join(_ADAPTER)}) is expected"
)

# what transformers, PEFT, vLLM, SGLang and llama.cpp look for by name: weights, settings, templates, tokenizers, code
_LOADED_SUFFIXES = frozenset(
    ".safetensors .bin .pt .pth .pkl .ckpt .h5 .msgpack .onnx .npz .gguf .json .jinja .py .model .tiktoken".split()
)
_LOADED_NAMES = frozenset({"vocab.txt", "merges.txt"})
_NOT_LOADED = frozenset({"configuration.json"})  # ModelScope's own note of a repository's task


def is_loaded(name: str) -> bool:
    """Whether a loader may read a repository's file of this name.

    A push replaces all such files as a set. Everything else cannot change the model: a licence, a README, pictures.
    """
    path = PurePosixPath(name.lower())
    return (path.suffix in _LOADED_SUFFIXES or path.name in _LOADED_NAMES) and path.name not in _NOT_LOADED


@dataclass
class Contents:
    """What a push sends of a directory, and the names of what it does not."""

    files: list[LocalFile] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def contents_of(directory: Path) -> Contents:
    """The files of a finished model or adapter, sorted. Raises UserError for what does not belong on a hub.

    Links are not followed; they, dot entries and `__pycache__` are left out.
    """
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory.")
    if directory.name.endswith(".partial"):
        raise UserError(f"{directory}: is being written, or was left unfinished. Export it again.")
    marker = read_marker(directory) or {}
    if marker.get("kind") == "run":
        run = path_argument(str(directory))
        raise UserError(f"{directory}: is a run, not a model. `glm45-tune export {run} --output DIR` first.")
    _check_sizes(directory, marker)
    found = Contents()
    try:
        _walk(directory, "", found)
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror}.") from error
    _check_model(directory, found)
    return found


def _walk(folder: Path, prefix: str, found: Contents) -> None:
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        name = prefix + entry.name
        is_folder = entry.is_dir(follow_symlinks=False)
        if entry.name.startswith(".") or entry.name == "__pycache__":
            found.left_out.append(name + "/" * is_folder)
        elif is_folder:
            _walk(folder / entry.name, f"{name}/", found)
        elif not entry.is_file(follow_symlinks=False):
            found.left_out.append(name)
        # surrogates stand for bytes that are not UTF-8
        elif any(unicodedata.category(letter) in ("Cc", "Cs") for letter in entry.name):
            raise UserError(f"{folder}: the file name {ascii(entry.name)} holds what no hub takes. Rename the file.")
        else:
            found.files.append(LocalFile(name, folder / entry.name))


def _check_sizes(directory: Path, marker: dict) -> None:
    """Raise UserError where a file of weights is not as long as our own marker says."""
    files = marker.get("files")
    for name, facts in files.items() if isinstance(files, dict) else ():
        shard, size = directory / name, facts.get("size") if isinstance(facts, dict) else None
        if not name.endswith(".safetensors") or not isinstance(size, int):
            continue
        if not shard.is_file() or shard.stat().st_size != size:
            came = f"has {shard.stat().st_size:,} bytes" if shard.is_file() else "is missing"
            raise UserError(f"{shard}: {came}; {MARKER} says {size:,} bytes. Export it again.")


def _check_model(directory: Path, found: Contents) -> None:
    """Raise UserError unless the files are one whole model, or one whole adapter."""
    names = {file.name for file in found.files}
    if not names and not found.left_out:
        raise UserError(f"{directory}: holds no files.")
    links = [name for name in found.left_out if (directory / name).is_symlink()]
    why = f" Links are not sent: {some(links)}." if links else ""
    has_weights = bool(names & {"model.safetensors", INDEX})
    if has_weights and names & set(_ADAPTER):
        raise UserError(
            f"{directory}: holds a model and an adapter; a loader would add the adapter to the model. "
            f"Move {some(sorted(names & set(_ADAPTER)))} away."
        )
    if not (has_weights and "config.json" in names or set(_ADAPTER) <= names):
        raise UserError(f"{directory}: is not a model: {_EXPECTED}.{why}")
    read_json(directory / ("config.json" if has_weights else _ADAPTER[0]))
    if INDEX in names:
        index = read_json(directory / INDEX)
        named = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(named, dict) or not named:
            raise UserError(f"{directory / INDEX}: has no weight_map, so it is not an index of weights.")
        if missing := sorted({str(name) for name in named.values()} - names):
            raise UserError(
                f"{directory / INDEX}: names {len(missing)} files that are not beside it, such as {some(missing, 1)}.{why}"
            )


def some(names: list[str], most: int = 3) -> str:
    """The first names, and how many more there are."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(short(name) for name in names[:most]) + rest
