"""The rules on batch and layout: the one place that says which numbers of a recipe go together.

`plan` and `train` both ask here, so that neither refuses what the other takes. A row's length has no rule: training pads
rows to what tensor and context ranks divide. What a recipe can be told without a model stands in recipe.py.
"""

from math import prod

from glm45_tune.errors import LayoutError, RecipeError
from glm45_tune.layout import Layout
from glm45_tune.recipe import Recipe
from glm45_tune.spec import ModelSpec


def check(spec: ModelSpec, recipe: Recipe, layout: Layout, has_mtp: bool = True) -> None:
    """Raise UserError where the recipe's numbers do not fit the model or the ranks; it says what would.

    has_mtp: whether the checkpoint holds the MTP layers that its config names.
    """
    check_layout(layout, spec)
    factor = recipe.model.mtp_loss_scaling_factor
    if factor and not (has_mtp and spec.mtp_num_layers):
        raise RecipeError(f"model.mtp_loss_scaling_factor is {factor}, but {recipe.model.path} has no MTP layer.")
    if not recipe.rl:  # whose batch is prompts; their answers fill micro batches as they come
        _check_batch(recipe, layout)


def check_layout(layout: Layout, spec: ModelSpec) -> None:
    """Raise LayoutError unless the model and the ranks divide as this layout asks."""
    tp, pp, ep = (
        layout.tensor_model_parallel_size,
        layout.pipeline_model_parallel_size,
        layout.expert_model_parallel_size,
    )
    etp, cp, vpp = (
        layout.expert_tensor_parallel_size,
        layout.context_parallel_size,
        layout.virtual_pipeline_model_parallel_size,
    )
    _must_fit(layout, (("tensor", tp), ("context", cp), ("pipeline", pp)))
    _must_fit(layout, (("expert tensor", etp), ("expert", ep), ("pipeline", pp)))
    _must_divide("expert_model_parallel_size", ep, "experts", spec.num_moe_experts)
    _must_divide("tensor_model_parallel_size", tp, "attention heads", spec.num_attention_heads)
    _must_divide("tensor_model_parallel_size", tp, "query groups", spec.num_query_groups)
    _must_divide("tensor_model_parallel_size", tp, "words of the vocabulary", spec.vocab_size)
    _must_divide("tensor_model_parallel_size", tp, "columns of the dense MLP", spec.ffn_hidden_size)
    _must_divide("tensor_model_parallel_size", tp, "columns of the shared expert", spec.shared_ffn_hidden_size)
    _must_divide("expert_tensor_parallel_size", etp, "columns of an expert", spec.moe_ffn_hidden_size)
    if pp == 1 and vpp > 1:
        raise LayoutError(
            f"virtual_pipeline_model_parallel_size {vpp} interleaves pipeline stages, and pipeline_model_parallel_size "
            "is 1. Set it to 2 or more, or virtual_pipeline_model_parallel_size to 1."
        )
    if layout.num_segments > spec.num_layers:
        what = f"pipeline_model_parallel_size {pp}" + (
            f" × virtual_pipeline_model_parallel_size {vpp} = {layout.num_segments}" if vpp > 1 else ""
        )
        raise LayoutError(f"{what} exceeds the {spec.num_layers} layers of the model.")


def _must_fit(layout: Layout, axes: tuple[tuple[str, int], ...]) -> None:
    """Raise LayoutError unless the product of these axes divides the ranks; says which numbers of ranks are nearest."""
    product, ranks = prod(size for _, size in axes), layout.world_size
    if ranks % product == 0:
        return
    smallest = layout.smallest_world_size
    near = [count for count in (ranks // smallest * smallest, (ranks // smallest + 1) * smallest) if count]
    terms = " × ".join(f"{name} {size}" for name, size in axes if name != "context" or size > 1)
    raise LayoutError(
        f"{terms} = {product} does not divide the {ranks} ranks of this job. Use a multiple of {smallest} ranks; "
        f"nearest: {' or '.join(map(str, near))}."
    )


def _must_divide(key: str, size: int, what: str, count: int) -> None:
    if count % size:
        valid = [n for n in range(1, min(count, 256) + 1) if count % n == 0]
        raise LayoutError(f"{key} {size} does not divide the {count} {what}; allowed: {', '.join(map(str, valid))}.")


def _check_batch(recipe: Recipe, layout: Layout) -> None:
    """Raise RecipeError unless the rows of a step make whole micro batches, as many as the schedule asks for."""
    train, multiple = recipe.train, layout.microbatch_multiple
    share = train.micro_batch_size * layout.data_parallel_size
    batch, step = train.global_batch_size, share * multiple
    near = " or ".join(str(size) for size in (batch // step * step, (batch // step + 1) * step) if size)
    if batch % share:
        raise RecipeError(
            f"train.global_batch_size {batch} is not a multiple of micro_batch_size {train.micro_batch_size} × "
            f"{layout.data_parallel_size} data-parallel ranks = {share}; use {near}."
        )
    if batch % step:
        raise RecipeError(
            f"train.global_batch_size {batch} makes {batch // share} micro batches a step; interleaved pipeline "
            f"stages (virtual_pipeline_model_parallel_size {layout.virtual_pipeline_model_parallel_size}) need whole "
            f"groups of {multiple}, so a multiple of {step}; use {near}."
        )
