"""Every recipe of a cluster in small: the tiny twin of its layout is trained, and holds what the planner says it holds."""

import json
from pathlib import Path

import pytest
import yaml

from glm45_tune.plan.memory import Model
from glm45_tune.recipe import Recipe
from glm45_tune.spec import load_spec

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).parent / "twin_worker.py"
BIG = sorted(path for path in (ROOT / "recipes").glob("*.yaml") if not path.stem.startswith("tiny"))


def twin(path: Path, checkpoints, corpus, texts, output) -> dict:
    """The recipe as it is, of a tiny model: every parallel size above 1 is 2, rows are short, the batch is small."""
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    sizes = recipe.setdefault("parallel", {})
    sizes.update({key: 2 for key, size in sizes.items() if size > 1})
    like = "air" if "Air" in recipe["model"]["path"] else "355b"
    recipe["model"] |= {"path": str(checkpoints[like]), "params_dtype": "fp32"}
    is_text = recipe["data"].get("format") == "text"
    recipe["data"] |= {"train": str(texts if is_text else corpus), "seq_length": 160, "eval_ratio": 0.0}
    if recipe.pop("rl", None):  # answers are a server's; what trains on them has the same weights and layout
        del recipe["data"]["format"]
    train = recipe["train"]
    train |= {"global_batch_size": 4, "recompute_num_layers": min(train.get("recompute_num_layers", 1), 2)}
    recipe["output_dir"] = str(output / "run")
    return recipe


def smallest(recipe: dict) -> int:
    return Recipe.from_dict(recipe).parallel.layout().world_size


@pytest.fixture(scope="module")
def twins(tmp_path_factory, checkpoints, corpus, ranks) -> tuple[Path, dict[str, str], dict[str, dict]]:
    """All twins trained, each on as few ranks as its layout takes; those that take as many by one start.

    Gives (where they left what they held, recipe → its twin, twin → recipe); recipes whose twins are equal share one.
    """
    output = tmp_path_factory.mktemp("twins")
    texts = output / "texts.jsonl"
    texts.write_text(
        "".join(json.dumps({"text": f"第{n}条河流。The river is long. " * (1 + n % 4)}) + "\n" for n in range(24))
    )
    names, recipes = {}, {}
    for path in BIG:
        recipe = twin(path, checkpoints, corpus, texts, output)
        names[path.stem] = next((name for name, other in recipes.items() if other == recipe), path.stem)
        recipes[names[path.stem]] = recipe
    for world_size in sorted({smallest(recipe) for recipe in recipes.values()}):
        cases = output / f"cases{world_size}.json"
        chosen = [
            {"name": name, "recipe": recipe} for name, recipe in recipes.items() if smallest(recipe) == world_size
        ]
        cases.write_text(json.dumps(chosen))
        ranks(world_size, WORKER, [str(cases), str(output)])
    return output, names, recipes


@pytest.mark.parametrize("name", [path.stem for path in BIG])
def test_the_tiny_twin_of_a_recipe_trains_and_holds_what_is_planned(twins, name):
    """Weights, adapters, gradients: to the byte, on every rank. Optimizer state, which ranks share unevenly: together."""
    output, names, recipes = twins
    name = names[name]
    recipe = Recipe.from_dict(recipes[name])
    layout = recipe.parallel.layout()
    model = Model(load_spec(recipe.model.path), layout, recipe)
    planned = model.all_stages()
    found = [json.loads((output / f"{name}.{rank}.json").read_text()) for rank in range(layout.world_size)]
    assert len({tuple(rank["losses"]) for rank in found}) == 1
    for rank in found:
        stage = planned[rank["stage"]]
        for kind in ("weights", "lora", "gradients"):
            assert rank[kind] == getattr(stage, kind), (kind, rank["stage"])
    together = sum(planned[rank["stage"]].optimizer for rank in found)
    assert sum(rank["optimizer"] for rank in found) == pytest.approx(together, rel=1e-3)
