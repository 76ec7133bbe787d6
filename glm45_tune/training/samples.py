"""What the model writes to a few of the data's prompts, before the first step and after the last: for the report."""

import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch.distributed as dist

from glm45_tune.data.chat import Sample
from glm45_tune.data.sources import RENDERERS
from glm45_tune.mcore.generate import Writer
from glm45_tune.mcore.step import Trainer
from glm45_tune.rl.engine import Request
from glm45_tune.run.files import SAMPLES_FILE
from glm45_tune.system.files import append_whole, write_whole
from glm45_tune.training.prepare import Job

_MOST_TOKENS = 64  # of an answer
_LONGEST_PROMPT = 2048


class Samples:
    """Prompts of held-out samples where there are any, else of trained ones; none of a stream alone. Used by all ranks together."""

    def __init__(self, job: Job, trainer: Trainer):
        self._job, self._trainer = job, trainer
        cut = map(_cut, islice(_wanted(job), job.recipe.logging.num_samples))
        self._cuts = [(prompt, wanted) for prompt, wanted in cut if 0 < len(prompt) <= _LONGEST_PROMPT]

    def write(self, step: int) -> None:
        """Add an answer to each prompt to SAMPLES_FILE; the same draw at every step."""
        if not self._cuts:
            return
        decode = self._job.tokenizer.decode
        writer = Writer(self._trainer.module[0], self._job.source.spec.eos_token_ids, concurrency=len(self._cuts))
        requests = [Request(prompt.tolist(), min(_MOST_TOKENS, len(wanted) + 16)) for prompt, wanted in self._cuts]
        answers = writer.write(requests, self._job.recipe.train.seed, step)
        if dist.get_rank() == 0:
            lines = []
            for (prompt, wanted), answer in zip(self._cuts, answers):
                texts = {"prompt": decode(prompt), "text": decode(answer.token_ids), "wanted": decode(wanted)}
                lines.append(json.dumps({"step": step, **texts}, ensure_ascii=False) + "\n")
            keep_samples(self._job.run, "".join(lines), anew=not step)


def keep_samples(run: Path, lines: str, anew: bool = False) -> None:
    """Add lines to a run's sample texts. Training goes on without them where they cannot be written, and that is said."""
    path = run / SAMPLES_FILE
    try:
        (write_whole if anew else append_whole)(path, lines)
    except OSError as error:
        print(f"{path}: cannot be written ({error.strerror}); training goes on without these texts.", file=sys.stderr)


def _wanted(job: Job) -> Iterator[Sample]:
    """Samples whose answers are wanted, in order: of pairs the chosen ones, of labelled answers the desirable ones."""
    source = job.held_out.samples or job.train.samples
    for number in range(0, len(source), RENDERERS[job.kind].per_row):  # a pair's chosen answer comes first
        sample = source[number]
        if job.kind != "labelled" or sample.row["label"]:
            yield sample


def _cut(sample: Sample) -> tuple[np.ndarray, np.ndarray]:
    """A sample's tokens up to the first one that is trained, or of plain text its first quarter; and the rest."""
    first = int(np.argmax(sample.loss_mask > 0))
    first = first if first > 2 else len(sample.input_ids) // 4
    return sample.input_ids[:first], sample.input_ids[first:]
