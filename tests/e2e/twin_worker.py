"""Run by every rank: a few steps of each of several recipes, and what this rank then holds, for the planner to be held to.

Arguments: a JSON file of cases (name, recipe) and a directory. Each rank leaves NAME.RANK.json: bytes of weights, adapters,
gradient buffers and optimizer state, the pipeline stage it is, and the losses of its steps.
"""

import json
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from transformers import AutoTokenizer  # noqa: F401  imported where a tokenizer is loaded; paid for once before the ranks fork

from glm45_tune.mcore import runtime
from glm45_tune.mcore.step import Trainer
from glm45_tune.recipe import Recipe
from glm45_tune.training.loop import METHODS
from glm45_tune.training.prepare import prepare

STEPS = 2


def held(trainer: Trainer) -> dict[str, float]:
    """Bytes of this rank by kind."""
    found = {"weights": 0, "lora": 0}
    for name, parameter in trainer.module.named_parameters():
        found["lora" if ".adapter." in name else "weights"] += parameter.numel() * parameter.element_size()
    for name, buffer in trainer.module.named_buffers():
        if name.endswith(("weight_scale", "weight_turned")):  # of a base in FP8
            found["weights"] += buffer.numel() * buffer.element_size()
    trained = [parameter for parameter in trainer.module.parameters() if parameter.requires_grad]
    found["gradients"] = sum(parameter.main_grad.numel() * parameter.main_grad.element_size() for parameter in trained)
    states = [state for part in trainer.optimizer.chained_optimizers for state in part.optimizer.state.values()]
    moments = [state[key] for state in states for key in ("exp_avg", "exp_avg_sq")]
    found["optimizer"] = sum(moment.numel() * moment.element_size() for moment in moments)
    return found


def main(cases: str, output: str) -> None:
    for case in json.loads(Path(cases).read_text()):
        job = prepare(Recipe.from_dict(case["recipe"]))
        runtime.start(job.layout, job.recipe.train.seed)
        trainer = Trainer(job.recipe, job.layout, job.source)
        method = METHODS[job.kind](job, trainer)
        losses = [method.train_step(step)["train/loss"] for step in range(STEPS)]
        facts = {**held(trainer), "stage": parallel_state.get_pipeline_model_parallel_rank(), "losses": losses}
        (Path(output) / f"{case['name']}.{dist.get_rank()}.json").write_text(json.dumps(facts))
        assert all(torch.isfinite(torch.tensor(losses))), losses
    runtime.stop()
