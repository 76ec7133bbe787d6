"""A run's directory: whose it is, whether this recipe may go on with it, and what stands in it from the start."""

import json
from pathlib import Path

from glm45_tune.conversion.tensors import HfReader, fingerprint
from glm45_tune.errors import UserError
from glm45_tune.recipe import Recipe

RECIPE_FILE = "recipe.yaml"
RUN_FILE = "glm45_tune.json"


def check(recipe: Recipe, source: HfReader) -> None:
    """Raise UserError when output_dir holds something else than this run, or this run of another model."""
    run = Path(recipe.output_dir)
    if not run.exists() or (run.is_dir() and not any(run.iterdir())):
        return
    if not (run / RUN_FILE).is_file():
        raise UserError(f"{run}: exists, is not empty and is no run of ours (no {RUN_FILE}). Choose another output_dir.")
    facts = json.loads((run / RUN_FILE).read_text(encoding="utf-8"))
    if facts.get("kind") != "run":
        raise UserError(f"{run}: holds a {facts.get('kind')!r}, not a run. Choose another output_dir.")
    if facts["fingerprint"] != fingerprint(source):
        raise UserError(
            f"{run}: is a run of another model ({facts['model']}); {recipe.model.path} cannot resume it. "
            "Choose another output_dir."
        )
    for name, wanted in _shape_of_training(recipe).items():
        if facts[name] != wanted:
            raise UserError(
                f"{run}: was trained with {name} {facts[name]}; the recipe now says {wanted}. Choose another output_dir."
            )


def _shape_of_training(recipe: Recipe) -> dict:
    """What decides which weights a checkpoint holds: a run cannot change it in the middle."""
    return {
        "lora": recipe.lora.model_dump() if recipe.lora else None,
        "mtp": recipe.model.mtp_loss_scaling_factor > 0,
        "freeze": recipe.train.freeze,
    }


def start(recipe: Recipe, source: HfReader, **facts: object) -> None:
    """Create the run directory and write what it is, and `facts` for its card. Called by one rank."""
    run = Path(recipe.output_dir)
    run.mkdir(parents=True, exist_ok=True)
    facts = {
        "kind": "run",
        "model": str(Path(recipe.model.path).resolve()),
        "fingerprint": fingerprint(source),
        **_shape_of_training(recipe),
        **facts,
    }
    (run / RUN_FILE).write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (run / RECIPE_FILE).write_text(recipe.to_yaml(), encoding="utf-8")
