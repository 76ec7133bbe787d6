"""Run by every rank: one optimizer step under each of several layouts, on the same data, saving what came of it.

Arguments: a JSON file of cases (name, recipe, optional sabotage) and a directory. For each case rank 0 leaves the metrics of
the step in NAME.json and all ranks a checkpoint in NAME/, whose first Adam moment is a tenth of the gradient.
"""

import json
import sys
from pathlib import Path

import torch.distributed as dist

from glm45_tune.mcore import checkpoint, runtime
from glm45_tune.mcore.step import Trainer
from glm45_tune.recipe import Recipe
from glm45_tune.training.loop import _train_step
from glm45_tune.training.prepare import prepare


def sabotage(trainer: Trainer, kind: str | None) -> None:
    """The broken twins: faults that a layout test must see."""
    if kind == "norms are not summed over tensor ranks":
        for parameter in trainer.module.parameters():
            parameter.sequence_parallel = False
    elif kind == "experts are reduced over no rank":
        for parameter in trainer.module.parameters():
            if not getattr(parameter, "allreduce", True):
                parameter.register_hook(lambda gradient: gradient * (1 + dist.get_rank()))
    else:
        assert kind is None, kind


def main(cases: Path, output: Path) -> None:
    for case in json.loads(cases.read_text()):
        job = prepare(Recipe.from_dict(case["recipe"]))
        runtime.start(job.layout, job.recipe.train.seed)
        trainer = Trainer(job.recipe, job.layout, job.source)
        sabotage(trainer, case.get("sabotage"))
        values = _train_step(job, trainer, 0)
        checkpoint.save(trainer, output / case["name"], job.source.config, {"step": 1})
        if dist.get_rank() == 0:
            (output / f"{case['name']}.json").write_text(json.dumps(values))
    runtime.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
