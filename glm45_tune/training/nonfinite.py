"""Steps without a finite loss or gradient, or without a rewarded answer, are left out and counted.

Too many in a row end the run, with the batch to look at.
"""

import json
import sys
from collections.abc import Iterable

from glm45_tune.data.chat import Sample, load_tokenizer
from glm45_tune.errors import StoppedError
from glm45_tune.training.prepare import Job


class NonFinite:
    """Sees every step's metrics, on every rank. `count`: steps of this run that updated nothing."""

    def __init__(self, job: Job, count: int, writes: bool):
        self.count, self._in_a_row = count, 0
        self._job, self._writes = job, writes

    def see(self, step: int, values: dict[str, float]) -> None:
        """step: from 1. Raises StoppedError after `train.max_skipped_steps` in a row."""
        unpaid = values.get("rl/answers", 0) > 0 and values["rl/without_reward"] == values["rl/answers"]
        if not values.pop("is_skipped", False) and not unpaid:
            self._in_a_row = 0
            return
        self.count, self._in_a_row = self.count + 1, self._in_a_row + 1
        values["train/skipped_steps"] = self.count
        what = f"loss {values['train/loss']}, gradient norm {values['train/grad_norm']}"
        what = f"none of its {values['rl/answers']:.0f} answers got a reward" if unpaid else what
        path = self._job.run / "nonfinite" / f"step_{step:06d}.jsonl"
        if self._writes:
            print(f"step {step} is left out: {what}; its batch is in {path}.", file=sys.stderr, flush=True)
            path.parent.mkdir(exist_ok=True)
            path.write_text("".join(_lines(self._job)), encoding="utf-8")
        limit = self._job.recipe.train.max_skipped_steps
        if self._in_a_row >= limit:
            fault, advice = "loss or gradient was not finite", "lower optimizer.lr, or look at that data"
            if unpaid:
                fault, advice = "no answer got a reward", "mend what the reward says above"
            raise StoppedError(
                f"{fault} in {limit} steps in a row, up to step {step} ({what}; train.max_skipped_steps). "
                f"Its batch is in {path}. Weights and checkpoints are those before; {advice}."
            )

    def check_end(self, step: int) -> None:
        """Raise StoppedError where no step of a whole run updated anything."""
        if 0 < step <= self.count and step >= self._job.num_steps:
            raise StoppedError(
                f"{self._job.run}: all {step} steps were left out, so nothing was trained: the weights are those of the start. "
                f"Their batches are in {self._job.run / 'nonfinite'}."
            )


def _lines(job: Job) -> Iterable[str]:
    """The last step's samples, as they were trained: which row of `Job.last_rows`, where from, text, tokens and weights."""
    tokenizer = load_tokenizer(job.recipe.model.path)
    for number, row in enumerate(job.last_rows):
        for sample in row:
            yield json.dumps({"row": number, **_described(sample, tokenizer)}, ensure_ascii=False) + "\n"


def _described(sample: Sample, tokenizer) -> dict:
    facts = {"source": sample.source, "line": sample.line, "text": tokenizer.decode(sample.input_ids)}
    return facts | {"input_ids": sample.input_ids.tolist(), "loss_mask": sample.loss_mask.tolist()}
