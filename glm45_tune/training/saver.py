"""When a run is saved and which checkpoints stay. Writing goes on in the background, from a snapshot, beside the next steps."""

import json
import shutil
import sys
import threading
import time
from pathlib import Path

import torch.distributed as dist

from glm45_tune.mcore import checkpoint
from glm45_tune.mcore.checkpoint import SaveError, Snapshot
from glm45_tune.mcore.step import Trainer
from glm45_tune.training.prepare import Job


class Saver:
    """Used by all ranks together. One write goes on at a time; the next save waits for it."""

    def __init__(self, job: Job, trainer: Trainer):
        self._job, self._trainer = job, trainer
        self._snapshot = Snapshot()
        self._group = dist.new_group(backend="gloo")  # the writing thread's own
        self._thread: threading.Thread | None = None
        self._last_time = time.monotonic()
        self._best = min(_evaluated(job.run).values(), default=float("inf"))
        self.failure: str | None = None
        """Why the last save failed; None where it did not."""

    def restore(self) -> dict:
        """Load the last complete checkpoint, if there is one. Returns what it was saved with; of none, step 0."""
        found = checkpoint.complete_checkpoints(self._job.run)
        if not found:
            return {"step": 0}
        checkpoint.restore(self._trainer, found[-1])
        return _facts(found[-1])

    def wants_time(self) -> bool:
        """Has train.save_interval_minutes passed on this rank's clock? Ranks must agree before they save."""
        minutes = self._job.recipe.train.save_interval_minutes
        return minutes is not None and time.monotonic() - self._last_time >= 60 * minutes

    def is_due(self, step: int, eval_loss: float | None) -> bool:
        """Does the recipe ask for a checkpoint after this step? The same on every rank."""
        options = self._job.recipe.train
        is_best = options.save_best and eval_loss is not None and eval_loss < self._best
        return is_best or bool(options.save_interval and step % options.save_interval == 0)

    def save(self, facts: dict) -> None:
        """Take a snapshot of the trainer and begin to write it. facts: `step`, `eval_loss` where known, and what resume needs."""
        self.wait()
        self._snapshot.take(self._trainer)
        self._last_time = time.monotonic()
        self._best = min(self._best, facts.get("eval_loss", self._best))
        self._thread = threading.Thread(target=self._write, args=(facts,), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until nothing is being written."""
        if self._thread:
            self._thread.join()
            self._thread = None

    def _write(self, facts: dict) -> None:
        directory = checkpoint.step_directory(self._job.run, facts["step"])
        try:
            self._snapshot.write(directory, self._job.source.config, facts, self._group)
            self.failure = None
            if self._group.rank() == 0:
                _prune(self._job.run, self._job.recipe.train.save_total_limit, self._job.recipe.train.save_best)
        except SaveError as error:
            self.failure = str(error)
            if self._group.rank() == 0:
                print(_sentence(self._job.run, facts["step"], error), file=sys.stderr, flush=True)


def _sentence(run: Path, step: int, error: SaveError) -> str:
    found = checkpoint.complete_checkpoints(run)
    last = f"the last good checkpoint is {found[-1]}" if found else "there is no good checkpoint yet"
    return f"step {step} could not be saved: {error}. Training goes on; {last}."


def _facts(directory: Path) -> dict:
    return json.loads((directory / checkpoint.COMPLETE).read_text(encoding="utf-8"))


def _evaluated(run: Path) -> dict[Path, float]:
    """Held-out loss of every complete checkpoint that has one."""
    facts = {path: _facts(path) for path in checkpoint.complete_checkpoints(run)}
    return {path: known["eval_loss"] for path, known in facts.items() if "eval_loss" in known}


def _prune(run: Path, limit: int | None, keeps_best: bool) -> None:
    """Keep the last `limit` checkpoints, and the best one where it is asked for."""
    if limit is None:
        return
    evaluated = _evaluated(run) if keeps_best else {}
    best = min(evaluated, key=evaluated.get, default=None)
    for path in checkpoint.complete_checkpoints(run)[:-limit]:
        if path != best:
            (path / checkpoint.COMPLETE).unlink()
            shutil.rmtree(path)
