"""From a recipe to running ranks: this process when torchrun started it or one rank is enough, else one process a rank."""

import json
import os
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path

from glm45_tune import surroundings
from glm45_tune.errors import DataError, RecipeError
from glm45_tune.recipe import Recipe
from glm45_tune.training.prepare import prepare, world_size
from glm45_tune.training.ranks import Ranks

_GIVEN = "the rows given"


def train(recipe: Recipe | str | os.PathLike, data: Iterable[dict] | None = None) -> int:
    """Run a recipe to its end. Returns its exit code: 0, or that of the rank that ended otherwise. Raises UserError before ranks start.

    recipe: a checked one, or the path of a recipe file.
    data: rows to train on instead of the recipe's, such as {"messages": [...]}; they are written to a file that all ranks read.
    """
    if isinstance(recipe, str | os.PathLike):
        recipe = Recipe.load(recipe)
    if not isinstance(recipe, Recipe):
        raise RecipeError(f"train: a Recipe or a recipe file's path is expected, and {type(recipe).__name__} came.")
    if data is not None:
        with tempfile.TemporaryDirectory(prefix="glm45_tune_") as holder:
            rows = Path(holder) / "rows.jsonl"
            with open(rows, "w", encoding="utf-8") as file:
                file.writelines(_as_line(number, row) for number, row in enumerate(data, start=1))
            changed = recipe.data.model_copy(update={"train": str(rows)})
            try:
                return train(recipe.model_copy(update={"data": changed}))
            except DataError as error:  # the caller knows rows, and no file
                raise DataError(
                    re.sub(rf"{re.escape(str(rows))}:(\d+): ", rf"row \1 of {_GIVEN}: ", str(error))
                ) from None
    if "RANK" in os.environ or not _is_for_several(recipe):
        with surroundings.kept():
            from glm45_tune.mcore import runtime
            from glm45_tune.training import loop

            with runtime.borrowed():
                return loop.run(prepare(recipe))
    with Ranks() as ranks, tempfile.TemporaryDirectory(prefix="glm45_tune_") as holder:
        job = prepare(recipe)
        if job.stream:
            job.stream.close()  # each rank has its own
        resolved = Path(holder) / "recipe.yaml"  # in a directory that its owner alone may enter
        resolved.write_text(recipe.to_yaml(with_secrets=True), encoding="utf-8")
        return ranks.run(job.layout.world_size, ["train", str(resolved)])


def _as_line(number: int, row: object) -> str:
    if not isinstance(row, dict):
        raise DataError(f"row {number} of {_GIVEN}: is {type(row).__name__}; a dict is expected.")
    try:
        return json.dumps(row) + "\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(
            f"row {number} of {_GIVEN}: {error}; what JSON can hold is expected: text, numbers, lists, dicts."
        ) from None


def _is_for_several(recipe: Recipe) -> bool:
    """Without torch where the recipe says it."""
    return (recipe.parallel.world_size or recipe.parallel.layout().world_size) > 1 or world_size(recipe) > 1
