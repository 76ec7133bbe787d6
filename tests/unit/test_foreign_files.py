"""Checkpoints, recipes and adapters of somebody else: what does not fit is one sentence, at once."""

import json
import os
import shutil
import time

import pytest
import torch
from safetensors.torch import save_file

from glm45_tune.conversion.adapter import Merged
from glm45_tune.conversion.hf_files import INDEX, HfDir, SafetensorsFile
from glm45_tune.conversion.stream import convert, open_model
from glm45_tune.data import deadline
from glm45_tune.data.chat import ChatRenderer, load_tokenizer
from glm45_tune.documents import DocumentError, parse_yaml
from glm45_tune.errors import CheckpointError, UserError
from glm45_tune.mcore.checkpoint import _saved_files
from glm45_tune.recipe import DataConfig, Recipe


@pytest.fixture
def broken(checkpoints, tmp_path):
    return shutil.copytree(checkpoints["air"], tmp_path / "broken")


def _write(path, header, data: bytes = bytes(16)) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def _entry(first=0, last=16, shape=(4,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [first, last]}


HEADERS = {
    "overlap": {"a": _entry(), "b": _entry()},
    "overlap in part": {"a": _entry(0, 12, (3,)), "b": _entry(8, 16, (2,))},
    "a gap": {"a": _entry(0, 4, (1,)), "b": _entry(8, 16, (2,))},
    "a gap in front": {"a": _entry(8, 16, (2,))},
    "bytes left over": {"a": _entry(0, 8, (2,))},
    "beyond the file": {"a": _entry(0, 32, (8,))},
    "negative": {"a": _entry(-16, 0)},
    "turned round": {"a": _entry(16, 0)},
    "numbers in fractions": {"a": _entry(0.0, 16.0)},
    "numbers that are truths": {"a": _entry(False, 16)},
    "three offsets": {"a": {**_entry(), "data_offsets": [0, 8, 16]}},
    "no offsets": {"a": {"dtype": "F32", "shape": [4]}},
    "null": {"a": None},
    "a list": ["a"],
    "a shape of 2^70": {"a": _entry(shape=(2**70,))},
    "a shape of zeros and 2^62": {"a": _entry(shape=(0, 2**62, 2**62))},
    "a negative shape": {"a": _entry(shape=(-2, -2))},
    "a shape of many": {"a": _entry(shape=(1,) * 10_000 + (4,))},
    "a shape in words": {"a": {**_entry(), "shape": "4"}},
    "another dtype": {"a": _entry(dtype="F77")},
    "a dtype that is a list": {"a": {**_entry(), "dtype": ["F32"]}},
    "metadata of numbers": {"__metadata__": {"a": 1}, "a": _entry()},
    "metadata that is a list": {"__metadata__": [], "a": _entry()},
    "a field more": {"a": {**_entry(), "more": 1}},
    "a name twice": b'{"a":' + json.dumps(_entry()).encode() + b',"a":' + json.dumps(_entry()).encode() + b"}",
    "nesting": b"[" * 50_000,
    "nested objects": b'{"a":' * 50_000,
    "digits": b'{"a":' + b"9" * 10_000 + b"}",
    "no UTF-8": b'{"\xff\xfe": 1}',
    "nothing": b"",
}


@pytest.mark.parametrize("fault", HEADERS)
def test_a_safetensors_header_is_checked(tmp_path, fault):
    _write(tmp_path / "x.safetensors", HEADERS[fault])
    with pytest.raises(CheckpointError, match="not a whole safetensors file") as caught:
        SafetensorsFile(tmp_path / "x.safetensors")
    assert len(str(caught.value)) < 800


def test_a_header_longer_than_its_file_is_not_read(tmp_path):
    (tmp_path / "x.safetensors").write_bytes((2**63).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="header has"):
        SafetensorsFile(tmp_path / "x.safetensors")


def test_a_right_header_is_read_whatever_its_order(tmp_path):
    _write(tmp_path / "x.safetensors", {"b": _entry(8, 16, (2,)), "e": _entry(8, 8, (0, 4)), "a": _entry(0, 8, (2,))})
    assert set(SafetensorsFile(tmp_path / "x.safetensors").tensors) == {"a", "b", "e"}


NAMES = {
    "climbs": "../x.safetensors",
    "is absolute": "/etc/passwd",
    "climbs as Windows does": "..\\x.safetensors",
    "is a directory": "folder",
    "is a pipe": "pipe",
    "is a device": "/dev/zero",
    "is a number": 7,
    "is null": None,
    "is a list": ["a"],
    "is long": "a" * 100_000,
    "is empty": "",
    "is the directory": ".",
    "holds NUL": "a\0b",
    "is a link elsewhere": "link",
}


@pytest.mark.parametrize("fault", NAMES)
def test_a_shard_lies_in_the_directory(broken, checkpoints, fault):
    shutil.copy(next(broken.glob("*.safetensors")), broken.parent / "x.safetensors")
    (broken / "folder").mkdir()
    os.mkfifo(broken / "pipe")
    (broken / "link").symlink_to(broken.parent / "x.safetensors")
    index = json.loads((broken / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = NAMES[fault]
    (broken / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError) as caught:
        HfDir(broken)
    assert len(str(caught.value)) < 1000


def test_a_hub_caches_own_links_are_followed(checkpoints, tmp_path):
    home = tmp_path / "models--me--tiny"
    snapshot, blobs = home / "snapshots" / "abc", home / "blobs"
    shutil.copytree(checkpoints["air"], blobs)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    convert(snapshot, tmp_path / "out", "mcore")
    outside = tmp_path / "secret"
    outside.write_text("secret")
    (snapshot / "LICENSE").symlink_to(outside)
    with pytest.raises(CheckpointError, match="LICENSE: is a link to"):
        convert(snapshot, tmp_path / "out2", "mcore")
    assert not (tmp_path / "out2").exists()


FILES = {
    "deep": "[" * 100_000,
    "deep objects": '{"a":' * 100_000,
    "deep and whole": '{"a":' * 300 + "1" + "}" * 300,
    "a key twice, among many": "{" + "".join(f'"{n}":0,' for n in range(100_000)) + '"0":1}',
    "a list": "[]",
    "no UTF-8": b"\xff\xfe{}",
    "digits": '{"hidden_size": ' + "9" * 5000 + "}",
    "empty": "",
}


@pytest.mark.parametrize("name", ["config.json", INDEX])
@pytest.mark.parametrize("fault", FILES)
def test_json_of_others_is_a_sentence(broken, cli, name, fault):
    content = FILES[fault]
    (broken / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    code, _, err = cli("verify", broken, broken)
    assert code == 2 and "Traceback" not in err and len(err) < 1000


NUMBERS = {
    "num_hidden_layers": (10**9, 4097, 2**64, True, "3", None, -1),
    "first_k_dense_replace": (10**9, -1, 1.5),
    "n_routed_experts": (10**9, 10**300),
    "num_nextn_predict_layers": (10**9, "x"),
    "hidden_size": (2**40, [1]),
    "num_attention_heads": (2**40, 0),
    "vocab_size": (2**70, -5),
    "rms_norm_eps": (1e300, float("nan"), float("inf")),
    "eos_token_id": (["x" * 10**5], {"a": 1}),
}


@pytest.mark.parametrize("key, value", [(key, value) for key, values in NUMBERS.items() for value in values])
def test_a_number_of_config_that_does_not_fit_is_refused_at_once(broken, key, value):
    config = json.loads((broken / "config.json").read_text()) | {key: value}
    (broken / "config.json").write_text(json.dumps(config))
    begin = time.process_time()
    with pytest.raises(CheckpointError) as caught:
        open_model(broken)
    assert time.process_time() - begin < 5 and len(str(caught.value)) < 1000


def test_a_config_that_cannot_be_opened_is_a_sentence(broken, monkeypatch):
    real = os.open

    def refuse(path, *rest, **options):
        if str(path).endswith("config.json"):
            raise PermissionError(13, "Permission denied")
        return real(path, *rest, **options)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(CheckpointError, match="config.json: cannot be read: Permission denied"):
        open_model(broken)


ALIASES = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{n}: &{n} [*{m},*{m},*{m},*{m},*{m},*{m},*{m},*{m},*{m}]\n" for m, n in zip("abcdefghi", "bcdefghij")
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{n}: &{n} {{<<: [*{m},*{m},*{m},*{m},*{m},*{m}]}}\n" for m, n in zip("abcdefghi", "bcdefghij")
)
YAML = {
    "aliases": ALIASES,
    "merges": MERGES,
    "an alias of itself": "a: &a [*a]",
    "a mapping in itself": "&a {b: *a}",
    "deep lists": "[" * 20_000,
    "deep mappings": "{a: " * 20_000,
    "deep blocks": "\n".join(" " * n + "a:" for n in range(400)),
    "a number of many digits": "a: " + "9" * 10_000,
    "a hex number of many digits": "a: 0x" + "f" * 100_000,
    "sixties": "a: 1" + ":59" * 2000,
    "no date": "a: 2024-99-99",
    "a list as key": "? [a]\n: b",
    "a mapping as key": "{{}: 1}",
    "python": "a: !!python/object/apply:os.system [true]",
    "an unknown tag": "a: !x 1",
    "no such alias": "a: *b",
    "two documents": "a: 1\n---\nb: 2",
    "a control character": "a: \x00",
    "long": "a: " + "x" * 300_000,
    "base64": "a: !!binary x",
    "a number that is none": "a: !!int x",
    "a set": "a: !!set [x]",
    "pairs": "a: !!omap {x: 1}",
    "a list": "[]",
    "nothing": "",
}


@pytest.mark.parametrize("fault", YAML)
def test_a_recipe_of_somebody_else_is_a_sentence(tmp_path, fault):
    (tmp_path / "r.yaml").write_text(YAML[fault])
    begin = time.process_time()
    with pytest.raises(UserError) as caught:
        Recipe.load(tmp_path / "r.yaml")
    assert time.process_time() - begin < 10 and len(str(caught.value)) < 5000


@pytest.mark.parametrize("fault", YAML)
def test_an_override_of_the_same_is_a_sentence(tmp_path, fault):
    (tmp_path / "r.yaml").write_text("{}\n" if fault else "")
    with pytest.raises(UserError) as caught:
        Recipe.load(tmp_path / "r.yaml", [f"train={YAML[fault]}"])
    assert len(str(caught.value)) < 5000


def test_ordinary_anchors_are_read():
    assert parse_yaml("a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: *a") == {"a": {"x": 1}, "b": {"x": 1, "y": 2}, "c": {"x": 1}}
    with pytest.raises(DocumentError, match="with its aliases written out"):
        parse_yaml(ALIASES)


def test_an_adapters_files_are_checked_too(checkpoints, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 1}))
    save_file({"x.lora_A.weight": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="lora_B"):
        Merged(HfDir(checkpoints["air"]), tmp_path)
    _write(tmp_path / "adapter_model.safetensors", HEADERS["overlap"])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        Merged(HfDir(checkpoints["air"]), tmp_path)
    (tmp_path / "adapter_config.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="nested too deep"):
        Merged(HfDir(checkpoints["air"]), tmp_path)


@pytest.mark.parametrize(
    "alpha",
    [
        {"(a|a)*(a|a)*(a|aa)+(x+x+)+y": 2},
        {"(.*)*(.*)*(.*)*(.*)*(.*)*(.*)*(.*)*(.*)*\\1x": 2},
        {"(": 2},
        {"(" * 300: 2},
        {"x" * 10_000: 2},
        {"q_proj": "2"},
        {"q_proj": True},
        {"q_proj": 10**400},
        {"q_proj": float("nan")},
        ["q_proj"],
        "q_proj",
        7,
    ],
)
def test_a_pattern_of_somebody_else_is_bounded(checkpoints, tmp_path, alpha):
    name = "base_model.model.model.layers.0.self_attn.o_proj"
    shape = HfDir(checkpoints["air"]).shape("model.layers.0.self_attn.o_proj.weight")
    tensors = {f"{name}.lora_A.weight": torch.ones(2, shape[1]), f"{name}.lora_B.weight": torch.ones(shape[0], 2)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "lora_alpha": 1, "alpha_pattern": alpha}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    begin = time.monotonic()
    try:
        Merged(HfDir(checkpoints["air"]), tmp_path)
    except CheckpointError as error:
        assert len(str(error)) < 1500
    else:
        assert any("*" in pattern for pattern in alpha)  # strange, and it ended
    assert time.monotonic() - begin < 20


TOKENIZERS = {
    "tokenizer.json is deep": ("tokenizer.json", "[" * 100_000),
    "tokenizer.json is a list": ("tokenizer.json", "[]"),
    "tokenizer.json is empty": ("tokenizer.json", ""),
    "tokenizer_config.json is deep": ("tokenizer_config.json", '{"a":' * 100_000),
    "tokenizer_config.json is a list": ("tokenizer_config.json", "[1]"),
}


@pytest.mark.parametrize("fault", TOKENIZERS)
def test_a_tokenizer_of_somebody_else_is_a_sentence(broken, tmp_path, fault):
    name, text = TOKENIZERS[fault]
    (broken / name).write_text(text)
    with pytest.raises(UserError) as caught:
        load_tokenizer(broken)
    assert len(str(caught.value)) < 1000


def test_code_that_a_tokenizer_brings_is_not_run(broken, tmp_path):
    config = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}
    (broken / "tokenizer_config.json").write_text(json.dumps(config))
    (broken / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    load_tokenizer(broken)
    assert not (tmp_path / "ran").exists()


TEMPLATES = {
    "for ever": "{% for a in range(90000) %}{% for b in range(90000) %}{% for c in range(90000) %}{% endfor %}{% endfor %}{% endfor %}",
    "deep": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "itself": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "code": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "a file": "{% include '/etc/passwd' %}",
    "a range": "{% for a in range(10 ** 12) %}{% endfor %}",
    "broken": "{% if %}",
}


@pytest.mark.parametrize("fault", TEMPLATES)
def test_a_template_of_somebody_else_is_a_sentence(broken, monkeypatch, fault):
    monkeypatch.setattr(deadline.in_time, "__defaults__", (1.0,))
    (broken / "chat_template.jinja").write_text(TEMPLATES[fault])
    with pytest.raises(UserError) as caught:
        ChatRenderer(load_tokenizer(broken), DataConfig(train="x"))
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "files",
    [
        7,
        [],
        {"a": 7},
        {"a": {"size": "7", "sha256": "x"}},
        {"../a": {"size": 0, "sha256": "x"}},
        {"/a": {"size": 0, "sha256": ""}},
    ],
)
def test_a_marker_of_somebody_else_names_files_of_its_directory(broken, cli, files):
    (broken / "glm45_tune.json").write_text(json.dumps({"kind": "hf", "files": files}))
    for command in (("verify", broken), ("convert", "--to-mcore", "--model", broken, "--output", broken)):
        code, _, err = cli(*command)
        assert code == 2 and "Traceback" not in err


@pytest.mark.parametrize(
    "files", [7, {"../x": [0, 0]}, {"config.json": 1}, {"config.json": [1, 2, 3]}, {"absent": [0, 0]}]
)
def test_a_checkpoint_of_somebody_else_is_not_whole_by_its_word(broken, files):
    (broken / "complete.json").write_text(json.dumps({"step": 1, "files": files}))
    with pytest.raises(CheckpointError):
        _saved_files(broken)
