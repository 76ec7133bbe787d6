"""The only room that imports megatron."""

from glm45_tune.surroundings import kept

with kept():  # what megatron says and sets when it is first imported
    import megatron.core.models.backends
    import megatron.core.optimizer  # noqa: F401
