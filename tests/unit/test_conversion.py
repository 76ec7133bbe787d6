"""HF → megatron → HF: every byte of every tensor."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glm45_tune.conversion import archives, blocks, hf_files, mcore_files, tensors
from glm45_tune.conversion.hf_files import HfDir, plan_hf
from glm45_tune.conversion.mcore_files import McoreDir
from glm45_tune.conversion.names import Row, rows
from glm45_tune.conversion.stream import convert, open_model, to_hf
from glm45_tune.conversion.tensors import read_row, row_parts, split_row
from glm45_tune.conversion.verify import compare
from glm45_tune.conversion.write import write_file
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

    for module in (hf_files, archives):
        monkeypatch.setattr(module, "read_block", counted)
    monkeypatch.setattr(tensors, "PIECE_BYTES", 2**12)
    monkeypatch.setattr(mcore_files, "MAX_CHUNK_BYTES", 2**15)
    source = HfDir(checkpoints["355b"])
    convert(checkpoints["355b"], tmp_path / "mcore", "mcore", dialect)
    convert(tmp_path / "mcore", tmp_path / "hf", "hf")
    assert largest[0] <= max(128 * source.read(name, 0, 1).nbytes for name in source.names)
    assert len(McoreDir(tmp_path / "mcore").tensors["embedding.word_embeddings.weight"].chunks) > 1
    assert not compare(source, HfDir(tmp_path / "hf")).differences


def test_what_passes_leaves_the_page_cache(checkpoints, tmp_path, monkeypatch):
    """Every file of weights, of source and result, is dropped to its end; unless somebody wants it at once."""
    dropped, real = {}, os.posix_fadvise

    def noted(descriptor, start, count, advice):
        if advice == os.POSIX_FADV_DONTNEED:
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}").replace(".partial", ""))
            dropped[path] = max(dropped.get(path, 0), start + count)
        real(descriptor, start, count, advice)

    monkeypatch.setattr(os, "posix_fadvise", noted)
    to_hf(HfDir(checkpoints["air"]), tmp_path / "kept", verify=False, kept=True)
    assert not dropped
    convert(checkpoints["air"], tmp_path / "mcore", "mcore", verify=False)
    convert(tmp_path / "mcore", tmp_path / "hf", "hf", verify=False)
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


def test_the_same_seed_writes_the_same_checkpoint(checkpoints, tmp_path):
    tiny.write(tmp_path / "again", "air")
    report = compare(HfDir(checkpoints["air"]), HfDir(tmp_path / "again"))
    assert not report.differences
    assert compare(HfDir(checkpoints["air"]), HfDir(checkpoints["air-other"])).differences
    values = np.concatenate(
        [HfDir(tmp_path / "again").read(n).float().view(-1) for n in report_names(tmp_path / "again")]
    )
    assert values.std() > 0  # norms and biases are drawn too


def report_names(directory):
    return [name for name in HfDir(directory).names if name.endswith(("layernorm.weight", ".bias", "correction_bias"))]
