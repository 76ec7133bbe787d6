"""What a run says of itself before its first step and after its last."""

from glm45_tune.mcore import runtime
from glm45_tune.mcore.step import Trainer
from glm45_tune.training.prepare import Job


def at_start(job: Job, trainer: Trainer, step: int) -> list[str]:
    """Ten lines that say what will run."""
    recipe, layout, spec = job.recipe, job.layout, job.source.spec
    trained = sum(p.numel() for p in trainer.module.parameters() if p.requires_grad)
    what = f"LoRA r {recipe.lora.r} on {', '.join(recipe.lora.targets)}" if recipe.lora else "all weights"
    what += f" but {', '.join(recipe.train.freeze)}" if recipe.train.freeze else ""
    return [
        f"model     {recipe.model.path}: {spec.num_layers} layers, {spec.num_moe_experts} experts, {recipe.model.params_dtype}",
        f"training  {what}: {trained:,} weights on this rank",
        f"layout    {layout}: {layout.world_size} ranks on {runtime.device().type}",
        f"data      {_data_line(job)}",
        *left_out(job),
        f"steps     {job.num_steps} of {recipe.train.global_batch_size} rows"
        + ("" if job.stream else f", {job.plan.steps_per_epoch} an epoch"),
        f"recompute {recipe.train.recompute_granularity or 'none'}",
        f"output    {job.run}" + (f", resumed after step {step}" if step else ""),
    ]


def left_out(job: Job) -> list[str]:
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
