"""Run by every rank: one optimizer step under each of several layouts, on the same data, saving what came of it.

Arguments: a JSON file of cases (name, recipe, optional sabotage) and a directory. For each case rank 0 leaves the metrics of
the step, and the held-out loss that the updated weights give, in NAME.json, and all ranks a checkpoint in NAME/: the updated
weights and Adam's first moment, a tenth of the gradient.
"""

import functools
import gc
import json
import time
from pathlib import Path

import torch.distributed as dist
from transformers import AutoTokenizer  # noqa: F401  imported where a tokenizer is loaded; paid for once before the ranks fork

from glm45_tune.mcore import checkpoint, runtime
from glm45_tune.mcore.step import Trainer
from glm45_tune.recipe import Recipe
from glm45_tune.training import prepare as preparing
from glm45_tune.training.prepare import prepare
from glm45_tune.training.sft import Supervised


def sabotage(trainer: Trainer, kind: str | None) -> None:
    """The broken twins: faults that a layout test must see."""
    if kind == "norms are not summed over tensor ranks":
        for parameter in trainer.module.parameters():
            parameter.sequence_parallel = False
    elif kind == "experts are reduced over no rank":
        for parameter in trainer.module.parameters():
            if not getattr(parameter, "allreduce", True):
                parameter.register_hook(lambda gradient: gradient * (1 + dist.get_rank()))
    elif kind == "keys forget what other context ranks saw of them":
        from glm45_tune.mcore.layers import context_parallel

        scatter = context_parallel.dist.reduce_scatter_tensor

        def own_part(output, whole, group):
            scatter(output, whole, group=group)
            output.copy_(whole.chunk(group.size())[group.rank()])

        context_parallel.dist.reduce_scatter_tensor = own_part
        trainer.undo = lambda: setattr(context_parallel.dist, "reduce_scatter_tensor", scatter)
    elif kind == "padding counts as tokens":
        for chunk in trainer.module:
            mask = chunk._padding_mask
            chunk._padding_mask = lambda tokens, num_padding, mask=mask: mask(tokens, 0)
    else:
        assert kind is None, kind


def forget(trainer: Trainer) -> None:
    """Empty what ties megatron's parts into a ring through autograd's hooks, where no collector sees it.

    Otherwise a rank would keep the model of every case, and the threads of its groups.
    """
    for part in (*trainer._wrapped, *trainer.optimizer.chained_optimizers):
        part.__dict__.clear()


def run(case: dict, output: Path) -> None:
    """What a case may say: "restore": begin with the checkpoint of that case; "steps" [first, end]: keep the losses of these only."""
    job = prepare(Recipe.from_dict(case["recipe"]))
    runtime.start(job.layout, job.recipe.train.seed, job.recipe.train.deterministic)
    trainer = Trainer(job.recipe, job.layout, job.source)
    method = Supervised(job, trainer)
    trainer.undo = lambda: None
    sabotage(trainer, case.get("sabotage"))
    if "restore" in case:
        checkpoint.restore(trainer, output / case["restore"])
    if "steps" in case:
        values = {"losses": [method.train_step(step)["train/loss"] for step in range(*case["steps"])]}
    else:
        values = method.train_step(0)
        values |= method.evaluate()
        checkpoint.save(trainer, output / case["name"], job.source.config, {"step": 1})
    if case.get("resume"):
        again = Trainer(job.recipe, job.layout, job.source)
        checkpoint.restore(again, output / case["name"])
        for key, each in (("straight", method), ("resumed", Supervised(job, again))):
            values[key] = [each.train_step(step)["train/loss"] for step in (1, 2)]
        forget(again)
    trainer.undo()
    forget(trainer)
    del trainer, method
    gc.collect()
    if dist.get_rank() == 0:
        (output / f"{case['name']}.json").write_text(json.dumps(values))


def main(cases: str, output: str) -> None:
    preparing.load_tokenizer = functools.lru_cache(preparing.load_tokenizer)  # most of what a small case costs
    for case in json.loads(Path(cases).read_text()):
        started = time.perf_counter()
        run(case, Path(output))
        if dist.get_rank() == 0:
            print(f"{case['name']}: {time.perf_counter() - started:.1f} s", flush=True)
    runtime.stop()
