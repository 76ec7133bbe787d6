"""What others wrote, made fit for a terminal; and what was typed there, checked."""

import re

# C0 without tab and line end, DEL and C1, and the marks that turn the direction of writing:
# a terminal obeys them
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    """The text with control characters shown instead of obeyed: ESC becomes \\x1b."""
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


def is_text(typed: str) -> bool:
    """Was it UTF-8? Bytes that are not come as halves of surrogate pairs."""
    return not any("\ud800" <= letter <= "\udfff" for letter in typed)
