"""Recipes are strict, and say everything that is wrong at once."""

import copy
import math
from pathlib import Path

import pytest
import yaml

from glm45_tune import faults
from glm45_tune.checks import check_layout
from glm45_tune.errors import LayoutError, RecipeError
from glm45_tune.layout import Layout
from glm45_tune.recipe import Recipe
from glm45_tune.section import _kinds
from glm45_tune.spec import load_spec

ROOT = Path(__file__).parents[2]
BASE = {"model": {"path": "m"}, "data": {"train": "d"}, "train": {"epochs": 1}, "output_dir": "o"}


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_loads_and_says_what_it_is(path):
    Recipe.load(path)
    header = path.read_text(encoding="utf-8").splitlines()[0]
    assert header.startswith("# ") and "glm45-tune train recipes/" + path.name in path.read_text(encoding="utf-8")


def test_a_resolved_recipe_is_the_same_recipe(tmp_path):
    recipe = Recipe.load(ROOT / "recipes" / "tiny_lora.yaml", ["optimizer.lr=5e-5", "lora.target_modules=[q_proj]"])
    assert recipe.optimizer.lr == 5e-5 and recipe.lora.target_modules == ["q_proj"]
    (tmp_path / "r.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    assert Recipe.load(tmp_path / "r.yaml") == recipe


FAULTS = [
    (
        {"parallel": {"tensor_parallel": 2}},
        ["parallel.tensor_parallel: unknown key", "parallel.tensor_model_parallel_size"],
    ),
    ({"modell": {}}, ["modell: unknown key", "model"]),
    ({"train": {"epochs": 1, "steps": 2}}, ["train", "either epochs or steps"]),
    ({"train": {"epochs": 0}}, ["train.epochs", "greater than 0"]),
    ({"data": {"train": "d", "seq_length": "long"}}, ["data.seq_length", "'long'"]),
    ({"data": {"train": 5}}, ["data.train", "5"]),
    ({"lora": {"target_modules": ["wq"]}}, ["lora.target_modules", "'wq'", "linear_qkv", "q_proj", "all-linear"]),
    (
        {"lora": {"target_modules": ["layers.3.self_attn.q_proj"]}},
        ["lora.target_modules", "in front of q_proj", "self_attn"],
    ),
    ({"lora": {"target_modules": ["shared_expert.linear_fc1"]}}, ["in front of linear_fc1", "shared_experts"]),
    ({"strategy": "ddp"}, ["strategy: unknown key"]),
    ({"train": {"epochs": 1, "stream": 1}}, ["train.stream: unknown key"]),
    ({"data": {"train": [{"path": "d", "weigth": 2}]}}, ["weigth: unknown key", "weight"]),
    ({"lora": {"target_modules": []}}, ["lora.target_modules", "empty"]),
    ({"lora": {"r": -1}}, ["lora.r"]),
    ({"optimizer": {"lr": 0}}, ["optimizer.lr", "greater than 0"]),
    ({"optimizer": {"lr": 1e-6, "min_lr": 1e-5}}, ["optimizer", "min_lr 1e-05 exceeds lr"]),
    ({"model": {"path": "m", "params_dtype": "fp16"}}, ["model.params_dtype", "'bf16' or 'fp32'", "'fp16'"]),
    ({"data": {"train": "d", "eval": "e", "eval_ratio": 0.1}}, ["data", "eval and eval_ratio"]),
    ({"parallel": {"context_parallel": 2}}, ["parallel.context_parallel: unknown key", "context_parallel_size"]),
    (
        {"parallel": {"virtual_pipeline_model_parallel_size": 0}},
        ["virtual_pipeline_model_parallel_size", "greater than 0"],
    ),
    ({"optimizer": {"exp_avg_dtype": "fp8"}}, ["optimizer.exp_avg_dtype", "'bf16' or 'fp32'"]),
    ({"optimizer": {"exp_avg_sq_dtype": "bf16", "adam_beta2": 0.999}}, ["adam_beta2 ≤ 0.99", "it is 0.999"]),
    ({"optimizer": {"optimizer_offload_fraction": 1.5}}, ["optimizer_offload_fraction", "less than or equal to 1"]),
    (
        {"optimizer": {"main_grads_dtype": "bf16"}, "model": {"path": "m", "params_dtype": "fp32"}},
        ["main_grads_dtype bf16 needs model.params_dtype bf16"],
    ),
    ({"train": {"epochs": 1, "freeze": ["router"]}, "lora": {}}, ["train.freeze", "narrow lora.target_modules"]),
    ({"train": {"epochs": 1, "freeze": "router"}}, ["train.freeze", "list"]),
    ({"model": {"path": "m", "moe_router_bias_update_rate": 1e-3}, "lora": {}}, ["an adapter cannot carry"]),
    ({"train": {"steps": True}}, ["train.steps: is true; a number is expected"]),
    ({"optimizer": {"lr": True}}, ["optimizer.lr: is true"]),
    ({"train": {"epochs": 1, "save_interval_minutes": False}}, ["save_interval_minutes: is false"]),
    ({"train": {"epochs": 1, "seed": 2**40}}, ["train.seed", "at most 4294967295"]),
    ({"train": {"epochs": 1, "recompute_modules": ["moe"]}}, ["recompute_modules needs recompute_granularity"]),
    (
        {"train": {"epochs": 1, "recompute_granularity": "full", "recompute_modules": ["moe"]}},
        ["full with recompute_method block"],
    ),
    ({"model": {"path": "m", "moe_z_loss_coeff": -1}}, ["model.moe_z_loss_coeff", "greater than or equal to 0"]),
]


@pytest.mark.parametrize("change, words", FAULTS, ids=[str(change) for change, _ in FAULTS])
def test_a_fault_is_named(change, words):
    with pytest.raises(RecipeError) as fault:
        Recipe.from_dict(BASE | change)
    for word in words:
        assert word in str(fault.value)


def test_a_key_that_stands_twice_is_an_error(tmp_path):
    """YAML's readers keep the last one; what the first said would be lost without a word."""
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(BASE) + "optimizer: {lr: 1.0e-3}\noptimizer: {weight_decay: 0.1}\n")
    with pytest.raises(RecipeError, match="the key optimizer stands there twice(.|\n)*line"):
        Recipe.load(path)
    path.write_text(yaml.safe_dump(BASE | {"data": {"source": "a"}}))
    assert (
        Recipe.load(path, ["data.train=b"]).data.train == "b" and Recipe.load(path, ["data.source=b"]).data.train == "b"
    )


def test_all_faults_come_in_one_message():
    with pytest.raises(RecipeError) as fault:
        Recipe.from_dict({"lora": {"rank": 1}, "optimizer": {"lr": -1}})
    lines = str(fault.value).splitlines()[1:]
    assert [line.split(":")[0].strip() for line in lines] == [
        "model",
        "data",
        "output_dir",
        "lora.rank",
        "optimizer.lr",
        "train",
    ]


@pytest.mark.parametrize(
    "train, sentence",
    [
        (None, "data.train: Input should be a valid string or a valid list (got None)."),
        ([3], "data.train.0: Input should be a valid string or a mapping (got 3)."),
        ([{"path": "x", "wieght": 2}], "data.train.0.wieght: unknown key. Did you mean data.train.0.weight?"),
        (["x", {"path": "x", "weight": 0}], "data.train.1.weight: Input should be greater than 0 (got 0)."),
    ],
)
def test_a_value_that_may_be_of_several_kinds_has_one_fault(train, sentence):
    with pytest.raises(RecipeError) as fault:
        Recipe.from_dict(BASE | {"data": {"train": train}})
    assert str(fault.value) == f"recipe: {sentence}"


def test_targets_by_either_name():
    def targets(names, module):
        return Recipe.from_dict(BASE | {"lora": {"target_modules": names}}).lora.targets_of(module)

    qkv, shared = "decoder.layers.0.self_attention.linear_qkv", "decoder.layers.3.mlp.shared_experts.linear_fc1"
    assert targets("all-linear", qkv) == ["linear_qkv"] and targets("all-linear", shared) == ["linear_fc1"]
    assert targets(["v_proj", "q_proj"], qkv) == ["q_proj", "v_proj"]
    assert targets(["self_attn.q_proj"], qkv) == ["q_proj"]
    assert targets(["linear_qkv", "q_proj"], qkv) == ["linear_qkv"]
    assert targets(["shared_experts.linear_fc1"], shared) == ["linear_fc1"]
    assert targets(["shared_experts.linear_fc1"], "decoder.layers.0.mlp.linear_fc1") == []
    assert targets(["up_proj"], shared) == ["up_proj"]


def test_a_layout_that_does_not_fit_says_what_would(checkpoints):
    spec = load_spec(checkpoints["air"])
    faults = {
        Layout(
            expert_model_parallel_size=3, world_size=3
        ): "expert_model_parallel_size 3 does not divide the 8 experts; allowed: 1, 2, 4, 8",
        Layout(tensor_model_parallel_size=4, world_size=4): "does not divide the 2 query groups",
        Layout(
            2, 4, world_size=12
        ): "tensor 2 × pipeline 4 = 8 does not divide the 12 ranks of this job. Use a multiple of 8 ranks",
        Layout(2, 4, world_size=20): "Use a multiple of 8 ranks; nearest: 16 or 24.",
        Layout(2, 4, world_size=4): "nearest: 8.",
        Layout(
            context_parallel_size=4, world_size=6
        ): "tensor 1 × context 4 × pipeline 1 = 4 does not divide the 6 ranks",
        Layout(expert_model_parallel_size=4, expert_tensor_parallel_size=2, world_size=12): "nearest: 8 or 16",
        Layout(pipeline_model_parallel_size=4, world_size=4): "exceeds the 3 layers",
        Layout(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2, world_size=2): (
            "pipeline_model_parallel_size 2 × virtual_pipeline_model_parallel_size 2 = 4 exceeds the 3 layers"
        ),
        Layout(virtual_pipeline_model_parallel_size=2, world_size=2): "pipeline_model_parallel_size is 1",
    }
    for layout, words in faults.items():
        with pytest.raises(LayoutError) as fault:
            check_layout(layout, spec)
        assert words in str(fault.value)


@pytest.mark.parametrize(
    "num_layers, mtp, stages, virtual",
    [
        *((46, 1, 8, 1), (92, 1, 16, 1), (92, 0, 7, 1), (3, 1, 3, 1), (5, 1, 2, 1), (2, 1, 2, 1), (1, 1, 1, 1)),
        *((46, 1, 4, 3), (92, 1, 8, 5), (5, 1, 2, 2), (4, 1, 2, 2)),
    ],
)
def test_stages_cover_every_layer_once_and_evenly(checkpoints, num_layers, mtp, stages, virtual):
    """Also what a rank holds in all: its virtual stages together differ by at most one layer from another rank's."""
    import dataclasses

    spec = dataclasses.replace(
        load_spec(checkpoints["air"]), num_layers=num_layers, num_dense_layers=1, mtp_num_layers=mtp
    )
    layout = Layout(
        pipeline_model_parallel_size=stages, virtual_pipeline_model_parallel_size=virtual, world_size=stages
    )
    sizes = layout.stage_layers(spec, with_mtp=bool(mtp))
    assert sum(sizes) == num_layers and len(sizes) == stages * virtual and min(sizes) >= 1
    loads = [*sizes[:-1], sizes[-1] + mtp]
    assert max(sizes) - min(loads) <= 1
    of_rank = [sum(loads[rank::stages]) for rank in range(stages)]
    assert max(of_rank) - min(of_rank) <= 1 + (num_layers + mtp < 2 * stages * virtual)
    pattern = layout.hybrid_pattern(spec, bool(mtp))
    assert pattern.replace("|", "") == "*-" + "*E" * (num_layers - 1) + "/*E" * mtp
    assert pattern.count("|") == stages * virtual - 1


def _leaves(section, front=()):
    """Every key of a recipe that may be a number: (its path, its type)."""
    for name, field in section.model_fields.items():
        inner = faults._section_in(field.annotation)
        if inner and "list[" not in str(field.annotation):
            yield from _leaves(inner, (*front, name))
        elif kinds := _kinds(field.annotation) & {int, float}:
            yield (*front, name), kinds


def _with(path: tuple[str, ...], value) -> dict:
    document = copy.deepcopy(BASE) | {"rl": {"rewards": [{"function": "length"}]}, "preference": {}}
    section = document
    for name in path[:-1]:
        section = section.setdefault(name, {})
    section[path[-1]] = value
    return document


@pytest.mark.parametrize(
    "path, kinds", list(_leaves(Recipe)), ids=lambda value: ".".join(value) if isinstance(value, tuple) else ""
)
def test_every_number_is_finite_and_of_this_world(path, kinds):
    """Whatever way it is written, as text too; the sentence names the key."""
    for value in (math.inf, -math.inf, math.nan, "inf", "nan", 10**30, -(10**30), 10**5000, "9" * 5000, "1e999"):
        if float in kinds and value == "9" * 5000:
            continue
        with pytest.raises(RecipeError) as fault:
            Recipe.from_dict(_with(path, value))
        assert ".".join(path) + ": " in str(fault.value) and len(str(fault.value)) < 3000


@pytest.mark.parametrize("value", [math.inf, [math.nan], {"a": [{"b": -math.inf}]}])
def test_numbers_inside_options_are_finite(value):
    with pytest.raises(RecipeError, match="rl.rewards.0.options: holds .*finite"):
        Recipe.from_dict(BASE | {"rl": {"rewards": [{"function": "length", "options": {"most": value}}]}})


def test_a_number_or_a_date_that_cannot_be_is_a_sentence(tmp_path):
    path = tmp_path / "r.yaml"
    for value in ("9" * 5000, "2026-13-45", '"\\x00"'):
        path.write_text(yaml.safe_dump(BASE) + f"seed: {value}\n")
        with pytest.raises(RecipeError):
            Recipe.load(path)
        with pytest.raises(RecipeError):
            Recipe.load(ROOT / "recipes" / "tiny_lora.yaml", [f"train.steps={value}"])


@pytest.mark.parametrize(
    "place, hint",
    [
        ("optimizer.learning_rate", "Here it is called optimizer.lr."),
        ("learning_rate", "Here it is called optimizer.lr."),
        ("lora.lora_rank", "Here it is called lora.r."),
        ("lora_r", "Here it is called lora.r."),
        ("lora.lora_rnak", "Did you mean lora.r?"),
        ("lora_alpha", "Did you mean lora.lora_alpha?"),
        ("train.lr", "Did you mean optimizer.lr?"),
        ("max_length", "Here it is called data.seq_length."),
        ("data.cutoff_len", "Here it is called data.seq_length."),
        ("sequence-len", "Here it is called data.seq_length."),
        ("train.num_train_epochs", "Here it is called train.epochs."),
        ("per_device_train_batch_size", "Here it is called train.micro_batch_size."),
        ("optimizer.lerning_rate", "Did you mean optimizer.lr?"),
        ("optimizer.zzz", "Allowed: lr, min_lr"),
        ("xyzzy", "Allowed: model, data"),
    ],
)
def test_an_unknown_key_is_told_what_it_is_here(place, hint):
    """Another tool's word first, then a key of another section, then a spelling that is close; else what is allowed."""
    path = tuple(place.split("."))
    with pytest.raises(RecipeError) as fault:
        Recipe.from_dict(_with(path, 1))
    assert f"{place}: unknown key. {hint}" in str(fault.value)


def test_every_hint_names_a_key_of_a_recipe():
    """Other tools' words lead to keys that exist; every key with a letter too many is refused with a hint."""
    known = faults.places(Recipe)
    assert set(faults.OTHER_WORDS.values()) <= set(known)
    for place in known:
        with pytest.raises(RecipeError, match="Did you mean|Here it is called|Allowed"):
            Recipe.from_dict(_with(tuple(f"{place}_".split(".")), 1))


def test_a_recipe_made_in_python_is_refused_with_a_sentence():
    for wrong in ({}, {"model": 1}, BASE | {"lora": {"rank": 1}}, BASE | {"data": {"train": "d", "seq_length": 0}}):
        with pytest.raises(RecipeError, match="recipe: "):
            Recipe(**wrong)
    with pytest.raises(RecipeError, match="Recipe.load"):
        Recipe("recipes/tiny_lora.yaml")
    with pytest.raises(RecipeError, match="holds list; a recipe is a mapping"):
        Recipe.from_dict([1])
    with pytest.raises(RecipeError, match="where: 1: unknown key"):
        Recipe.from_dict({1: 2}, "where")
    assert Recipe(**BASE) == Recipe.from_dict(BASE)


def test_train_takes_a_path_or_a_recipe(tmp_path):
    from glm45_tune import train

    with pytest.raises(RecipeError, match="nothing.yaml: no such recipe"):
        train(str(tmp_path / "nothing.yaml"))
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(BASE | {"train": {"epochs": 1, "num_epochs": 2}}))
    with pytest.raises(RecipeError, match="Here it is called train.epochs"):
        train(tmp_path / "r.yaml")
    with pytest.raises(RecipeError, match="and dict came"):
        train(BASE)
