"""Write docs/reference/ from the code: commands, recipe keys with a JSON schema, metrics, exit codes.

`--check` writes nothing and ends with 1 where a page is not what the code says.
"""

import json
import sys
import types
from pathlib import Path
from typing import Annotated, Literal, Union, get_args, get_origin

import typer
from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from glm45_tune import Recipe, errors
from glm45_tune.cli import app
from glm45_tune.run.metric_names import METRICS

ROOT = Path(__file__).parent.parent / "docs" / "reference"
_NOTE = "Made from the code by `python scripts/reference.py`.\n"


def pages() -> dict[str, str]:
    """File name → its text."""
    return {
        "commands.md": commands(),
        "recipe.md": recipe_keys(),
        "recipe.schema.json": json.dumps(Recipe.model_json_schema(), indent=1, ensure_ascii=False) + "\n",
        "metrics.md": metrics(),
        "exit-codes.md": exit_codes(),
    }


def commands() -> str:
    found = ["# Commands", "", _NOTE]
    group = typer.main.get_command(app)
    for name, command in sorted(group.commands.items()):
        found += [
            f"## glm45-tune {name}",
            "",
            _plain(command.help),
            "",
            "| argument or option | meaning |",
            "| --- | --- |",
        ]
        for parameter in command.params:
            if parameter.name == "help":
                continue
            is_option = parameter.param_type_name == "option"
            written = "/".join((*parameter.opts, *parameter.secondary_opts)) if is_option else parameter.name.upper()
            default = parameter.default
            shown = "" if default in (None, False, (), []) or callable(default) else f" Default: {_value(default)}."
            wanted = " Required." if parameter.required and is_option else ""
            found.append(f"| `{written}` | {_cell(_plain(getattr(parameter, 'help', '')))}{wanted}{shown} |")
        found.append("")
    return "\n".join(found)


def recipe_keys() -> str:
    found = ["# Recipe keys", "", _NOTE, _plain(Recipe.__doc__), ""]
    for name, field in Recipe.model_fields.items():
        if not (sections := _sections(field.annotation)):
            found += [
                "## " + name,
                "",
                "| key | type | default | meaning |",
                "| --- | --- | --- | --- |",
                _row(name, field),
                "",
            ]
        for section in sections:
            found += [f"## {name}", "", _plain(field.description or section.__doc__ or ""), ""]
            found += _table(section, name)
    return "\n".join(line for line in found)


def _table(section: type[BaseModel], front: str) -> list[str]:
    found = ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    nested = {}
    for key, field in section.model_fields.items():
        found.append(_row(f"{front}.{key}", field))
        nested |= {
            each: f"{front}.{key}[]" if "list" in str(field.annotation) else f"{front}.{key}"
            for each in _sections(field.annotation)
        }
    found.append("")
    for inner, name in nested.items():
        found += [f"### {name}", "", *_table(inner, name)]
    return found


def _row(name: str, field) -> str:
    default = (
        "required"
        if field.default is PydanticUndefined and not field.default_factory
        else _value(field.get_default(call_default_factory=True))
    )
    return f"| `{name}` | {_cell(_kind(field.annotation, field.metadata))} | {_cell(default)} | {_cell(_plain(field.description))} |"


def _sections(annotation) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for inner in get_args(annotation) for section in _sections(inner)]


def _kind(annotation, metadata=()) -> str:
    """A type in words: `number, at least 0`, `"all" or "last"`."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kind(inner[0], inner[1:])
    if origin is Literal:
        return " or ".join(f"`{each}`" for each in inner)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_kind(each, metadata if each in (int, float) else ()) for each in inner))
    if origin in (list, tuple):
        return f"list of {_kind(inner[0])}"
    if origin is dict:
        return "mapping"
    names = {int: "whole number", float: "number", str: "text", bool: "true or false", type(None): "null"}
    limits = [limit for each in metadata for limit in _limits(each)]
    return ", ".join([names.get(annotation) or ("section" if _sections(annotation) else "any"), *limits])


def _limits(constraint) -> list[str]:
    words = {Gt: ("gt", "above"), Ge: ("ge", "at least"), Lt: ("lt", "below"), Le: ("le", "at most")}
    for each in (constraint, *getattr(constraint, "metadata", ())):
        for kind, (attribute, word) in words.items():
            if isinstance(each, kind):
                yield f"{word} {getattr(each, attribute)}"


def metrics() -> str:
    lines = [
        "# Metrics",
        "",
        _NOTE,
        "Keys of `metrics.jsonl`, one JSON object a step. A name in capitals stands for many.",
        "",
    ]
    lines += [
        "| key | meaning |",
        "| --- | --- |",
        *(f"| `{name}` | {_cell(text)} |" for name, text in METRICS.items()),
    ]
    return "\n".join(lines) + "\n"


def exit_codes() -> str:
    lines = ["# Exit codes", "", _NOTE, "| code | meaning |", "| --- | --- |"]
    return "\n".join([*lines, *(f"| {code} | {text} |" for code, text in errors.EXIT_CODES.items())]) + "\n"


def _value(value) -> str:
    if isinstance(value, BaseModel):
        return "its defaults"
    if isinstance(value, bool) or value is None:
        return f"`{str(value).lower().replace('none', 'null')}`"
    return f"`{getattr(value, 'value', value)}`"


def _plain(text: str | None) -> str:
    return " ".join((text or "").split())


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main() -> int:
    stale = []
    for name, text in pages().items():
        path = ROOT / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            stale.append(name)
            if "--check" not in sys.argv:
                ROOT.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
    print(f"docs/reference: {', '.join(stale) or 'nothing'} {'is stale' if '--check' in sys.argv else 'written'}")
    return int(bool(stale) and "--check" in sys.argv)


if __name__ == "__main__":
    sys.exit(main())
