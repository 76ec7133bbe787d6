"""From a recipe to running ranks: this process when torchrun started it or one rank is enough, else one process a rank."""

import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from glm45_tune.recipe import Recipe
from glm45_tune.training.prepare import prepare, world_size
from glm45_tune.training.ranks import Ranks


def train(recipe: Recipe, data: Iterable[dict] | None = None) -> int:
    """Run a recipe to its end. Returns its exit code: 0, or that of the rank that ended otherwise. Raises UserError before ranks start.

    data: rows to train on instead of the recipe's, such as {"messages": [...]}; they are written to a file that all ranks read.
    """
    if data is not None:
        with tempfile.TemporaryDirectory(prefix="glm45_tune_") as holder:
            rows = Path(holder) / "rows.jsonl"
            with open(rows, "w", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in data)
            changed = recipe.data.model_copy(update={"train": str(rows)})
            return train(recipe.model_copy(update={"data": changed}))
    if "RANK" in os.environ or not _is_for_several(recipe):
        from glm45_tune.mcore import runtime
        from glm45_tune.training import loop

        code = loop.run(prepare(recipe))
        runtime.stop()
        return code
    with Ranks() as ranks, tempfile.TemporaryDirectory(prefix="glm45_tune_") as holder:
        job = prepare(recipe)
        if job.stream:
            job.stream.close()  # each rank has its own
        resolved = Path(holder) / "recipe.yaml"
        resolved.write_text(recipe.to_yaml(), encoding="utf-8")
        return ranks.run(job.layout.world_size, ["train", str(resolved)])


def _is_for_several(recipe: Recipe) -> bool:
    """Without torch where the recipe says it."""
    return (recipe.parallel.world_size or recipe.parallel.layout().world_size) > 1 or world_size(recipe) > 1
