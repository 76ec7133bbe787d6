"""Where a run's numbers go: metrics.jsonl always, trackers when asked, a live line for the person."""

import json
import math
import sys
import time
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from glm45_tune.console import Terminal
from glm45_tune.errors import StoppedError
from glm45_tune.recipe import Recipe
from glm45_tune.run.files import LOAD_FILE, METRICS_FILE, kept_until
from glm45_tune.system.files import append_whole, write_whole
from glm45_tune.training.trackers import trackers_of

_SECONDS_BETWEEN_LOADS = 30.0


class Metrics:
    """Writes one JSON object a step. On resume, what an interrupted run wrote beyond its checkpoint is dropped."""

    def __init__(self, run: Path, recipe: Recipe, first_step: int, last_step: int | None = None):
        """last_step: of the whole run."""
        self._last_step, self._load, self._load_written = last_step, None, 0.0
        self._path, self._waiting, self._is_full = run / METRICS_FILE, "", False
        try:
            write_whole(self._path, kept_until(self._path, first_step) if first_step else b"")
        except OSError as error:
            raise StoppedError(
                f"{self._path}: cannot be written ({error.strerror}). Make room and start again."
            ) from error
        self._trackers = trackers_of(run, recipe, first_step)

    def write(self, step: int, values: dict[str, float], expert_load: torch.Tensor | None = None) -> None:
        """expert_load: [layers, experts], tokens over the layer's mean; the last few steps' mean of it is in LOAD_FILE."""
        values = {key: value for key, value in values.items() if math.isfinite(value)}
        self._waiting += json.dumps({"step": step, **values}) + "\n"
        try:
            append_whole(self._path, self._waiting)
            self._waiting = ""
            if expert_load is not None:
                self._write_load(step, expert_load)
            self._is_full = False
        except OSError as error:
            if not self._is_full:
                print(
                    f"{self._path}: cannot be written ({error.strerror}); training goes on, and it is tried again.",
                    file=sys.stderr,
                )
            self._is_full = True
        for tracker in self._trackers:
            tracker.write(step, values)

    def _write_load(self, step: int, load: torch.Tensor) -> None:
        """A moving mean over some ten steps, written where a person may look: rarely, as it is as large as the model is deep."""
        self._load = load if self._load is None else self._load.lerp(load, 0.1)
        if step == self._last_step or time.monotonic() - self._load_written > _SECONDS_BETWEEN_LOADS:
            rows = [[round(each, 3) if math.isfinite(each) else None for each in row] for row in self._load.tolist()]
            write_whole(self._path.with_name(LOAD_FILE), json.dumps({"step": step, "load": rows}) + "\n")
            self._load_written = time.monotonic()

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.close()


class LiveLine:
    """Progress on stderr: a bar that moves on a terminal, a line every few seconds elsewhere."""

    def __init__(self, first_step: int, num_steps: int, seconds_between_lines: float = 5.0):
        self.console = Terminal(stderr=True)
        self._num_steps, self._first = num_steps, first_step
        self._wait, self._started, self._last = seconds_between_lines, time.monotonic(), 0.0
        self._bar = None
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=20),
                TextColumn("{task.fields[text]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._bar.start()
            self._task = self._bar.add_task("train", total=num_steps, completed=first_step, text="")

    def show(self, step: int, values: dict[str, float]) -> None:
        text = f"reward {values['rl/reward_mean']:.3f}  " if "rl/reward_mean" in values else ""
        text += f"loss {values['train/loss']:.4f}  {values['perf/tokens_per_second']:,.0f} tokens/s  "
        text += f"MFU {values['perf/mfu']:.1%}  " if "perf/mfu" in values else ""
        text += f"{values['perf/peak_memory_gib']:.1f} GiB"
        if self._bar:
            self._bar.update(self._task, completed=step, text=text)
            return
        now = time.monotonic()
        if now - self._last >= self._wait or step == self._num_steps:
            self._last = now
            left = (now - self._started) / (step - self._first) * (self._num_steps - step)
            print(f"step {step}/{self._num_steps}  {text}  {_clock(left)} left", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar:
            self._bar.stop()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
