"""Files of others: nothing in them runs, and what does not fit its file is a sentence before it costs anything."""

import collections
import io
import json
import os
import pickle
import shutil
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glm45_tune.conversion.metadata import NAMES, read_metadata
from glm45_tune.conversion.pickles import PickleError, load
from glm45_tune.conversion.stream import convert, open_model
from glm45_tune.conversion.torch_dist import Part, TorchDistFiles, metadata_of
from glm45_tune.documents import MOST_JSON_BYTES
from glm45_tune.errors import CheckpointError
from glm45_tune.foreign import read_json, shown
from glm45_tune.spec import load_spec


@pytest.fixture(scope="module")
def mcore(checkpoints, tmp_path_factory):
    output = tmp_path_factory.mktemp("foreign") / "mcore"
    convert(checkpoints["air-no-mtp"], output, "mcore", workers=1)
    return output


@pytest.fixture
def copy(mcore, tmp_path):
    return shutil.copytree(mcore, tmp_path / "copy")


class _Calls:
    """Pickled, it calls a function with one argument when it is read."""

    def __init__(self, function, argument):
        self.call = function, (argument,)

    def __reduce__(self):
        return self.call


def _global(module: str, name: str, argument: str) -> bytes:
    """A pickle of protocol 4 that calls what these two names lead to."""
    text = lambda word: b"\x8c" + bytes([len(word)]) + word.encode()  # noqa: E731
    return b"\x80\x04" + text(module) + text(name) + b"\x93" + text(argument) + b"\x85R."


HOSTILE = {
    "os.system": ("os", "system"),
    "a name with a dot": ("torch.distributed.checkpoint.filesystem", "os.system"),
    "a class of torch that opens files": ("torch", "PyTorchFileWriter"),
    "a function of an allowed module": ("torch.serialization", "load"),
    "an attribute of an allowed class": ("torch.distributed.checkpoint.metadata", "Metadata.__init__"),
    "a builtin": ("builtins", "eval"),
    "functools": ("functools", "partial"),
    "a module below torch": ("torch.utils.data", "DataLoader"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_a_metadata_file_names_is_refused_and_not_called(copy, tmp_path, cli, kind):
    module, name = HOSTILE[kind]
    target = tmp_path / "target"
    target.write_text("mine")
    argument = str(target) if "Writer" in name else f"touch {tmp_path}/ran"
    (copy / ".metadata").write_bytes(_global(module, name, argument))
    for command in (
        ("verify", copy, copy),
        ("convert", "--to-hf", "--model", copy, "--output", tmp_path / "out"),
    ):
        code, _, err = cli(*command)
        assert code == 2 and name in err and err.count("\n") == 1, err
    assert not (tmp_path / "ran").exists() and target.read_text() == "mine"


def test_a_class_that_is_allowed_cannot_be_changed_by_a_state(copy):
    """BUILD with a state on a class would set attributes of torch's own class."""
    text = lambda word: b"\x8c" + bytes([len(word)]) + word.encode()  # noqa: E731
    build = text("torch.distributed.checkpoint.metadata") + text("Metadata") + b"\x93N}" + text("x") + b"K\x01s\x86b."
    with pytest.raises(PickleError, match="gives a state to what has none"):
        load(b"\x80\x04" + build, NAMES)


def test_a_place_in_the_memo_costs_no_memory():
    with pytest.raises(PickleError):
        load(b"\x80\x02Nr\xff\xff\xff\x7f.", NAMES)


def _places(real) -> dict:
    """Where everything is stored, as torch keeps it and as it is read here."""
    return {(index.fqn, index.offset and tuple(index.offset)): info for index, info in real.storage_data.items()}


def test_every_opcode_of_a_real_file_is_read_as_pickle_reads_it(mcore, tmp_path):
    real = pickle.loads((mcore / ".metadata").read_bytes())
    for protocol in (2, 4, 5):
        (tmp_path / ".metadata").write_bytes(pickle.dumps(real, protocol))
        tensors, stored = read_metadata(tmp_path)
        assert stored == _places(real)
        assert {key: (meta.size, meta.chunks) for key, meta in tensors.items()} == {
            key: (meta.size, meta.chunks) for key, meta in real.state_dict_metadata.items() if hasattr(meta, "size")
        }


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_damaged_metadata_file_is_a_sentence(mcore, tmp_path_factory, data):
    home = tmp_path_factory.getbasetemp()
    whole = bytearray((mcore / ".metadata").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(whole) - 1))
        whole[place] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(whole)))
    for damaged in (bytes(whole), bytes(whole[:cut])):
        (home / ".metadata").write_bytes(damaged)
        try:
            read_metadata(home)
        except CheckpointError as error:
            assert len(str(error)) < 1000


STORAGE = {
    "climbs out of the directory": lambda info: info.__setattr__("relative_path", "../elsewhere.distcp"),
    "absolute": lambda info: info.__setattr__("relative_path", "/etc/passwd"),
    "longer than the file": lambda info: info.__setattr__("length", 2**40),
    "too short for its values": lambda info: info.__setattr__("length", 3),
    "negative": lambda info: info.__setattr__("offset", -1),
}


@pytest.mark.parametrize("kind", STORAGE)
def test_a_chunk_lies_in_a_file_of_its_directory(copy, kind):
    metadata = pickle.loads((copy / ".metadata").read_bytes())
    (copy.parent / "elsewhere.distcp").write_bytes(bytes(10**6))
    key, info = next((k, info) for k, info in metadata.storage_data.items() if k.fqn.endswith("weight"))
    STORAGE[kind](info)
    (copy / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError):
        open_model(copy)


def test_a_link_of_a_chunk_file_is_not_followed(copy):
    file = next(copy.glob("*.distcp"))
    file.rename(copy.parent / "elsewhere")
    file.symlink_to(copy.parent / "elsewhere")
    with pytest.raises(CheckpointError, match="does not lie in that directory"):
        open_model(copy)


def test_an_object_of_a_run_is_read_as_plain_values(tmp_path):
    """What a resume reads beside the tensors was once unpickled as it came."""
    from glm45_tune.conversion.torch_dist import COMMON, metadata_of, write_part

    for function, argument in ((os.system, f"touch {tmp_path}/ran"), (eval, "1"), (io.FileIO, "/etc/passwd")):
        directory = tmp_path / function.__name__
        directory.mkdir()
        part = write_part(directory, "__0_0.distcp", {}, {COMMON: {"optimizer": _Calls(function, argument)}})
        (directory / ".metadata").write_bytes(metadata_of([part]))
        with pytest.raises(CheckpointError, match="cannot be read"):
            TorchDistFiles(directory).read_object(COMMON)
    assert not (tmp_path / "ran").exists()


def _header(file: Path) -> tuple[dict, bytes]:
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _write(file: Path, header: object, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def _swap(header: dict, first: object, last: object) -> None:
    name = next(name for name in header if name != "__metadata__")
    header[name]["data_offsets"] = [first, last]


HEADERS = {
    "overlapping": lambda h: _swap(h, *list(h.values())[-1]["data_offsets"]),
    "negative": lambda h: _swap(h, -8, 8),
    "beyond the file": lambda h: _swap(h, 2**50, 2**50 + 8),
    "no numbers": lambda h: _swap(h, "0", None),
    "true for 1": lambda h: _swap(h, False, True),
    "a shape beyond memory": lambda h: list(h.values())[-1].update(shape=[2**40, 2**40]),
    "a shape of text": lambda h: list(h.values())[-1].update(shape="ab"),
    "a negative shape": lambda h: list(h.values())[-1].update(shape=[-1, -8]),
    "a dtype that is a list": lambda h: list(h.values())[-1].update(dtype=["F32"]),
    "an entry that is null": lambda h: h.update({next(iter(h)): None}),
    "a name of a million letters": lambda h: h.update(
        {"x" * 10**6: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    ),
}


@pytest.fixture
def hf(checkpoints, tmp_path):
    return shutil.copytree(checkpoints["air-no-mtp"], tmp_path / "hf")


@pytest.mark.parametrize("kind", HEADERS)
def test_a_safetensors_header_describes_its_file_and_nothing_else(hf, cli, kind):
    file = sorted(hf.glob("*.safetensors"))[0]
    header, data = _header(file)
    header.pop("__metadata__", None)
    HEADERS[kind](header)
    _write(file, header, data)
    code, _, err = cli("convert", "--to-mcore", "--model", hf, "--output", hf.parent / "out")
    assert code == 2 and "safetensors" in err and len(err) < 1500 and not (hf.parent / "out").exists()


def test_a_header_that_names_a_tensor_twice_or_nests_too_deep_is_refused(hf):
    file = sorted(hf.glob("*.safetensors"))[0]
    header, data = _header(file)
    name = next(n for n in header if n != "__metadata__")
    twice = json.dumps(header)[:-1] + f', "{name}": {json.dumps(header[name])}}}'
    for text in (twice.encode(), b"[" * 100_000, b'{"a":' * 50_000):
        _write(file, text, data)
        with pytest.raises(CheckpointError, match="not a whole safetensors file"):
            open_model(hf)


INDEXES = {
    "a number": lambda i: i["weight_map"].update({next(iter(i["weight_map"])): 7}),
    "null": lambda i: i["weight_map"].update({next(iter(i["weight_map"])): None}),
    "a list": lambda i: i.update(weight_map=["a"]),
    "nothing": lambda i: i.update(weight_map=None),
    "a climbing path": lambda i: i["weight_map"].update({next(iter(i["weight_map"])): "../x.safetensors"}),
    "an absolute path": lambda i: i["weight_map"].update({next(iter(i["weight_map"])): "/x.safetensors"}),
    "a very long name": lambda i: i["weight_map"].update({next(iter(i["weight_map"])): "x" * 10**6}),
    "a zero byte": lambda i: i["weight_map"].update({next(iter(i["weight_map"])): "x\0y"}),
    "a directory": lambda i: i["weight_map"].update({next(iter(i["weight_map"])): "."}),
}


@pytest.mark.parametrize("kind", INDEXES)
def test_an_index_names_files_of_its_directory(hf, kind):
    shutil.copy(sorted(hf.glob("*.safetensors"))[0], hf.parent / "x.safetensors")
    path = hf / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    INDEXES[kind](index)
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError) as fault:
        open_model(hf)
    assert len(str(fault.value)) < 1000


def test_a_hub_cache_is_read_through_its_own_links(hf, tmp_path):
    """snapshots/REVISION/FILE → ../../blobs/HASH is how Hugging Face's cache is laid out."""
    repository = tmp_path / "models--a--b"
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    shutil.copytree(hf, repository / "blobs")
    for file in (repository / "blobs").iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    assert len(open_model(snapshot).names) == len(open_model(hf).names)
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(hf / "config.json")
    with pytest.raises(CheckpointError, match="link"):
        open_model(snapshot)


def test_a_side_file_that_is_a_link_elsewhere_is_not_copied(hf, tmp_path, cli):
    (tmp_path / "secret").write_text("of mine")
    (hf / "LICENSE").unlink(missing_ok=True)
    (hf / "LICENSE").symlink_to(tmp_path / "secret")
    code, _, err = cli("convert", "--to-mcore", "--model", hf, "--output", tmp_path / "out")
    assert code == 2 and "LICENSE" in err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["num_hidden_layers", "n_routed_experts", "hidden_size", "num_nextn_predict_layers"])
@pytest.mark.parametrize("value", [10**9, 10**30, -1, 1.5, True, "2", [2], {"a": 1}])
def test_a_size_that_no_model_has_is_refused_at_once(hf, key, value):
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(CheckpointError):
        open_model(hf).check()


def test_json_of_others_is_bounded(tmp_path):
    path = tmp_path / "config.json"
    for text in ("[" * 10**6, "{" * 10**6, "[]", '"', "\xff", "1" * 10**5, "NaN", ""):
        path.write_bytes(text.encode("latin-1"))
        with pytest.raises(CheckpointError) as fault:
            load_spec(tmp_path)
        assert len(str(fault.value)) < 600
    os.truncate(path, MOST_JSON_BYTES + 1)
    with pytest.raises(CheckpointError, match="at most"):
        read_json(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_json(path)


def test_an_ordered_dict_may_hold_the_tensors(mcore, tmp_path):
    """torch wrote such metadata once."""
    real = pickle.loads((mcore / ".metadata").read_bytes())
    real.planner_data = collections.OrderedDict(a=torch.Size([1]))
    (tmp_path / ".metadata").write_bytes(pickle.dumps(real, 2))
    assert read_metadata(tmp_path)[1] == _places(real)


def test_what_names_itself_again_and_again_is_shown_at_no_cost(copy):
    """Ten names of ten names of ten names, forty deep: written out, it would have no end."""
    deep = "x"
    for _ in range(40):
        deep = (deep,) * 10
    assert len(shown(deep)) < 200
    metadata = pickle.loads((copy / ".metadata").read_bytes())
    next(info for key, info in metadata.storage_data.items() if key.offset).relative_path = deep
    (copy / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="not the name of a file"):
        open_model(copy)


def test_the_metadata_of_the_largest_release_is_read_in_seconds(tmp_path):
    """30,000 chunks, as 355B has."""
    pieces = [((row, 0), (1, 8), row * 64, 64) for row in range(300)]
    part = Part("a", [(f"layer.{n}.weight", (300, 8), torch.bfloat16, pieces) for n in range(100)])
    (tmp_path / ".metadata").write_bytes(metadata_of([part]))
    begin = time.process_time()
    tensors, places = read_metadata(tmp_path)
    assert time.process_time() - begin < 10 and len(places) == 30_000 and len(tensors) == 100
