"""A rank that dies, fails or hangs among others: who is named, in which order, and how soon all of them end."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

FAULTY = Path(__file__).parent / "faulty"


@pytest.fixture
def fail(checkpoints, corpus, make_recipe, tmp_path):
    """Train on two ranks with one fault; returns (exit code, what was said, seconds)."""
    train = {"steps": 6, "save_interval": 2, "distributed_timeout_minutes": 0.3}
    sections = {"lora": {"r": 4}, "parallel": {"expert_model_parallel_size": 2}, "train": train}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(make_recipe(checkpoints["air"], corpus, tmp_path / "run", **sections)))

    def run(fault: str) -> tuple[int, str, float]:
        env = {**os.environ, "FAULT": fault, "PYTHONPATH": f"{FAULTY}:{os.environ.get('PYTHONPATH', '')}"}
        started = time.monotonic()
        command = [sys.executable, "-m", "glm45_tune", "train", str(path)]
        ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240, check=False)
        return ended.returncode, ended.stderr, time.monotonic() - started

    return run


def test_a_failing_rank_is_heard_first(fail):
    """Its traceback, then that the others are stopped; the other's broken connection is not heard at all."""
    code, said, _ = fail("1:4:raise")
    assert code == 1
    assert (
        said.count("Traceback") == 1
        and "rank 1 failed in step 4, preparing its batch" in said
        and "the data of this rank is cursed" in said
    )
    assert said.index("rank 1 failed") < said.index("rank 1 ended with code 1; the other ranks are stopped.")


def test_a_hanging_rank_is_named_with_the_line_it_stands_at(fail):
    """Asleep in its data while the other waits in a collective."""
    code, said, _ = fail("1:5:sleep")
    assert code == 1
    assert (
        "rank 1 hangs in step 5, preparing its batch" in said
        and "sitecustomize.py" in said
        and "time.sleep(1000)" in said
    )
    assert "rank 0 hangs" not in said and "Traceback" not in said and "train.distributed_timeout_minutes" in said


def descendants(process: int) -> list[int]:
    """Every process below this one, in the order of birth."""
    found = []
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        for child in task.read_text().split():
            found += [int(child), *descendants(int(child))]
    return found


@pytest.mark.parametrize("born", [1, 3])
def test_a_signal_while_two_ranks_start_ends_with_75(checkpoints, corpus, make_recipe, tmp_path, born):
    """Told as soon as the starter is there, and as soon as both ranks are; none of them has made a step."""
    path = tmp_path / "recipe.yaml"
    parallel = {"parallel": {"expert_model_parallel_size": 2}, "train": {"steps": 200}}
    path.write_text(yaml.safe_dump(make_recipe(checkpoints["air"], corpus, tmp_path / "run", **parallel)))
    command = [sys.executable, "-m", "glm45_tune", "train", str(path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as running:
        last = time.monotonic() + 120
        while len(descendants(running.pid)) < born and running.poll() is None and time.monotonic() < last:
            time.sleep(0.01)
        running.terminate()
        _, said = running.communicate(timeout=60)
    assert running.returncode == 75 and "Traceback" not in said, said
