"""Cards as data: how much memory a program gets, and what the maker says of speed. One more card is one more line."""

import difflib
import os
from dataclasses import dataclass, fields, replace

from glm45_tune.errors import UserError


@dataclass(frozen=True, slots=True)
class Card:
    """One GPU. Speeds are the maker's figures; what share of them is reached is in rates.py."""

    name: str
    memory_gib: float
    """Total memory as the driver reports it (an "80 GB" card has 79.1 GiB)."""
    tflops: float
    """Dense bf16, without sparsity."""
    bandwidth_gb_s: float
    """Memory bandwidth."""
    link_gb_s: float
    """Between cards of one host, both directions together (NVLink)."""
    node_link_gb_s: float = 50.0
    """Between hosts, one direction, a card: one 400 Gb/s adapter each. Of your network, not of the card."""

    @property
    def has_fp8(self) -> bool:
        """Whether it multiplies in FP8. Those that do not are named; a card that is described is taken to."""
        return self.name not in ("a100", "a800")


CARDS = {
    card.name: card
    for card in (
        Card("a100", 79.2, 312, 2039, 600),
        Card("a800", 79.2, 312, 2039, 400),
        Card("h20", 95.2, 148, 4000, 900),
        Card("h100", 79.1, 989, 3350, 900),
        Card("h200", 139.8, 989, 4800, 900),
        Card("b200", 178.3, 2250, 8000, 1800),
    )
}
CPU = "cpu"
_KEYS = tuple(field.name for field in fields(Card) if field.name != "name")


def find_card(text: str) -> Card:
    """A card by name, a known one with changes (`h100:memory_gib=94`), or one described whole (`memory_gib=48,tflops=…`).

    `cpu` is this machine: memory alone is planned. Raises UserError.
    """
    name, _, changes = text.partition(":")
    if "=" in name:
        name, changes = "", text
    values = _values(changes, text)
    name = name.lower()
    if name == CPU:
        return replace(_this_machine(), **values)
    if name:
        if name not in CARDS:
            near = difflib.get_close_matches(name, CARDS, 1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise UserError(f"--gpu {text}: unknown card.{hint} {_HOW}")
        return replace(CARDS[name], **values)
    missing = [key for key in _KEYS[:-1] if key not in values]
    if missing:
        raise UserError(f"--gpu {text}: {', '.join(missing)} missing. {_HOW}")
    return Card("described", **values)


def card_named(name: str) -> Card | None:
    """The known card that a driver calls so ("NVIDIA H200"): the longest of ours that is in it, for an H200 has "h20" in it too."""
    known = [key for key in CARDS if key in name.lower()]
    return CARDS[max(known, key=len)] if known else None


def _values(changes: str, text: str) -> dict[str, float]:
    values = {}
    for change in filter(None, changes.split(",")):
        key, _, value = change.partition("=")
        try:
            values[key] = float(value)
        except ValueError:
            values[key] = -1.0
        if key not in _KEYS or not 0 < values[key] < float("inf"):
            raise UserError(f"--gpu {text}: {change!r} is not NAME=NUMBER above 0. {_HOW}")
    return values


def _this_machine() -> Card:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return Card(CPU, memory, 0.0, 0.0, 0.0)


_HOW = (
    f"Known: {', '.join(CARDS)}, {CPU}. Describe another by --gpu {'=…,'.join(_KEYS[:-1])}=… (GiB, dense bf16 TFLOP/s, GB/s, "
    "GB/s between cards of a host), or a known one with changes: --gpu h100:memory_gib=94."
)
