"""Bytes as people write and read them."""

import re
from pathlib import Path

from glm45_tune.errors import UserError


def human(size: float) -> str:
    """1536 → 1.5 KiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def size_of(directory: Path) -> str:
    """Of all files in a directory."""
    return human(sum(path.stat().st_size for path in directory.rglob("*") if path.is_file()))


def parse(text: str, option: str) -> int:
    """5GB (10⁹) or 5GiB (2³⁰) as bytes. Raises UserError naming the option."""
    units = {"": 1, "B": 1} | {f"{letter}B": 1000**n for n, letter in enumerate("KMGT", 1)}
    units |= {f"{letter}IB": 1024**n for n, letter in enumerate("KMGT", 1)}
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Z]*)", text.strip().upper())
    if not found or found[2] not in units or float(found[1]) * units[found[2]] < 1:
        raise UserError(f"{option}: {text!r} is no size; a number with KB, MB, GB, KiB, MiB or GiB is, such as 5GB.")
    return int(float(found[1]) * units[found[2]])
