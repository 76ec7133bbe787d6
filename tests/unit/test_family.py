"""The layouts in which the family's checkpoints are published: each is read, and written back as it was."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from glm45_tune.conversion.stream import convert, open_model
from glm45_tune.conversion.verify import compare
from glm45_tune.errors import CheckpointError
from glm45_tune.hub.export import export
from glm45_tune.spec import MTP_COPIES
from glm45_tune.tiny import checkpoint

NONE, EMBEDDING, HEAD = (), MTP_COPIES[:1], MTP_COPIES[1:]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """copies → a checkpoint whose MTP layer repeats these."""
    root = tmp_path_factory.mktemp("family")
    for number, copies in enumerate((NONE, EMBEDDING, HEAD)):
        checkpoint.write(root / str(number), "air", mtp_copies=copies)
    return {copies: root / str(number) for number, copies in enumerate((NONE, EMBEDDING, HEAD))}


def same(a, b) -> bool:
    return not compare(open_model(a), open_model(b), lambda size: None, 1).differences


@pytest.mark.parametrize("dialect", ["hybrid", "gpt"])
@pytest.mark.parametrize("copies", [NONE, EMBEDDING, HEAD], ids=["none", "the embedding", "the head"])
def test_an_mtp_layer_without_its_copies_comes_back_as_it_was(published, tmp_path, copies, dialect):
    convert(published[copies], tmp_path / "mcore", "mcore", dialect, workers=1)
    convert(tmp_path / "mcore", tmp_path / "back", "hf", workers=1)
    assert same(published[copies], tmp_path / "mcore") and same(published[copies], tmp_path / "back")
    assert open_model(tmp_path / "back").names == open_model(published[copies]).names
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())["weight_map"]
    assert {name for name in index if name.endswith(MTP_COPIES) and name.startswith("model.layers")} == {
        name for name in open_model(published[copies]).names if name.endswith(copies or ("-",)) and "layers" in name
    }


def test_a_megatron_checkpoint_of_before_comes_back_with_both_copies(checkpoints, tmp_path):
    """It does not say what was repeated: only checkpoints that repeat both were read then."""
    convert(checkpoints["air"], tmp_path / "mcore", "mcore", workers=1)
    marker = tmp_path / "mcore" / "glm45_tune.json"
    said = json.loads(marker.read_text())
    del said["mtp_copies"]
    marker.write_text(json.dumps(said))
    convert(tmp_path / "mcore", tmp_path / "back", "hf", workers=1)
    assert same(checkpoints["air"], tmp_path / "back")


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("is_converted", [False, True], ids=["from HF", "from megatron"])
def test_a_run_without_copies_trains_and_exports_the_bases_layout(
    published, corpus, make_recipe, train_here, tmp_path, kind, is_converted
):
    base = published[NONE]
    if is_converted:
        base = tmp_path / "mcore"
        convert(published[NONE], base, "mcore", workers=1)
    sections = {"lora": {"r": 2}} if kind == "lora" else {"model": {"mtp_loss_scaling_factor": 0.3}}
    run = train_here(make_recipe(base, corpus, tmp_path / "run", **sections))
    export(run, tmp_path / "out", workers=1)
    assert open_model(tmp_path / "out").names == open_model(published[NONE]).names
    assert not same(published[NONE], tmp_path / "out")


@pytest.mark.parametrize("layout", ["channel", "block"])
def test_fp8_without_copies_is_read_and_written(published, tmp_path, layout):
    convert(published[NONE], tmp_path / "mcore", "mcore", workers=1)
    convert(tmp_path / "mcore", tmp_path / "fp8", "hf", fp8=layout, workers=1)
    convert(tmp_path / "fp8", tmp_path / "again", "mcore", workers=1)
    assert same(tmp_path / "fp8", tmp_path / "again")


def _edit(directory, change) -> None:
    for file in directory.glob("*.safetensors"):
        tensors = load_file(file)
        save_file({name: change(name, tensor) for name, tensor in tensors.items()}, file, {"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_routers_bias_in_another_dtype_is_read_with_a_word_and_kept(checkpoints, tmp_path, cli, dtype):
    source = shutil.copytree(checkpoints["air"], tmp_path / "source")
    _edit(source, lambda name, tensor: tensor.to(dtype) if name.endswith("e_score_correction_bias") else tensor)
    code, _, err = cli("convert", "--to-mcore", "--model", source, "--output", tmp_path / "mcore")
    assert code == 0 and err.count("correction biases") == 1 and str(dtype).removeprefix("torch.") in err
    convert(tmp_path / "mcore", tmp_path / "back", "hf", workers=1)
    assert same(source, tmp_path / "back")
    name = next(name for name in open_model(source).names if name.endswith("e_score_correction_bias"))
    assert open_model(tmp_path / "back").dtype(name) == dtype


def test_a_routers_bias_in_bf16_trains(checkpoints, corpus, make_recipe, train_here, tmp_path):
    source = shutil.copytree(checkpoints["355b"], tmp_path / "source")
    _edit(source, lambda name, tensor: tensor.bfloat16() if name.endswith("e_score_correction_bias") else tensor)
    run = train_here(make_recipe(source, corpus, tmp_path / "run"))
    export(run, tmp_path / "out", workers=1)
    assert [open_model(tmp_path / "out").dtype(name) for name in open_model(source).names] == [
        open_model(source).dtype(name) for name in open_model(source).names
    ]


COMPUTES_OTHERWISE = {
    "scoring_func": "softmax",
    "topk_method": "greedy",
    "moe_layer_freq": 2,
    "sliding_window": 4096,
    "mlp_bias": True,
}


@pytest.mark.parametrize("key", COMPUTES_OTHERWISE)
def test_a_config_that_computes_otherwise_is_refused(checkpoints, tmp_path, key):
    source = shutil.copytree(checkpoints["air"], tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {key: COMPUTES_OTHERWISE[key]}))
    with pytest.raises(CheckpointError, match=key):
        open_model(source)


def test_a_key_that_nobody_reads_is_named_once(checkpoints, tmp_path, cli):
    source = shutil.copytree(checkpoints["air-no-mtp"], tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(
        json.dumps(config | {"attention_sinks": 4, "use_cache": True, "dtype": "bfloat16"})
    )
    code, _, err = cli("convert", "--to-mcore", "--model", source, "--output", tmp_path / "mcore")
    assert code == 0 and err.count("attention_sinks is not used here") == 1
    assert "use_cache" not in err and "dtype" not in err


def test_an_adapter_is_merged_and_mtp_left_out(checkpoints, lora_run, tmp_path):
    """Its base is the whole model; what is written is that without MTP, the adapter merged."""
    convert(checkpoints["air"], tmp_path / "whole", "hf", adapter=lora_run, workers=1)
    convert(checkpoints["air"], tmp_path / "without", "hf", adapter=lora_run, mtp=False, workers=1)
    whole, without = open_model(tmp_path / "whole"), open_model(tmp_path / "without")
    assert without.spec.mtp_num_layers == 0 and 0 < len(without.names) < len(whole.names)
    assert all(torch.equal(without.read(name), whole.read(name)) for name in without.names)
