"""A fuzzer over every reader of foreign files: `python tests/fuzz/readers.py --megabytes 10 [--only NAME] [--seed N]`.

Right files are mutated, and each reader ends in success or in one of our sentences; never in another exception, after more
than ten seconds, or in more than 1 GiB of memory above what it began with.
"""

import argparse
import contextlib
import gzip
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import pyarrow.csv
import pyarrow.parquet
import torch
import torch.distributed.checkpoint as dcp
import zstandard
from safetensors.torch import save_file
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from glm45_tune.conversion.adapter import Merged
from glm45_tune.conversion.hf_files import HfDir, plan_side_files
from glm45_tune.conversion.mcore_files import McoreDir
from glm45_tune.conversion.stream import convert
from glm45_tune.conversion.torch_dist import COMMON, TorchDistFiles
from glm45_tune.data.sources import read_source
from glm45_tune.errors import StoppedError, UserError, VerificationError
from glm45_tune.mcore.checkpoint import saved_facts
from glm45_tune.recipe import Recipe
from glm45_tune.report import page
from glm45_tune.tiny import checkpoint

SECONDS, MEMORY = 10, 2**30
HOSTILE = (
    *(
        None,
        True,
        -1,
        0,
        2**31,
        2**63,
        2**64,
        10**30,
        1e308,
        float("nan"),
        "",
        "x" * 5000,
        "../x",
        "/etc/passwd",
        "a\0b",
    ),
    *([], {}, [[]], {"a": {}}, [1, "2", None], "\ud800", "\x1b[2J", "(a+)+$", "F32", 0.5),
)
NUMBERS = [n.to_bytes(size, order) for size in (2, 4, 8) for n in (0, 1, 2 ** (8 * size) - 1, 2 ** (8 * size - 1))
           for order in ("little", "big")]  # fmt: skip
PICKLED = [
    b"}",
    b"]",
    b"(",
    b")",
    b"N",
    b"t",
    b"R",
    b"b",
    b"\x81",
    b"\x94",
    b"h\x00",
    b"\x85",
    b"u",
    b"s",
    b"e",
    b"0",
    b".",
]


@dataclass(frozen=True)
class Reader:
    """A directory of right files; which of them are mutated; and what reads them."""

    make: Callable[[Path], None]
    files: tuple[str, ...]
    read: Callable[[Path], object]


def mutate(data: bytes, chance: random.Random) -> bytes:
    """The same bytes, damaged somewhere; of JSON and of a safetensors header also a value put in the place of another."""
    if chance.random() < 0.5 and (found := _in_json(data, chance)) is not None:
        return found
    kept = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 8))):
        where = chance.randrange(len(kept) + 1) if chance.random() < 0.5 else min(len(kept), chance.randrange(400))
        length = chance.choice((1, 2, 4, 8, 64))
        match chance.randrange(7):
            case 0:
                kept[where : where + 1] = bytes([chance.randrange(256)])
            case 1:
                del kept[where:]
            case 2:
                del kept[where : where + length]
            case 3:
                start = chance.randrange(len(data) + 1)
                kept[where:where] = data[start : start + length * 8]
            case 4:
                number = chance.choice(NUMBERS)
                kept[where : where + len(number)] = number
            case 5:
                kept[where:where] = chance.choice(PICKLED) * chance.choice((1, 1, 2, 1000))
            case 6:
                kept[where:where] = chance.choice(
                    (b"[", b'{"a":', b"- ", b"\n", b"&a [*a]", b'"', b"\xff")
                ) * chance.choice((1, 3000))
    return bytes(kept)


def _in_json(data: bytes, chance: random.Random) -> bytes | None:
    front, text = b"", data
    if len(data) > 8 and data[8:9] == b"{":  # safetensors
        length = int.from_bytes(data[:8], "little")
        front, text, behind = data[:8], data[8 : 8 + length], data[8 + length :]
    lines = text.split(b"\n") if not front and text.count(b"}\n") > 1 and text[:1] == b"{" else [text]
    number = chance.randrange(len(lines))
    try:
        document = json.loads(lines[number])
    except ValueError:
        return None
    places: list[tuple] = []
    _walk(document, places)
    if not places:
        return None
    holder, key = chance.choice(places)
    if isinstance(holder, dict) and chance.random() < 0.3:
        holder[chance.choice((*map(str, HOSTILE[:3]), "x" * 300, key + "x"))] = holder.pop(key)
    else:
        other, name = chance.choice(places)
        holder[key] = chance.choice((*HOSTILE, other[name] if name in other or isinstance(other, list) else 0))
    with contextlib.suppress(RecursionError, ValueError):  # a value put into itself
        lines[number] = json.dumps(document).encode()
    text = b"\n".join(lines)
    return len(text).to_bytes(8, "little") + text + behind if front else text


def _walk(value: object, places: list[tuple]) -> None:
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            places.append((value, key))
            _walk(value[key], places)


def _read_hf(path: Path) -> None:
    source = HfDir(path)
    source.check()
    plan_side_files(source)
    for name in source.names[:40]:
        source.read(name, 0, 4)


def _read_mcore(path: Path) -> None:
    source = McoreDir(path)
    for name in source.names[:40]:
        source.read(name, 0, 4)


def _make_values(path: Path) -> None:
    """A few values and an object as torch.distributed.checkpoint itself writes them."""
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.arange(6.0).view(2, 3).t(), "c": torch.ones(2).bfloat16()}
    objects = {COMMON: [{"optimizer": {0: {"optimizer": {"param_groups": [{"step": 1.0}]}}}}]}
    dcp.save({**tensors, **objects}, storage_writer=FileSystemWriter(path, single_file_per_rank=True), no_dist=True)
    written = next(path.glob("*.distcp")).name
    assert written == "__0_0.distcp", written


def _read_values(path: Path) -> None:
    files = TorchDistFiles(path)
    for name in files.tensors:
        files.read_key(name)
    files.read_object(COMMON)


def _make_adapter(path: Path) -> None:
    name = "base_model.model.model.layers.0.self_attn.o_proj"
    shape = HfDir(path.parent / "base").shape("model.layers.0.self_attn.o_proj.weight")
    tensors = {f"{name}.lora_A.weight": torch.ones(2, shape[1]), f"{name}.lora_B.weight": torch.ones(shape[0], 2)}
    save_file(tensors, path / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["o_proj"],
        "alpha_pattern": {"q_proj": 2},
    }
    (path / "adapter_config.json").write_text(json.dumps(config))


def _read_adapter(path: Path) -> None:
    Merged(HfDir(path.parent / "base"), path).read("model.layers.0.self_attn.o_proj.weight", 0, 4)


ROWS = [
    {"messages": [{"role": "user", "content": f"question {n}"}, {"role": "assistant", "content": "answer " * n}]}
    for n in range(1, 9)
]


def _make_rows(path: Path) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    (path / "a.jsonl").write_bytes(lines)
    (path / "b.json").write_text(json.dumps(ROWS))
    (path / "c.csv").write_text("prompt,answer\n" + "".join(f'"q, {n}",a{n}\n' for n in range(8)))
    (path / "d.jsonl.gz").write_bytes(gzip.compress(lines, mtime=0))
    (path / "e.jsonl.zst").write_bytes(zstandard.compress(lines))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path / "f.parquet")


def _read_rows(path: Path) -> None:
    for file in sorted(path.iterdir()):
        if file.read_bytes() != _RIGHT[path / file.name]:
            for _ in read_source(str(file)):
                pass


RECIPE = """\
model: {path: base}
data: &data
  train: [{path: a.jsonl, weight: 2}, b.jsonl]
  seq_length: 128
lora: {r: 8, lora_alpha: 16, target_modules: [linear_qkv, linear_proj]}
parallel: {tensor_model_parallel_size: 2}
train: {steps: 2, global_batch_size: 4, freeze: []}
output_dir: runs/x
"""


def _make_run(path: Path) -> None:
    (path / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": n, "train/loss": 1.0 / n}) + "\n" for n in range(1, 9))
    )
    sample = {
        "step": 0,
        "prompt": "question",
        "answer": "an answer",
        "completion": "an answer",
        "reward": 0.5,
        "advantage": 0.1,
        "finish": "stop",
    }
    (path / "samples.jsonl").write_text(json.dumps(sample) + "\n" + json.dumps({**sample, "step": 2}) + "\n")
    (path / "expert_load.json").write_text(json.dumps({"load": [[0.5, 0.5], [0.4, 0.6]]}))
    (path / "recipe.yaml").write_text(RECIPE)
    facts = {
        "kind": "run",
        "training": "sft",
        "model": "base",
        "lora": None,
        "begun_with": {"samples": 8, "tokens": 99},
    }
    (path / "glm45_tune.json").write_text(json.dumps(facts))


SHARD = "model-00006-of-00006.safetensors"
READERS = {
    "hf": Reader(
        lambda path: shutil.copytree(path.parent / "base", path, dirs_exist_ok=True),
        ("config.json", "model.safetensors.index.json", SHARD),
        _read_hf,
    ),
    "torch_dist": Reader(
        lambda path: convert(path.parent / "base", path, "mcore", verify=False),
        (".metadata", ".metadata", ".metadata", "config.json"),
        _read_mcore,
    ),
    "values": Reader(_make_values, ("__0_0.distcp", "__0_0.distcp", ".metadata"), _read_values),
    "adapter": Reader(_make_adapter, ("adapter_config.json", "adapter_model.safetensors"), _read_adapter),
    "recipe": Reader(
        lambda path: (path / "r.yaml").write_text(RECIPE) and None,
        ("r.yaml",),
        lambda path: Recipe.load(path / "r.yaml"),
    ),
    "facts": Reader(
        lambda path: (path / "complete.json").write_text('{"step": 1, "files": {"a": [1, 2]}}') and None,
        ("complete.json",),
        saved_facts,
    ),
    "rows": Reader(_make_rows, ("a.jsonl", "b.json", "c.csv", "d.jsonl.gz", "e.jsonl.zst", "f.parquet"), _read_rows),
    "run": Reader(
        _make_run,
        ("metrics.jsonl", "samples.jsonl", "expert_load.json", "glm45_tune.json"),
        lambda path: page.write(path, path.parent / "page.html"),
    ),
}
_RIGHT: dict[Path, bytes] = {}


def fuzz(name: str, bytes_wanted: int, seed: int, root: Path) -> tuple[int, int, list[str]]:
    """Mutated bytes, inputs, and what went wrong. root: a directory with a checkpoint `base`."""
    reader, directory = READERS[name], root / name
    if not directory.exists():
        directory.mkdir()
        reader.make(directory)
    for path in filter(Path.is_file, directory.iterdir()):
        _RIGHT[path] = path.read_bytes()
    done, number, faults = 0, 0, []
    while done < bytes_wanted and len(faults) < 20:
        said, end = os.pipe()
        if not (child := os.fork()):
            os.close(said)
            _in_child(reader, directory, seed, number, bytes_wanted - done, end)
        os.close(end)
        last = number
        with open(said, encoding="utf-8") as lines:
            for line in lines:
                last, size, fault = json.loads(line)
                if size:
                    done, number = done + size, last + 1
                if fault:
                    faults.append(f"{name} seed {seed} input {last}: {fault}")
        _, status = os.waitpid(child, 0)
        if os.waitstatus_to_exitcode(status):  # killed by the clock or by the memory it asked for
            faults.append(
                f"{name} seed {seed} input {last}: its process ended with {os.waitstatus_to_exitcode(status)}"
            )
            number = last + 1
    return done, number, faults


def _in_child(reader: Reader, directory: Path, seed: int, number: int, bytes_wanted: int, end: int) -> None:
    """Input after input until one is at fault, each told before and after."""
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))
    sys.stderr = io.StringIO()
    with open(end, "w", encoding="utf-8", buffering=1) as out:
        while bytes_wanted > 0:
            chance = random.Random(f"{seed} {number}")
            file = directory / chance.choice(reader.files)
            data = mutate(_RIGHT[file], chance)
            out.write(json.dumps([number, 0, None]) + "\n")
            file.write_bytes(data)
            signal.alarm(SECONDS)  # whose default is the end of the process, whatever it is in
            fault = None
            try:
                reader.read(directory)
            except (UserError, StoppedError, VerificationError) as error:
                if len(str(error)) > 20_000:
                    fault = f"{file.name}: a message of {len(str(error))} characters"
            except BaseException as error:  # what is looked for
                fault = f"{file.name}: {type(error).__name__}: {str(error)[:200]} at {traceback.extract_tb(error.__traceback__)[-1]}"
            signal.alarm(0)
            file.write_bytes(_RIGHT[file])
            out.write(json.dumps([number, len(data), fault]) + "\n")
            bytes_wanted, number = bytes_wanted - len(data), number + 1
    os._exit(0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=float, default=1.0, help="mutated input in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=READERS, action="append")
    options = parser.parse_args()
    names = options.only or list(READERS)
    total, failed = 0, False
    with tempfile.TemporaryDirectory(prefix="glm45_tune_fuzz_") as root:
        checkpoint.write(Path(root) / "base", "air")
        for name in names:
            done, count, faults = fuzz(name, int(options.megabytes * 1e6 / len(names)), options.seed, Path(root))
            total, failed = total + done, failed or bool(faults)
            print(f"{name}: {count} inputs, {done / 1e6:.1f} MB, {len(faults)} faults", *faults, sep="\n  ", flush=True)
    print(f"{total / 1e6:.1f} MB in all")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
