"""A run's directory: whose it is, what it was begun with, whether this recipe may go on with it, and who writes to it."""

import contextlib
import json
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from glm45_tune.conversion.tensors import HfReader, fingerprint
from glm45_tune.data.sources import Corpus
from glm45_tune.errors import StoppedError, UserError
from glm45_tune.layout import Layout
from glm45_tune.plan.memory import GIB, Model
from glm45_tune.recipe import Recipe, sources_of
from glm45_tune.redaction import references, secret_places
from glm45_tune.run.files import FACTS_FILE, LOCK_FILE, RECIPE_FILE, read_facts
from glm45_tune.run.scratch import sweep
from glm45_tune.system.files import lock, write_whole

# what a resumed run may change with train.on_change=continue: its checkpoints still fit
_CAN_CONTINUE = ("model's weights", "data", "lora.lora_alpha", "lora.lora_dropout", "lora.use_rslora")


def facts_of(recipe: Recipe, source: HfReader, train: Corpus) -> dict:
    """What a run is, as FACTS_FILE holds it: a resumed run must agree."""
    data = recipe.data
    return {
        "kind": "run",
        "training": recipe.kind,
        "model": str(Path(recipe.model.path).resolve()),
        "fingerprint": fingerprint(source),
        "lora": recipe.lora.model_dump() if recipe.lora else None,
        "mtp": recipe.model.mtp_loss_scaling_factor > 0,
        "freeze": recipe.train.freeze,
        "begun_with": {
            "sources": [source.model_dump() for source in sources_of(data.train)] if data.streaming else None,
            "samples": len(train.samples),
            "tokens": int(train.lengths.sum()),
            "digest": train.samples.digest() if len(train.samples) else None,
            "data.seq_length": data.seq_length,
            "data.packing": data.packing,
            "data.streaming": data.streaming,
            "data.streaming_window": data.streaming_window if data.streaming else None,
            "train.global_batch_size": recipe.train.global_batch_size,
            "train.seed": recipe.train.seed,
        },
    }


def check_ours(recipe: Recipe) -> None:
    """Raise UserError when output_dir holds something else than a run, is being written to, or cannot be."""
    run = Path(recipe.output_dir)
    if run.exists() and not run.is_dir():
        raise UserError(f"{run}: is a file. Choose another output_dir.")
    if not run.exists() or not any(run.iterdir()):
        return
    if not (run / FACTS_FILE).is_file():
        raise UserError(
            f"{run}: exists, is not empty and is no run of ours (no {FACTS_FILE}). Choose another output_dir."
        )
    read_facts(run)
    with locked(run):
        pass


def check_same(recipe: Recipe, now: dict) -> None:
    """Raise UserError when the run in output_dir was begun otherwise, unless train.on_change allows what changed."""
    run = Path(recipe.output_dir)
    if not (run / FACTS_FILE).is_file() or recipe.train.on_change == "restart":
        return
    changed = _changes(read_facts(run), now)
    stuck = [name for name in changed if name not in _CAN_CONTINUE]
    if not changed or (recipe.train.on_change == "continue" and not stuck):
        return
    ways = ["choose another output_dir", "train.on_change=restart to set the earlier run aside and begin anew"]
    if not stuck:
        ways.insert(1, "train.on_change=continue to go on from its last checkpoint all the same")
    raise UserError(
        f"{run}: what was begun is not what the recipe says: {'; '.join(changed.values())}. Either {', or '.join(ways)}."
    )


def _changes(before: Mapping, now: Mapping) -> dict[str, str]:
    """What changed → a few words on it."""
    found = {}
    if before["fingerprint"] != now["fingerprint"]:
        found["model's weights"] = f"it is a run of another model ({before['model']}, now {now['model']})"
    if (before["lora"] is None) != (now["lora"] is None):
        found["lora"] = f"lora was {before['lora']}, now {now['lora']}"
    elif now["lora"]:
        found |= _differences(before["lora"], now["lora"], "lora.")
    if before.get("training") != now["training"]:
        found["training"] = f"it was {before['training']}, now {now['training']}"
    if before.get("mtp") != now["mtp"]:
        found["mtp"] = f"it was trained with mtp {before['mtp']}, now {now['mtp']} (model.mtp_loss_scaling_factor)"
    if before.get("freeze") != now["freeze"]:
        found["freeze"] = f"train.freeze was {before['freeze']}, now {now['freeze']}"
    if differences := _differences(before.get("begun_with", {}), now["begun_with"]):
        if "digest" in differences:
            differences = {
                "digest": "the samples are others",
                **{k: v for k, v in differences.items() if k != "digest"},
            }
        found["data"] = f"the data changed ({', '.join(differences.values())})"
    return found


def _differences(before: dict, now: dict, front: str = "") -> dict[str, str]:
    return {
        front + key: f"{front}{key} was {before.get(key)}, now {value}"
        for key, value in now.items()
        if before.get(key) != value
    }


def check_disk(recipe: Recipe, source: HfReader) -> None:
    """Raise UserError when nothing can be written at output_dir, or not a whole checkpoint."""
    run = Path(recipe.output_dir)
    there = next(path for path in (run, *run.absolute().parents) if path.is_dir())
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(bytes(1 << 16))
    except OSError as error:
        raise UserError(
            f"{there}: cannot be written to ({error.strerror}). Choose another output_dir, or make room."
        ) from error
    needed, free = _checkpoint_bytes(recipe, source), shutil.disk_usage(there).free
    if needed > free:
        raise UserError(
            f"{there}: {free / GIB:.2f} GiB are free, and a checkpoint of this run takes {needed / GIB:.2f} GiB. Make room, or "
            "choose another output_dir."
        )


def _checkpoint_bytes(recipe: Recipe, source: HfReader) -> int:
    """Of what is trained: the weights, fp32 masters and both moments. With frozen weights 0: they are not counted here."""
    if recipe.train.freeze:
        return 0
    counted = Model(source.spec, Layout(), recipe).weights(0)
    trained = counted.lora_dense + counted.lora_expert if recipe.lora else counted.dense + counted.expert
    return trained * (12 + (2 if recipe.model.params_dtype == "bf16" else 4))


@contextlib.contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold the run's lock. Raises UserError when another process does. It is gone with the process, however that ends."""
    try:
        file = open(run / LOCK_FILE, "a+", encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{run}: cannot be written to ({error.strerror}). Choose another output_dir.") from error
    with file:
        try:
            if not lock(file.fileno()):
                print(f"{run}: this file system has no locks: let no other job write there.", file=sys.stderr)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"{run}: another job is writing to it ({file.read().strip() or 'just started'}). Wait for its end, or choose "
                "another output_dir."
            ) from None
        file.truncate(0)
        with contextlib.suppress(OSError):  # the note is for a person; the lock holds on a full disk too
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
        yield


@contextlib.contextmanager
def opened(recipe: Recipe, facts: dict) -> Iterator[None]:
    """Create the run directory or go on with it, hold its lock, and write what the run is. Entered by one rank."""
    run = Path(recipe.output_dir)
    if (run / FACTS_FILE).is_file() and recipe.train.on_change == "restart" and _changes(read_facts(run), facts):
        _set_aside(run)
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoppedError(f"{run}: cannot be made ({error.strerror}).") from error
    sweep(run)
    with locked(run):
        try:
            write_whole(run / FACTS_FILE, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
            write_whole(run / RECIPE_FILE, recipe.to_yaml())
        except OSError as error:
            raise StoppedError(f"{run}: cannot be written to ({error.strerror}). Make room and start again.") from error
        if references(document := recipe.model_dump()) or secret_places(document):
            (run / RECIPE_FILE).chmod(0o600)  # no secret is in it; where they are kept is nobody else's business
        yield


def _set_aside(run: Path) -> None:
    number = 1
    while (aside := run.with_name(f"{run.name}.before{number}")).exists():
        number += 1
    run.rename(aside)
    print(f"the earlier run is now {aside}", file=sys.stderr)
