"""A run from its first step to its last: one place to read what training does."""

import json
import sys
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist

from glm45_tune.conversion import adapter
from glm45_tune.data.batch import Batch, collate, total_weights
from glm45_tune.data.chat import Sample
from glm45_tune.data.packing import BatchPlan
from glm45_tune.errors import UserError
from glm45_tune.mcore import checkpoint, runtime
from glm45_tune.mcore.step import StepResult, Trainer
from glm45_tune.training import prepare
from glm45_tune.training.metrics import LiveLine, Metrics
from glm45_tune.training.prepare import Job
from glm45_tune.training.schedule import learning_rate


def run(job: Job) -> None:
    """Train, resuming from the run's last complete checkpoint. Called by every rank; only the first one writes."""
    runtime.start(job.layout, job.recipe.train.seed, job.recipe.train.deterministic)
    is_first = dist.get_rank() == 0
    if is_first:
        prepare.open_run_directory(job)
    trainer = Trainer(job.recipe, job.layout, job.source)
    step = _resume(job, trainer)
    if is_first:
        _introduce(job, trainer, step)
    metrics = Metrics(job.run, job.recipe, step) if is_first else None
    line = LiveLine(step, job.num_steps) if is_first else None
    settings = job.recipe.train
    while step < job.num_steps:
        values = _train_step(job, trainer, step)
        step += 1
        is_last = step == job.num_steps
        if job.eval_rows and (is_last or (settings.eval_interval and step % settings.eval_interval == 0)):
            values["eval/loss"] = _evaluate(job, trainer)
        if is_first:
            metrics.write(step, values)
            line.show(step, values["train/loss"], values["perf/tokens_per_second"], values["perf/peak_memory_gib"])
        if is_last or (settings.save_interval and step % settings.save_interval == 0):
            _save(job, trainer, step)
    if job.stream:
        job.stream.close()
    if is_first:
        line.close()
        metrics.close()
        if job.recipe.lora is not None:
            adapter.write_peft(checkpoint.step_directory(job.run, step), job.recipe.lora, job.source, job.run / "adapter")
        print("\n".join([f"done: {job.num_steps} steps in {job.run}", *_left_out(job)]), file=sys.stderr)
    dist.barrier()


def _resume(job: Job, trainer: Trainer) -> int:
    """Load the last complete checkpoint, if there is one. Returns the number of steps done."""
    found = checkpoint.complete_checkpoints(job.run)
    if not found:
        return 0
    facts = json.loads((found[-1] / checkpoint.COMPLETE).read_text(encoding="utf-8"))
    if ("cursor" in facts) != (job.stream is not None):
        raise UserError(f"{job.run}: data.streaming was changed; a run goes on as it began. Choose another output_dir.")
    checkpoint.restore(trainer, found[-1])
    if job.stream:
        job.stream.seek(facts["cursor"])
    return facts["step"]


def _save(job: Job, trainer: Trainer, step: int) -> None:
    facts = {"step": step} | ({"cursor": job.stream.cursor} if job.stream else {})
    checkpoint.save(trainer, checkpoint.step_directory(job.run, step), job.source.config, facts)


def _batches(microbatches: list[list[list[Sample]]], job: Job, trainer: Trainer) -> Iterator[Batch]:
    """One Batch for each micro batch of rows, made when it is needed."""
    for rows in microbatches:
        members = [sample for row in rows for sample in row]
        yield collate(members, trainer.num_predictions, trainer.pad_multiple, job.pad_id)


def _train_step(job: Job, trainer: Trainer, step: int) -> dict[str, float]:
    settings, options, plan = job.recipe.train, job.recipe.optimizer, job.plan
    started = time.perf_counter()
    runtime.seed_all(settings.seed + step)  # dropout depends on the step alone: a resumed run draws what it would have drawn
    rows = job.rows_of_step(step)
    members = [sample for row in rows for sample in row]
    denominators = total_weights(members, trainer.num_predictions)
    microbatches = plan.share(rows, trainer.data_parallel_rank)
    lowest = options.lr / 10 if options.min_lr is None else options.min_lr
    lr = learning_rate(step, job.num_steps, options.lr, lowest, options.warmup_ratio)
    result: StepResult = trainer.train(_batches(microbatches, job, trainer), len(microbatches), denominators.tolist(), lr)
    seconds = time.perf_counter() - started
    tokens = sum(len(sample.input_ids) for sample in members)
    values = {
        "train/loss": result.losses[0],
        "train/grad_norm": result.grad_norm,
        "train/learning_rate": lr,
        "train/tokens": tokens,
        "train/trained_tokens": float(denominators[0]),
        "data/fill_ratio": tokens / (len(rows) * job.recipe.data.seq_length),
        "moe/expert_load_max_over_mean": result.expert_load,
        "perf/step_seconds": seconds,
        "perf/tokens_per_second": tokens / seconds,
        "perf/tokens_per_second_per_gpu": tokens / seconds / job.layout.world_size,
        "perf/peak_memory_gib": peak_memory_gib(),
    }
    if len(result.losses) > 1:
        values["train/mtp_loss"] = sum(result.losses[1:]) / len(result.losses[1:])
    if trainer.has_aux_loss:
        values["train/aux_loss"] = result.aux_loss
    if trainer.has_z_loss:
        values["train/z_loss"] = result.z_loss
    return values


def _evaluate(job: Job, trainer: Trainer) -> float:
    """Mean loss of the next token over the held-out rows."""
    batch = job.recipe.train.micro_batch_size * job.layout.data_parallel_size * job.layout.microbatch_multiple
    size = -(-len(job.eval_rows) // batch) * batch
    plan = BatchPlan(len(job.eval_rows), size, job.recipe.train.micro_batch_size, job.layout.data_parallel_size, 0)
    rows = [[job.held_out.samples[index] for index in job.eval_rows[row]] for row in plan.rows_of_step(0)]
    microbatches = plan.share(rows, trainer.data_parallel_rank)
    denominators = total_weights(job.held_out.samples, trainer.num_predictions).tolist()
    return trainer.evaluate(_batches(microbatches, job, trainer), len(microbatches), denominators).losses[0]


def peak_memory_gib() -> float:
    """Of the GPU's allocator, or of the process on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _left_out(job: Job) -> list[str]:
    """A line about rows that were skipped, cut or repeated, if there were any: said at the start and again at the end."""
    seen = job.stream.seen if job.stream else job.train
    counts = {"bad rows skipped": len(seen.faults), **seen.counts}
    said = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    return [f"of {seen.num_rows} rows: {said} (glm45-tune data lists them)"] if said else []


def _data_line(job: Job) -> str:
    data = job.recipe.data
    if job.stream:
        return f"streamed in windows of {data.streaming_window} rows; {len(job.held_out.samples)} samples held out"
    tokens, weights = int(job.train.lengths.sum()), float(job.train.weights.sum())
    fill = tokens / (len(job.train_rows) * data.seq_length)
    return (
        f"{len(job.train.samples)} samples in {len(job.train_rows)} rows of {data.seq_length} ({fill:.1%} filled), "
        f"{tokens:,} tokens, {weights:,.0f} trained; {len(job.held_out.samples)} held out"
    )


def _introduce(job: Job, trainer: Trainer, step: int) -> None:
    """Ten lines that say what will run."""
    recipe, layout, spec = job.recipe, job.layout, job.source.spec
    trained = sum(p.numel() for p in trainer.module.parameters() if p.requires_grad)
    what = f"LoRA r {recipe.lora.r} on {', '.join(recipe.lora.targets)}" if recipe.lora else "all weights"
    what += f" but {', '.join(recipe.train.freeze)}" if recipe.train.freeze else ""
    lines = [
        f"model     {recipe.model.path}: {spec.num_layers} layers, {spec.num_moe_experts} experts, {recipe.model.params_dtype}",
        f"training  {what}: {trained:,} weights on this rank",
        f"layout    {layout}: {layout.world_size} ranks on {runtime.device().type}",
        f"data      {_data_line(job)}",
        *_left_out(job),
        f"steps     {job.num_steps} of {recipe.train.global_batch_size} rows"
        + ("" if job.stream else f", {job.plan.steps_per_epoch} an epoch"),
        f"recompute {recipe.train.recompute_granularity or 'none'}",
        f"output    {job.run}" + (f", resumed after step {step}" if step else ""),
    ]
    print("\n".join(lines), file=sys.stderr, flush=True)
