"""The planner: counts are exact, limits are said with what would fit, and nothing heavy is imported for it."""

import dataclasses
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from glm45_tune.conversion.names import hf_shapes
from glm45_tune.errors import UserError
from glm45_tune.layout import Layout
from glm45_tune.plan import rates
from glm45_tune.plan.cards import CARDS, find_card
from glm45_tune.plan.memory import GIB, Model
from glm45_tune.plan.models import find_spec
from glm45_tune.plan.planner import Hardware, plan, search, with_recompute
from glm45_tune.plan.report import recompute_text, settings_text
from glm45_tune.plan.timing import step_seconds, work
from glm45_tune.recipe import Recipe

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
BIG = [path for path in RECIPES if not path.stem.startswith("tiny")]
AIR_LORA = ROOT / "recipes" / "air_lora_4gpu.yaml"


@pytest.mark.parametrize("name, billions", [("GLM-4.5-Air", (106.85, 110.5)), ("zai-org/GLM-4.5", (352.8, 358.3))])
def test_weights_add_up_to_the_published_count(name, billions):
    """facts: parameters without and with MTP; the names table counts the same, its copies of embedding and head apart."""
    spec, _ = find_spec(name)
    for with_mtp, published in zip((False, True), billions):
        recipe = Recipe.load(AIR_LORA, ["lora=null", f"model.mtp_loss_scaling_factor={0.1 * with_mtp}"])
        counted = Model(spec, Layout(), recipe).weights(0)
        shapes = hf_shapes(spec if with_mtp else dataclasses.replace(spec, mtp_num_layers=0))
        rows = sum(math.prod(shape) for key, shape in shapes.items() if not key.endswith("e_score_correction_bias"))
        copies = 2 * spec.vocab_size * spec.hidden_size if with_mtp else 0
        assert counted.dense + counted.expert == rows - copies
        assert (counted.dense + counted.expert + copies) / 1e9 == pytest.approx(published, abs=0.06)


@pytest.mark.parametrize("layout", [Layout(4, 1, 8, 1, 8), Layout(2, 4, 16, 1, 64), Layout(8, 16, 8, 1, 128)], ids=str)
def test_what_ranks_hold_adds_up_to_the_model(layout):
    """Matrices of all ranks together, each replica once, are the model's; only what every tensor rank repeats is more."""
    spec, _ = find_spec("GLM-4.5")
    recipe = Recipe.load(AIR_LORA, ["lora=null"])
    whole, cut = Model(spec, Layout(), recipe).weights(0), Model(spec, layout, recipe)
    stages = [cut.weights(stage) for stage in range(len(cut.stages))]
    assert sum(stage.expert for stage in stages) * layout.expert_model_parallel_size == whole.expert
    repeated = sum(2 * spec.hidden_size + 2 * spec.kv_channels + spec.is_moe(n) * spec.num_moe_experts * spec.hidden_size
                   for n in range(spec.num_layers)) + spec.hidden_size  # fmt: skip
    tp = layout.tensor_model_parallel_size
    assert sum(stage.dense for stage in stages) * tp == whole.dense + (tp - 1) * repeated


def _line(path: Path) -> list[str]:
    """The arguments of the plan line in a recipe's header."""
    return re.search(rf"glm45-tune plan recipes/{path.name}(.*)", path.read_text(encoding="utf-8"))[1].split()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_fits_the_cards_its_header_names(path, cli, checkpoints):
    """The header's own plan line, as a user would type it."""
    model = [f"model.path={checkpoints['air']}"] if path.stem.startswith("tiny") else []
    code, out, err = cli("plan", path, *model, *_line(path))
    assert code == 0 and "memory     fits" in out, err
    code, out, err = cli("plan", path, *model, *_line(path), "--json")
    document = json.loads(out)
    assert (
        code == 0 and document["fits"] and len(document["stages"]) == document["layout"]["pipeline_model_parallel_size"]
    )


@pytest.mark.parametrize("path", [path for path in BIG if "_1x" not in path.stem], ids=lambda path: path.stem)
def test_one_card_too_few_is_refused_with_the_nearest_that_fits(path, cli):
    arguments = _line(path)
    count = arguments.index("--gpus") + 1
    arguments[count] = str(int(arguments[count]) - 1)
    code, _, err = cli("plan", path, *arguments)
    assert code == 2 and "does not divide" in err and "Nearest that fits" in err
    assert f"{int(arguments[count]) + 1} × {arguments[arguments.index('--gpu') + 1]}, the recipe as it is" in err


FAULTS = {
    "experts": (
        ["parallel.expert_model_parallel_size=3"],
        ["3 does not divide the 128 experts", "allowed: 1, 2, 4, 8"],
    ),
    "heads": (["parallel.tensor_model_parallel_size=16"], ["does not divide the 8 query groups; allowed: 1, 2, 4, 8"]),
    "stages": (["parallel.pipeline_model_parallel_size=64"], ["64 exceeds the 46 layers"]),
    "batch": (
        ["train.global_batch_size=6"],
        ["global_batch_size 6 is not a multiple of micro_batch_size 1 × 4", "use 4 or 8"],
    ),
    "card": (["--gpu", "b100"], ["unknown card", "Did you mean", "memory_gib=…"]),
    "card by half": (["--gpu", "memory_gib=48"], ["tflops, bandwidth_gb_s, link_gb_s missing"]),
    "card by nonsense": (["--gpu", "h100:memory_gib=-1"], ["not NAME=NUMBER above 0"]),
    "memory": (["--gpu", "a100", "model.path=GLM-4.5"], ["GiB of 79.2", "weights", "Nearest that fits", "× a100"]),
    "model": (["model.path=/nope/GLM-9"], ["no such directory", "GLM-4.5-Air"]),
    "script without a card": (["--sbatch"], ["--gpu"]),
    "limit without a script": (["--minutes", "60"], ["--minutes 60 is the time limit of --sbatch's script"]),
    "documents longer than a row": (
        ["--document-tokens", "8193", "data.seq_length=8192"],
        ["--document-tokens 8193 is more than a row holds, data.seq_length 8192"],
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_ends_with_what_would_be_right(name, cli):
    changes, words = FAULTS[name]
    card = [] if "--gpu" in changes or "--sbatch" in changes else ["--gpu", "h20"]
    code, _, err = cli("plan", AIR_LORA, *card, *changes)
    assert code == 2 and "Traceback" not in err
    for word in words:
        assert word in err


def test_a_card_can_be_described():
    card = find_card("memory_gib=94,tflops=835,bandwidth_gb_s=3900,link_gb_s=600")
    assert (card.memory_gib, card.tflops, card.node_link_gb_s) == (94, 835, 50)
    assert find_card("H100:memory_gib=94") == dataclasses.replace(CARDS["h100"], memory_gib=94)
    assert find_card("cpu").memory_gib > 0.5


def test_355b_on_128_ranks_takes_a_second_and_no_torch(tmp_path):
    """≤ 1 s of this process's time, start of Python included; in an empty folder, by the model's name alone."""
    code = (
        "import resource, sys\n"
        "from glm45_tune.cli import main\n"
        f"sys.argv = ['glm45-tune', 'plan', {str(ROOT / 'recipes' / 'glm45_sft_128xh20.yaml')!r}, '--gpu', 'h20', '--json']\n"
        "main.__globals__['app'](standalone_mode=False)\n"
        "used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "print(used.ru_utime + used.ru_stime, sorted({'torch', 'megatron', 'transformers'} & set(sys.modules)))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    document, used = ended.stdout.splitlines()
    assert json.loads(document)["layout"]["world_size"] == 128
    seconds, heavy = used.split(" ", 1)
    assert float(seconds) < 1.0 and heavy == "[]"


def _air(*overrides: str) -> tuple:
    recipe = Recipe.load(AIR_LORA, overrides)
    spec, _ = find_spec(recipe.model.path)
    return spec, recipe.parallel.layout(), recipe


@pytest.mark.parametrize("gib", [72, 79.1, 95.2, 130])
def test_the_least_recompute_is_the_least(gib):
    """It fits, and with one layer less it would not."""
    model = Model(*_air())
    again = model.least(0, gib * GIB)
    assert model.memory(0, model.first_layers(0, again)).needed <= gib * GIB
    assert again == 0 or model.memory(0, model.first_layers(0, again - 1)).needed > gib * GIB


def test_no_recompute_is_enough_for_too_little_memory():
    assert Model(*_air()).least(0, 60 * GIB) is None


def test_laws_of_memory():
    """More recompute keeps less; more experts' ranks hold less; a longer row keeps more; full training needs 18 bytes a weight."""

    def needed(*overrides):
        spec, layout, recipe = _air(*overrides)
        return max(stage.needed for stage in Model(spec, layout, recipe).all_stages())

    none = needed("train.recompute_granularity=null")
    assert needed() < needed("train.recompute_method=block", "train.recompute_num_layers=20") < none
    assert needed("train.recompute_granularity=selective") < none
    assert needed("parallel.expert_model_parallel_size=8") < needed() < needed("data.seq_length=16384")
    assert needed() < needed("lora.target_modules=all-linear")
    spec, layout, recipe = _air("lora=null")
    stage = Model(spec, layout, recipe).all_stages()[0]
    held = Model(spec, layout, recipe).weights(0)
    assert stage.gradients == 4 * (held.dense + held.expert) and stage.weights == 2 * (held.dense + held.expert)
    assert stage.optimizer == 12 * (held.dense / 4 + held.expert)


def test_a_measured_layer_is_met_by_the_time_model():
    """46 layers at the measured milliseconds are the step's part that layers take; a card with half the speed takes longer."""
    one = ["train.recompute_granularity=null", "parallel.expert_model_parallel_size=1", "train.global_batch_size=1"]
    spec, layout, recipe = _air(*one)
    model = Model(spec, layout, recipe)

    def seconds(card, layers, recipe=recipe):
        spec_ = dataclasses.replace(spec, num_layers=layers)
        model = Model(spec_, layout, recipe)
        return step_seconds(model, model.all_stages(), card, rates.DOCUMENT_TOKENS).total

    card = CARDS[rates.MEASURED_CARD]
    assert (seconds(card, 46) - seconds(card, 45)) * 1e3 == pytest.approx(rates.LAYER_MS, rel=0.01)
    everywhere = Recipe.load(AIR_LORA, [*one, "lora.target_modules=all-linear", "lora.r=16"])
    more = seconds(card, 46, everywhere) - seconds(card, 45, everywhere)
    assert more * 1e3 == pytest.approx(1.12 * rates.LAYER_MS, rel=0.04)  # so much more was measured
    slower = dataclasses.replace(card, tflops=card.tflops / 2)
    assert seconds(card, 46) < seconds(slower, 46) < 2 * seconds(card, 46)
    assert step_seconds(model, model.all_stages(), card, 1024).total < seconds(card, 46)


def test_work_is_four_flop_a_frozen_weight_and_six_a_trained_one():
    """Of the 12 B weights that a token of Air meets, the head's only where its prediction counts; and causal attention by its squares."""
    spec, _ = find_spec("GLM-4.5-Air")
    per_layer = 3 * spec.hidden_size * spec.moe_ffn_hidden_size * (spec.moe_router_topk + spec.num_shared_experts)
    heads = spec.num_attention_heads * spec.kv_channels
    attention = 2 * spec.hidden_size * (heads + spec.num_query_groups * spec.kv_channels)
    dense, moe = spec.num_dense_layers, spec.num_layers - spec.num_dense_layers
    active = spec.num_layers * attention + moe * per_layer + dense * 3 * spec.hidden_size * spec.ffn_hidden_size
    for changes, factor in (([], 4), (["lora=null"], 6)):
        found = work(spec, Recipe.load(AIR_LORA, changes))
        short = 1000 * [1]  # hardly any attention
        assert found.of(short, 0) == pytest.approx(factor * active * 1000, rel=0.03)
        assert found.of([1000], 10) - found.of([1000], 0) == pytest.approx(
            factor * spec.hidden_size * spec.vocab_size * 10
        )
        squares = found.of([2000], 0) - found.of([1000, 1000], 0)
        assert squares == pytest.approx(3.5 * spec.num_layers * 2 * heads * (2000**2 - 2 * 1000**2))


def test_search_ranks_what_fits(cli):
    """Every layout found fits and is valid; the first is the fastest; and the printed settings are a recipe that fits."""
    spec, _, recipe = _air()
    hardware = Hardware(CARDS["h100"], 8, 8, 8192)
    found = search(spec, recipe, hardware)
    assert len(found) > 5 and all(plan.fits for plan in found)
    assert found == sorted(found, key=lambda plan: -plan.tokens_per_second)
    code, out, _ = cli("plan", AIR_LORA, "--gpu", "h100", "--gpus", 8, "--search", "--json")
    first = json.loads(out)[0]
    assert code == 0 and first["why"]
    code, out, err = cli("plan", AIR_LORA, "--gpu", "h100", "--gpus", 8, *first["settings"].split(), "--json")
    assert code == 0, err
    assert json.loads(out)["time"]["seconds_per_step"] == pytest.approx(first["time"]["seconds_per_step"], rel=1e-6)


OFFICIAL = [
    ("air_lora_4gpu", 4, 3),
    ("glm45_lora_16xh20", 16, 8),
    ("air_sft_32xh20", 32, 28),
    ("glm45_sft_128xh20", 128, 96),
]


@pytest.mark.parametrize("name, gpus, least", OFFICIAL)
def test_the_official_table_is_what_search_says(name, gpus, least):
    """docs/planning.md: with the official number of H20 nothing is recomputed, and the fewer that it names fit, laid out as it says."""
    recipe, document = Recipe.load(ROOT / "recipes" / f"{name}.yaml"), (ROOT / "docs" / "planning.md").read_text()
    spec, _ = find_spec(recipe.model.path)
    found = {n: search(spec, recipe, Hardware(CARDS["h20"], n, 8, recipe.data.seq_length)) for n in (gpus, least)}
    (row,) = (
        line
        for line in document.splitlines()
        if f"| {gpus} × H20 with nothing recomputed; **{least} × H20** fit" in line
    )
    assert not found[gpus][0].recomputed and not found[gpus][0].recipe.train.recompute_modules
    layout = found[least][0].layout
    tensor, pipeline = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
    said = [f"tensor {tensor}"] * (tensor > 1) + [f"pipeline {pipeline}"] * (tensor > 1 < pipeline)
    again = found[least][0].recomputed
    said += [f"{again} of {spec.num_layers} recomputed"] * (again > 0)
    assert all(words in row for words in said)


def test_search_knows_what_the_recipe_refuses(cli, checkpoints):
    """A local engine and sample texts are not written over pipeline stages."""
    for name, *more in (("tiny_grpo",), ("tiny_lora", "logging.num_samples=2")):
        command = ("plan", ROOT / "recipes" / f"{name}.yaml", f"model.path={checkpoints['air']}", *more)
        code, out, err = cli(*command, "--search", "--gpu", "h20", "--gpus", 4, "--json")
        assert code == 0, err
        assert {layout["layout"]["pipeline_model_parallel_size"] for layout in json.loads(out)} == {1}


def test_without_a_card_all_are_shown(cli):
    code, out, _ = cli("plan", AIR_LORA)
    assert code == 0 and all(name in out for name in CARDS)
    code, out, err = cli("plan", AIR_LORA, "model.path=GLM-4.5")
    assert code == 2 and "Nearest that fits" in err


def test_the_script_asks_for_whole_nodes(cli):
    code, out, _ = cli(
        "plan", ROOT / "recipes" / "glm45_sft_128xh20.yaml", "--gpu", "h20", "--sbatch", "optimizer.lr=2e-5"
    )
    assert code == 0 and "--nodes=16\n" in out and "--ntasks-per-node=8\n" in out and "--gpus-per-node=8\n" in out
    assert "optimizer.lr=2e-5)" in out
    code, _, err = cli("plan", AIR_LORA, "--gpu", "h20", "--gpus", 12, "train.global_batch_size=12", "--sbatch")
    assert code == 2 and "do not fill nodes of 8" in err


def test_config_json_alone_is_enough(tmp_path, cli):
    """A folder with nothing but config.json is planned, and a foreign one refused."""
    from glm45_tune.plan.models import PUBLIC

    (tmp_path / "config.json").write_text(json.dumps(PUBLIC["GLM-4.5"]))
    code, out, err = cli("plan", AIR_LORA, f"model.path={tmp_path}", "--gpu", "h20", "--gpus", 16,
                         "parallel.expert_model_parallel_size=16", "parallel.tensor_model_parallel_size=4", "--json")  # fmt: skip
    assert code == 0 and json.loads(out)["model"]["sizes_from"] == f"{tmp_path}/config.json", err
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(UserError, match="glm4_moe"):
        find_spec(str(tmp_path))


@pytest.mark.parametrize("gib", [20, 40, 60, 64, 70, 79.1, 90, 140])
@pytest.mark.parametrize("overrides", [(), ("parallel.pipeline_model_parallel_size=2", "parallel.expert_model_parallel_size=2"),
    ("parallel.pipeline_model_parallel_size=2", "parallel.virtual_pipeline_model_parallel_size=3", "parallel.expert_model_parallel_size=2")])  # fmt: skip
def test_auto_recompute_runs_as_it_is_planned(gib, overrides):
    """What the ranks of each stage run is what the plan shows: the least that fits the card, or all where nothing does."""
    spec, layout, recipe = _air("train.recompute_granularity=auto", *overrides)
    card = dataclasses.replace(CARDS["h20"], memory_gib=gib)
    hardware = Hardware(card, 4, 8, 8192)
    shown = plan(spec, recipe, layout, hardware)
    for stage, memory in enumerate(shown.stages):
        run = with_recompute(spec, recipe, layout, stage, hardware)
        assert Model(spec, layout, run).all_stages()[stage].recompute == memory.recompute
        assert Model(spec, layout, run).all_stages()[stage].needed == memory.needed
        least = Model(spec, layout, shown.recipe).least(stage, gib * GIB)
        assert all(memory.recompute) if least is None else (memory.needed <= gib * GIB)


def test_the_memory_benchmark_predicts_without_a_card():
    """`--dry` gives a row for every setting; on a card the same rows get what was measured."""
    command = [sys.executable, str(ROOT / "scripts" / "bench_memory.py"), "--dry"]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = [line for line in ended.stdout.splitlines() if line.startswith("| ") and " - " in line]
    assert len(rows) >= 12 and all(float(row.split("|")[2]) > 10 for row in rows)


@pytest.mark.parametrize("document_tokens, half", [(512, "attention"), (16384, "moe")])
def test_auto_recomputes_the_half_that_costs_less(document_tokens, half):
    """Of layers that are not recomputed whole: short documents make attention cheap, long ones dear. With room, nothing."""
    spec, _ = find_spec("GLM-4.5-Air")
    recipe = Recipe.from_dict(
        {
            "model": {"path": "GLM-4.5-Air"},
            "data": {"train": "none", "seq_length": 16384},
            "parallel": {"expert_model_parallel_size": 2, "world_size": 2},
            "lora": {"r": 16, "lora_alpha": 32},
            "train": {"steps": 1, "global_batch_size": 2, "recompute_granularity": "auto"},
            "output_dir": "none",
        }
    )
    layout = recipe.parallel.layout()

    def chosen(memory_gib, **train):
        hardware = Hardware(dataclasses.replace(CARDS["h200"], memory_gib=memory_gib), 2, 2, document_tokens)
        asked = recipe.model_copy(update={"train": recipe.train.model_copy(update=train)})
        run = with_recompute(spec, asked, layout, 0, hardware).train
        shown = plan(spec, asked, layout, hardware)
        assert run.recompute_granularity != "full" or sum(shown.stages[0].recompute) == run.recompute_num_layers
        return run, shown

    run, shown = chosen(137.4)
    assert run.recompute_granularity == "full" and run.recompute_method == "block" and run.recompute_modules == [half]
    named, slower = chosen(137.4, recompute_modules=[])
    assert named.recompute_modules == [] and shown.time.total < slower.time.total and shown.fits and slower.fits
    assert chosen(1000.0)[0].recompute_granularity is None
    most, _ = chosen(1.0)
    assert most.recompute_granularity == "full" and most.recompute_num_layers == spec.num_layers


def test_what_search_prints_is_what_it_ranked(cli):
    """Whatever the recipe has recomputed: the overrides replace it."""
    given = ["train.recompute_granularity=selective", "train.recompute_modules=[attention,moe]"]
    code, out, _ = cli("plan", AIR_LORA, "--gpu", "h20", "--gpus", 4, "--search", "--json", *given)
    first = json.loads(out)[0]
    assert code == 0
    code, out, err = cli("plan", AIR_LORA, "--gpu", "h20", "--gpus", 4, *given, *first["settings"].split(), "--json")
    assert code == 0, err
    assert json.loads(out)["time"]["seconds_per_step"] == pytest.approx(first["time"]["seconds_per_step"], rel=1e-6)


SEARCHES = [
    ("air_lora_4gpu", "h20", 4, ()),
    ("air_lora_4gpu", "h100", 5, ("train.global_batch_size=20",)),
    ("air_lora_4gpu", "h20", 3, ()),
    (
        "air_lora_4gpu",
        "h100",
        4,
        ("parallel.virtual_pipeline_model_parallel_size=3", "train.recompute_granularity=auto"),
    ),
    ("glm45_lora_16xh20", "h20", 8, ("train.recompute_granularity=selective", "train.recompute_modules=[moe]")),
    ("air_sft_32xh20", "h20", 28, ("parallel.context_parallel_size=2",)),
    ("air_lora_4gpu", "h200", 6, ("model.mtp_loss_scaling_factor=0.1", "data.seq_length=24001")),
]


@pytest.mark.parametrize("name, card, gpus, changes", SEARCHES)
def test_every_row_of_a_search_is_what_its_settings_plan(name, card, gpus, changes):
    """Its memory, its time and its recomputed layers, whatever stages differ in and whatever the recipe said before."""
    path = ROOT / "recipes" / f"{name}.yaml"
    recipe = Recipe.load(path, changes)
    spec, _ = find_spec(recipe.model.path)
    hardware = Hardware(CARDS[card], gpus, 8, recipe.data.seq_length)
    found = search(spec, recipe, hardware)
    assert found and all(row.fits for row in found)
    for row in found:
        again = Recipe.load(path, [*changes, *settings_text(row).split()])
        planned = plan(spec, again, again.parallel.layout(), hardware)
        assert planned.layout == row.layout and planned.stages == row.stages and planned.time == row.time
        assert planned.recipe == row.recipe and recompute_text(planned) == recompute_text(row)


@pytest.mark.parametrize(
    "name, card, gpus, changes",
    [
        ("air_lora_4gpu", "h100", 4, ("parallel.expert_model_parallel_size=4", "train.recompute_granularity=null")),
        ("air_lora_4gpu", "h100", 5, ("parallel.expert_model_parallel_size=1", "train.global_batch_size=20")),
        ("air_lora_4gpu", "h20", 3, ("parallel.expert_model_parallel_size=1", "train.global_batch_size=3")),
        ("glm45_lora_16xh20", "h20", 8, ()),
    ],
)
def test_what_a_plan_that_does_not_fit_suggests_fits_as_it_says(cli, name, card, gpus, changes):
    """The settings of the suggestion are planned without a word, and recompute as many layers as it says."""
    path = ROOT / "recipes" / f"{name}.yaml"
    code, _, err = cli("plan", path, "--gpu", card, "--gpus", gpus, *changes)
    assert code == 2 and "Nearest that fits" in err
    said = re.search(r"parallel\.tensor\S+( \S+=\S+)*", err)[0].split()
    code, out, err_again = cli("plan", path, "--gpu", card, *changes, *said, "--json")
    assert code == 0, err_again
    document = json.loads(out)
    count = sum(sum(stage["recompute"]) for stage in document["stages"])
    said_layers = re.search(r"(all|\d+) (?:of )?(?:the )?(\d+) layers", err)
    assert document["card"]["gpus"] == gpus
    which = 2 if said_layers and said_layers[1] == "all" else 1
    assert count == (int(said_layers[which]) if said_layers else 0), err
