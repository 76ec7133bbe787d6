"""One rule book: `plan` and `train` refuse the same recipes, with the same sentence."""

import random
from types import SimpleNamespace

import pytest
from conftest import recipe_dict

from glm45_tune.errors import UserError
from glm45_tune.plan import planner
from glm45_tune.plan.cards import CARDS
from glm45_tune.plan.models import find_spec
from glm45_tune.plan.planner import Hardware
from glm45_tune.recipe import Recipe
from glm45_tune.training import failure
from glm45_tune.training.prepare import prepare

RL = {"rewards": [{"function": "length"}], "max_new_tokens": 8}


def _refusal(call) -> str | None:
    try:
        call()
    except UserError as error:
        return str(error)
    return None


def _drawn(draw: random.Random) -> dict:
    """Sections of a recipe, most of whose numbers go together and some of which do not."""
    sizes = {
        "tensor_model_parallel_size": draw.choice((1, 1, 2, 2, 3, 4)),
        "pipeline_model_parallel_size": draw.choice((1, 1, 2, 3, 5)),
        "virtual_pipeline_model_parallel_size": draw.choice((1, 1, 1, 2)),
        "context_parallel_size": draw.choice((1, 1, 2)),
        "expert_model_parallel_size": draw.choice((1, 2, 4, 3)),
        "expert_tensor_parallel_size": draw.choice((1, 1, 2)),
        "world_size": draw.choice((None, 1, 2, 4, 6, 8)),
    }
    return {
        "parallel": sizes,
        "data": {"seq_length": draw.choice((160, 161, 333, 1001))},
        "train": {"global_batch_size": draw.choice((1, 3, 4, 8, 16)), "micro_batch_size": draw.choice((1, 1, 2))},
        "model": {"mtp_loss_scaling_factor": draw.choice((0, 0, 0.1))},
    }


def test_plan_and_train_refuse_the_same_recipes_with_the_same_sentence(checkpoints, corpus, tmp_path):
    """Drawn by a seed over sizes, ranks, batches, row lengths and MTP, with models that have MTP layers and that have none."""
    draw, taken, refused = random.Random(5), 0, set()
    for number in range(120):
        name = draw.choice(("air", "air-no-mtp"))
        document = recipe_dict(checkpoints[name], corpus, tmp_path / f"run{number}", **_drawn(draw))
        recipe = Recipe.from_dict(document)
        spec, _ = find_spec(recipe.model.path)
        layout = recipe.parallel.layout()
        hardware = Hardware(CARDS["h20"], layout.world_size, 8, 160)
        by_plan = _refusal(lambda: planner.plan(spec, recipe, layout, hardware))  # noqa: B023
        by_train = _refusal(lambda: prepare(recipe))  # noqa: B023
        assert by_plan == by_train, document
        taken += by_plan is None
        refused.add(by_plan and " ".join(by_plan.split()[:2]))
    assert taken > 10 and len(refused) > 5


@pytest.mark.parametrize("sizes", [{"tensor_model_parallel_size": 2}, {"context_parallel_size": 2}])
def test_rows_of_any_length_are_planned(checkpoints, corpus, cli, tmp_path, sizes):
    """Training pads them to what the ranks divide, so the planner counts them so."""
    recipe = Recipe.from_dict(
        recipe_dict(checkpoints["air"], corpus, tmp_path / "run", parallel=sizes, data={"seq_length": 1001})
    )
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    code, _, err = cli("plan", tmp_path / "recipe.yaml", "--gpu", "h20")
    assert code == 0, err


def test_reinforcement_learning_has_no_rule_on_its_batch(checkpoints, corpus, tmp_path):
    """Its batch is prompts; the planner takes any number of them as training does."""
    sections = {"rl": RL, "train": {"global_batch_size": 3}, "parallel": {"world_size": 2}, "lora": {"r": 2}}
    recipe = Recipe.from_dict(recipe_dict(checkpoints["air"], corpus, tmp_path / "run", **sections))
    spec, _ = find_spec(recipe.model.path)
    assert planner.plan(spec, recipe, recipe.parallel.layout(), Hardware(CARDS["h20"], 2, 8, 160)).stages


def test_out_of_memory_is_told_even_where_no_advice_can_be_had(monkeypatch):
    """Whatever the planner raises, the sentence names the rank and its step."""
    for fault in (UserError("a rule"), MemoryError(), KeyError("card")):

        def raises(job, fault=fault):
            raise fault

        monkeypatch.setattr(failure, "_advice", raises)
        watchdog = SimpleNamespace(step=2, phase="forward")
        said = failure._out_of_memory(None, watchdog, MemoryError("no room"))
        assert "rank 0 is out of memory in step 3, forward: no room" in said and type(fault).__name__ in said
