"""What a process shares with its caller, left as it was found."""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator

# loggers that recommend what is not installed, or look for a CUDA compiler that nobody asked for
_LOUD = ("torch.utils.cpp_extension", "megatron")


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Around work of ours: environment variables, warnings filters and loggers' levels are afterwards as before."""
    with environment(), quiet():
        yield


@contextlib.contextmanager
def environment(*names: str) -> Iterator[None]:
    """Environment variables, these or all, are afterwards as before."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in names or {*os.environ, *before}:
            if name not in before:
                os.environ.pop(name, None)
            elif os.environ.get(name) != before[name]:
                os.environ[name] = before[name]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Put warnings filters and loggers' levels back at the end.

    Meanwhile megatron says nothing of itself or of what is not installed.
    """
    loggers = [logging.getLogger(name) for name in _LOUD]
    levels = [logger.level for logger in loggers]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex).* (is|are) not installed")
            warnings.filterwarnings("ignore", module=r"megatron\..*")
            warnings.filterwarnings("ignore", message=".*parse_schema.*", category=DeprecationWarning)
            # FlashAttention's compiler, of an argument that is not used
            warnings.filterwarnings("ignore", "Argument aux_data")
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
