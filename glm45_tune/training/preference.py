"""Preference tuning: of two answers to one prompt the chosen one becomes likelier, measured against what the model was."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.distributed as dist

from glm45_tune.data.batch import Batch
from glm45_tune.data.chat import Sample
from glm45_tune.data.packing import BatchPlan, Rows, pack
from glm45_tune.data.pairs import Pairs
from glm45_tune.mcore import runtime
from glm45_tune.mcore.step import Trainer
from glm45_tune.rl.losses import sum_by_sequence
from glm45_tune.rl.preference import kto_losses, pair_losses
from glm45_tune.training.prepare import Job
from glm45_tune.training.schedule import learning_rate_of
from glm45_tune.training.sft import batches, common_metrics

REFERENCE_FILE = "reference_logprobs.npz"


class Preference:
    """DPO, IPO and KTO of pairs. A `Method`, see loop.py. A row's samples are pairs end to end, each the chosen answer first."""

    together = 2
    """Samples that are compared with one another."""

    def __init__(self, job: Job, trainer: Trainer):
        self._job, self._trainer, self._options = job, trainer, job.recipe.asked_preference
        self._reference = None
        if self._options.reference == "precomputed":
            self._reference = self._precomputed()

    def train_step(self, step: int) -> dict[str, float]:
        job, trainer = self._job, self._trainer
        runtime.seed_all(job.recipe.train.seed + step)
        rows = job.rows_of_step(step)
        members = [sample for row in rows for sample in row]
        lr = learning_rate_of(job.recipe, step, job.num_steps)
        chosen = self._with_reference(job.plan.share(rows, trainer.data_parallel_rank))
        divergence = self._divergence(members)
        objective = partial(self._objective, members, divergence)
        num_filled = sum(batch.num_samples > 0 for batch in chosen)
        result = trainer.update(chosen, len(chosen), objective, lr, num_filled)
        tokens = sum(len(sample.input_ids) for sample in members)
        return {
            **common_metrics(result, trainer, result.sums["loss"]),
            "train/learning_rate": lr,
            "train/tokens": tokens,
            "train/trained_tokens": float(sum(sample.loss_mask.sum() for sample in members)),
            "data/fill_ratio": tokens / (len(rows) * job.recipe.data.seq_length),
            **self._metrics(result.sums, members, divergence),
        }

    def evaluate(self) -> dict[str, float]:
        job = self._job
        if not job.eval_rows:
            return {}
        rows, plan = _all_rows(job, job.held_out.samples, job.eval_rows)
        members = [sample for row in rows for sample in row]
        chosen = self._with_reference(plan.share(rows, self._trainer.data_parallel_rank))
        divergence = self._divergence(members)
        sums = self._trainer.measure(chosen, len(chosen), partial(self._objective, members, divergence)).sums
        metrics = self._metrics(sums, members, divergence)
        return {"eval/loss": sums["loss"]} | {
            f"eval/{name.partition('/')[2]}": value for name, value in metrics.items()
        }

    @property
    def state(self) -> dict:
        return {}

    def resume(self, state: dict) -> None:
        pass

    def close(self) -> None:
        pass

    def _answers(self, batch: Batch, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log-probabilities of a micro batch's answers under policy (with gradient) and reference, and their cross entropies, all [answers]."""
        weights, count, across = batch.weights[0], batch.num_samples, self._trainer.over_row
        lengths = sum_by_sequence(weights, batch.sequence, count, across).clamp(min=1e-30)
        policy = sum_by_sequence(-losses[0] * weights, batch.sequence, count, across)
        reference = sum_by_sequence(batch.along["reference"] * weights, batch.sequence, count, across)
        means = policy / lengths
        return (means, reference / lengths, -means) if self._options.length_normalised else (policy, reference, -means)

    def _objective(self, members: list[Sample], divergence: float, batch: Batch, losses: torch.Tensor):
        """The loss is a mean over the pairs of the whole step; micro batches hold whole pairs."""
        options, count, num_pairs = self._options, batch.num_samples, len(members) // 2
        policy, reference, cross_entropy = self._answers(batch, losses)
        cross_entropy = cross_entropy[0::2]
        if options.loss == "kto":
            is_chosen = torch.arange(count, device=policy.device) % 2 == 0
            at = policy.new_tensor(divergence)
            shares = (options.desirable_weight, options.undesirable_weight)
            each = kto_losses(policy, reference, is_chosen, at, options.beta, shares) / 2
        else:
            sides = (values[side::2] for values in (policy, reference) for side in (0, 1))
            each = pair_losses(*sides, options.loss, options.beta)
        loss = (each.sum() + options.sft_weight * cross_entropy.sum()) / num_pairs
        gain = (options.beta * (policy - reference)).detach()
        numbers = {
            "loss": loss.detach(),
            "cross_entropy": cross_entropy.detach().sum(),
            "chosen_reward": gain[0::2].sum(),
            "rejected_reward": gain[1::2].sum(),
            "accuracy": (gain[0::2] > gain[1::2]).sum(),
            "chosen_logprob": policy.detach()[0::2].sum(),
            "rejected_logprob": policy.detach()[1::2].sum(),
        }
        return loss, {name: value * self._trainer.reports_row for name, value in numbers.items()}

    def _metrics(self, sums: dict[str, float], members: list[Sample], divergence: float) -> dict[str, float]:
        # no router is told its experts here, so what became of that is no number of ours
        means = {
            name: total / (len(members) // 2)
            for name, total in sums.items()
            if name != "loss" and not name.startswith("routes_")
        }
        if not self._options.sft_weight:
            del means["cross_entropy"]
        means["margin"] = means["chosen_reward"] - means["rejected_reward"]
        if self._options.loss == "kto":
            means["reference_point"] = divergence
        return {f"preference/{name}": value for name, value in means.items()}

    def _with_reference(self, microbatches: list[list[list[Sample]]]) -> list[Batch]:
        """The micro batches with what the reference thought of their tokens."""
        plain = list(batches(self._job, self._trainer, microbatches))
        if self._reference is None:
            found = self._trainer.log_probabilities(plain, with_adapter=False)
        else:
            members = ([sample for row in rows for sample in row] for rows in microbatches)
            found = [self._known(batch, samples) for batch, samples in zip(plain, members)]
        return [replace(batch, along={"reference": values}) for batch, values in zip(plain, found)]

    def _divergence(self, members: list[Sample]) -> float:
        """Return KTO's reference point z0 (arXiv:2402.01306, 4.1), without gradient and at least 0.

        Each prompt is paired with the next sample's answer, and log(policy / reference) is averaged
        over the step. It estimates KL(policy ‖ reference) with answers to other prompts. A step of
        one pair (one answer) has none to pair, and 0.
        """
        if self._options.loss != "kto" or len(members) < 2 * self.together:
            return 0.0
        job, options = self._job, self._job.recipe.data
        mixed = self._mixed(members)
        rows = (
            pack([len(s.input_ids) for s in mixed], options.seq_length) if options.packing else Rows.single(len(mixed))
        )
        size = job.layout.data_parallel_size * job.layout.microbatch_multiple
        plan = BatchPlan(len(rows), -(-len(rows) // size) * size, 1, job.layout.data_parallel_size, 0)
        whole = [[mixed[number] for number in row] for row in rows]
        chosen = self._with_reference(plan.share(whole, self._trainer.data_parallel_rank))
        sums = self._trainer.measure(chosen, len(chosen), self._log_ratio).sums
        return max(sums["log_ratio"] / len(mixed), 0.0)

    def _mixed(self, members: list[Sample]) -> list[Sample]:
        """Each pair's prompt with the next pair's chosen answer."""
        pairs = list(Pairs(members))
        return swapped([(pair.chosen, pair.prompt) for pair in pairs], self._job.recipe.data.seq_length)

    def _log_ratio(self, batch: Batch, losses: torch.Tensor):
        policy, reference, _ = self._answers(batch, losses)
        gaps = policy - reference
        return gaps.sum(), {"log_ratio": gaps.sum() * self._trainer.reports_row}

    def _precomputed(self) -> dict[tuple[str, int], np.ndarray]:
        """(file, line) of a pair → float32 [2], the log-probabilities of its answers before the first step.

        They are measured once, kept with the run, and measured again where the data is not the
        same. The trainer holds no checkpoint yet.
        """
        job, path = self._job, self._job.run / REFERENCE_FILE
        sides = {"train": (job.train.samples, job.train_rows), "held_out": (job.held_out.samples, job.eval_rows)}
        digests = {name: samples.digest() if len(samples) else "" for name, (samples, _) in sides.items()}
        read = [dict(np.load(path)) if dist.get_rank() == 0 and path.is_file() else {}]
        dist.broadcast_object_list(read, src=0)
        kept = read[0]
        other = [name for name in sides if f"{name} digest" not in kept or str(kept[f"{name} digest"]) != digests[name]]
        for name in other:
            kept |= {name: self._measured(*sides[name]), f"{name} digest": np.array(digests[name])}
        if other and dist.get_rank() == 0:
            staging = path.with_suffix(".partial.npz")
            np.savez(staging, **kept)
            staging.replace(path)
        found = {}
        for name, (samples, _) in sides.items():
            for pair, values in zip(Pairs(samples) if len(samples) else (), kept[name].reshape(-1, 2), strict=True):
                found[pair.chosen.source, pair.chosen.line] = values
        return found

    def _measured(self, samples: Sequence[Sample], rows: Rows) -> np.ndarray:
        """The weighted log-probability of every sample, float64 [samples]."""
        found = np.zeros(len(samples))
        if not len(samples):
            return found
        trainer, job = self._trainer, self._job
        whole, plan = _all_rows(job, samples, rows)
        own = plan.share(whole, trainer.data_parallel_rank)
        numbers = plan.share([rows[row] for row in plan.rows_of_step(0)], trainer.data_parallel_rank)
        plain = list(batches(job, trainer, own))
        for batch, chosen, logps in zip(plain, numbers, trainer.log_probabilities(plain)):
            members = [number for row in chosen for number in row]
            if trainer.reports_sample:
                found[members] = sum_by_sequence(logps * batch.weights[0], batch.sequence, batch.num_samples).double()
        total = torch.from_numpy(found).to(runtime.device())
        dist.all_reduce(total)
        return total.cpu().numpy()

    def _known(self, batch: Batch, members: list[Sample]) -> torch.Tensor:
        """Values [T] whose weighted sum over an answer is its precomputed log-probability."""
        sums = torch.zeros(batch.num_samples)
        for number, sample in enumerate(members):
            sums[number] = float(self._reference[sample.source, sample.line][number % 2])
        means = sums / sum_by_sequence(batch.weights[0], batch.sequence, batch.num_samples).clamp(min=1e-30)
        return torch.where(batch.sequence >= 0, means[batch.sequence.clamp(min=0)] if members else 0.0, 0.0)


def _all_rows(job: Job, samples: Sequence[Sample], rows: Rows) -> tuple[list[list[Sample]], BatchPlan]:
    """Every row once, and the plan by which ranks share them."""
    size = job.recipe.train.micro_batch_size * job.layout.data_parallel_size * job.layout.microbatch_multiple
    count = math.ceil(len(rows) / size) * size
    plan = BatchPlan(len(rows), count, job.recipe.train.micro_batch_size, job.layout.data_parallel_size, 0)
    return [[samples[index] for index in rows[row]] for row in plan.rows_of_step(0)], plan


def swapped(answers: list[tuple[Sample, int]], longest: int) -> list[Sample]:
    """Each prompt with the next one's answer (the last with the first's), cut at `longest` tokens.

    answers: a conversation and how many tokens of it are prompt, each.
    """
    found = []
    for (sample, prompt), (other, start) in zip(answers, [*answers[1:], answers[0]]):
        ids = np.concatenate([sample.input_ids[:prompt], other.input_ids[start:]])[:longest]
        mask = np.concatenate([np.zeros(prompt, np.float32), other.loss_mask[start:]])[:longest]
        found.append(Sample(ids, mask, sample.source, sample.line))
    return found
