"""A run from its first step to its last: one place to read what every kind of training does."""

import contextlib
import gc
import math
import shutil
import sys
import time
from typing import Protocol

import torch
import torch.distributed as dist

from glm45_tune.conversion import adapter
from glm45_tune.errors import STOPPED, StoppedError, ToldToStop
from glm45_tune.mcore import checkpoint, runtime
from glm45_tune.mcore.step import Trainer
from glm45_tune.plan import planner
from glm45_tune.training import failure, record, run_directory, summary
from glm45_tune.training.card import hardware, this_card
from glm45_tune.training.frozen import settled
from glm45_tune.training.interruption import Interruption
from glm45_tune.training.labelled import Labelled
from glm45_tune.training.metrics import LiveLine, Metrics
from glm45_tune.training.nonfinite import NonFinite
from glm45_tune.training.policy import PolicyGradient
from glm45_tune.training.preference import Preference
from glm45_tune.training.prepare import Job
from glm45_tune.training.samples import Samples
from glm45_tune.training.saver import Saver, check_saved
from glm45_tune.training.schedule import schedule_of
from glm45_tune.training.sft import Supervised
from glm45_tune.training.watchdog import Watchdog


class Method(Protocol):
    """A kind of training. Built from (job, trainer); its methods are called by all ranks together."""

    def train_step(self, step: int) -> dict[str, float]:
        """Optimizer step number `step`, from 0. Returns its metrics: at least those of `sft.common_metrics`, and `train/tokens`."""

    def evaluate(self) -> dict[str, float]:
        """Return metrics of what is held out; nothing when nothing is.

        The best checkpoint has the lowest `eval/loss`, or where there is none the highest
        `eval/reward_mean`.
        """

    @property
    def state(self) -> dict:
        """What resume needs besides the step, as JSON values."""

    def resume(self, state: dict) -> None:
        """Go on from a checkpoint's `state`, or from the start of the run when it is empty."""

    def close(self) -> None:
        """Called once, after the last step."""


METHODS = {"sft": Supervised, "preference": Preference, "labelled": Labelled, "rl": PolicyGradient}


def run(job: Job) -> int:
    """Train, resuming from the run's last whole checkpoint. Called by every rank; only the first one writes.

    Returns an exit code: 0, or STOPPED when a signal asked to save and end. Raises StoppedError when the run cannot go on.
    """
    settings = job.recipe.train
    runtime.start(job.layout, settings.seed, settings.deterministic, settings.distributed_timeout_minutes)
    job.card = this_card()
    opened = contextlib.nullcontext()
    if dist.get_rank() == 0:
        opened = run_directory.opened(job.recipe, job.facts | record.facts(job))
    watchdog = Watchdog(runtime.store(), settings.distributed_timeout_minutes)
    with opened, watchdog, failure.told_well(job, watchdog):
        return _train(job, watchdog)


def _trainer(job: Job, watchdog: Watchdog) -> Trainer:
    """This rank's trainer, with what the recipe leaves to the memory that is free settled."""
    job.recipe = settled(job.recipe, job.source)
    recipe = planner.with_recompute(job.source.spec, job.recipe, job.layout, runtime.stage(), hardware(job))
    recipe = planner.with_turned(job.source.spec, recipe, job.layout, hardware(job))
    return Trainer(recipe, job.layout, job.source, watchdog.enter)


def _train(job: Job, watchdog: Watchdog) -> int:
    is_first = dist.get_rank() == 0
    trainer = _trainer(job, watchdog)
    method: Method = METHODS[job.kind](job, trainer)
    saver = Saver(job, trainer)
    watchdog.enter("loading the last checkpoint")
    facts = _resume(saver, method)
    step = facts["step"]
    nonfinite = NonFinite(job, facts.get("skipped_steps", 0), writes=is_first)
    if is_first:
        _say_the_start(job, trainer, facts)
    samples = Samples(job, trainer) if job.recipe.kind != "rl" else None
    if samples and not step:
        watchdog.enter("writing sample texts")
        samples.write(0)
    metrics = Metrics(job.run, job.recipe, step, job.num_steps) if is_first else None
    line = LiveLine(step, job.num_steps) if is_first else None
    must_stop = False
    with Interruption() as interruption, collector_spared():
        while step < job.num_steps and not must_stop:
            watchdog.step = step
            watchdog.enter("preparing its batch")
            try:
                values = _step(job, method, step)
            except ToldToStop:  # by all ranks together; nothing of this step was trained
                if step != saver.saved:
                    saver.save(_facts(job, step, {}, method, nonfinite))
                break
            step += 1
            is_last = step == job.num_steps
            if is_last or _divides(job.recipe.train.eval_interval, step):
                with contextlib.suppress(ToldToStop):  # the step is saved without it
                    values |= method.evaluate()
            try:
                nonfinite.see(step, values)
            except StoppedError:  # raised by all ranks together: what is being written shall be whole
                saver.wait()
                raise
            if is_first:
                metrics.write(step, values, trainer.expert_load)
                line.show(step, values)
            watchdog.enter("agreeing whether to save")
            must_stop, is_time = interruption.agree(saver.wants_time())
            if is_last or must_stop or is_time or saver.is_due(step, _held_out_loss(values)):
                watchdog.enter("copying what is saved")
                saver.save(_facts(job, step, values, method, nonfinite))
        watchdog.enter("writing the last checkpoint")
        saver.wait()
    if samples and step == job.num_steps:
        watchdog.enter("writing sample texts")
        samples.write(step)
    method.close()
    check_saved(saver, job.run, step)
    nonfinite.check_end(step)
    if is_first:
        line.close()
        metrics.close()
        _say_the_end(job, step, nonfinite.count)
    runtime.barrier()
    return 0 if step >= job.num_steps else STOPPED


@contextlib.contextmanager
def collector_spared():
    """What stands when training begins stays: the collector, which megatron calls twice a save, need not walk it (0.25 s each time)."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _resume(saver: Saver, method: Method) -> dict:
    """Returns what the run's last checkpoint was saved with; of none, step 0."""
    facts = saver.restore()
    if facts["step"]:
        method.resume(facts)
    return facts


def _facts(job: Job, step: int, values: dict[str, float], method: Method, nonfinite: NonFinite) -> dict:
    loss = _held_out_loss(values)
    evaluated = {} if loss is None else {"eval_loss": loss}
    schedule = schedule_of(job.recipe, job.num_steps)
    return {"step": step, "skipped_steps": nonfinite.count, "schedule": schedule, **evaluated, **method.state}


def _held_out_loss(values: dict[str, float]) -> float | None:
    """What the best checkpoint has least of, where this step was evaluated and the result is a number."""
    loss = values.get("eval/loss", -values.get("eval/reward_mean", math.nan))
    return loss if math.isfinite(loss) else None


def _step(job: Job, method: Method, step: int) -> dict[str, float]:
    started = time.perf_counter()
    values = method.train_step(step)
    seconds = time.perf_counter() - started
    speed = values["train/tokens"] / seconds
    flops = values.pop("flops", 0.0) / seconds / job.layout.world_size / 1e12
    if flops:
        values["perf/model_tflops_per_gpu"] = flops
        if job.card.tflops:
            values["perf/mfu"] = flops / job.card.tflops
    return values | {
        "perf/step_seconds": seconds,
        "perf/tokens_per_second": speed,
        "perf/tokens_per_second_per_gpu": speed / job.layout.world_size,
        "perf/peak_memory_gib": peak_memory_gib(),
    }


def _divides(interval: int | None, step: int) -> bool:
    return interval is not None and step % interval == 0


def peak_memory_gib() -> float:
    """Of the GPU's allocator, or of the process on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _say_the_start(job: Job, trainer: Trainer, facts: dict) -> None:
    if facts["step"] < job.num_steps:  # of an earlier end, which this run goes past
        shutil.rmtree(job.run / "adapter", ignore_errors=True)
    print("\n".join(summary.at_start(job, trainer, facts)), file=sys.stderr, flush=True)


def _say_the_end(job: Job, step: int, num_skipped: int) -> None:
    if step < job.num_steps:
        end = f"stopped by a signal after step {step} of {job.num_steps}; the same command again goes on"
    else:
        end = f"done: {step} steps in {job.run}"
        if step > job.num_steps:
            end += f" (it was further than the {job.num_steps} steps of the recipe)"
        if job.recipe.lora is not None:
            adapter.write_peft(
                checkpoint.step_directory(job.run, step), job.recipe.lora, job.source, job.run / "adapter"
            )
    skipped = [f"{num_skipped} of {step} steps were left out, see train/skipped_steps"] if num_skipped else []
    print("\n".join([end, *skipped, *summary.left_out(job)]), file=sys.stderr)
