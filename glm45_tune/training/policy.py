"""Reinforcement learning: answers that were worth more than their group's become likelier, within bounds of the policy that wrote them."""

import math
import time
from dataclasses import replace

import numpy as np
import torch

from glm45_tune.data.batch import Batch, collate
from glm45_tune.data.chat import Sample
from glm45_tune.data.packing import BatchPlan, pack
from glm45_tune.errors import ToldToStop
from glm45_tune.mcore.step import StepResult, Trainer
from glm45_tune.rl.losses import answer_weights, divergence, importance_weights, policy_losses, sequence_ratios
from glm45_tune.run.files import SAMPLES_FILE, kept_until
from glm45_tune.system.files import write_whole
from glm45_tune.training.ahead import Ahead
from glm45_tune.training.engines import LocalEngine, ServedEngine
from glm45_tune.training.prepare import Job
from glm45_tune.training.rollout import Answer, Roller, Rollout, as_line
from glm45_tune.training.sameness import Sameness
from glm45_tune.training.samples import keep_samples
from glm45_tune.training.schedule import learning_rate_of
from glm45_tune.training.sft import common_metrics

SAMPLES_A_STEP = 4


class PolicyGradient:
    """GRPO and its kin. A `Method`, see loop.py: a step is a rollout and the updates made from it."""

    def __init__(self, job: Job, trainer: Trainer):
        self._job, self._trainer, self._rl = job, trainer, job.recipe.asked_rl
        self._engine = (LocalEngine if self._rl.engine.kind == "local" else ServedEngine)(job, trainer)
        self._roller = Roller(job, self._engine)
        self._ahead = Ahead(job, self._engine, self._roller.prompts) if self._rl.staleness else None
        self._version = 0
        self._sameness = Sameness()

    def train_step(self, step: int) -> dict[str, float]:
        job = self._job
        started = time.perf_counter()
        rollout, sync_seconds = self._rollout_ahead(step) if self._ahead else self._rollout(step)
        rolled = time.perf_counter()
        trains = [_trains(answer, self._rl.mask_truncated) for answer in rollout.answers]
        job.last_rows = [[_sample(answer, is_trained)] for answer, is_trained in zip(rollout.answers, trains)]
        lr = learning_rate_of(job.recipe, step, job.num_steps)
        # where no answer was left to learn from, the optimizer makes a step of length 0: its momentum would move the weights
        results = self._update(rollout.answers, lr if any(trains) else 0.0)
        trained = time.perf_counter()
        self._keep_samples(step, rollout.answers)
        if torch.distributed.get_rank() == 0:
            self._sameness.see(rollout.metrics)
        return {
            **rollout.metrics,
            **self._engine.metrics(),
            **self._replay_gaps(rollout.answers),
            **self._metrics(results),
            "train/learning_rate": lr,
            "train/tokens": sum(len(answer.token_ids) for answer in rollout.answers),
            "rl/version": self._version,
            "perf/sync_seconds": sync_seconds,
            "perf/rollout_seconds": rolled - started - sync_seconds,
            "perf/train_seconds": trained - rolled,
        }

    def _rollout(self, step: int) -> tuple[Rollout, float]:
        """The step's answers from the weights as they stand, and the seconds that the engine took to have them."""
        seconds, prompts = self._synchronise(), self._roller.prompts
        before = prompts.taken, prompts.again
        try:
            return self._roller.roll(step), seconds
        except ToldToStop:
            prompts.taken, prompts.again = before
            raise

    def _rollout_ahead(self, step: int) -> tuple[Rollout, float]:
        """What was written during the last step; then the engine gets the weights as they stand, and writes while this step trains."""
        ahead, seconds = self._ahead, 0.0
        if not ahead.is_writing:
            seconds += self._synchronise()
            ahead.start(step, self._version)
        pending, prompts = ahead.pending, self._roller.prompts
        answers, metrics = ahead.take(self._version)
        before = prompts.taken, [number for number in pending if number not in ahead.pending] + prompts.again
        try:
            rollout = self._roller.roll(step, answers)
        except ToldToStop:
            prompts.taken, prompts.again = before
            raise
        rollout.metrics |= metrics
        if step + 1 < self._job.num_steps:
            seconds += self._synchronise()
            ahead.start(step + 1, self._version)
        return rollout, seconds

    def _synchronise(self) -> float:
        started = time.perf_counter()
        self._trainer.enter("giving the engine the weights")
        self._engine.synchronise(self._version)
        self._trainer.enter("rollout")
        return time.perf_counter() - started

    def evaluate(self) -> dict[str, float]:
        """Rewards of the held-out prompts' answers. What is written ahead is written to its end first, and these then by the same weights."""
        if not len(self._job.held_out.samples):
            return {}
        if self._ahead and self._ahead.is_writing:
            self._ahead.settle()
        else:
            self._synchronise()
        return self._roller.evaluate(self._job.held_out.samples)

    @property
    def state(self) -> dict:
        prompts = self._roller.prompts
        untrained = [*(self._ahead.pending if self._ahead else []), *prompts.again]
        found = {"prompts_taken": prompts.taken, "version": self._version}
        return found | ({"prompts_again": untrained} if untrained else {})

    def resume(self, state: dict) -> None:
        self._roller.prompts.taken, self._version = state["prompts_taken"], state["version"]
        self._roller.prompts.again = state.get("prompts_again", [])
        path = self._job.run / SAMPLES_FILE
        if torch.distributed.get_rank() == 0 and path.is_file():
            write_whole(path, kept_until(path, state["step"]))

    def close(self) -> None:
        self._sameness.end()
        self._roller.close()
        if self._ahead:
            self._ahead.close()
        self._engine.close()

    def _update(self, answers: list[Answer], lr: float) -> list[StepResult]:
        """The rollout's updates, each on its share of the groups, against the log-probabilities of the policy before the first."""
        count = self._rl.updates_per_rollout
        num_groups = answers[-1].group + 1 if answers else 1
        shares = [[a for a in answers if a.group * count // num_groups == number] for number in range(count)]
        batches = [self._batches(share) for share in shares if share or not answers]
        ends = np.cumsum([len(share) for share in batches])
        prepared = self._with_old([batch for share in batches for batch in share])
        results = []
        for share, end in zip(batches, ends):
            ours = prepared[end - len(share) : end]
            num_filled = sum(batch.num_samples > 0 for batch in ours)
            results.append(self._trainer.update(ours, len(ours), self._objective, lr, num_filled))
            self._version += 1
        return results

    def _batches(self, answers: list[Answer]) -> list[Batch]:
        """This rank's micro batches of an update: answers packed into rows, with what goes with every token."""
        job, trainer, rl = self._job, self._trainer, self._rl
        trains = [a.length if _trains(a, rl.mask_truncated) else 0 for a in answers]
        weights = answer_weights(np.array(trains), rl.loss_average, rl.max_new_tokens)
        rows = pack([len(answer.token_ids) for answer in answers], job.recipe.data.seq_length)
        ranks, size = job.layout.data_parallel_size, job.recipe.train.micro_batch_size
        multiple = size * ranks * job.layout.microbatch_multiple
        plan = BatchPlan(len(rows), max(math.ceil(len(rows) / multiple), 1) * multiple, size, ranks, 0)
        microbatches = plan.share([rows[row] for row in range(len(rows))], trainer.data_parallel_rank)
        found = []
        for chosen in microbatches:
            members = [number for row in chosen for number in row]
            own = [answers[number] for number in members]
            samples = [_sample(answer, bool(trains[number])) for answer, number in zip(own, members)]
            along = {
                "engine": [np.array(answer.logprobs, np.float32) for answer in own],
                "advantage": [np.full(len(answer.token_ids), answer.advantage, np.float32) for answer in own],
                "weight": [np.full(len(a.token_ids), weights[n], np.float32) for a, n in zip(own, members)],
            }
            batch = collate(samples, trainer.num_predictions, trainer.pad_multiple, job.pad_id, along)
            if rl.router_replay == "engine":
                batch = replace(batch, routes=trainer.routes_of(batch, self._experts(own, batch)))
            found.append(batch)
        return found

    def _experts(self, answers: list[Answer], batch: Batch) -> torch.Tensor:
        """The experts that the engine chose, int [T, MoE layers, K]; −1 where it did not say, and for the last token, which it never read."""
        spec = self._job.source.spec
        whole = np.full(
            (len(batch.tokens), spec.num_layers - spec.num_dense_layers, spec.moe_router_topk), -1, np.int16
        )
        for first, answer in zip(batch.bounds, answers):
            if answer.experts is not None:
                # vLLM counts dense layers too
                whole[first : first + len(answer.experts)] = answer.experts[:, -whole.shape[1] :]
        return torch.from_numpy(whole)

    def _with_old(self, batches: list[Batch]) -> list[Batch]:
        """With the log-probabilities of the policy as it stands, those of the reference, and what follows from them."""
        rl, trainer = self._rl, self._trainer
        old = trainer.log_probabilities(batches)
        if rl.router_replay == "trainer":
            batches = [replace(batch, routes=routes) for batch, routes in zip(batches, trainer.routes_taken())]
        reference = trainer.log_probabilities(batches, with_adapter=False) if rl.kl_coef else old
        found = []
        for batch, before, base in zip(batches, old, reference):
            mask, along = batch.weights[0] > 0, dict(batch.along)
            correction = importance_weights(
                before,
                along["engine"],
                mask,
                batch.sequence,
                batch.num_samples,
                rl.importance_sampling,
                rl.importance_cap,
            )
            along["weight"] = along["weight"] * batch.weights[0] * correction
            if rl.kl_estimator == "k1":
                along["advantage"] = along["advantage"] - rl.kl_coef * torch.where(
                    mask, divergence(before, base, "k1"), 0.0
                )
            found.append(replace(batch, along=along | {"old": before, "reference": base}))
        return found

    def _objective(self, batch: Batch, losses: torch.Tensor):
        """The loss is a sum over tokens, whose weights make it the mean that the recipe asks for."""
        rl, trainer, along = self._rl, self._trainer, batch.along
        mask, logp = batch.weights[0] > 0, -losses[0]
        logs = torch.where(mask, logp - along["old"], 0.0)
        if rl.loss == "gspo":
            ratios = sequence_ratios(logs, mask, batch.sequence, batch.num_samples, trainer.over_row, trainer.for_row)
            logs = torch.where(mask, ratios, 0.0)
        each, clipped = policy_losses(logp, logs, along["advantage"], rl.loss, rl.epsilon, rl.highest)
        if rl.kl_estimator in ("k2", "k3"):
            each = each + rl.kl_coef * divergence(logp, along["reference"], rl.kl_estimator)
        loss = torch.where(mask, each * along["weight"], 0.0).sum()
        with torch.no_grad():
            ratio = logs.exp()
            gap = torch.where(mask, along["old"] - along["engine"], 0.0)
            numbers = {
                "loss": loss.detach(),
                "tokens": mask.sum(),
                "clipped": (clipped & mask).sum(),
                "ratio": (ratio * mask).sum(),
                "max/ratio": (ratio * mask).max(),
                "surprise": -(logp.detach() * mask).sum(),
                "kl": (divergence(logp, along["reference"], "k3") * mask).sum(),
                "gap": gap.abs().sum(),
                "max/gap": gap.abs().max(),
                "importance": (gap.exp() * mask).sum(),
                "importance_squared": ((2 * gap).exp() * mask).sum(),
            }
        return loss, numbers

    def _metrics(self, results: list[StepResult]) -> dict[str, float]:
        """Over the rollout's updates together."""
        sums = {
            name: (max if name.startswith("max/") else sum)(result.sums[name] for result in results)
            for name in results[0].sums
        }
        tokens = max(sums["tokens"], 1)
        return {
            **common_metrics(results[-1], self._trainer, sums["loss"] / len(results)),
            "train/trained_tokens": sums["tokens"],
            "rl/clipped_share": sums["clipped"] / tokens,
            "rl/ratio_mean": sums["ratio"] / tokens,
            "rl/ratio_max": sums["max/ratio"],
            "rl/entropy": sums["surprise"] / tokens,
            "rl/logprob_gap_mean": sums["gap"] / tokens,
            "rl/logprob_gap_max": sums["max/gap"],
            "rl/logprob_gap_exp": math.exp(min(sums["gap"] / tokens, 700)),
            "rl/effective_sample_size": sums["importance"] ** 2 / (tokens * max(sums["importance_squared"], 1e-30)),
            **({"rl/kl": sums["kl"] / tokens} if self._rl.kl_coef else {}),
            **({"rl/router_agreement": sums["routes_agreed"] / sums["routes_told"]} if sums["routes_told"] else {}),
        }

    def _replay_gaps(self, answers: list[Answer]) -> dict[str, int]:
        """Tokens that the engine read without saying which experts it sent them to."""
        if self._rl.router_replay != "engine":
            return {}
        told = sum(int((a.experts >= 0).all((1, 2)).sum()) for a in answers if a.experts is not None)
        return {"rl/replay_gaps": sum(len(a.token_ids) - 1 for a in answers) - told}

    def _keep_samples(self, step: int, answers: list[Answer]) -> None:
        """A few of the step's conversations, for the person who wonders what the numbers mean."""
        if torch.distributed.get_rank() == 0:
            decode = self._job.tokenizer.decode
            lines = []
            for answer in answers[:: math.ceil(len(answers) / SAMPLES_A_STEP) or 1]:
                prompt = decode(answer.sample.input_ids, skip_special_tokens=False)
                lines.append(as_line(step + 1, answer, self._roller.text(answer, whole=True), prompt))
            keep_samples(self._job.run, "".join(lines))


def _trains(answer: Answer, mask_truncated: bool) -> bool:
    return not math.isnan(answer.reward) and not (mask_truncated and answer.finish == "length")


def _sample(answer: Answer, trains: bool) -> Sample:
    mask = np.array(answer.written, np.float32) * trains
    return Sample(np.array(answer.token_ids, np.int32), mask, answer.sample.source, answer.sample.line)
