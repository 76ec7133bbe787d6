"""Where a run's numbers go: metrics.jsonl always, TensorBoard and Weights & Biases when asked, a live line for the person."""

import errno
import json
import math
import os
import sys
import time
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from glm45_tune.console import Terminal
from glm45_tune.errors import UserError
from glm45_tune.recipe import Recipe

LOAD_FILE = "expert_load.json"
_SECONDS_BETWEEN_LOADS = 30.0


def check_trackers(recipe: Recipe) -> None:
    """Raise UserError when a tracker is asked for that is not installed."""
    if recipe.logging.wandb_project:
        try:
            import wandb  # noqa: F401
        except ImportError:
            raise UserError("logging.wandb_project is set, but wandb is not installed: pip install wandb.") from None


class Metrics:
    """Writes one JSON object a step. On resume, what an interrupted run wrote beyond its checkpoint is dropped."""

    def __init__(self, run: Path, recipe: Recipe, first_step: int, last_step: int | None = None):
        """last_step: of the whole run."""
        self._last_step, self._load, self._load_written = last_step, None, 0.0
        self._path = run / "metrics.jsonl"
        kept = []
        if first_step and self._path.exists():
            lines = self._path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if _is_whole(line) and json.loads(line)["step"] <= first_step]
        staged = self._path.with_suffix(".partial")
        staged.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        staged.replace(self._path)
        self._file, self._waiting, self._is_full = open(self._path, "ab", buffering=0), b"", False
        self._board = self._wandb = None
        if recipe.logging.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(run / "tensorboard", purge_step=first_step + 1)
        if recipe.logging.wandb_project:
            import wandb

            self._wandb = wandb.init(
                project=recipe.logging.wandb_project,
                dir=str(run),
                name=run.name,
                id=run.name,
                resume="allow",
                config=recipe.shown(),
            )

    def write(self, step: int, values: dict[str, float], expert_load: torch.Tensor | None = None) -> None:
        """expert_load: [layers, experts], tokens over the layer's mean; the last few steps' mean of it is in LOAD_FILE."""
        values = {key: value for key, value in values.items() if math.isfinite(value)}
        self._waiting += json.dumps({"step": step, **values}).encode() + b"\n"
        try:
            self._append()
            if expert_load is not None:
                self._write_load(step, expert_load)
            if self._board:
                for key, value in values.items():
                    self._board.add_scalar(key, value, step)
            self._is_full = False
        except OSError as error:
            if not self._is_full:
                print(
                    f"{self._path}: cannot be written ({error.strerror}); training goes on, and it is tried again.",
                    file=sys.stderr,
                )
            self._is_full = True
        if self._wandb:
            self._wandb.log(values, step=step)

    def _write_load(self, step: int, load: torch.Tensor) -> None:
        """A moving mean over some ten steps, written where a person may look: rarely, as it is as large as the model is deep."""
        self._load = load if self._load is None else self._load.lerp(load, 0.1)
        if step == self._last_step or time.monotonic() - self._load_written > _SECONDS_BETWEEN_LOADS:
            document = {"step": step, "load": [[round(each, 3) for each in row] for row in self._load.tolist()]}
            staged = self._path.with_name(f"{LOAD_FILE}.partial")  # a report may be reading the last one
            staged.write_text(json.dumps(document) + "\n", encoding="utf-8")
            staged.replace(self._path.with_name(LOAD_FILE))
            self._load_written = time.monotonic()

    def _append(self) -> None:
        """Whole lines or nothing: a full disk leaves no half of one."""
        end = self._file.seek(0, 2)
        try:
            if self._file.write(self._waiting) < len(self._waiting):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            self._file.truncate(end)
            raise
        self._waiting = b""

    def close(self) -> None:
        self._file.close()
        if self._board:
            self._board.close()
        if self._wandb:
            self._wandb.finish()


def _is_whole(line: str) -> bool:
    return line.startswith("{") and line.endswith("}")


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
