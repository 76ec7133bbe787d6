"""FP8 checkpoints of both layouts: read as q × scale, written so that transformers and vLLM read them, errors that name a tensor."""

import json
import math
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from glm45_tune.conversion import fp8
from glm45_tune.conversion.adapter import Merged
from glm45_tune.conversion.fp8 import Quantized, Scale, dequantize
from glm45_tune.conversion.hf_files import INDEX, AsStored, HfDir, plan_hf
from glm45_tune.conversion.stream import convert, open_model
from glm45_tune.conversion.verify import compare
from glm45_tune.conversion.write import write_file
from glm45_tune.errors import CheckpointError
from glm45_tune.spec import ModelSpec
from glm45_tune.tiny import checkpoint as tiny

FP8 = torch.float8_e4m3fn
CHANNEL = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False},
            "input_activations": {
                "num_bits": 8,
                "type": "float",
                "strategy": "token",
                "symmetric": True,
                "dynamic": True,
            },
        }
    },
    "ignore": ["lm_head", "re:.*mlp.gate$"],
}
BLOCK = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def expanded(scale: torch.Tensor, shape) -> torch.Tensor:
    """A reference of its own: every value's scale, by index."""
    rows = torch.tensor([i if len(scale) == shape[0] else i // 128 for i in range(shape[0])])
    columns = torch.tensor([0 if scale.shape[1] == 1 else j // 128 for j in range(shape[1])])
    return scale.float()[rows][:, columns]


def quantize_by_hand(source, target, layout, generator):
    """A quantized copy whose scales are drawn, not computed. Returns name → what each weight stands for."""
    target.mkdir()
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(
        json.dumps(config | {"quantization_config": CHANNEL if layout == "channel" else BLOCK})
    )
    weight_map, meant = {}, {}
    for shard in sorted(source.glob("*.safetensors")):
        tensors = {}
        for name, tensor in load_file(shard).items():
            if "_proj.weight" in name and "eh_proj" not in name:
                rows, columns = tensor.shape
                shape = (rows, 1) if layout == "channel" else (math.ceil(rows / 128), math.ceil(columns / 128))
                dtype = torch.bfloat16 if layout == "channel" else torch.float32
                scale = (0.5 + torch.rand(shape, generator=generator)).to(dtype) / 100
                q = (torch.randn(rows, columns, generator=generator) * 100).clamp(-448, 448).to(FP8)
                suffix = "_scale" if layout == "channel" else "_scale_inv"
                tensors |= {name: q, name + suffix: scale}
                meant[name] = (q.float() * expanded(scale, q.shape)).bfloat16()
            else:
                tensors[name] = meant[name] = tensor
        save_file(tensors, target / shard.name)
        weight_map |= dict.fromkeys(tensors, shard.name)
    (target / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return meant


@pytest.fixture(scope="module")
def by_hand(checkpoints, tmp_path_factory):
    """layout → (directory, what its tensors stand for)."""
    root, generator = tmp_path_factory.mktemp("fp8"), torch.Generator().manual_seed(1)
    return {
        layout: (root / layout, quantize_by_hand(checkpoints["air"], root / layout, layout, generator))
        for layout in ("channel", "block")
    }


@pytest.mark.parametrize("layout", ["channel", "block"])
def test_both_layouts_are_read_as_q_times_scale(by_hand, layout, tmp_path):
    """Every tensor, whole and in slices, and through conversion; what is left in bf16 is bit-equal; config.json says bf16 then."""
    directory, meant = by_hand[layout]
    source = HfDir(directory)
    assert set(source.names) == set(meant)
    for name, tensor in meant.items():
        assert source.dtype(name) == tensor.dtype and torch.equal(source.read(name), tensor), name
        if tensor.dim() == 2:
            rows, columns = tensor.shape
            part = source.read(name, rows // 3, rows - 1, slice(columns // 5, columns - 3))
            assert torch.equal(part, tensor[rows // 3 : rows - 1, columns // 5 : columns - 3]), name
    convert(directory, tmp_path / "mcore", "mcore")
    convert(tmp_path / "mcore", tmp_path / "hf", "hf")
    assert "quantization_config" not in json.loads((tmp_path / "hf" / "config.json").read_text())
    back = HfDir(tmp_path / "hf")
    assert all(torch.equal(back.read(name), tensor) for name, tensor in meant.items())
    assert not compare(source, back).differences


@settings(max_examples=60, deadline=None)
@given(data=st.data(), rows=st.integers(1, 300), columns=st.integers(1, 300), block=st.booleans())
def test_slices_of_any_size(data, rows, columns, block):
    """dequantize of any rows and columns is that part of the whole."""
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    q = torch.randn(rows, columns, generator=generator).to(FP8)
    shape = (math.ceil(rows / 128), math.ceil(columns / 128)) if block else (rows, 1)
    scales = torch.rand(shape, generator=generator)
    whole = (q.float() * expanded(scales, q.shape)).bfloat16()
    first, left = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1))
    last, right = data.draw(st.integers(first + 1, rows)), data.draw(st.integers(left + 1, columns))
    scale = Scale("", 128, 128) if block else Scale("", 1, columns)
    assert torch.equal(dequantize(q[first:last, left:right], scale, scales, first, left), whole[first:last, left:right])


def _edit(directory, tensors=None, **config):
    path = directory / "config.json"
    settings = json.loads(path.read_text())
    settings["quantization_config"] = (
        settings["quantization_config"] | config if config.get("quant_method", 1) else None
    )
    path.write_text(json.dumps(settings))
    if tensors:
        index = json.loads((directory / INDEX).read_text())
        shard = index["weight_map"][NAME]
        held = load_file(directory / shard)
        tensors(held)
        save_file(held, directory / shard)
        index["weight_map"] = {n: s for n, s in index["weight_map"].items() if s != shard} | dict.fromkeys(held, shard)
        (directory / INDEX).write_text(json.dumps(index))


NAME = "model.layers.1.mlp.experts.3.down_proj.weight"
SCALE = NAME + "_scale"
GROUP = CHANNEL["config_groups"]["group_0"]["weights"]
FAULTS = {
    "another method": (lambda d: _edit(d, quant_method="gptq"), ["scheme is not known", "gptq"]),
    "int8": (
        lambda d: _edit(d, config_groups={"group_0": {"weights": GROUP | {"type": "int"}}}),
        ["scheme is not known", "'int'"],
    ),
    "groups of columns": (
        lambda d: _edit(d, config_groups={"group_0": {"weights": GROUP | {"strategy": "group"}}}),
        ["scheme is not known", "'group'"],
    ),
    "no scale": (lambda d: _edit(d, lambda t: t.pop(SCALE)), [NAME, "no weight_scale"]),
    "scale of another shape": (lambda d: _edit(d, lambda t: t.update({SCALE: torch.ones(3, 1)})), [NAME, "(3, 1)"]),
    "no config": (lambda d: _edit(d, quant_method=None), ["scheme is not known", "_proj.weight"]),
    "e5m2": (lambda d: _edit(d, lambda t: t.update({NAME: t[NAME].float().to(torch.float8_e5m2)})), [NAME, "F8_E5M2"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_unknown_scheme_is_an_error_that_names_a_tensor(by_hand, tmp_path, cli, fault):
    broken = shutil.copytree(by_hand["channel"][0], tmp_path / "broken")
    edit, words = FAULTS[fault]
    edit(broken)
    code, _, err = cli("convert", "--to-mcore", "--model", broken, "--output", tmp_path / "out")
    assert code == 2 and "model.layers." in err and "Traceback" not in err, err
    assert all(word in err for word in words), err


@pytest.fixture(scope="module")
def even(tmp_path_factory):
    """A checkpoint whose sizes are multiples of 128, but for its dense layer's."""
    root = tmp_path_factory.mktemp("even") / "hf"
    root.mkdir()
    config = tiny.config("air", True, 512, [0]) | {
        "num_hidden_layers": 2, "hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
        "intermediate_size": 320, "moe_intermediate_size": 128, "n_routed_experts": 4,
    }  # fmt: skip
    (root / "config.json").write_text(json.dumps(config))
    source = tiny.RandomModel(ModelSpec.from_config(config, "config.json"), 1)
    for file in plan_hf(source, 2_000_000):
        write_file(root / file.name, source, file)
    return root


@pytest.mark.parametrize("layout", ["channel", "block"])
def test_written_fp8_is_close_and_the_rest_bit_equal(even, tmp_path, layout, cli):
    """Within half a step of e4m3 of each scale's values; read in pieces or whole the same; verified as it is written."""
    assert cli("convert", "--to-hf", "--model", even, "--output", tmp_path / "q", "--fp8", layout)[0] == 0
    written, source = HfDir(tmp_path / "q"), HfDir(even)
    scheme = json.loads((tmp_path / "q/config.json").read_text())["quantization_config"]
    assert written.names == source.names
    for name in source.names:
        a, b = source.read(name).float(), written.read(name).float()
        if name not in written.scales:
            assert torch.equal(a, b) and source.dtype(name) == written.dtype(name)
            continue
        scale = expanded(AsStored(written).read(written.scales[name].name), a.shape)
        step = torch.maximum(a.abs() / 8, scale * 2**-9)  # e4m3: 3 bits behind the point, then rounding to bf16
        assert ((a - b).abs() <= 0.51 * step + a.abs() / 256).all(), name
    left = {name for name in source.names if name not in written.scales and source.read(name).dim() == 2}
    uneven = "model.layers.0.mlp." if layout == "block" else "nothing"  # 320 is no multiple of 128
    kept = ("embed_tokens.weight", "head.weight", "mlp.gate.weight", "eh_proj.weight")
    assert all(name.endswith(kept) or name.startswith(uneven) for name in left)
    assert {f"{name}.weight" for name in scheme["ignore" if layout == "channel" else "modules_to_not_convert"]} == left
    assert cli("verify", tmp_path / "q", tmp_path / "q")[0] == 0
    whole = {name: AsStored(written).read(name) for name in AsStored(written).names}
    again = Quantized(source, layout)
    for name in again.names:
        rows = again.shape(name)[0]
        for first, last in ((0, rows), (rows // 3, rows), (rows // 2, rows // 2 + 1)):
            part = whole[name][first:last].contiguous()
            assert torch.equal(again.read(name, first, last).view(torch.uint8), part.view(torch.uint8)), name


def test_transformers_reads_our_blocks(even, tmp_path):
    """FineGrainedFP8 widened by transformers itself, bf16: the weights that we read, bit for bit."""
    import transformers

    convert(even, tmp_path / "q", "hf", fp8="block")
    convert(tmp_path / "q", tmp_path / "plain", "hf")
    how = transformers.FineGrainedFP8Config(dequantize=True)
    found, info = transformers.Glm4MoeForCausalLM.from_pretrained(
        str(tmp_path / "q"), quantization_config=how, dtype=torch.bfloat16, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["mismatched_keys"]
    expected = transformers.Glm4MoeForCausalLM.from_pretrained(
        str(tmp_path / "plain"), dtype=torch.bfloat16
    ).state_dict()
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor.to(expected[name].dtype), expected[name]), name


def test_verify_sees_one_scale(by_hand, tmp_path, cli):
    other = shutil.copytree(by_hand["block"][0], tmp_path / "other")
    _edit(other, lambda t: t[NAME + "_scale_inv"].mul_(2))
    code, out, _ = cli("verify", by_hand["block"][0], other, "--json")
    assert code == 3 and [d["name"] for d in json.loads(out)["differences"]] == [NAME + "_scale_inv"]


def test_an_adapter_is_merged_before_it_is_quantized(checkpoints, tmp_path):
    from peft import LoraConfig

    name = "model.layers.0.self_attn.q_proj"
    generator = torch.Generator().manual_seed(4)
    LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj"]).save_pretrained(str(tmp_path / "adapter"))
    pair = {
        f"base_model.model.{name}.lora_A.weight": torch.randn(2, 128, generator=generator),
        f"base_model.model.{name}.lora_B.weight": torch.randn(256, 2, generator=generator),
    }
    save_file(pair, tmp_path / "adapter" / "adapter_model.safetensors")
    convert(checkpoints["air"], tmp_path / "q", "hf", adapter=tmp_path / "adapter", fp8="channel")
    base = open_model(checkpoints["air"])
    merged = Merged(base, tmp_path / "adapter")
    written = HfDir(tmp_path / "q")
    expected = merged.read(f"{name}.weight").float()
    assert ((written.read(f"{name}.weight").float() - expected).abs() <= expected.abs() / 14 + 0.02).all()
    assert ((written.read(f"{name}.weight").float() - base.read(f"{name}.weight").float()).abs().max()) > 0.5
    assert not compare(AsStored(written), Quantized(merged, "channel")).differences


def test_training_loads_fp8_as_it_loads_what_it_stands_for(by_hand, one_rank, tmp_path):
    from glm45_tune.mcore.load import load_weights
    from glm45_tune.mcore.model import GLM45Model

    directory, meant = by_hand["block"]
    source = open_model(directory)
    model = GLM45Model(source.spec, one_rank)
    load_weights(model, source)
    assert torch.equal(model.output_layer.weight, meant["lm_head.weight"].float())
    proj = model.decoder.layers[0].self_attention.linear_proj.weight
    assert torch.equal(proj, meant["model.layers.0.self_attn.o_proj.weight"].float())


def test_an_all_zero_weight_stays_zero():
    values = torch.zeros(130, 140)
    for layout in fp8.LAYOUTS:
        assert (fp8._scale_of(values, layout) == 1).all()


def test_a_fp8_source_without_quantization_config_is_no_raw_cast(by_hand, tmp_path):
    plain = shutil.copytree(by_hand["channel"][0], tmp_path / "plain")
    config = json.loads((plain / "config.json").read_text())
    del config["quantization_config"]
    (plain / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="_proj.weight"):
        open_model(plain)
