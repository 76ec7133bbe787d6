"""Rewards that never differ within a group: a run of them learns nothing, and is told so."""

import math
import sys

_STEPS = 5


class Sameness:
    """Sees the metrics of every step of reinforcement learning, on the rank that speaks."""

    def __init__(self) -> None:
        self._in_a_row, self._has_differed, self._is_told, self._last = 0, False, False, 0.0

    def see(self, metrics: dict[str, float]) -> None:
        if math.isnan(metrics["rl/reward_mean"]):  # no answer has one, which is told otherwise
            return
        is_same = metrics["rl/equal_groups_share"] == 1
        self._in_a_row = self._in_a_row + 1 if is_same else 0
        self._has_differed |= not is_same
        self._last = metrics["rl/reward_mean"]
        if self._in_a_row == _STEPS:
            self._tell(f"in {_STEPS} steps in a row")

    def end(self) -> None:
        """Say it of a run in which it was never otherwise."""
        if self._in_a_row and not self._has_differed and not self._is_told:
            self._tell("in every step")

    def _tell(self, when: str) -> None:
        self._is_told = True
        print(
            f"warning: {when}, all answers of each group got the same reward (mean {self._last:.3g}), and nothing can be learned "
            "from that. Look at samples.jsonl: is the reward right, are the prompts all too hard or too easy?",
            file=sys.stderr,
            flush=True,
        )
