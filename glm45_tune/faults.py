"""A recipe's text: `key=value` put into it, and what is wrong with it in words."""

import difflib
import re
import reprlib

import yaml
from pydantic import BaseModel

from glm45_tune.documents import DocumentError, parse_yaml
from glm45_tune.errors import RecipeError


class UniqueKeys(yaml.SafeLoader):
    """YAML whose mappings have each key once: of a section that stands twice the first would be lost without a word."""

    def construct_mapping(self, node, deep=False):
        found = set()
        for name, mark in [(key.value, key.start_mark) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]:
            if name in found and name != "<<":
                raise yaml.constructor.ConstructorError(None, None, f"the key {name} stands there twice", mark)
            found.add(name)
        return super().construct_mapping(node, deep)


def override(document: dict, text: str) -> None:
    """Put `a.b=value` into a recipe's document. Raises RecipeError."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise RecipeError(f"{text!r}: an override is key=value, such as optimizer.lr=5e-5.")
    *sections, last = key.split(".")
    for section in sections:
        document = document.setdefault(section, {})
        if not isinstance(document, dict):
            raise RecipeError(f"{text!r}: {section} is {document!r}, not a section.")
    if sections == ["data"] and last in ("train", "source"):  # two names of one key
        document.pop("train", None)
        document.pop("source", None)
    try:
        document[last] = parse_yaml(value)
    except DocumentError as error:
        raise RecipeError(f"{text[:200]!r}: the value is {error}") from error


def explain(faults: list[dict], recipe: type[BaseModel]) -> list[str]:
    """What pydantic found, a sentence a place: where, what came, what is allowed."""
    by_place: dict[tuple, list[dict]] = {}
    for fault in faults:
        by_place.setdefault(_place(fault), []).append(fault)
    return [
        _sentence(place, here, recipe)
        for place, here in by_place.items()
        # a list, say, that might have been one string: what is wrong inside it tells more
        if here[0]["type"] != "string_type" or not any(place == other[: len(place)] != other for other in by_place)
    ]


def _place(fault: dict) -> tuple:
    """Without the kinds of value that pydantic tried there."""
    kinds = ("str", "SourceConfig")
    return tuple(
        part for part in fault["loc"] if part not in kinds and not str(part).startswith(("list[", "function-"))
    )


def _sentence(place: tuple, faults: list[dict], recipe: type[BaseModel]) -> str:
    """faults: one, or of a value that may be of several kinds one for each."""
    where, fault = ".".join(map(str, place)), faults[0]
    if fault["type"] == "extra_forbidden":
        allowed = _keys_at(recipe, tuple(part for part in place[:-1] if isinstance(part, str)))
        near = difflib.get_close_matches(str(place[-1]), allowed, 1, 0.5)
        front = ".".join(map(str, place[:-1]))
        hint = f"Did you mean {f'{front}.' if front else ''}{near[0]}?" if near else f"Allowed: {', '.join(allowed)}."
        return f"{where}: unknown key. {hint}"
    if fault["type"] == "missing":
        return f"{where}: missing."
    messages = (fault["msg"].removeprefix("Value error, ") for fault in faults)
    first, *others = (re.sub(r"a valid dictionary( or instance of \w+)?", "a mapping", message) for message in messages)
    message = first + "".join(f" or {other.removeprefix('Input should be ')}" for other in others)
    came = "" if fault["type"] == "value_error" else f" (got {_shown(fault['input'])})"
    return f"{where}: {message}{came}." if where else f"{message}{came}."


def _shown(value: object) -> str:
    """A value as a message shows it: cut where it is long."""
    shown = reprlib.Repr(maxlevel=3, maxdict=6, maxlist=6, maxstring=120, maxother=120, maxlong=40)
    try:
        return shown.repr(value)
    except ValueError:  # Python refuses to write out a number of so many digits
        return "a number of very many digits"


def _keys_at(model: type[BaseModel], location: tuple[str, ...]) -> list[str]:
    for part in location:
        model = _section_in(model.model_fields[part].annotation)
    return list(model.model_fields)


def _section_in(annotation) -> type[BaseModel]:
    """The section inside an annotation such as `LoraConfig | None` or `str | list[str | SourceConfig]`."""
    if hasattr(annotation, "model_fields"):
        return annotation
    found = (_section_in(inner) for inner in getattr(annotation, "__args__", ()) if inner is not type(None))
    return next((section for section in found if section is not None), None)
