"""The card a rank runs on, as the planner knows it."""

import torch

from glm45_tune.plan.cards import CARDS, Card, find_card


def this_card() -> Card:
    """A known one by its name; another with an H100's speeds and its own memory; on a CPU, speeds of 0."""
    if not torch.cuda.is_available():
        return find_card("cpu")
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    known = [card for name, card in CARDS.items() if name in found.name.lower()]
    return known[0] if known else find_card(f"h100:memory_gib={found.total_memory / 2**30:.1f}")
