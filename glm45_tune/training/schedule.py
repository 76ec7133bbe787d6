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
