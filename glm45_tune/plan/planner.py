"""A recipe, a number of cards and a kind of card → what every rank holds, how long a step takes, and whether it fits."""

from dataclasses import asdict, dataclass, replace

from glm45_tune.checks import check
from glm45_tune.errors import LayoutError, RecipeError, UserError
from glm45_tune.layout import Layout
from glm45_tune.plan.cards import Card
from glm45_tune.plan.memory import GIB, Model, StageMemory
from glm45_tune.plan.timing import StepTime, step_seconds
from glm45_tune.recipe import ParallelConfig, Recipe, with_frozen
from glm45_tune.spec import ModelSpec

# more are not tried where a recipe does not fit
MOST_CARDS = 1024


@dataclass(frozen=True)
class Hardware:
    """Cards of one kind. document_tokens: how long documents are (mean over tokens), for attention's share of the time."""

    card: Card
    gpus: int
    gpus_per_node: int
    document_tokens: float


@dataclass(frozen=True)
class Plan:
    """One layout on one kind of card."""

    spec: ModelSpec
    recipe: Recipe
    layout: Layout
    hardware: Hardware
    stages: list[StageMemory]
    time: StepTime | None
    """None where it is not known: on a CPU, and in reinforcement learning, where an engine writes most of the time."""

    @property
    def worst(self) -> StageMemory:
        return max(self.stages, key=lambda stage: stage.needed)

    @property
    def fits(self) -> bool:
        return self.worst.needed <= self.hardware.card.memory_gib * GIB

    @property
    def recomputed(self) -> int:
        return sum(sum(stage.recompute) for stage in self.stages)

    @property
    def tokens_per_second(self) -> float:
        return self.time.tokens / self.time.total if self.time else 0.0


def plan(spec: ModelSpec, recipe: Recipe, layout: Layout, hardware: Hardware) -> Plan:
    """The recipe under this layout as it stands; with recompute `auto`, the fastest that fits. Raises UserError."""
    check(spec, recipe, layout)
    if recipe.train.recompute_granularity == "auto":
        return auto(spec, recipe, layout, hardware)[0]
    model = Model(spec, layout, _on(recipe, hardware.card))
    return _of(model, hardware, model.all_stages())


def with_recompute(spec: ModelSpec, recipe: Recipe, layout: Layout, stage: int, hardware: Hardware) -> Recipe:
    """Return the recipe as the ranks of a stage run it.

    Recompute `auto` is what `plan` says of this hardware, or all layers where even that is too
    little by its count.
    """
    if recipe.train.recompute_granularity != "auto":
        return recipe
    found, again = auto(spec, recipe, layout, hardware)
    if again[stage]:
        chosen = {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": again[stage]}
    else:
        chosen = {"recompute_granularity": "selective" if found.recipe.train.recompute_modules else None}
    return found.recipe.model_copy(update={"train": found.recipe.train.model_copy(update=chosen)})


def with_turned(spec: ModelSpec, recipe: Recipe, layout: Layout, hardware: Hardware) -> Recipe:
    """The recipe with `model.frozen_turned` settled: kept where that fits beside a step that recomputes nothing.

    A GiB of activations that need not be computed again saves more time than one of transposes. `recipe` is what `with_recompute` gives.
    """
    model, train = recipe.model, recipe.train
    if model.frozen_turned is not None:
        return recipe
    keeps = recipe.model_copy(update={"model": model.model_copy(update={"frozen_turned": True})})
    turns = (
        model.frozen_dtype == "fp8" and model.frozen_products != "bf16" and hardware.card.tflops > 0
    )  # a CPU does not
    if turns and train.recompute_granularity is None and plan(spec, keeps, layout, hardware).fits:
        return keeps
    return recipe.model_copy(update={"model": model.model_copy(update={"frozen_turned": False})})


def auto(spec: ModelSpec, recipe: Recipe, layout: Layout, hardware: Hardware) -> tuple[Plan, list[int]]:
    """Recompute `auto`, and how many first layers of each stage's segments it computes again: all where nothing fits."""
    found = _fastest(spec, recipe, layout, hardware)
    if found:
        return found
    model = Model(spec, layout, _on(recipe, hardware.card))
    stages = [model.memory(stage, model.first_layers(stage, count)) for stage, count in enumerate(model.stages)]
    return _of(model, hardware, stages), model.stages


def _fastest(spec: ModelSpec, recipe: Recipe, layout: Layout, hardware: Hardware) -> tuple[Plan, list[int]] | None:
    """Recompute as few first layers as fit; None: nothing fits.

    Of the others what the recipe names, or else nothing, their attention or their experts,
    whichever makes the fastest step.
    """
    free, best, named = hardware.card.memory_gib * GIB, None, recipe.train.recompute_modules
    for modules in ([], ["attention"], ["moe"]) if named is None else (named,):
        train = recipe.train.model_copy(update={"recompute_modules": modules})
        model = Model(spec, layout, _on(recipe.model_copy(update={"train": train}), hardware.card))
        again = [model.least(stage, free) for stage in range(len(model.stages))]
        if None in again:
            continue
        found = _of(
            model, hardware, [model.memory(stage, model.first_layers(stage, n)) for stage, n in enumerate(again)]
        )
        if best is None or found.tokens_per_second > best[0].tokens_per_second:
            best = found, again
        if not any(again):
            break  # with nothing left out it fits
    return best


def _on(recipe: Recipe, card: Card) -> Recipe:
    """The recipe with what this card multiplies frozen FP8 weights in."""
    return with_frozen(recipe, recipe.model.frozen_dtype == "fp8", card.has_fp8)


def _of(model: Model, hardware: Hardware, stages: list[StageMemory]) -> Plan:
    card = hardware.card
    is_known = card.tflops and getattr(model.recipe, "rl", None) is None  # an engine's rollouts are not counted
    time = step_seconds(model, stages, card, hardware.document_tokens, hardware.gpus_per_node) if is_known else None
    return Plan(model.spec, model.recipe, model.layout, hardware, stages, time)


def with_least_recompute(spec: ModelSpec, recipe: Recipe, layout: Layout, hardware: Hardware) -> Plan | None:
    """The layout with the least recompute that a recipe can name, whatever this recipe says; None where nothing fits.

    The plan's recipe holds those settings, so that they give the same figures when planned again. A recipe has one count
    for all stages; only `auto` lets each stage have its own. Raises UserError on a wrong layout.
    """
    check(spec, recipe, layout)
    parallel = ParallelConfig(**asdict(layout))
    best = None
    for modules in ([], ["attention"], ["moe"]):
        changes = {"recompute_granularity": "auto", "recompute_modules": modules}
        model = Model(spec, layout, _on(_with_train(recipe, **changes), hardware.card))
        again = model.least_everywhere(hardware.card.memory_gib * GIB)
        if again is None:
            continue
        settings = _with_train(recipe, **_settings(again, modules)).model_copy(update={"parallel": parallel})
        model = Model(spec, layout, _on(settings, hardware.card))
        found = _of(model, hardware, model.all_stages())
        if best is None or found.tokens_per_second > best.tokens_per_second:
            best = found
        if not again:
            break  # with nothing left out it fits
    return best


def _settings(again: int, modules: list[str]) -> dict:
    """The keys of `train` that compute the first `again` layers of every segment again, and `modules` of the others."""
    if again:
        return {
            "recompute_granularity": "full",
            "recompute_method": "block",
            "recompute_num_layers": again,
            "recompute_modules": modules or None,
        }
    return {"recompute_granularity": "selective" if modules else None, "recompute_modules": modules or None}


def _with_train(recipe: Recipe, **changes) -> Recipe:
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=changes)})


def search(spec: ModelSpec, recipe: Recipe, hardware: Hardware) -> list[Plan]:
    """Every layout of these cards that fits and that the recipe allows, fastest first (by memory where speed is not known)."""
    found, document = [], recipe.model_dump()
    for layout in _layouts(spec, recipe, hardware):
        try:
            Recipe.from_dict(document | {"parallel": asdict(layout)})
            candidate = with_least_recompute(spec, recipe, layout, hardware)
        except UserError:
            continue
        if candidate:
            found.append(candidate)
    return sorted(found, key=lambda plan: (-plan.tokens_per_second, plan.worst.needed))


def _layouts(spec: ModelSpec, recipe: Recipe, hardware: Hardware):
    gpus = hardware.gpus
    divisors = [n for n in range(1, gpus + 1) if gpus % n == 0]
    base = recipe.parallel.layout(gpus)
    context = base.context_parallel_size
    for tensor in (n for n in divisors if n <= hardware.gpus_per_node and spec.num_query_groups % n == 0):
        for pipeline in (n for n in divisors if n <= spec.num_layers and gpus % (n * tensor * context) == 0):
            for expert in (n for n in divisors if spec.num_moe_experts % n == 0 and gpus % (n * pipeline) == 0):
                yield replace(
                    base,
                    tensor_model_parallel_size=tensor,
                    pipeline_model_parallel_size=pipeline,
                    expert_model_parallel_size=expert,
                    expert_tensor_parallel_size=1,
                )


def fewest(spec: ModelSpec, recipe: Recipe, hardware: Hardware, most: int = MOST_CARDS) -> int | None:
    """The fewest cards, more than the plan has, on which the recipe's own layout fits as it stands."""
    step = recipe.parallel.layout().smallest_world_size
    for gpus in range((hardware.gpus // step + 1) * step, most + 1, step):
        try:
            if plan(spec, recipe, recipe.parallel.layout(gpus), replace(hardware, gpus=gpus)).fits:
                return gpus
        except RecipeError:  # the batch does not divide
            continue
        except LayoutError:
            return None
    return None


def reason(found: Plan, best: Plan) -> str:
    """Why a layout stands where it stands, in a few words."""
    again = found.recomputed
    halves = " and ".join(found.recipe.train.recompute_modules or [])
    parts = [f"{again} of {found.spec.num_layers} layers recomputed"] if again else []
    parts += [f"{halves} of {'the others' if again else 'all layers'} recomputed"] if halves else []
    parts = parts or ["nothing recomputed"]
    if found.time:
        shares = {name: value / found.time.total for name, value in found.time.parts.items()}
        for name, what in (("bubble", "pipeline idle"), ("wires", "on the wires"), ("optimizer", "in the optimizer")):
            if shares[name] >= 0.05:
                parts.append(f"{shares[name]:.0%} {what}")
    free = found.hardware.card.memory_gib - found.worst.needed / GIB
    parts.append(f"{free:.1f} GiB to spare")
    if found is not best and found.worst.needed < best.worst.needed - GIB:
        parts.append("less memory than the fastest")
    return ", ".join(parts)


def what_binds(found: Plan) -> str:
    """The limit that a change of the recipe would move first."""
    worst = found.worst
    parts = {
        "weights": worst.weights,
        "gradients": worst.gradients,
        "optimizer state": worst.optimizer,
        "Adam's own buffers" if worst.worst == "optimizer" else "activations": max(
            worst.optimizer_working if worst.worst == "optimizer" else worst.activations, 0
        ),
        "logits" if worst.worst == "head" else "a layer's backward": worst.working if worst.worst != "optimizer" else 0,
    }
    name = max(parts, key=parts.get)
    memory = f"memory: {name}, {parts[name] / worst.needed:.0%} of stage {worst.stage}"
    if found.time is None:
        return memory
    slow = max(found.time.parts, key=found.time.parts.get)
    return f"{memory}; time: {slow}, {found.time.parts[slow] / found.time.total:.0%} of a step"
