"""Run by every rank: a few steps of each of several recipes, and what this rank then holds, for the planner to be held to.

Arguments: a JSON file of cases (name, recipe) and a directory. Each rank leaves NAME.RANK.json: bytes of weights, adapters,
gradient buffers and optimizer state, the pipeline stage it is, and the losses of its steps.
"""

import json
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoTokenizer  # noqa: F401  imported where a tokenizer is loaded; paid for once before the ranks fork
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker, set_moe_metrics_tracker

from glm45_tune.data.batch import collate, total_weights
from glm45_tune.mcore import runtime
from glm45_tune.mcore.step import Trainer
from glm45_tune.recipe import Recipe
from glm45_tune.training.prepare import Job, prepare

STEPS = 2


def held(trainer: Trainer) -> dict[str, float]:
    """Bytes of this rank by kind."""
    found = {"weights": 0, "lora": 0}
    for name, parameter in trainer.module.named_parameters():
        found["lora" if ".adapter." in name else "weights"] += parameter.numel() * parameter.element_size()
    trained = [parameter for parameter in trainer.module.parameters() if parameter.requires_grad]
    found["gradients"] = sum(parameter.main_grad.numel() * parameter.main_grad.element_size() for parameter in trained)
    states = [state for part in trainer.optimizer.chained_optimizers for state in part.optimizer.state.values()]
    moments = [state[key] for state in states for key in ("exp_avg", "exp_avg_sq")]
    found["optimizer"] = sum(moment.numel() * moment.element_size() for moment in moments)
    return found


def train_step(job: Job, trainer: Trainer, number: int) -> float:
    """One optimizer step on the recipe's own rows. Returns its loss."""
    samples, rows = job.train.samples, job.train_rows
    members = [samples[index] for row in job.plan.rows_of_step(number) for index in rows[row]]
    microbatches = job.plan.microbatches(number, trainer.data_parallel_rank)
    batches = (
        collate(
            [samples[index] for row in chosen for index in rows[row]],
            trainer.num_predictions,
            trainer.pad_multiple,
            job.pad_id,
        )
        for chosen in microbatches
    )
    denominators = total_weights(members, trainer.num_predictions).tolist()
    return trainer.train(batches, len(microbatches), denominators, 1e-4).losses[0]


def main(cases: str, output: str) -> None:
    for case in json.loads(Path(cases).read_text()):
        set_moe_metrics_tracker(MoEMetricsTracker())  # megatron's is sized by the first model of a process
        job = prepare(Recipe.from_dict(case["recipe"]))
        runtime.start(job.layout, job.recipe.train.seed)
        trainer = Trainer(job.recipe, job.layout, job.source)
        losses = [train_step(job, trainer, step) for step in range(STEPS)]
        facts = {**held(trainer), "stage": parallel_state.get_pipeline_model_parallel_rank(), "losses": losses}
        (Path(output) / f"{case['name']}.{dist.get_rank()}.json").write_text(json.dumps(facts))
        assert all(torch.isfinite(torch.tensor(losses))), losses
    runtime.stop()
