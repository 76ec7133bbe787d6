"""The learning rate as a function of the step."""

import math

from glm45_tune.recipe import Recipe


def learning_rate(step: int, num_steps: int, lr: float, min_lr: float, warmup_ratio: float) -> float:
    """Rate of step 0 … num_steps − 1: a line from 0 over the warm-up (its first step is not 0), then a cosine to min_lr."""
    warmup = math.ceil(num_steps * warmup_ratio)
    if step < warmup:
        return lr * (step + 1) / warmup
    progress = (step - warmup) / max(num_steps - 1 - warmup, 1)
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def learning_rate_of(recipe: Recipe, step: int, num_steps: int) -> float:
    """A recipe's rate at a step."""
    options = recipe.optimizer
    lowest = options.lr / 10 if options.min_lr is None else options.min_lr
    return learning_rate(step, num_steps, options.lr, lowest, options.warmup_ratio)


def schedule_of(recipe: Recipe, num_steps: int) -> dict:
    """What a recipe's rate follows from, as a checkpoint keeps it."""
    names = ("lr", "min_lr", "warmup_ratio")
    return {"steps": num_steps, **{name: getattr(recipe.optimizer, name) for name in names}}


def changed_schedule(recipe: Recipe, num_steps: int, facts: dict) -> str | None:
    """What a resumed run's rate follows from now, where its checkpoint was saved under another schedule.

    facts: those of the checkpoint; one of an earlier version does not say its schedule.
    """
    before, now, step = facts.get("schedule"), schedule_of(recipe, num_steps), facts["step"]
    if before in (None, now) or not step < num_steps:
        return None
    changed = ", ".join(
        f"{name} {before.get(name)} → {value}" for name, value in now.items() if before.get(name) != value
    )
    rate = learning_rate_of(recipe, step, num_steps)
    return f"the recipe's as it is now, from step 1 on ({changed}): step {step + 1} has lr {rate:.3g}"
