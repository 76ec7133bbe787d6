"""What each answer was worth beside the other answers to its prompt. Arithmetic on a rollout's rewards, no torch.

N answers; `groups` int [N]: which prompt each belongs to. An answer without a reward (NaN) is no part of its group: its advantage
is 0 and it changes no other's.
"""

import numpy as np

_SMALL = 1e-4


def advantages(rewards: np.ndarray, groups: np.ndarray, kind: str) -> np.ndarray:
    """Return the advantage of each answer, float64 [N].

    kind `group`: (r − mean) / (deviation + 1e-4), the deviation of a sample (arXiv:2402.03300);
    `centred`: r − mean (arXiv:2503.20783); `leave_one_out`: r − mean of the group's other rewards
    (arXiv:2402.14740). A group of one gives 0.
    """
    found = np.zeros(len(rewards))
    for group in np.unique(groups):
        members = (groups == group) & ~np.isnan(rewards)
        count, own = members.sum(), rewards[members]
        if count < 2:
            continue
        centred = own - own.mean()
        if kind == "group":
            found[members] = centred / (own.std(ddof=1) + _SMALL)
        else:
            found[members] = centred * (count / (count - 1) if kind == "leave_one_out" else 1)
    return found


def equal_groups(rewards: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """bool [N]: the answer's group has one reward for all, or fewer than two rewards, and so teaches nothing."""
    found = np.ones(len(rewards), bool)
    for group in np.unique(groups):
        own = rewards[(groups == group) & ~np.isnan(rewards)]
        found[groups == group] = len(own) < 2 or own.min() == own.max()
    return found


def overlong_penalties(lengths: np.ndarray, longest: int, buffer: int, penalty: float) -> np.ndarray:
    """Return what an answer's length takes off its reward (arXiv:2503.14476, 3.4), float64 [N], none positive.

    Nothing up to longest − buffer tokens, then rising to `penalty` at `longest`.
    """
    if not buffer:
        return np.zeros(len(lengths))
    return -penalty * np.clip((lengths - (longest - buffer)) / buffer, 0, 1)
