"""Who hangs is told from what ranks last said of themselves."""

import random

from glm45_tune.training.watchdog import find_hanging


def told(step=5, phase="forward and backward", waits=True, beats=9):
    facts = {"beats": beats, "phase": phase, "step": step, "line": "batch.py:3 (collate)", "waits": waits}
    return facts | {"seconds": 70.0, "host": "node7", "pid": 41}


def later(facts: dict[int, dict]) -> dict[int, dict]:
    return {rank: each | {"beats": each.get("beats", 0) + 3} for rank, each in facts.items()}


def test_the_rank_that_waits_for_nobody_is_the_one():
    """Whatever the number of ranks: one is busy, all others wait for it."""
    for seed in range(20):
        size = random.Random(seed).randrange(2, 40)
        culprit = random.Random(seed + 100).randrange(size)
        before = {rank: told(waits=rank != culprit) for rank in range(size)}
        sentences = find_hanging(before, later(before))
        assert list(sentences) == [culprit]
        assert f"rank {culprit} hangs in step 6, forward and backward, for 70 s at batch.py:3" in sentences[culprit]


def test_a_rank_behind_comes_before_one_that_seems_busy():
    before = {0: told(step=6, waits=False), 1: told(step=5), 2: told(step=6)}
    assert list(find_hanging(before, later(before))) == [1]


def test_a_silent_rank_is_named_with_its_host():
    before = {rank: told() for rank in range(4)}
    after = later(before) | {2: before[2]}
    assert list(find_hanging(before, after)) == [2]
    assert "no sign of life: its process 41 on node7" in find_hanging(before, after)[2]
    assert "did not start" in find_hanging(before | {3: {}}, after | {3: {}, 2: later(before)[2]})[3]


def test_when_all_wait_all_are_shown():
    """A collective that two ranks understand differently: nobody is busy, nobody behind."""
    before = {rank: told() for rank in range(3)}
    assert sorted(find_hanging(before, later(before))) == [0, 1, 2]
