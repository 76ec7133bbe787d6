"""What a run says of itself before its first step and after its last."""

from glm45_tune.conversion.check import remarks
from glm45_tune.data.labels import only_label
from glm45_tune.mcore import runtime
from glm45_tune.mcore.step import Trainer
from glm45_tune.plan import planner
from glm45_tune.plan.memory import GIB
from glm45_tune.redaction import secret_places
from glm45_tune.training.card import hardware
from glm45_tune.training.prepare import Job
from glm45_tune.training.schedule import changed_schedule


def at_start(job: Job, trainer: Trainer, facts: dict) -> list[str]:
    """Ten lines that say what will run. facts: of the checkpoint it goes on from; of none, step 0."""
    step, schedule = facts["step"], changed_schedule(job.recipe, job.num_steps, facts)
    recipe, layout, spec = job.recipe, job.layout, job.source.spec
    trained = sum(p.numel() for p in trainer.module.parameters() if p.requires_grad)
    what = f"LoRA r {recipe.lora.r} on {', '.join(recipe.lora.targets)}" if recipe.lora else "all weights"
    what += f" but {', '.join(recipe.train.freeze)}" if recipe.train.freeze else ""
    return [
        f"model     {recipe.model.path}: {spec.num_layers} layers, {spec.num_moe_experts} experts, {recipe.model.params_dtype}",
        *_base_lines(job, trainer),
        f"training  {what}: {trained:,} weights on this rank",
        f"layout    {layout}: {layout.world_size} ranks on {runtime.device().type}",
        *[f"note      {remark}" for remark in (*remarks(job.source), *_positions(job))],
        f"data      {_data_line(job)}",
        *left_out(job),
        *_one_label(job),
        *_literal_secrets(job),
        f"steps     {job.num_steps} of {recipe.train.global_batch_size} rows"
        + ("" if job.stream else f", {job.plan.steps_per_epoch} an epoch"),
        f"update    lr {recipe.optimizer.lr:g}, {recipe.optimizer.warmup_ratio:.0%} warm-up, clipped at {recipe.optimizer.clip_grad:g}",
        *([f"schedule  {schedule}"] if schedule else []),
        f"recompute {_recompute_line(job)}",
        f"memory    {_memory_line(job)}",
        f"saving    {_saving_line(job)}",
        f"output    {job.run}" + (f", resumed after step {step}" if step else ""),
    ]


def _positions(job: Job) -> list[str]:
    """A remark where rows are longer than what the model was trained to see."""
    known, length = job.source.config.get("max_position_embeddings"), job.recipe.data.seq_length
    if not isinstance(known, int) or length <= known:
        return []
    return [
        f"data.seq_length {length:,} exceeds the {known:,} positions of config.json: documents that long are new to the model."
    ]


def _base_lines(job: Job, trainer: Trainer) -> list[str]:
    """What is kept in FP8 and how well, where anything is."""
    if not trainer.quantization:
        return []
    rest = "norms, router, embedding, head, biases, MTP's projection and the adapter"
    turned = ", transposes kept" if trainer.keeps_turned else ""
    said = f"frozen in FP8{turned}, products in {job.recipe.model.frozen_products}; in {job.recipe.model.params_dtype}: {rest}"
    return [f"base      {said}", *(f"          {line}" for line in trainer.quantization)]


def _recompute_line(job: Job) -> str:
    train = job.recipe.train
    if train.recompute_granularity != "auto":
        return train.recompute_granularity or "none"
    chosen, counts = planner.auto(job.source.spec, job.recipe, job.layout, hardware(job))
    said = f"auto: the first {', '.join(map(str, counts))} layers" + (" of the stages" if len(counts) > 1 else "")
    return said + "".join(f", {name} of the others" for name in chosen.recipe.train.recompute_modules or [])


def _memory_line(job: Job) -> str:
    worst = planner.plan(job.source.spec, job.recipe, job.layout, hardware(job)).worst
    assert job.card, "the ranks have not joined"
    return (
        f"{worst.needed / GIB:.1f} GiB planned of {job.card.memory_gib:.0f} free: weights {(worst.weights + worst.lora) / GIB:.1f}, gradients "
        f"{worst.gradients / GIB:.1f}, optimizer {worst.optimizer / GIB:.1f}, activations {(worst.activations + worst.working) / GIB:.1f}"
    )


def _saving_line(job: Job) -> str:
    train = job.recipe.train
    when = [f"every {train.save_interval} steps" if train.save_interval else ""]
    when += [f"every {train.save_interval_minutes:g} minutes" if train.save_interval_minutes else ""]
    when += ["at the best held-out loss" if train.save_best else "", "at the end"]
    kept = f"the last {train.save_total_limit} kept" if train.save_total_limit else "all kept"
    return f"{', '.join(filter(None, when))}; {kept}"


def left_out(job: Job) -> list[str]:
    """A line about rows that were skipped, cut or repeated, if there were any: said at the start and again at the end."""
    seen = job.stream.seen if job.stream else job.train
    counts = {"bad rows skipped": len(seen.faults), **seen.counts}
    said = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    return [f"of {seen.num_rows} rows: {said} (glm45-tune data lists them)"] if said else []


def _one_label(job: Job) -> list[str]:
    """A warning where KTO would learn from praise alone, or from blame alone."""
    label = only_label(job.train.samples) if job.kind == "labelled" else None
    if label is None:
        return []
    return [
        f"warning   all {len(job.train.samples)} answers have the label {str(label).lower()}: kto weighs desirable against "
        "undesirable ones, and of one sort alone it learns little. Is the field label what was meant?"
    ]


def _literal_secrets(job: Job) -> list[str]:
    """A warning where the recipe holds a key that it could name."""
    if not (places := secret_places(job.recipe.model_dump())):
        return []
    return [
        f"warning   {', '.join(places)}: looks like a secret. The run's recipe.yaml, card, report and trackers have it as "
        "***. Keep it out of the recipe too: write ${env:NAME}, and export NAME."
    ]


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
