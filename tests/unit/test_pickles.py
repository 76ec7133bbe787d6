"""A pickle of somebody else builds plain values and nothing else: no code runs, and it costs no more than its size."""

import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from glm45_tune.conversion import metadata, pickles
from glm45_tune.conversion.mcore_files import McoreDir
from glm45_tune.conversion.stream import convert
from glm45_tune.conversion.torch_dist import COMMON, TorchDistFiles, metadata_of, write_part
from glm45_tune.errors import CheckpointError

FILESYSTEM = "torch.distributed.checkpoint.filesystem"


@pytest.fixture(scope="module")
def whole(checkpoints, tmp_path_factory):
    path = tmp_path_factory.mktemp("pickles") / "mcore"
    convert(checkpoints["air"], path, "mcore", verify=False)
    return path


@pytest.fixture
def mcore(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "mcore")


def _text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


def _calls(module: str, name: str, *arguments: str) -> bytes:
    """A pickle of protocol 4 that calls module.name(*arguments)."""
    values = b"(" + b"".join(map(_text, arguments)) + b"t"
    return b"\x80\x04" + _text(module) + _text(name) + b"\x93" + values + b"R."


CALLS = [
    (FILESYSTEM, "os.system"),
    (FILESYSTEM, "os"),
    ("torch.distributed.checkpoint.metadata", "os.system"),
    ("torch", "PyTorchFileWriter"),
    ("torch", "os.system"),
    ("torch", "Size.__new__"),
    ("torch.serialization", "_get_layout.__globals__"),
    ("torch.serialization", "load"),
    ("torch.utils.collect_env", "run"),
    ("pathlib", "PosixPath.write_text"),
    ("pathlib", "Path"),
    ("collections", "namedtuple"),
    ("functools", "partial"),
    ("builtins", "eval"),
    ("builtins", "getattr"),
    ("os", "system"),
    ("posix", "system"),
    ("megatron.core.dist_checkpointing.strategies.torch", "pickle.loads"),
]


@pytest.mark.parametrize("module, name", CALLS)
def test_a_global_that_is_not_listed_is_refused_by_its_name(mcore, tmp_path, module, name):
    ran = tmp_path / "ran"
    (mcore / ".metadata").write_bytes(_calls(module, name, f"touch {ran}"))
    with pytest.raises(CheckpointError, match=rf"{module}\.{name}'? has no place"):
        McoreDir(mcore)
    assert not ran.exists()


def test_the_command_line_ends_with_2_and_runs_nothing(mcore, checkpoints, tmp_path, cli):
    ran = tmp_path / "ran"
    (mcore / ".metadata").write_bytes(_calls(FILESYSTEM, "os.system", f"touch {ran}"))
    for command in (
        ("verify", checkpoints["air"], mcore),
        ("convert", "--to-hf", "--model", mcore, "--output", tmp_path / "out"),
    ):
        code, _, err = cli(*command)
        assert code == 2 and "os.system" in err and "Traceback" not in err
    assert not ran.exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", sorted({name for name in metadata.NAMES}))
def test_a_listed_global_called_on_a_text_makes_nothing_of_it(name, tmp_path):
    """Nor with a state put on it, on its class, or twice."""
    ran = tmp_path / "ran"
    called = _calls(*name, str(ran))[:-1]
    for data in (
        called + b".",
        called + b"}b.",
        called + b"}b}b.",
        called[:-1] + b"}b.",
        called + b")R.",
        b"\x80\x02" + called[2:] + b".",
    ):
        try:
            value = pickles.load(data, metadata.NAMES)
        except pickles.PickleError:
            continue
        assert isinstance(value, pickles.Record | dict | tuple | torch.dtype)
    assert not ran.exists() and not list(tmp_path.iterdir())


BOMBS = {
    "a memo far out": b"\x80\x04Nr" + struct.pack("<I", 2**31),
    "a text of 4 GiB": b"\x80\x04X" + struct.pack("<I", 2**32 - 1) + b"x",
    "a number of 2 GiB": b"\x80\x04\x8b" + struct.pack("<i", 2**31 - 1) + b"x",
    "a long number": b"\x80\x04\x8a\xff" + bytes(255) + b".",
    "containers alone": b"\x80\x04" + b"}" * 200_000 + b".",
    "marks alone": b"\x80\x04" + b"(" * 200_000 + b".",
    "tuples in tuples": b"\x80\x04}" + b")" + b"\x85" * 200_000 + b"Ns.",
    "lists in lists": b"\x80\x04" + b"]" * 300 + b"a" * 299 + b".",
    "a deep key": b"\x80\x04}N" + b"\x85" * 900 + b"Ns.",
    "a long shape again and again": b"\x80\x04\x8c\x05torch\x8c\x04Size\x93\x94("
    + b"K\x01" * 100_000
    + b"t\x94\x85\x94"
    + b"h\x00h\x02R" * 10_000
    + b".",
    "no end": b"\x80\x04N",
    "nothing": b"",
    "bytes": b"\x80\x04C\x01x.",
    "bytes of 2^60": b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b"x.",
    "a list among its own": b"\x80\x04]\x94h\x00a.",
    "a frame of 2^60": b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b"N.",
    "a name of 1 MB": b"\x80\x02c" + b"a" * 10**6 + b"\nb\n.",
    "no text": b"\x80\x04X\x02\x00\x00\x00\xff\xfe.",
    "an extension": b"\x80\x02\x82\x01.",
    "a persistent id": b"\x80\x02NQ.",
    "an instance of protocol 0": b"(i__builtin__\neval\n.",
    "protocol 0": b"S'x'\n.",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_is_a_sentence(mcore, bomb):
    (mcore / ".metadata").write_bytes(BOMBS[bomb])
    with pytest.raises(CheckpointError, match="metadata: cannot be read") as caught:
        McoreDir(mcore)
    assert len(str(caught.value)) < 1000


def test_bombs_cost_no_memory(mcore):
    """In a process that may take 200 MiB more than its imports."""
    program = f"""
import resource, sys
from pathlib import Path
sys.path.insert(0, {os.path.dirname(__file__)!r})
from test_pickles import BOMBS, pickles, metadata
now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + 200 * 2**20,) * 2)
for name, bomb in BOMBS.items():
    try:
        pickles.load(bomb, metadata.NAMES)
    except pickles.PickleError:
        pass
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def _changed(mcore, edit) -> None:
    """Write .metadata anew after an edit of what torch reads there."""
    path = mcore / ".metadata"
    known = pickle.loads(path.read_bytes())  # our own
    edit(known)
    path.write_bytes(pickle.dumps(known, protocol=4))


def _first(known):
    return next(info for index, info in known.storage_data.items() if index.offset is not None)


def _chunk(known):
    return next(iter(known.state_dict_metadata.values())).chunks[0]


EDITS = {
    "a path that climbs": lambda known: setattr(_first(known), "relative_path", "../other.distcp"),
    "an absolute path": lambda known: setattr(_first(known), "relative_path", "/etc/passwd"),
    "a path of Windows": lambda known: setattr(_first(known), "relative_path", "..\\other"),
    "a path that is a number": lambda known: setattr(_first(known), "relative_path", 7),
    "a path that is its directory": lambda known: setattr(_first(known), "relative_path", "."),
    "a path with NUL": lambda known: setattr(_first(known), "relative_path", "a\0b"),
    "a path of 10,000 letters": lambda known: setattr(_first(known), "relative_path", "a" * 10_000),
    "a length beyond the file": lambda known: setattr(_first(known), "length", 2**40),
    "an offset beyond the file": lambda known: setattr(_first(known), "offset", 2**62),
    "a negative offset": lambda known: setattr(_first(known), "offset", -1),
    "an offset in fractions": lambda known: setattr(_first(known), "offset", 0.5),
    "a length of 2^200": lambda known: setattr(_first(known), "length", 2**200),
    "a length too short": lambda known: setattr(_first(known), "length", 10),
    "compression": lambda known: setattr(_first(known), "transform_descriptors", ["zstd"]),
    "a chunk beyond its tensor": lambda known: setattr(_chunk(known), "sizes", torch.Size([10**6, 128])),
    "a chunk of other dimensions": lambda known: setattr(_chunk(known), "sizes", torch.Size([1])),
    "a chunk twice": lambda known: next(iter(known.state_dict_metadata.values())).chunks.append(_chunk(known)),
    "chunks that are none": lambda known: setattr(next(iter(known.state_dict_metadata.values())), "chunks", None),
    "a size that is no shape": lambda known: setattr(next(iter(known.state_dict_metadata.values())), "size", "x"),
    "no chunks": lambda known: setattr(known, "state_dict_metadata", None),
    "no places": lambda known: known.storage_data.clear(),
}


@pytest.mark.parametrize("edit", EDITS)
def test_what_does_not_fit_the_files_is_refused(mcore, edit):
    _changed(mcore, EDITS[edit])
    with pytest.raises(CheckpointError, match="metadata"):
        McoreDir(mcore)


def _archived(values: bytes, **members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in {"data.pkl": values, **members}.items():
            archive.writestr(f"archive/{name}", data)
    return buffer.getvalue()


def test_values_of_others_are_not_unpickled_either(tmp_path):
    ran = tmp_path / "ran"
    evil = _archived(_calls("os", "system", f"touch {ran}"))
    part = write_part(tmp_path, "__0_0.distcp", {"x": ((4,), torch.float32, [((0,), (4,), torch.ones(4))])}, {})
    (tmp_path / ".metadata").write_bytes(metadata_of([part]))
    assert torch.equal(TorchDistFiles(tmp_path).read_key("x"), torch.ones(4))
    path = tmp_path / "__0_0.distcp"
    path.write_bytes(evil + bytes(max(part.size - len(evil), 0)))
    _changed(tmp_path, lambda known: setattr(_first(known), "length", path.stat().st_size))
    with pytest.raises(CheckpointError):
        TorchDistFiles(tmp_path).read_key("x")
    path.write_bytes(evil)
    _changed(tmp_path, lambda known: setattr(_first(known), "length", len(evil)))
    with pytest.raises(CheckpointError, match="os.system' has no place"):
        TorchDistFiles(tmp_path).read_key("x")
    assert not ran.exists()


def test_a_compressed_archive_is_refused(tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(2**24))
    data = buffer.getvalue()
    part = write_part(tmp_path, "__0_0.distcp", {}, {COMMON: 1})
    (tmp_path / "__0_0.distcp").write_bytes(data)
    part.objects = [(COMMON, 0, len(data))]
    (tmp_path / ".metadata").write_bytes(metadata_of([part]))
    with pytest.raises(CheckpointError, match="compressed"):
        TorchDistFiles(tmp_path).read_object(COMMON)


def test_what_torch_itself_writes_is_read(tmp_path):
    """Contiguous, transposed, empty and scalar tensors, every dtype, and objects beside them."""
    tensors = {
        "plain": torch.randn(5, 7),
        "turned": torch.randn(5, 7).t(),
        "part": torch.randn(9, 4)[2:5],
        "bf16": torch.randn(3).bfloat16(),
        "half": torch.randn(3).half(),
        "counts": torch.arange(4),
        "scalar": torch.tensor(2.5),
    }
    writer = FileSystemWriter(tmp_path, single_file_per_rank=True)
    dcp.save({**tensors, COMMON: [{"step": 3}]}, storage_writer=writer, no_dist=True)
    files = TorchDistFiles(tmp_path)
    for name, tensor in tensors.items():
        found = files.read_key(name)
        assert found.dtype == tensor.dtype and torch.equal(found, tensor), name


def test_a_run_of_somebody_else_is_resumed_without_unpickling(tmp_path, checkpoints, corpus, cli):
    """Every file of a checkpoint that holds a pickle is replaced by one that runs a command; its sums are made to fit."""
    import zlib

    run, ran = tmp_path / "run", tmp_path / "ran"
    recipe = [
        *(f"model.path={checkpoints['air']}", f"data.train={corpus}", "data.seq_length=512", f"output_dir={run}"),
        *("train.global_batch_size=1", "train.save_interval=1"),
    ]
    (tmp_path / "r.yaml").write_text("model: {}\n")
    code, _, err = cli("train", tmp_path / "r.yaml", *recipe, "train.steps=1")
    assert code == 0, err
    (checkpoint,) = run.glob("checkpoints/*")
    (checkpoint / "common.pt").write_bytes(_calls("os", "system", f"touch {ran}"))
    whole = (checkpoint / ".metadata").read_bytes()
    code, _, err = cli("train", tmp_path / "r.yaml", *recipe, "train.steps=2")
    assert code == 0 and "resumed after step 1" in err + _, err
    (checkpoint,) = run.glob("checkpoints/*1")
    shutil.rmtree(run / "checkpoints" / "step_000002")
    evil = _archived(_calls("os", "system", f"touch {ran}"))
    known = pickle.loads(whole)
    place = next(info for index, info in known.storage_data.items() if index.fqn == COMMON)
    file = checkpoint / place.relative_path
    place.offset, place.length = file.stat().st_size, len(evil)
    with open(file, "ab") as out:
        out.write(evil)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(known, protocol=4))
    facts = json.loads((checkpoint / "complete.json").read_text())
    for name in facts["files"]:
        data = (checkpoint / name).read_bytes()
        facts["files"][name] = [len(data), zlib.crc32(data)]
    (checkpoint / "complete.json").write_text(json.dumps(facts))
    code, _, err = cli("train", tmp_path / "r.yaml", *recipe, "train.steps=3")
    assert code == 2 and "os.system" in err and "Traceback" not in err, err
    assert not ran.exists()
