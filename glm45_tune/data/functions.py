"""A user's function by its name in a recipe, module:function."""

import importlib
import os
import sys


def function_named(name: str):
    """What module:function names; a module in the working directory is found too.

    Raises ModuleNotFoundError where there is none, ImportError where its module cannot be imported; the text says which and why.
    """
    module, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        # a user's module lies where the command is typed; last, so that no file there stands in for a library's
        sys.path.append(os.getcwd())
    try:
        found = importlib.import_module(module)
    except (Exception, SystemExit) as error:  # the user's program
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            raise ModuleNotFoundError(f"no such Python function: {error}") from error
        raise ImportError(f"the module {module} cannot be imported: {error!r}") from error
    if not hasattr(found, attribute):
        raise ModuleNotFoundError(f"no such Python function: {found.__name__} has no {attribute}")
    return getattr(found, attribute)
