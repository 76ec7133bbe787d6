"""Supervised fine-tuning and continued pre-training: what happens in a step, and what is held out."""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from glm45_tune.data.batch import Batch, collate, total_weights
from glm45_tune.data.chat import Sample
from glm45_tune.data.packing import BatchPlan
from glm45_tune.errors import UserError
from glm45_tune.mcore import runtime
from glm45_tune.mcore.step import StepResult, Trainer
from glm45_tune.plan.timing import Work, work
from glm45_tune.training.prepare import Job
from glm45_tune.training.schedule import learning_rate_of


class Supervised:
    """The next token of what is trained. A `Method`, see loop.py."""

    def __init__(self, job: Job, trainer: Trainer):
        self._job, self._trainer = job, trainer
        self._seen: set[str] = set()

    @cached_property
    def _work(self) -> Work:
        return work(self._job.source.spec, self._job.recipe)

    @cached_property
    def _files(self) -> set[str]:
        """All that are known to be trained; a stream's are added as they come."""
        samples = self._job.train.samples
        return set(samples.origins().names if len(samples) else ())

    def train_step(self, step: int) -> dict[str, float]:
        job, trainer = self._job, self._trainer
        runtime.seed_all(
            job.recipe.train.seed + step
        )  # dropout depends on the step alone, so a resumed run draws the same
        rows = job.rows_of_step(step)
        members = [sample for row in rows for sample in row]
        denominators = total_weights(members, trainer.num_predictions)
        microbatches = job.plan.share(rows, trainer.data_parallel_rank)
        lr = learning_rate_of(job.recipe, step, job.num_steps)
        channels = self._channels_of(members)
        made = batches(job, trainer, microbatches, channels)
        num_filled = sum(map(bool, microbatches))
        result = trainer.train(made, len(microbatches), denominators.tolist(), lr, len(channels), num_filled)
        lengths = [len(sample.input_ids) for sample in members]
        tokens, counted = sum(lengths), sum(np.count_nonzero(sample.loss_mask) for sample in members)
        return {
            **common_metrics(result, trainer, result.losses[0]),
            **_channel_losses(result, members, channels, self._files),
            "train/learning_rate": lr,
            "train/tokens": tokens,
            "train/trained_tokens": float(denominators[0]),
            "flops": self._work.of(lengths, counted),
            "data/fill_ratio": tokens / (len(rows) * job.recipe.data.seq_length),
        }

    def _channels_of(self, members: list[Sample]) -> list[str]:
        """Those of a step's samples, whose losses are told apart; none where the run has seen but one."""
        found = sorted({sample.channel for sample in members})
        self._files.update(sample.source for sample in members)
        self._seen.update(found)
        return found if len(self._files | self._seen) > 1 else []

    def evaluate(self) -> dict[str, float]:
        job, trainer = self._job, self._trainer
        if not job.eval_rows:
            return {}
        batch = job.recipe.train.micro_batch_size * job.layout.data_parallel_size * job.layout.microbatch_multiple
        size = -(-len(job.eval_rows) // batch) * batch
        plan = BatchPlan(len(job.eval_rows), size, job.recipe.train.micro_batch_size, job.layout.data_parallel_size, 0)
        rows = [[job.held_out.samples[index] for index in job.eval_rows[row]] for row in plan.rows_of_step(0)]
        microbatches = plan.share(rows, trainer.data_parallel_rank)
        denominators = total_weights(job.held_out.samples, trainer.num_predictions).tolist()
        result = trainer.evaluate(batches(job, trainer, microbatches), len(microbatches), denominators)
        return {"eval/loss": result.losses[0]}

    @property
    def state(self) -> dict:
        return {"cursor": self._job.stream.cursor} if self._job.stream else {}

    def resume(self, state: dict) -> None:
        stream = self._job.stream
        if ("cursor" in state) != (stream is not None):
            raise UserError(
                f"{self._job.run}: data.streaming was changed; a run goes on as it began. Choose another output_dir."
            )
        if stream:
            stream.seek(state["cursor"])

    def close(self) -> None:
        if self._job.stream:
            self._job.stream.close()


def batches(
    job: Job, trainer: Trainer, microbatches: list[list[list[Sample]]], channels: list[str] | None = None
) -> Iterator[Batch]:
    """One Batch for each micro batch of rows, made when it is needed; with `channels`, each token's goes along."""
    for rows in microbatches:
        members = [sample for row in rows for sample in row]
        along = {}
        if channels:
            along["channel"] = [np.full(len(each.input_ids), channels.index(each.channel)) for each in members]
        yield collate(members, trainer.num_predictions, trainer.pad_multiple, job.pad_id, along)


def _channel_losses(
    result: StepResult, members: list[Sample], channels: list[str], files: set[str]
) -> dict[str, float]:
    """Return `loss/NAME` of every channel: the mean over its trained tokens of this step.

    NAME is the rows' own or the file's, which is its whole path where two files have one name.
    """
    found = {}
    names = [Path(file).name for file in files]
    for number, channel in enumerate(channels):
        weight = total_weights([sample for sample in members if sample.channel == channel], 1)[0]
        short = Path(channel).name
        name = short if channel in files and names.count(short) == 1 else channel
        found[f"loss/{name}"] = result.sums[f"channel/{number}"] / max(weight, 1e-30)
    return found


def common_metrics(result: StepResult, trainer: Trainer, loss: float) -> dict[str, float]:
    """What every kind of training says of a step."""
    values = {
        "train/loss": loss,
        "train/grad_norm": result.grad_norm,
        **{f"grad_norm/{group}": norm for group, norm in result.grad_norm_by_group.items()},
        "is_skipped": result.is_skipped,
        **_expert_load(result.expert_load, trainer),
    }
    if len(result.losses) > 1:
        values["train/mtp_loss"] = sum(result.losses[1:]) / len(result.losses[1:])
    if trainer.has_aux_loss:
        values["train/aux_loss"] = result.aux_loss
    if trainer.has_z_loss:
        values["train/z_loss"] = result.z_loss
    return values


def _expert_load(load: torch.Tensor, trainer: Trainer) -> dict[str, float]:
    """The busiest expert of every layer (HF's number), and of all of them, over its layer's mean."""
    first = trainer.module.spec.num_dense_layers
    by_layer = {f"moe/load/layer_{first + row:02d}": worst for row, worst in enumerate(load.amax(1).tolist())}
    return {"moe/expert_load_max_over_mean": max(by_layer.values()), **by_layer}
