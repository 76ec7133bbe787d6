"""Every way a checkpoint can be wrong has a name; what is unusual and right goes through."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from glm45_tune.conversion.hf_files import INDEX, HfDir
from glm45_tune.conversion.stream import convert, open_model
from glm45_tune.conversion.verify import compare
from glm45_tune.errors import CheckpointError


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
        ["model-00002-of-00006.safetensors", "not a file there"],
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
    "wrong shape": (
        lambda d: _edit_tensors(d, lambda t: t.update({O_PROJ: t[O_PROJ][:64].clone()})),
        [O_PROJ, "(64, 256)"],
    ),
    "dtypes mixed": (
        lambda d: _edit_tensors(
            d,
            lambda t: t.update(
                {"model.layers.0.self_attn.q_proj.weight": t["model.layers.0.self_attn.q_proj.weight"].float()}
            ),
        ),
        ["differ in dtype", "q_proj"],
    ),
    "a width in fractions": (
        lambda d: _edit_config(d, hidden_size=128.0),
        ["hidden_size is 128.0", "a whole number from 1"],
    ),
    "a width in words": (lambda d: _edit_config(d, rms_norm_eps="x"), ["rms_norm_eps is 'x'; a number from 0"]),
    "no groups": (lambda d: _edit_config(d, num_key_value_heads=0), ["num_key_value_heads is 0"]),
    "no shared experts": (lambda d: _edit_config(d, n_shared_experts=0), ["n_shared_experts is 0"]),
    "rope in words": (lambda d: _edit_config(d, rope_scaling="x"), ["rope_scaling is 'x'; an object"]),
    "scales in words": (lambda d: _edit_config(d, quantization_config="x"), ["quantization_config is 'x'; an object"]),
    "end in words": (lambda d: _edit_config(d, eos_token_id=["x"]), ["eos_token_id is ['x']"]),
    "experts disagree": (lambda d: _edit_config(d, n_routed_experts=6), ["n_routed_experts is 6 there, 8 here"]),
    "layers disagree": (lambda d: _edit_config(d, num_hidden_layers=2), ["num_hidden_layers is 2 there, 3 here"]),
    "dense layers disagree": (
        lambda d: _edit_config(d, first_k_dense_replace=2),
        ["first_k_dense_replace is 2 there, 1"],
    ),
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


def test_verify_of_one_directory_needs_hashes(broken, cli):
    (broken / "glm45_tune.json").unlink()
    code, _, err = cli("verify", broken)
    assert code == 2 and "no glm45_tune.json with hashes" in err


@pytest.mark.parametrize(
    "more, said",
    [
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type is 'yarn'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_type is 'linear'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ],
)
def test_what_the_model_would_compute_otherwise_is_refused(broken, more, said):
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | more))
    with pytest.raises(CheckpointError, match=said):
        open_model(broken)


def test_configs_of_later_releases_go_the_same_road(checkpoints, broken, tmp_path):
    """GLM-4.6 and 4.7: longer context, rotary keys nested as transformers 5 writes them, more eos; Base: no chat template."""
    config = json.loads((broken / "config.json").read_text())
    rope = {"rope_theta": config.pop("rope_theta"), "partial_rotary_factor": config.pop("partial_rotary_factor")}
    del config["rope_scaling"], config["torch_dtype"]
    config |= {
        "rope_parameters": rope | {"rope_type": "default"},
        "max_position_embeddings": 202752,
        "dtype": "bfloat16",
    }
    (broken / "config.json").write_text(json.dumps(config))
    (broken / "chat_template.jinja").unlink()
    convert(broken, tmp_path / "mcore", "mcore")
    convert(tmp_path / "mcore", tmp_path / "hf", "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text()) == config
    assert not (tmp_path / "hf" / "chat_template.jinja").exists()
    assert not compare(HfDir(checkpoints["air"]), HfDir(tmp_path / "hf")).differences


def test_a_damaged_name_in_metadata_is_a_sentence(checkpoints, tmp_path, cli):
    assert cli("convert", "--to-mcore", "--model", checkpoints["air"], "--output", tmp_path / "m")[0] == 0
    path = tmp_path / "m" / ".metadata"
    path.write_bytes(path.read_bytes().replace(b"embedding.word", b"embedding.wOrd"))
    code, _, err = cli("verify", checkpoints["air"], tmp_path / "m")
    assert code == 2 and "embedding.word_embeddings.weight is missing" in err
