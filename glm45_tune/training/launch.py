"""From a recipe to running ranks: this process when torchrun started it or one rank is enough, else one process a rank."""

import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from glm45_tune.recipe import Recipe
from glm45_tune.training.prepare import prepare
from glm45_tune.training.ranks import start_ranks


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
    job = prepare(recipe)
    if "RANK" in os.environ or job.layout.world_size == 1:
        from glm45_tune.mcore import runtime
        from glm45_tune.training import loop

        code = loop.run(job)
        runtime.stop()
        return code
    if job.stream:
        job.stream.close()  # each rank has its own
    with tempfile.TemporaryDirectory(prefix="glm45_tune_") as holder:
        resolved = Path(holder) / "recipe.yaml"
        resolved.write_text(recipe.to_yaml(), encoding="utf-8")
        return start_ranks(["train", str(resolved)], job.layout.world_size)
