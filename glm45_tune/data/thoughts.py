"""The thought in an assistant's text, and the tags that a chat template makes a turn of.

The template splits a text at `</think>` by itself and drops or doubles what does not fit. So a text is split here, when it
is read, into one thought and what is said; any other use of the template's tags in it is an error that names the place.
"""

import re

from glm45_tune.errors import DataError

OPEN, CLOSE = "<think>", "</think>"
_INLINE = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)
_CALL_TAGS = ("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
_RESULT_TAGS = ("<tool_response>", "</tool_response>")


def split_thought(content: str, reasoning: str | None, where: str) -> tuple[str, str | None]:
    """An assistant's text and thought → the same apart: (what is said, the thought or None). Raises DataError.

    A thought may stand at the beginning of the text, in `<think>` and `</think>`, where `reasoning` gives none.
    """
    for tag in (OPEN, CLOSE):
        if reasoning and tag in reasoning:
            raise DataError(
                f"holds {tag}, which the template writes around it; leave the tag out", f"{where}.reasoning_content"
            )
    if OPEN not in content and CLOSE not in content:
        return content, reasoning
    found = _INLINE.fullmatch(content)
    if not found or any(tag in part for part in found.groups() for tag in (OPEN, CLOSE)):
        raise DataError(
            f"holds {OPEN} or {CLOSE} otherwise than around one thought at its beginning, and the template would lose or "
            "double text. Put the thought into reasoning_content, and leave other tags out",
            f"{where}.content",
        )
    thought, said = found.groups()
    if reasoning:
        raise DataError("is given beside a thought in the text itself; give one of them", f"{where}.reasoning_content")
    return said.lstrip("\n"), thought.strip("\n")


def check_tags(role: str, content: str, where: str) -> None:
    """Raise DataError where a text holds what the template writes around calls (an assistant's) or results (a tool's)."""
    if role == "assistant":
        for tag in _CALL_TAGS + _RESULT_TAGS:
            if tag in content:
                raise DataError(
                    f"holds {tag}: a call written as text would be trained as prose. Put calls into tool_calls, and what tools "
                    "say into messages of the role tool",
                    where,
                )
    elif role == "tool":
        for tag in _RESULT_TAGS:
            if tag in content:
                raise DataError(f"holds {tag}, which the template writes around it; leave the tags out", where)
