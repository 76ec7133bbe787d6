"""Secrets of a recipe: named by `${env:NAME}`, read when they are used, never written or shown.

`redacted` is applied to every copy of a recipe that leaves the process, `redacted_text` to every
message.
"""

import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import yaml

from glm45_tune.documents import parse_yaml
from glm45_tune.errors import RecipeError

HIDDEN = "***"
"""What stands where a secret was."""
REFERENCE = re.compile(r"\$\{env:([A-Za-z_]\w*)\}")

_WORDS = (
    r"api[-_]?keys?|key|token|secrets?|passwords?|passwd|pwd|passphrase|credentials?|auth|authorization|bearer|cookie"
)
# a name that ends in such a word; camelCase is taken apart before
_NAME = re.compile(rf"(?:(?:^|[\W_])(?:{_WORDS})|token|secret|password|apikey)$", re.IGNORECASE)
_FLAG = re.compile(rf"--?[\w-]*(?<![a-z])(?:{_WORDS})", re.IGNORECASE)
_IN_TEXT = [
    (re.compile(r"(\w://)(?![^/\s?#@]*\$\{env:)[^/\s?#]*@"), rf"\1{HIDDEN}@"),
    (re.compile(r"\b(bearer|basic)\s+(?!\$\{env:)[\w.~+/=-]{6,}", re.IGNORECASE), rf"\1 {HIDDEN}"),
    (
        re.compile(
            rf"(?<![A-Za-z])((?:\w{{0,40}}[-_])?(?:{_WORDS}|sig|signature)=)(?!\$\{{env:)[^\s&;,'\"]+", re.IGNORECASE
        ),
        rf"\1{HIDDEN}",
    ),
    (
        re.compile(
            r"((?:api[-_]?key|secret|password|passwd|authorization)['\"]?\s*:\s*['\"]?)(?!\$\{env:)[^\s'\",}]+",
            re.IGNORECASE,
        ),
        rf"\1{HIDDEN}",
    ),
    # what keys of well-known services look like
    (
        re.compile(
            r"\b(?:[spr]k-[\w-]{8,}|hf_\w{8,}|gh[pousr]_\w{8,}|github_pat_\w{8,}|glpat-[\w-]{8,}|xox[a-z]-[\w-]{8,}"
            r"|AKIA[0-9A-Z]{12,}|AIza[\w-]{20,}|eyJ[\w-]{8,2000}\.[\w-]+\.[\w-]*)"
        ),
        HIDDEN,
    ),
]


def redacted_text(text: str) -> str:
    """The text without what looks like a secret: a key, a bearer token, a password in a URL."""
    for pattern, instead in _IN_TEXT:
        text = pattern.sub(instead, text)
    return text


def redacted(document: Any, is_secret: bool = False) -> Any:
    """A recipe's document with HIDDEN for every secret.

    What an environment variable is named for stays.

    is_secret: it stands under a name such as api_key, so every text in it is one.
    """
    if isinstance(document, dict):
        return {key: redacted(value, is_secret or _is_secret_name(key)) for key, value in document.items()}
    if isinstance(document, list):
        flags = [isinstance(item, str) and bool(_FLAG.fullmatch(item)) for item in document]
        return [redacted(item, is_secret or before) for item, before in zip(document, [False, *flags])]
    if not isinstance(document, str):
        return document
    if is_secret and document and not REFERENCE.search(document):
        return HIDDEN
    return redacted_text(document)


def _is_secret_name(name: object) -> bool:
    return isinstance(name, str) and bool(_NAME.search(re.sub(r"([a-z])([A-Z])", r"\1_\2", name)))


def redacted_yaml(text: str) -> str:
    """A recipe's file as it may be shown; one that is not YAML is searched as a text."""
    try:
        document = parse_yaml(text)
        hidden = redacted(document)
    except (yaml.YAMLError, ValueError, RecursionError):
        return redacted_text(text)
    return text if hidden == document else yaml.safe_dump(hidden, sort_keys=False, allow_unicode=True)


def texts_of(document, where: str = "") -> list[tuple[str, str]]:
    """(place, text) of every text in a recipe's document, such as rl.rewards[0].options.api_key."""
    if isinstance(document, dict):
        return [found for key, value in document.items() for found in texts_of(value, f"{where}.{key}".lstrip("."))]
    if isinstance(document, list):
        return [found for number, value in enumerate(document) for found in texts_of(value, f"{where}[{number}]")]
    return [(where, document)] if isinstance(document, str) else []


def _literal(document) -> list[tuple[str, str]]:
    hidden = dict(texts_of(redacted(document)))
    return [(place, text) for place, text in texts_of(document) if hidden[place] != text]


def secret_places(document) -> list[str]:
    """Where a document holds a secret literally."""
    return [place for place, _ in _literal(document)]


def references(document) -> list[str]:
    """The environment variables that a document names."""
    return [name for _, text in texts_of(document) for name in REFERENCE.findall(text)]


def secrets_of(document) -> list[str]:
    """The secrets themselves, literal and from the environment, the longest first."""
    found = {os.environ[name] for name in references(document) if os.environ.get(name)}
    for _, text in _literal(document):
        found |= {text, *(part for pattern, _ in _IN_TEXT for part in _parts(pattern, text))}
    return sorted((text for text in found if len(text) >= 4), key=len, reverse=True)


def _parts(pattern: re.Pattern, text: str) -> Iterator[str]:
    """What a pattern finds, without the words in front; of user and password also the latter."""
    for found in pattern.finditer(text):
        secret = found[0][len(found[1]) if pattern.groups else 0 :].strip(" @")
        yield from (secret, secret.partition(":")[2])


def without(text: str, secrets: list[str]) -> str:
    """A message without these secrets, nor what looks like one."""
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    return redacted_text(text)


def resolved(document: Any, where: str, put: Callable[[str], str] = str) -> Any:
    """The document with every `${env:NAME}` replaced by that variable.

    Raises RecipeError where there is none.

    put: what to make of a value that is a part of a text.
    """
    if isinstance(document, dict):
        return {key: resolved(value, f"{where}.{key}", put) for key, value in document.items()}
    if isinstance(document, list):
        return [resolved(item, f"{where}[{number}]", put) for number, item in enumerate(document)]
    if not isinstance(document, str):
        return document
    if missing := [name for name in REFERENCE.findall(document) if name not in os.environ]:
        raise RecipeError(
            f"{where}: the environment has no {missing[0]}. Export it before the command: {missing[0]}=…."
        )
    if whole := REFERENCE.fullmatch(document):
        return os.environ[whole[1]]
    return REFERENCE.sub(lambda found: put(os.environ[found[1]]), document)
