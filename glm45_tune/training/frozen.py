"""What a run keeps its frozen weights in, and multiplies them in, where the recipe says `auto`."""

import torch

from glm45_tune.conversion.hf_files import HfDir
from glm45_tune.conversion.tensors import HfReader
from glm45_tune.errors import RecipeError
from glm45_tune.recipe import Recipe


def settled(recipe: Recipe, source: HfReader) -> Recipe:
    """The recipe with `model.frozen_dtype` and `model.frozen_products` as this checkpoint and this card make them.

    Raises RecipeError when FP8 products are asked for and the card has none.
    """
    kept, products = recipe.model.frozen_dtype, recipe.model.frozen_products
    if kept == "auto":
        is_fp8 = isinstance(source, HfDir) and bool(source.scales)
        kept = "fp8" if is_fp8 and recipe.lora is not None else "bf16"
    has_products = not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (9, 0)
    if kept == "fp8" and products == "fp8" and not has_products:
        raise RecipeError(
            f"model.frozen_products is fp8, but {torch.cuda.get_device_name()} has no FP8 products; allowed there: bf16 or auto."
        )
    if products == "auto":
        products = "fp8" if has_products else "bf16"
    model = recipe.model.model_copy(update={"frozen_dtype": kept, "frozen_products": products})
    return recipe.model_copy(update={"model": model})
