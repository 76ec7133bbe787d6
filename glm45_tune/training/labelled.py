"""KTO of single answers: desirable ones become likelier, undesirable ones less so, against what the model was."""

from dataclasses import replace

import numpy as np
import torch

from glm45_tune.data.batch import Batch
from glm45_tune.data.chat import Sample
from glm45_tune.rl.losses import sum_by_sequence
from glm45_tune.rl.preference import kto_losses
from glm45_tune.training.preference import Preference, swapped


class Labelled(Preference):
    """A `Method`, see loop.py. A row's samples are answers end to end, each with {"label": bool} as its `row`.

    The loss is the mean over the step's answers of `kto_losses`, with λ desirable_weight or undesirable_weight by the label, and
    the reference point from the step's answers, of both labels, each put behind its neighbour's prompt (`Preference._divergence`).
    """

    together = 1

    def _with_reference(self, microbatches: list[list[list[Sample]]]) -> list[Batch]:
        """The micro batches with what the reference thought of their tokens, and 1 along the tokens of desirable answers, else 0."""
        found = []
        for batch, rows in zip(super()._with_reference(microbatches), microbatches):
            labels = [sample.row["label"] for row in rows for sample in row] or [False]
            desirable = torch.tensor(labels, dtype=torch.float32)[batch.sequence.clamp(min=0)]
            found.append(replace(batch, along=batch.along | {"desirable": desirable}))
        return found

    def _objective(self, members: list[Sample], divergence: float, batch: Batch, losses: torch.Tensor):
        options, across = self._options, self._trainer.over_row
        policy, reference, cross_entropy = self._answers(batch, losses)
        labels = batch.along["desirable"] * batch.weights[0]
        desirable = sum_by_sequence(labels, batch.sequence, batch.num_samples, across) > 0
        shares = (options.desirable_weight, options.undesirable_weight)
        each = kto_losses(policy, reference, desirable, policy.new_tensor(divergence), options.beta, shares)
        cross_entropy = torch.where(desirable, cross_entropy, 0.0).sum()
        loss = each.sum() / len(members) + options.sft_weight * cross_entropy / max(_count(members), 1)
        gain, logps = (options.beta * (policy - reference)).detach(), policy.detach()
        numbers = {
            "loss": loss.detach(),
            "cross_entropy": cross_entropy.detach(),
            "desirable_reward": (gain * desirable).sum(),
            "undesirable_reward": (gain * ~desirable).sum(),
            "desirable_logprob": (logps * desirable).sum(),
            "undesirable_logprob": (logps * ~desirable).sum(),
        }
        return loss, {name: value * self._trainer.reports_row for name, value in numbers.items()}

    def _metrics(self, sums: dict[str, float], members: list[Sample], divergence: float) -> dict[str, float]:
        """Means over the answers of each label, of those that the step has."""
        counts = {"desirable": _count(members), "undesirable": len(members) - _count(members)}
        means = {"reference_point": divergence, "desirable_share": counts["desirable"] / len(members)}
        for label, count in counts.items():
            if count:
                means |= {f"{label}_{what}": sums[f"{label}_{what}"] / count for what in ("reward", "logprob")}
        if all(counts.values()):
            means["margin"] = means["desirable_reward"] - means["undesirable_reward"]
        if self._options.sft_weight and counts["desirable"]:
            means["cross_entropy"] = sums["cross_entropy"] / counts["desirable"]
        return {f"preference/{name}": value for name, value in means.items()}

    def _mixed(self, members: list[Sample]) -> list[Sample]:
        """Each prompt, up to what is trained, with the next sample's answer; they keep the label that came with the prompt."""
        answers = [(sample, int(np.argmax(sample.loss_mask > 0))) for sample in members]
        found = swapped(answers, self._job.recipe.data.seq_length)
        return [replace(mixed, row=sample.row) for mixed, sample in zip(found, members)]


def _count(members: list[Sample]) -> int:
    """Desirable answers."""
    return sum(sample.row["label"] for sample in members)
