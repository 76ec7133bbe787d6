"""What a run keeps its frozen weights in, and multiplies them in, where the recipe says `auto`."""

import torch

from glm45_tune.conversion.hf_files import HfDir
from glm45_tune.conversion.tensors import HfReader
from glm45_tune.errors import RecipeError
from glm45_tune.recipe import Recipe, with_frozen


def settled(recipe: Recipe, source: HfReader) -> Recipe:
    """The recipe with `model.frozen_dtype` and `model.frozen_products` as this checkpoint and this card make them.

    Raises RecipeError when FP8 products are asked for and the card has none.
    """
    # a CPU computes the same by plain torch
    has_products = not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (9, 0)
    if recipe.model.frozen_products == "fp8" and not has_products:
        raise RecipeError(
            f"model.frozen_products is fp8, but {torch.cuda.get_device_name()} has no FP8 products; allowed there: bf16 or auto."
        )
    is_fp8 = isinstance(source, HfDir) and bool(source.scales)
    return with_frozen(recipe, is_fp8, has_products)
