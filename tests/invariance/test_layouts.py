"""The law: the same losses, gradients, gradient norm, router biases and updated weights under every parallel layout, 1e-5

relative in fp32. One rank is the reference. The whole matrix (every layout of 8 ranks) runs with GLM45_TUNE_ALL_LAYOUTS=1;
without it a part that covers every pair of sizes.
"""

import json
import os
from itertools import product
from pathlib import Path

import layouts
import pytest

from glm45_tune.conversion.mcore_files import TorchDistFiles
from glm45_tune.spec import ModelSpec, read_config
from glm45_tune.tiny.checkpoint import config

WORKER = Path(__file__).parent / "worker.py"
TOLERANCE = 1e-5
LOSSES = ("train/loss", "train/grad_norm", "train/mtp_loss", "train/aux_loss", "train/z_loss", "eval/loss")
# packed rows, MTP, and every loss a router knows; five layers and MTP, which no pipeline divides
MODEL = {"mtp_loss_scaling_factor": 0.3, "moe_aux_loss_coeff": 1e-2, "moe_z_loss_coeff": 1e-3}
KINDS = {
    "full": {"model": MODEL | {"moe_router_bias_update_rate": 1e-2}},
    "lora": {"model": MODEL, "lora": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}},
}
# what is worth a few layouts, not the matrix
MORE_KINDS = {
    "lora-hf-names": {"lora": {"r": 4, "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"]}},
    "air": {"model": {"mtp_loss_scaling_factor": 0.3}},
    "frozen": {"model": MODEL, "train": {"freeze": ["embed_tokens", "layers.0", "layers.1", "router", "*norm"]}},
    "recompute": {"model": MODEL, "train": {"recompute_granularity": "full"}},
    "recompute-lora": {
        "model": MODEL,
        "lora": {"r": 4, "target_modules": "all-linear"},
        "train": {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 2}
        | {"recompute_modules": ["attention", "moe"]},
    },
    # weights in FP8, products in fp32: as exact as any other; recompute beside it
    "fp8-weights": {
        "model": MODEL | {"frozen_dtype": "fp8", "frozen_products": "bf16"},
        "lora": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
        "train": {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 2},
    },
    "fp8": {"model": MODEL | {"frozen_dtype": "fp8"}, "lora": {"r": 4, "target_modules": "all-linear"}},
    # nothing trains the experts: their rows travel in FP8
    "fp8-sent": {
        "model": MODEL | {"frozen_dtype": "fp8"},
        "lora": {"r": 4, "target_modules": ["linear_qkv", "linear_proj"]},
        "train": {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 2},
    },
    "lean": {
        "optimizer": {"exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16", "optimizer_offload_fraction": 0.5},
    },
    "lean-bf16": {
        "model": {"params_dtype": "bf16"},
        "optimizer": {
            "exp_avg_dtype": "bf16",
            "exp_avg_sq_dtype": "bf16",
            "optimizer_offload_fraction": 1.0,
            "main_grads_dtype": "bf16",
        },
    },
    "bf16": {"model": {"params_dtype": "bf16"}, "optimizer": {"lr": 1e-7, "min_lr": 1e-7}},
    "deterministic": {
        "model": MODEL,
        "lora": {"r": 4, "target_modules": "all-linear", "lora_dropout": 0.1},
        "train": {"deterministic": True},
    },
}
# the same dropout, drawn again
HALVES = {"recompute_granularity": "selective", "recompute_modules": ["attention", "moe", "mlp"]}
MORE_KINDS["deterministic-halves"] = MORE_KINDS["deterministic"] | {"train": {"deterministic": True} | HALVES}
# trained to their end: kind → (steps, learning rate, what the loss must fall below)
CONVERGING = {"full": (15, 5e-3, 0.1), "lora": (30, 1e-2, 0.2)}
SPEC = ModelSpec.from_config(config("355b", True, 512, [0]), "tiny")
ALL = "GLM45_TUNE_ALL_LAYOUTS" in os.environ
MATRIX = [*product(KINDS, layouts.every(8, SPEC))] if ALL else layouts.covering(8, SPEC, tuple(KINDS))


def _sizes(*chosen: int) -> dict[str, int]:
    return dict(zip(layouts.SIZES, chosen))


# on four ranks
MORE = [
    *(("lora-hf-names", _sizes(*sizes)) for sizes in ((2, 1, 2, 1, 2, 1), (1, 2, 1, 1, 2, 2))),
    *(("air", _sizes(*sizes)) for sizes in ((2, 2, 1, 1, 4, 1), (1, 1, 2, 1, 2, 1))),
    *(("frozen", _sizes(*sizes)) for sizes in ((1, 1, 4, 1, 1, 1), (1, 2, 2, 2, 2, 1), (2, 1, 1, 1, 4, 1))),
    *(("recompute", _sizes(*sizes)) for sizes in ((2, 1, 2, 1, 2, 1), (1, 2, 2, 2, 1, 2))),
    *(("recompute-lora", _sizes(*sizes)) for sizes in ((1, 1, 2, 1, 2, 1), (2, 1, 1, 1, 2, 2))),
    ("lean", _sizes(2, 1, 2, 1, 2, 1)),
    *(("fp8-weights", _sizes(*sizes)) for sizes in ((2, 1, 2, 1, 2, 1), (1, 2, 1, 1, 2, 2), (2, 1, 1, 1, 1, 2))),
    *(("fp8", _sizes(*sizes)) for sizes in ((1, 1, 2, 2, 2, 1), (2, 2, 1, 1, 2, 1), (1, 1, 1, 1, 2, 2))),
    *(("fp8-sent", _sizes(*sizes)) for sizes in ((1, 1, 1, 1, 4, 1), (1, 1, 2, 1, 2, 1))),
]
BROKEN = {
    "norms are not summed over tensor ranks": _sizes(2, 1, 1, 1, 1, 1),
    "experts are reduced over no rank": _sizes(1, 1, 1, 1, 2, 1),
    "keys forget what other context ranks saw of them": _sizes(1, 4, 1, 1, 1, 1),
    "padding counts as tokens": _sizes(2, 2, 1, 1, 1, 1),
}
TRAINED = [(kind, sizes) for kind in CONVERGING for sizes in (_sizes(1, 1, 2, 1, 2, 1), _sizes(2, 1, 1, 1, 2, 1))]
RESUMED = [
    ("lean-bf16", _sizes(2, 1, 2, 1, 2, 1)),
    ("full", _sizes(1, 2, 2, 2, 2, 1)),
    ("lora", _sizes(1, 1, 2, 1, 2, 1)),
    ("fp8", _sizes(1, 1, 2, 1, 2, 1)),
]
# resumed again under other layouts
MOVED = [
    (kind, _sizes(*sizes))
    for kind in ("full", "lora")
    for sizes in ((2, 1, 1, 1, 4, 1), (1, 1, 4, 1, 1, 1), (2, 1, 2, 1, 1, 2))
]
ROOT = Path(__file__).parents[2]
EVERY = [(kind, sizes, 8) for kind, sizes in MATRIX] + [(kind, sizes, 4) for kind, sizes in MORE]


def _rows(sizes: dict[str, int], world_size: int) -> int:
    """Rows of the step: enough that every data rank has as many micro batches as there are stages."""
    tp, cp, pp, *_ = sizes.values()
    return max(4, world_size // (tp * cp * pp) * pp)


def _one(kind: str, rows: int) -> str:
    """The case of one rank with that many rows."""
    return f"{kind}-one-{rows}"


def _case(name, kind, sizes, world_size, checkpoints, corpus, make_recipe, output, **more):
    # with so large an eps Adam's update is nearly the gradient: by itself it would blow rounding noise up to steps of full size
    sections = {
        "optimizer": {"lr": 1.0, "min_lr": 1.0, "adam_eps": 1.0},
        "data": {"eval_ratio": 0.2},
        "train": {"steps": 1, "global_batch_size": more.pop("rows", None) or _rows(sizes, world_size)},
    }
    for section, values in {**KINDS, **MORE_KINDS}[kind].items():
        sections[section] = sections.get(section, {}) | values
    model = checkpoints["air" if kind == "air" else "355b"]
    sections["parallel"] = sizes | {"world_size": world_size}
    return {"name": name, "recipe": make_recipe(model, corpus, output / "run", **sections), **more}


def _training(name, kind, sizes, world_size, checkpoints, corpus, make_recipe, output):
    """A run on 16 of the quickstart's questions."""
    steps, lr, _ = CONVERGING[kind]
    tp, cp, pp, *_ = sizes.values()
    lora = {"lora": {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}} if kind == "lora" else {}
    recipe = make_recipe(
        checkpoints["air"],
        f"{ROOT}/data_examples/seats_at_once.jsonl#16",
        output / "run",
        model={"mtp_loss_scaling_factor": 0.1},
        data={"seq_length": 96},
        optimizer={"lr": lr},
        train={"steps": steps, "global_batch_size": 8, "micro_batch_size": 8 // (world_size // (tp * cp * pp)) // pp},
        parallel=sizes | {"world_size": world_size},
        **lora,
    )
    return {"name": name, "recipe": recipe, "steps": [0, steps]}


@pytest.fixture(scope="module")
def results(checkpoints, corpus, make_recipe, ranks, tmp_path_factory):
    """Directory with the result of every case, all cases of one rank count run by one start of the ranks."""
    output = tmp_path_factory.mktemp("layouts")
    common = (checkpoints, corpus, make_recipe, output)
    one = _sizes(1, 1, 1, 1, 1, 1)
    assert layouts.every(8, SPEC) == layouts.every(8, ModelSpec.from_config(read_config(checkpoints["355b"]), "355b"))
    cases = {
        1: [
            _case(_one(kind, rows), kind, one, 1, *common, rows=rows)
            for kind, rows in [*product({**KINDS, **MORE_KINDS}, (4,)), *product(KINDS, (8,))]
        ]
        + [_training(f"trained-{kind}-one", kind, one, 1, *common) for kind in CONVERGING],
        4: [_training(f"trained-{kind}-{layouts.name(sizes)}", kind, sizes, 4, *common) for kind, sizes in TRAINED]
        + [_case(f"resumed-{kind}", kind, sizes, 4, *common, resume=True) for kind, sizes in RESUMED]
        + [
            _case(
                f"moved-{kind}-{layouts.name(sizes)}", kind, sizes, 4, *common, restore=f"resumed-{kind}", steps=[1, 3]
            )
            for kind, sizes in MOVED
        ]
        + [_case(f"deterministic-{run}", "deterministic", _sizes(2, 1, 2, 1, 2, 1), 4, *common) for run in range(2)]
        + [_case("deterministic-halves", "deterministic-halves", _sizes(2, 1, 2, 1, 2, 1), 4, *common)]
        + [_case(f"broken-{what}", "full", sizes, 4, *common, sabotage=what) for what, sizes in BROKEN.items()],
        8: [],
    }
    for kind, sizes, world_size in EVERY:
        cases[world_size].append(_case(f"{kind}-{layouts.name(sizes)}", kind, sizes, world_size, *common))
    for world_size, chosen in cases.items():
        file = output / f"cases{world_size}.json"
        file.write_text(json.dumps(chosen))
        ranks(world_size, WORKER, [str(file), str(output)], timeout=3000)
    return output


def _difference(results: Path, name: str, reference: str) -> float:
    """Largest relative difference of a loss, the gradient norm, any gradient and any weight (against its own largest value)."""
    ours, theirs = (json.loads((results / f"{n}.json").read_text()) for n in (name, reference))
    assert theirs.keys() & set(LOSSES) and not set(LOSSES) & (ours.keys() ^ theirs.keys())
    worst = max(abs(ours[key] / theirs[key] - 1) for key in LOSSES if key in theirs)
    a, b = TorchDistFiles(results / name), TorchDistFiles(results / reference)
    assert any(key.startswith("optimizer.state.exp_avg.") for key in b.tensors) and set(a.tensors) == set(b.tensors)
    for key in b.tensors:
        if key.startswith("optimizer.state.exp_avg_sq."):
            continue  # the square of what is compared
        x, y = a.read_key(key).float(), b.read_key(key).float()
        scale = y.abs().max().item()
        if scale > 1e-9:  # an expert that no token reached has no gradient
            worst = max(worst, (x - y).abs().max().item() / scale)
    return worst


@pytest.mark.parametrize(
    "kind, sizes, world_size", EVERY, ids=[f"{kind}-{layouts.name(sizes)}" for kind, sizes, _ in EVERY]
)
def test_a_layout_gives_one_ranks_loss_gradients_and_weights(results, kind, sizes, world_size):
    tolerance = {"lean": 2**-8, "fp8": 1e-3, "fp8-sent": 1e-3}.get(
        kind, TOLERANCE
    )  # a bf16 moment, or a row in FP8, may round the other way
    if kind == "fp8" and max(sizes["tensor_model_parallel_size"], sizes["expert_tensor_parallel_size"]) > 1:
        # each of these ranks quantizes its part of a row by the part's own largest value: a single element of a gradient then differs
        # by as much as FP8 itself changes it. `fp8-weights` holds such layouts to 1e-5
        tolerance = 0.25
    assert _difference(results, f"{kind}-{layouts.name(sizes)}", _one(kind, _rows(sizes, world_size))) <= tolerance


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_layout_is_seen(results, broken):
    assert _difference(results, f"broken-{broken}", _one("full", _rows(BROKEN[broken], 4))) > 10 * TOLERANCE


def test_the_covering_part_has_every_pair_of_sizes():
    whole, part = [*product(KINDS, layouts.every(8, SPEC))], layouts.covering(8, SPEC, tuple(KINDS))
    pairs = [set().union(*(layouts.pairs(*case) for case in cases)) for cases in (whole, part)]
    assert pairs[0] == pairs[1] and len(part) < len(whole) / 8


def test_router_biases_move_by_the_rate_and_are_saved(results, checkpoints):
    """Each bias goes one step of the rate up or down (or stays, at an exactly even load), and only where the recipe says so."""
    from glm45_tune.conversion.hf_files import HfDir

    source, checked = HfDir(checkpoints["355b"]), 0
    for name, moves in (("full-one-4", True), ("frozen-one-4", False)):
        saved = TorchDistFiles(results / name)
        for layer in range(SPEC.num_dense_layers, SPEC.num_layers):
            before = source.read(f"model.layers.{layer}.mlp.gate.e_score_correction_bias")
            change = saved.read_key(f"decoder.layers.{2 * layer + 1}.mlp.router.expert_bias") - before
            assert (change.abs().max() > 0) == moves
            assert all(min(abs(abs(c) - 1e-2), abs(c)) < 1e-7 for c in change.tolist())
            checked += 1
    assert checked == 2 * (SPEC.num_layers - SPEC.num_dense_layers)


def test_frozen_weights_stay_bit_for_bit_and_others_move(results, checkpoints):
    from glm45_tune.conversion.names import rows
    from glm45_tune.conversion.patterns import frozen

    before, after = TorchDistFiles(results / "recompute-one-4"), TorchDistFiles(results / "frozen-one-4")
    names = frozen(SPEC, MORE_KINDS["frozen"]["train"]["freeze"], with_mtp=True)
    assert {
        "embedding.word_embeddings.weight",
        "decoder.final_norm.weight",
        "decoder.layers.2.self_attention.linear_qkv.bias",
    } <= names
    from glm45_tune.conversion.hf_files import HfDir

    source = HfDir(checkpoints["355b"])
    for row in rows(SPEC):
        if row.num_experts or len(row.parts) > 1 or row.is_fp32:
            continue
        original = source.read(row.hf_names()[0]).float()
        assert after.read_key(row.hybrid).equal(original) == (row.hybrid in names), row.hybrid
        assert f"optimizer.state.exp_avg.{row.hybrid}" in before.tensors
        assert (f"optimizer.state.exp_avg.{row.hybrid}" in after.tensors) == (row.hybrid not in names)


@pytest.mark.parametrize("kind, sizes", TRAINED, ids=[f"{kind}-{layouts.name(sizes)}" for kind, sizes in TRAINED])
def test_training_converges_as_on_one_rank(results, kind, sizes):
    """Pipeline 2 × expert 2 and tensor 2 × expert 2. Over the steps another order of sums may grow: to 1e-4 of the first loss."""
    ours = json.loads((results / f"trained-{kind}-{layouts.name(sizes)}.json").read_text())["losses"]
    theirs = json.loads((results / f"trained-{kind}-one.json").read_text())["losses"]
    assert ours[-1] < CONVERGING[kind][2] < 0.05 * ours[0]
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 1e-4 * ours[0]


def test_recompute_drops_the_same_elements(results):
    """LoRA's dropout in both halves under tensor and pipeline ranks, beside an MTP layer: as without recompute."""
    assert _difference(results, "deterministic-halves", "deterministic-0") <= TOLERANCE


def test_deterministic_runs_end_with_the_same_bits(results):
    """Tensor 2 × pipeline 2 × expert 2, LoRA with dropout; every saved tensor, and the losses as they are printed."""
    one, two = (TorchDistFiles(results / f"deterministic-{run}") for run in range(2))
    assert set(one.tensors) == set(two.tensors)
    assert all(one.read_key(key).equal(two.read_key(key)) for key in one.tensors)
    first, second = (json.loads((results / f"deterministic-{run}.json").read_text()) for run in range(2))
    assert [first[key] for key in LOSSES] == [second[key] for key in LOSSES]


@pytest.mark.parametrize("kind", [kind for kind, _ in RESUMED])
def test_a_resumed_run_goes_on_exactly(results, kind):
    """With bf16 moments, bf16 gradients and everything offloaded; and over context ranks and interleaved stages."""
    values = json.loads((results / f"resumed-{kind}.json").read_text())
    assert values["resumed"] == values["straight"] and values["straight"][0] != values["straight"][1]
    reference = json.loads((results / f"{_one(kind, 4)}.json").read_text())
    tolerance = 2e-2 if kind in ("lean-bf16", "fp8") else TOLERANCE  # they round at other places
    for key in ("train/loss", "train/grad_norm"):
        assert abs(values[key] / reference[key] - 1) <= tolerance


@pytest.mark.parametrize("kind, sizes", MOVED, ids=[f"{kind}-{layouts.name(sizes)}" for kind, sizes in MOVED])
def test_a_run_resumed_under_another_layout_goes_on_as_if_it_had_not_moved(results, kind, sizes):
    """Two steps, 1e-6 relative."""
    moved = json.loads((results / f"moved-{kind}-{layouts.name(sizes)}.json").read_text())["losses"]
    straight = json.loads((results / f"resumed-{kind}.json").read_text())["straight"]
    assert moved == pytest.approx(straight, rel=1e-6)


def test_bf16_weights_have_fp32_masters(results, checkpoints):
    """An update far below a bf16 step changes the master by lr · g / (|g| + eps), to fp32 rounding, and the weight not at all."""
    from glm45_tune.conversion.hf_files import HfDir

    saved, source = TorchDistFiles(results / "bf16-one-4"), HfDir(checkpoints["355b"])
    for key, name in {
        "output_layer.weight": "lm_head.weight",
        "decoder.layers.2.self_attention.linear_proj.weight": "model.layers.1.self_attn.o_proj.weight",
    }.items():
        original, weight = source.read(name), saved.read_key(key)
        master, gradient = (
            saved.read_key(f"optimizer.state.param.{key}"),
            10 * saved.read_key(f"optimizer.state.exp_avg.{key}"),
        )
        assert weight.dtype == original.dtype and master.dtype == gradient.dtype and "float32" in str(master.dtype)
        assert weight.equal(original) and weight.equal(master.to(weight.dtype))
        moved, expected = original.double() - master.double(), 1e-7 * gradient.double() / (gradient.double().abs() + 1)
        assert expected.abs().max() > 0 and (moved - expected).abs().max() <= 2**-24 * original.abs().max()
        small = original.abs() < 2**-9  # where fp32 resolves the update
        assert (moved - expected)[small].abs().max() < 0.05 * expected.abs().max()
