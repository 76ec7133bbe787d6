"""What others wrote, on a terminal: shown, not obeyed."""

import re

# C0 but tab and line end, DEL, C1, and what turns the direction of writing
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    """The text with control characters as their escapes: ESC as `\\x1b`, so that no colour, title or link comes of it."""
    return _OBEYED.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
