"""From a recipe to running ranks: this process when torchrun started it or one rank is enough, else one process a rank."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from glm45_tune.recipe import Recipe
from glm45_tune.training.prepare import prepare


def train(recipe: Recipe, data: Iterable[dict] | None = None) -> int:
    """Run a recipe to its end. Returns 0, or the exit code of the rank that failed. Raises UserError before ranks start.

    data: rows to train on instead of the recipe's, such as {"messages": [...]}; they are written to a file that all ranks read.
    """
    if data is not None:
        with tempfile.TemporaryDirectory(prefix="glm45_tune_") as holder:
            rows = Path(holder) / "rows.jsonl"
            with open(rows, "w", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in data)
            changed = recipe.data.model_copy(update={"train": str(rows)})
            return train(recipe.model_copy(update={"data": changed}))
    job = prepare(recipe)
    if "RANK" in os.environ or job.layout.world_size == 1:
        from glm45_tune.mcore import runtime
        from glm45_tune.training import loop

        loop.run(job)
        runtime.stop()
        return 0
    if job.stream:
        job.stream.close()  # each rank has its own
    with tempfile.TemporaryDirectory(prefix="glm45_tune_") as holder:
        resolved = Path(holder) / "recipe.yaml"
        resolved.write_text(recipe.to_yaml(), encoding="utf-8")
        return start_ranks(["train", str(resolved)], job.layout.world_size)


def start_ranks(arguments: list[str], world_size: int) -> int:
    """Run `python -m glm45_tune ARGUMENTS` once a rank; when one fails the others are ended. Returns its exit code, or 0."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {**os.environ, "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common.setdefault("OMP_NUM_THREADS", "1")
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "glm45_tune", *arguments], env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        )
        for rank in range(world_size)
    ]
    try:
        return _wait(ranks)
    finally:
        for rank in ranks:
            if rank.poll() is None:
                rank.terminate()
        for rank in ranks:
            try:
                rank.wait(timeout=20)
            except subprocess.TimeoutExpired:
                rank.kill()


def _wait(ranks: list[subprocess.Popen]) -> int:
    while True:
        codes = [rank.poll() for rank in ranks]
        failed = [(number, code) for number, code in enumerate(codes) if code]
        if failed:
            number, code = failed[0]
            if code != 2:
                print(f"rank {number} ended with code {code}; the other ranks are stopped.", file=sys.stderr)
            return code if code > 0 else 1
        if all(code == 0 for code in codes):
            return 0
        time.sleep(0.1)
