"""Run by every rank: updates from answers that no model wrote under each of several layouts, and answers that the model writes.

Arguments: a JSON file of cases (name, recipe) and a directory. Rank 0 leaves the metrics of every step in NAME.json.
"""

import json
from pathlib import Path

import numpy as np
import torch.distributed as dist
from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker, set_moe_metrics_tracker
from transformers import AutoTokenizer  # noqa: F401  imported where a tokenizer is loaded; paid for once before the ranks fork

from glm45_tune.mcore import runtime
from glm45_tune.mcore.step import Trainer
from glm45_tune.recipe import Recipe
from glm45_tune.rl.engine import Completion
from glm45_tune.training.engines import LocalEngine
from glm45_tune.training.loop import METHODS
from glm45_tune.training.policy import PolicyGradient
from glm45_tune.training.prepare import prepare


class Dice:
    """An engine whose answers hang on the seed alone."""

    def generate(self, requests, seed):
        draw = np.random.default_rng(seed)
        found = []
        for request in requests:
            count = int(draw.integers(1, request.max_new_tokens + 1))
            tokens = draw.integers(10, 600, count).tolist()
            experts = draw.integers(0, 8, (len(request.token_ids) + count - 1, 2, 2)).astype(np.int16)
            experts[..., 1] = (experts[..., 0] + 1) % 8
            experts[::3] = -1
            found.append(Completion(tokens, (-5 - draw.random(count)).tolist(), "length", 0, experts))
        return found

    def synchronise(self, version):
        pass

    def metrics(self):
        return {}

    def close(self):
        pass


def main(cases: str, output: str) -> None:
    for case in json.loads(Path(cases).read_text()):
        set_moe_metrics_tracker(MoEMetricsTracker())  # megatron's is sized by the first model of a process
        job = prepare(Recipe.from_dict(case["recipe"]))
        runtime.start(job.layout, job.recipe.train.seed)
        job.run.mkdir(parents=True, exist_ok=True)
        trainer = Trainer(job.recipe, job.layout, job.source)
        method = METHODS[job.kind](job, trainer)
        if isinstance(method, PolicyGradient) and not case.get("writes"):
            method._engine = method._roller._engine = Dice()
        if case.get("writes"):
            assert isinstance(method._engine, LocalEngine)
        steps = [method.train_step(step) for step in range(2)]
        method.close()
        if dist.get_rank() == 0:
            (Path(output) / f"{case['name']}.json").write_text(json.dumps(steps))
        dist.barrier()
    runtime.stop()
