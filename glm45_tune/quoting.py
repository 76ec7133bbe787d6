"""A value quoted for where it goes: a shell command, a batch script's option, YAML, a page of Markdown."""

import html
import re
import shlex

import yaml


def shell(text: str) -> str:
    """One word of a bash command, on one line whatever the text holds."""
    if not text or text.isprintable():
        return shlex.quote(text)

    def escaped(letter: str) -> str:
        if letter in "\\'":
            return f"\\{letter}"
        return (
            letter
            if letter.isprintable()
            else "".join(f"\\x{byte:02x}" for byte in letter.encode("utf-8", "surrogateescape"))
        )

    return f"$'{''.join(map(escaped, text))}'"


def path_argument(text: str) -> str:
    """The same of a path, which an option's dash at its front must not make an option."""
    return shell(f"./{text}" if text.startswith("-") else text)


def sbatch(text: str) -> str:
    """The value of an option in a #SBATCH line, as Slurm reads it.

    A line cannot hold what does not print: that becomes `_`.
    """
    text = one_line(text, "_")
    if re.fullmatch(r"[\w.,:@%+/=-]+", text):
        return text
    return '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'


def one_line(text: str, instead: str = " ") -> str:
    """The text with everything that does not print, line ends first of all, replaced."""
    return "".join(letter if letter.isprintable() else instead for letter in text)


def markdown(text: str) -> str:
    """The text as itself in a line or a table's cell: no markup, no HTML, no further cell."""
    text = html.escape(one_line(text), quote=False)
    text = re.sub(r"([\\`*\[\]|~$])", r"\\\1", text)
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])|^#|#$", r"\\\g<0>", text)


def code(text: str) -> str:
    """The text as a span of code in a line of Markdown."""
    text, ticks = one_line(text), "`" * (_longest_run(text) + 1)
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{ticks}{pad}{text}{pad}{ticks}"


def fenced(text: str, language: str = "") -> str:
    """The text as a block of code, behind a fence that nothing in it closes."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


class _Dumper(yaml.SafeDumper):
    """PyYAML's own, but what does not print is escaped: of Unicode's line ends it writes some that come back as others."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    plain = text.replace("\n", "").isprintable()
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, None if plain else '"')


_Dumper.add_representer(str, _text)


def yaml_text(document: object) -> str:
    """A document as YAML that loads to the same, keys in their order."""
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
