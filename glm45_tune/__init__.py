"""Fine-tune GLM-4.5 and GLM-4.5-Air on megatron-core.

from glm45_tune import Recipe, train, export
train(Recipe.load("recipes/tiny_lora.yaml"))
export("runs/tiny_lora", "exports/tiny_lora")
"""

from importlib import import_module

_PUBLIC = {
    "Recipe": "glm45_tune.recipe",
    "train": "glm45_tune.training.launch",
    "convert": "glm45_tune.conversion.stream",
    "export": "glm45_tune.hub.export",
}
__all__ = list(_PUBLIC)
__version__ = "0.1.0"


def __getattr__(name: str):
    # imported on first use: torch and megatron take seconds
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
