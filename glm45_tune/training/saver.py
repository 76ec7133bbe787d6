"""When a run is saved and which checkpoints stay. Writing goes on in the background, from a snapshot, beside the next steps."""

import contextlib
import math
import shutil
import sys
import threading
import time
from pathlib import Path

import torch.distributed as dist

from glm45_tune.errors import CheckpointError, SaveError
from glm45_tune.mcore import checkpoint
from glm45_tune.mcore.checkpoint import Snapshot
from glm45_tune.mcore.step import Trainer
from glm45_tune.training.prepare import Job


class Saver:
    """Used by all ranks together. One write goes on at a time; the next save waits for it."""

    def __init__(self, job: Job, trainer: Trainer):
        self._job, self._trainer = job, trainer
        self._snapshot = Snapshot()
        self._group = dist.new_group(backend="gloo")  # the writing thread's own
        self._thread: threading.Thread | None = None
        self._bug: Exception | None = None
        self._last_time = time.monotonic()
        self._best = min(_evaluated(job.run).values(), default=float("inf"))
        self.saved = 0
        """The step of the last checkpoint that was loaded, or begun to be written."""
        self.failure: str | None = None
        """Why the last save failed; None where it did not."""

    def restore(self) -> dict:
        """Load the last checkpoint that is whole, if there is one. Returns what it was saved with; of none, step 0."""
        listed = [checkpoint.every_checkpoint(self._job.run)]
        dist.broadcast_object_list(listed, src=0, group=self._group)
        said = []
        for directory in reversed(listed[0]):
            fault = checkpoint.find_fault(directory, self._group)
            if fault is None:
                self._say([*said, f"going on from {directory}"] if said else [])
                checkpoint.restore(self._trainer, directory)
                facts = checkpoint.saved_facts(directory)
                self.saved = facts["step"]
                return facts
            said.append(f"{directory} is not used: {fault}.")
        self._say([*said, "no checkpoint is whole: the run begins anew"] if said else [])
        return {"step": 0}

    def _say(self, lines: list[str]) -> None:
        if lines and self._group.rank() == 0:
            print("\n".join(lines), file=sys.stderr, flush=True)

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
        self.saved = facts["step"]
        self._last_time = time.monotonic()
        self._best = min(self._best, facts.get("eval_loss", self._best))
        self._thread = threading.Thread(target=self._write, args=(facts,), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until nothing is being written."""
        if self._thread:
            self._thread.join()
            self._thread = None
        if self._bug:
            raise self._bug

    def _write(self, facts: dict) -> None:
        directory = checkpoint.step_directory(self._job.run, facts["step"])
        try:
            self._snapshot.write(directory, self._job.source.config, facts, self._group)
            self.failure = None
            if self._group.rank() == 0:
                _prune(self._job.run, self._job.recipe.train.save_total_limit, self._job.recipe.train.save_best)
        except SaveError as error:
            self.failure = str(error)
            self._say([_sentence(self._job.run, facts["step"], error)])
        except Exception as error:  # a thread's fault would be lost: raised where the main thread waits
            self._bug = error


def _sentence(run: Path, step: int, error: SaveError) -> str:
    found = checkpoint.complete_checkpoints(run)
    last = f"the last good checkpoint is {found[-1]}" if found else "there is no good checkpoint yet"
    return f"step {step} could not be saved: {error}. Training goes on; {last}."


def check_saved(saver: Saver, run: Path, step: int) -> None:
    """Raise SaveError when the last save of a run that ends failed."""
    if saver.failure:
        found = checkpoint.complete_checkpoints(run)
        last = f"from {found[-1]}" if found else "from its start"
        raise SaveError(
            f"{run}: its last step, {step}, could not be saved: {saver.failure}. Make room; the same command goes on {last}."
        )


def _evaluated(run: Path) -> dict[Path, float]:
    """Held-out loss of every complete checkpoint that has one which is a number."""
    found = {}
    for path in checkpoint.complete_checkpoints(run):
        with contextlib.suppress(CheckpointError, KeyError):  # damaged, or not evaluated
            found[path] = checkpoint.saved_facts(path)["eval_loss"]
    return {path: loss for path, loss in found.items() if math.isfinite(loss)}


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
