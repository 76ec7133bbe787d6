"""HF → megatron → HF: every byte of every tensor; and every way a checkpoint can be wrong has a name."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from glm45_tune.conversion import blocks, hf_files, mcore_files, tensors, torch_dist, verify, write
from glm45_tune.conversion.hf_files import INDEX, HfDir, plan_hf
from glm45_tune.conversion.mcore_files import McoreDir
from glm45_tune.conversion.names import Row, rows
from glm45_tune.conversion.stream import convert, open_model
from glm45_tune.conversion.tensors import read_row, row_parts, split_row
from glm45_tune.conversion.verify import compare
from glm45_tune.conversion.write import write_file
from glm45_tune.errors import CheckpointError
from glm45_tune.spec import ModelSpec
from glm45_tune.tiny import checkpoint as tiny


@pytest.mark.parametrize("like", ["air", "355b", "air-no-mtp", "355b-no-mtp"])
@pytest.mark.parametrize("dialect", ["hybrid", "gpt"])
def test_round_trip_is_bit_exact(checkpoints, tmp_path, like, dialect):
    convert(checkpoints[like], tmp_path / "mcore", "mcore", dialect, verify=False)
    assert open_model(tmp_path / "mcore").dialect == dialect
    convert(tmp_path / "mcore", tmp_path / "hf", "hf", verify=False)
    before, after = HfDir(checkpoints[like]), HfDir(tmp_path / "hf")
    assert set(before.names) == set(after.names)
    for name in before.names:
        a, b = before.read(name), after.read(name)
        assert a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8)), name
    assert json.loads((checkpoints[like] / "config.json").read_text()) == json.loads(
        (tmp_path / "hf/config.json").read_text()
    )
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (checkpoints[like] / name).read_bytes()


def _flip_a_bit(directory):
    """In the weights of a torch_dist directory, well inside some tensor."""
    path = next(path for path in sorted(directory.glob("*.distcp")) if path.stat().st_size > 100_000)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_verify_sees_one_flipped_bit(checkpoints, tmp_path, cli):
    convert(checkpoints["air"], tmp_path / "mcore", "mcore")
    assert cli("verify", checkpoints["air"], tmp_path / "mcore")[0] == 0
    _flip_a_bit(tmp_path / "mcore")
    code, out, _ = cli("verify", checkpoints["air"], tmp_path / "mcore", "--json")
    differences = json.loads(out)["differences"]
    assert code == 3 and 1 <= len(differences) <= 2 and "1 of " in differences[0]["what"]  # 2: MTP repeats what was hit


def test_a_wrong_table_fails_verification(checkpoints, tmp_path, cli, monkeypatch):
    """The twin of the round trip: gate and up exchanged while writing must not pass."""

    def exchanged(row: Row, *where):
        parts = list(row_parts(row, *where))
        return parts[::-1] if "linear_fc1.weight" in row.hybrid else parts

    monkeypatch.setattr(mcore_files, "row_parts", exchanged)
    code, _, err = cli("convert", "--to-mcore", "--model", checkpoints["air"], "--output", tmp_path / "out")
    assert code == 3 and "gate_proj" in err and "of 135 tensors differ" in err
    assert not (tmp_path / "out").exists()


sizes = st.fixed_dictionaries(
    {
        "num_hidden_layers": st.integers(1, 4),
        "hidden_size": st.sampled_from([8, 24, 40]),
        "intermediate_size": st.integers(1, 30),
        "moe_intermediate_size": st.integers(1, 20),
        "num_key_value_heads": st.sampled_from([1, 2, 3]),
        "head_dim": st.sampled_from([4, 6]),
        "n_routed_experts": st.integers(2, 7),
        "n_shared_experts": st.integers(1, 2),
        "num_nextn_predict_layers": st.integers(0, 2),
        "use_qk_norm": st.booleans(),
        "attention_bias": st.booleans(),
        "vocab_size": st.integers(3, 50),
    }
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=sizes, dense=st.integers(0, 4), heads=st.integers(1, 3), shard=st.integers(200, 20_000), gpt=st.booleans())
def test_round_trip_of_any_sizes(tmp_path_factory, sizes, dense, heads, shard, gpt):
    """Random sizes, shard cuts and dialects: every byte comes back."""
    root = tmp_path_factory.mktemp("any")
    config = tiny.config("air", True, sizes["vocab_size"], [0]) | sizes
    config |= {
        "first_k_dense_replace": min(dense, config["num_hidden_layers"]),
        "num_attention_heads": heads * sizes["num_key_value_heads"],
        "num_experts_per_tok": 1,
    }
    (root / "hf").mkdir()
    (root / "hf" / "config.json").write_text(json.dumps(config))
    source = tiny.RandomModel(ModelSpec.from_config(config, "config.json"), 1)
    for file in plan_hf(source, shard):
        write_file(root / "hf" / file.name, source, file)
    convert(root / "hf", root / "mcore", "mcore", "gpt" if gpt else "hybrid", verify=False)
    convert(root / "mcore", root / "back", "hf", verify=False)
    assert not compare(HfDir(root / "hf"), HfDir(root / "back")).differences
    shutil.rmtree(root)


@pytest.mark.parametrize("dialect", ["hybrid", "gpt"])
def test_memory_holds_a_piece_however_large_a_tensor_is(checkpoints, tmp_path, monkeypatch, dialect):
    """With pieces of 128 rows at most and chunks of 32 KiB: no read is larger, in conversion or verification, and no byte moves."""
    largest, real = [0], blocks.read_block

    def counted(file, start, dtype, shape, low, high):
        tensor = real(file, start, dtype, shape, low, high)
        largest[0] = max(largest[0], tensor.nbytes)
        return tensor

    for module in (hf_files, torch_dist):
        monkeypatch.setattr(module, "read_block", counted)
    monkeypatch.setattr(tensors, "PIECE_BYTES", 2**12)
    monkeypatch.setattr(mcore_files, "MAX_CHUNK_BYTES", 2**15)
    source = HfDir(checkpoints["355b"])
    convert(checkpoints["355b"], tmp_path / "mcore", "mcore", dialect)
    convert(tmp_path / "mcore", tmp_path / "hf", "hf")
    assert largest[0] <= max(128 * source.read(name, 0, 1).nbytes for name in source.names)
    assert len(McoreDir(tmp_path / "mcore").tensors["embedding.word_embeddings.weight"].chunks) > 1
    assert not compare(source, HfDir(tmp_path / "hf")).differences


def test_what_outgrows_memory_leaves_the_page_cache_and_is_the_same(checkpoints, tmp_path, monkeypatch):
    """Every file of source and result is dropped, to its end; the bytes are those of a small model that stays."""
    for name, to in (("small-mcore", "mcore"), ("small-hf", "hf")):
        convert(checkpoints["air"] if to == "mcore" else tmp_path / "small-mcore", tmp_path / name, to)
    dropped, real = {}, os.posix_fadvise

    def noted(descriptor, start, count, advice):
        if advice == os.POSIX_FADV_DONTNEED:
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}").replace(".partial", ""))
            dropped[path] = max(dropped.get(path, 0), start + count)
        real(descriptor, start, count, advice)

    monkeypatch.setattr(os, "posix_fadvise", noted)
    for module in (write, verify):
        monkeypatch.setattr(module, "outgrows_memory", lambda nbytes: True)
    convert(checkpoints["air"], tmp_path / "mcore", "mcore")
    convert(tmp_path / "mcore", tmp_path / "hf", "hf")
    for kind in ("mcore", "hf"):
        for path in (tmp_path / kind).iterdir():
            if path.name == "glm45_tune.json":
                continue  # names the source
            assert path.read_bytes() == (tmp_path / f"small-{kind}" / path.name).read_bytes()
    weights = [*(tmp_path / "mcore").glob("*.distcp"), *(tmp_path / "hf").glob("*.safetensors")]
    weights += checkpoints["air"].glob("*.safetensors")
    assert weights and all(dropped[path] > path.stat().st_size - 4096 for path in weights)


def test_slices_are_the_merged_tensors_slices(checkpoints):
    """What a rank reads is what it would cut from the whole."""
    source = HfDir(checkpoints["355b"])
    for row in rows(source.spec)[:30]:
        expert = 0 if row.num_experts else None
        whole = read_row(row, source, expert=expert)
        for first, last in ((0, len(whole)), (1, len(whole)), (len(whole) // 3, 2 * len(whole) // 3 + 1)):
            assert torch.equal(read_row(row, source, first, last, expert), whole[first:last])
        if whole.dim() == 2:
            width = whole.shape[1]
            columns = slice(width // 3, 2 * width // 3 + 1)
            assert torch.equal(read_row(row, source, 1, len(whole), expert, columns), whole[1:, columns])
        for name, part in zip(row.hf_names(expert), split_row(row, whole)):
            assert torch.equal(part, source.read(name))


def test_megatron_slices_across_chunks(checkpoints, tmp_path):
    convert(checkpoints["air"], tmp_path / "mcore", "mcore")
    files = McoreDir(tmp_path / "mcore")
    key = "decoder.layers.3.mlp.experts.experts.linear_fc1.weight"
    whole = files.read_key(key)
    assert torch.equal(files.read_key(key, (2, 5, 3), (4, 50, 100)), whole[2:6, 5:55, 3:103])


@pytest.fixture
def broken(checkpoints, tmp_path):
    """A copy of the Air-like checkpoint to break."""
    return shutil.copytree(checkpoints["air"], tmp_path / "broken")


def _edit_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _edit_tensors(directory, edit):
    """Rewrite the shard that holds the first layer's o_proj; `edit` changes its dict of tensors."""
    index = json.loads((directory / INDEX).read_text())
    shard = index["weight_map"]["model.layers.0.self_attn.o_proj.weight"]
    tensors = load_file(directory / shard)
    names = set(tensors)
    edit(tensors)
    save_file(tensors, directory / shard)
    for name in names - tensors.keys():
        del index["weight_map"][name]
    index["weight_map"] |= dict.fromkeys(tensors, shard)
    (directory / INDEX).write_text(json.dumps(index))


O_PROJ = "model.layers.0.self_attn.o_proj.weight"


def _truncate(directory):
    path = sorted(directory.glob("*.safetensors"))[2]
    path.write_bytes(path.read_bytes()[:-1000])


FAULTS = {
    "no config": (lambda d: (d / "config.json").unlink(), ["no config.json"]),
    "another model": (lambda d: _edit_config(d, model_type="llama"), ["llama", "glm4_moe"]),
    "config is no JSON": (lambda d: (d / "config.json").write_text("{"), ["config.json", "not JSON"]),
    "absent shard": (
        lambda d: (d / "model-00002-of-00006.safetensors").unlink(),
        ["model-00002-of-00006.safetensors", "not in"],
    ),
    "truncated shard": (_truncate, ["model-00003-of-00006.safetensors", "not a whole safetensors file"]),
    "missing tensor": (lambda d: _edit_tensors(d, lambda t: t.pop(O_PROJ)), [O_PROJ, "missing"]),
    "unknown tensor": (
        lambda d: _edit_tensors(d, lambda t: t.update({"model.layers.0.mlp.foo.weight": torch.ones(2)})),
        ["model.layers.0.mlp.foo.weight", "no place"],
    ),
    "renamed tensor": (
        lambda d: _edit_tensors(d, lambda t: t.update({O_PROJ.replace("o_proj", "out"): t.pop(O_PROJ)})),
        [O_PROJ, "missing"],
    ),
    "wrong shape": (lambda d: _edit_tensors(d, lambda t: t.update({O_PROJ: t[O_PROJ][:64].clone()})), [O_PROJ, "(64, 256)"]),
    "dtypes mixed": (
        lambda d: _edit_tensors(
            d,
            lambda t: t.update(
                {"model.layers.0.self_attn.q_proj.weight": t["model.layers.0.self_attn.q_proj.weight"].float()}
            ),
        ),
        ["differ in dtype", "q_proj"],
    ),
    "experts disagree": (lambda d: _edit_config(d, n_routed_experts=6), ["n_routed_experts is 6 there, 8 here"]),
    "layers disagree": (lambda d: _edit_config(d, num_hidden_layers=2), ["num_hidden_layers is 2 there, 3 here"]),
    "dense layers disagree": (lambda d: _edit_config(d, first_k_dense_replace=2), ["first_k_dense_replace is 2 there, 1"]),
    "MTP promised, absent": (lambda d: _edit_config(d, num_nextn_predict_layers=2), ["model.layers.4.", "missing"]),
    "index lies": (
        lambda d: (d / INDEX).write_text((d / INDEX).read_text().replace("model-00001-of", "model-00002-of", 1)),
        ["does not hold it"],
    ),
    "no index": (lambda d: (d / INDEX).unlink(), [INDEX]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_and_nothing_is_written(broken, tmp_path, cli, fault):
    edit, words = FAULTS[fault]
    edit(broken)
    code, _, err = cli("convert", "--to-mcore", "--model", broken, "--output", tmp_path / "out")
    assert code == 2, err
    for word in words:
        assert word in err
    assert "Traceback" not in err and not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_a_copy_that_differs_is_an_error(broken, tmp_path):
    index = json.loads((broken / INDEX).read_text())
    name = "model.layers.3.embed_tokens.weight"
    shard = broken / index["weight_map"][name]
    tensors = load_file(shard)
    tensors[name] = tensors[name] + 1
    save_file(tensors, shard)
    with pytest.raises(CheckpointError, match="embed_tokens.*must repeat"):
        convert(broken, tmp_path / "out", "mcore")


@pytest.mark.parametrize("to", ["mcore", "hf"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_are_reported_by_name(checkpoints, broken, tmp_path, cli, to, value):
    name = "model.layers.2.mlp.experts.5.up_proj.weight"
    index = json.loads((broken / INDEX).read_text())
    shard = broken / index["weight_map"][name]
    tensors = load_file(shard)
    tensors[name][7, 11] = value
    save_file(tensors, shard)
    if to == "hf":
        convert(broken, tmp_path / "mcore", "mcore", allow_nonfinite=True, verify=False)
    source = broken if to == "mcore" else tmp_path / "mcore"
    command = ["convert", f"--to-{to}", "--model", source, "--output", tmp_path / "out"]
    code, _, err = cli(*command)
    assert code == 2 and name in err and "--allow-nonfinite" in err and not (tmp_path / "out").exists()
    code, _, err = cli(*command, "--allow-nonfinite")
    assert code == 0 and name in err  # said, and done
    assert not compare(open_model(source), open_model(tmp_path / "out")).differences


@pytest.mark.parametrize("to", ["mcore", "hf"])
def test_mtp_off_writes_a_model_without_it(checkpoints, broken, tmp_path, cli, to):
    """Where it is promised and absent, and where it is there."""
    absent = shutil.copytree(checkpoints["air-no-mtp"], tmp_path / "absent")
    _edit_config(absent, num_nextn_predict_layers=1)
    code, _, err = cli("convert", f"--to-{to}", "--model", absent, "--output", tmp_path / "out")
    assert code == 2 and "num_nextn_predict_layers is 1 there, 0 here" in err and "--mtp off" in err
    for number, source in enumerate((absent, broken)):
        output = tmp_path / f"out{number}"
        assert cli("convert", f"--to-{to}", "--model", source, "--output", output, "--mtp", "off")[0] == 0
        assert json.loads((output / "config.json").read_text())["num_nextn_predict_layers"] == 0
        made = open_model(output)
        assert not any(name.startswith("model.layers.3.") for name in made.names)
        without = HfDir(checkpoints["air-no-mtp"])
        assert set(made.names) == set(without.names)
        if source is absent:
            assert not compare(made, without).differences


@pytest.mark.parametrize("damage", ["a byte", "length", "gone"])
def test_verify_of_one_directory_checks_its_hashes(checkpoints, tmp_path, cli, damage):
    """Every file, whichever byte of it."""
    convert(checkpoints["air"], tmp_path / "out", "mcore")
    code, out, _ = cli("verify", tmp_path / "out", "--json")
    assert code == 0 and json.loads(out)["equal"]
    names = json.loads((tmp_path / "out" / "glm45_tune.json").read_text())["files"]
    assert set(names) | {"glm45_tune.json"} == {path.name for path in (tmp_path / "out").iterdir()}
    rng = np.random.default_rng(3)
    for name in names:
        path = tmp_path / "out" / name
        data = path.read_bytes()
        changed = bytearray(data)
        changed[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
        path.write_bytes(changed if damage == "a byte" else data[:-1])
        if damage == "gone":
            path.unlink()
        code, out, err = cli("verify", tmp_path / "out", "--json")
        assert code == 3 and [d["name"] for d in json.loads(out)["differences"]] == [name] and "Traceback" not in err
        path.write_bytes(data)
    assert cli("verify", tmp_path / "out")[0] == 0


def test_verify_of_one_directory_needs_hashes(broken, cli):
    (broken / "glm45_tune.json").unlink()
    code, _, err = cli("verify", broken)
    assert code == 2 and "no glm45_tune.json with hashes" in err


def test_configs_of_later_releases_go_the_same_road(checkpoints, broken, tmp_path):
    """GLM-4.6 and 4.7: longer context, rotary keys nested as transformers 5 writes them, more eos; Base: no chat template."""
    config = json.loads((broken / "config.json").read_text())
    rope = {"rope_theta": config.pop("rope_theta"), "partial_rotary_factor": config.pop("partial_rotary_factor")}
    del config["rope_scaling"], config["torch_dtype"]
    config |= {"rope_parameters": rope | {"rope_type": "default"}, "max_position_embeddings": 202752, "dtype": "bfloat16"}
    (broken / "config.json").write_text(json.dumps(config))
    (broken / "chat_template.jinja").unlink()
    convert(broken, tmp_path / "mcore", "mcore")
    convert(tmp_path / "mcore", tmp_path / "hf", "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text()) == config
    assert not (tmp_path / "hf" / "chat_template.jinja").exists()
    assert not compare(HfDir(checkpoints["air"]), HfDir(tmp_path / "hf")).differences


def test_a_directory_that_is_not_ours_is_kept(checkpoints, tmp_path, cli):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    code, _, err = cli("convert", "--to-mcore", "--model", checkpoints["air"], "--output", tmp_path / "out")
    assert code == 2 and "not ours" in err and (tmp_path / "out" / "thesis.txt").read_text() == "precious"
    convert(checkpoints["air"], tmp_path / "ours", "mcore")
    convert(checkpoints["air-other"], tmp_path / "ours", "mcore")  # our own of the same kind is replaced
    for output in (tmp_path / "ours", checkpoints["air"]):  # another kind, and the source itself, are not
        code, _, err = cli("convert", "--to-hf", "--model", tmp_path / "ours", "--output", output)
        assert code == 2 and "Choose another output directory" in err
    assert not compare(HfDir(checkpoints["air-other"]), McoreDir(tmp_path / "ours")).differences


def test_metadata_with_code_in_it_is_refused(checkpoints, tmp_path):
    import pickle

    convert(checkpoints["air"], tmp_path / "mcore", "mcore")

    class Evil:
        def __reduce__(self):
            return (print, ("ran",))

    (tmp_path / "mcore" / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match="no place in a checkpoint's metadata"):
        McoreDir(tmp_path / "mcore")


def test_the_same_seed_writes_the_same_checkpoint(checkpoints, tmp_path):
    tiny.write(tmp_path / "again", "air")
    report = compare(HfDir(checkpoints["air"]), HfDir(tmp_path / "again"))
    assert not report.differences
    assert compare(HfDir(checkpoints["air"]), HfDir(checkpoints["air-other"])).differences
    values = np.concatenate([HfDir(tmp_path / "again").read(n).float().view(-1) for n in report_names(tmp_path / "again")])
    assert values.std() > 0  # norms and biases are drawn too


def report_names(directory):
    return [name for name in HfDir(directory).names if name.endswith(("layernorm.weight", ".bias", "correction_bias"))]


@pytest.mark.parametrize("sizes", [(2, 1, 1), (1, 4, 1), (1, 1, 2), (2, 8, 4)])
def test_a_rank_reads_only_what_it_holds(checkpoints, sizes, monkeypatch):
    """Bytes asked of the files by load_weights on the first rank of a layout, against the bytes of its own parameters."""
    from glm45_tune.mcore import load
    from glm45_tune.mcore.load import load_weights

    source, read = HfDir(checkpoints["air"]), []
    shards = [_shard(row, *sizes) for row in rows(source.spec)]
    monkeypatch.setattr(load, "sharded_tensors", lambda model: shards)
    real = HfDir.read
    monkeypatch.setattr(HfDir, "read", lambda self, *where: read.append(real(self, *where)) or read[-1])
    load_weights(None, source)
    held = sum(shard.data.nbytes for shard in shards)
    assert sum(tensor.nbytes for tensor in read) == held


class _Shard:
    def __init__(self, key, offset, shape, dtype):
        self.key, self.global_offset, self.local_shape = key, offset, shape
        self.data = torch.empty(shape, dtype=dtype)


def _shard(row, tensor, expert, expert_tensor):
    """The last rank's part of a row under a cut of rows (fc1, qkv), columns (proj, fc2) and experts."""
    shape, offset = list(row.shape), [0] * len(row.shape)
    cuts = {}
    if row.num_experts:
        cuts[0] = expert
        cuts[1 if "linear_fc1" in row.hybrid else 2] = expert_tensor if "linear_fc2" in row.hybrid else 1
    elif row.hybrid.endswith(("linear_proj.weight", "linear_fc2.weight")):
        cuts[1] = tensor
    elif row.hybrid.endswith(("linear_qkv.weight", "word_embeddings.weight", "output_layer.weight")):
        cuts[0] = tensor
    for dim, parts in cuts.items():
        shape[dim] //= parts
        offset[dim] = shape[dim] * (parts - 1)
    return _Shard(row.hybrid, tuple(offset), tuple(shape), torch.float32 if row.is_fp32 else torch.bfloat16)
