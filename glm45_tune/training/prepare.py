"""Everything about a run that can be known, or found wrong, before a rank is started."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from glm45_tune.conversion.hf_files import HfDir
from glm45_tune.conversion.patterns import frozen
from glm45_tune.conversion.stream import has_mtp, open_model
from glm45_tune.conversion.tensors import HfReader
from glm45_tune.data.chat import Sample, load_tokenizer
from glm45_tune.data.packing import BatchPlan, Rows, pack
from glm45_tune.data.sources import Corpus, load_data
from glm45_tune.data.stream import Stream, load_stream
from glm45_tune.errors import RecipeError, UserError
from glm45_tune.layout import Layout
from glm45_tune.recipe import Recipe
from glm45_tune.training.metrics import check_trackers

RECIPE_FILE = "recipe.yaml"
RUN_FILE = "glm45_tune.json"


@dataclass
class Job:
    """A checked run: the same on every rank."""

    recipe: Recipe
    layout: Layout
    source: HfReader
    pad_id: int
    train: Corpus
    held_out: Corpus
    train_rows: Rows
    eval_rows: Rows
    plan: BatchPlan
    num_steps: int
    stream: Stream | None
    """Where the training rows come from under data.streaming; `train` then only counts."""

    @property
    def run(self) -> Path:
        return Path(self.recipe.output_dir)

    def rows_of_step(self, step: int) -> list[list[Sample]]:
        """The packed rows of a step (from 0), all ranks'. A stream gives them in order, once."""
        if self.stream:
            return self.stream.rows(self.plan.global_batch_size)
        return [[self.train.samples[index] for index in self.train_rows[row]] for row in self.plan.rows_of_step(step)]


def world_size(recipe: Recipe) -> int:
    """Ranks of this job: torchrun's, else the recipe's, else every visible GPU, else the fewest the layout allows."""
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    import torch

    return recipe.parallel.world_size or torch.cuda.device_count() or recipe.parallel.layout().world_size


def prepare(recipe: Recipe) -> Job:
    """Check the recipe against the model, the ranks, the data and the output directory. Raises UserError."""
    check_trackers(recipe)
    layout = recipe.parallel.layout(world_size(recipe))
    source = open_model(recipe.model.path)
    if isinstance(source, HfDir):
        source.check()
    layout.check(source.spec)
    if recipe.model.mtp_loss_scaling_factor and not has_mtp(source):
        raise RecipeError(
            f"model.mtp_loss_scaling_factor is {recipe.model.mtp_loss_scaling_factor}, but {recipe.model.path} has no MTP layer."
        )
    train = recipe.train
    share = train.micro_batch_size * layout.data_parallel_size
    if train.global_batch_size % share:
        raise RecipeError(
            f"train.global_batch_size {train.global_batch_size} is no multiple of micro_batch_size "
            f"{train.micro_batch_size} × {layout.data_parallel_size} data-parallel ranks = {share}."
        )
    if (microbatches := train.global_batch_size // share) % layout.microbatch_multiple:
        raise RecipeError(
            f"train.global_batch_size {train.global_batch_size} makes {microbatches} micro batches a step; interleaved pipeline "
            f"stages (virtual_pipeline_model_parallel_size {layout.virtual_pipeline_model_parallel_size}) need a multiple of "
            f"pipeline_model_parallel_size {layout.pipeline_model_parallel_size}: a global_batch_size that is a multiple of "
            f"{share * layout.microbatch_multiple}."
        )
    frozen(source.spec, train.freeze, with_mtp=recipe.model.mtp_loss_scaling_factor > 0)
    check_run_directory(recipe, source)
    tokenizer = load_tokenizer(recipe.model.path)
    stream = None
    if recipe.data.streaming:
        stream, held_out = load_stream(recipe.data, tokenizer, train.seed)
        corpus = stream.seen
    else:
        corpus, held_out = load_data(recipe.data, tokenizer, train.seed)
    rows = _rows(corpus, recipe)
    plan = BatchPlan(len(rows), train.global_batch_size, train.micro_batch_size, layout.data_parallel_size, train.seed)
    return Job(
        recipe,
        layout,
        source,
        tokenizer.pad_token_id or 0,
        corpus,
        held_out,
        rows,
        _rows(held_out, recipe),
        plan,
        train.steps or train.epochs * plan.steps_per_epoch,
        stream,
    )


def _rows(corpus: Corpus, recipe: Recipe) -> Rows:
    if not recipe.data.packing:
        return Rows.single(len(corpus.samples))
    return pack(corpus.lengths, recipe.data.seq_length)


def fingerprint(source: HfReader) -> str:
    """Tells models apart by their sizes and their final norm and first query weights, in either format; not by the directory."""
    digest = hashlib.sha256(repr(source.spec).encode())
    for name in ("model.norm.weight", "model.layers.0.input_layernorm.weight", "model.layers.0.self_attn.q_proj.weight"):
        digest.update(source.read(name, 0, 64).contiguous().view(-1).float().numpy().tobytes())
    return digest.hexdigest()


def check_run_directory(recipe: Recipe, source: HfReader) -> None:
    """Raise UserError when output_dir holds something else than this run, or this run of another model."""
    run = Path(recipe.output_dir)
    if not run.exists() or (run.is_dir() and not any(run.iterdir())):
        return
    if not (run / RUN_FILE).is_file():
        raise UserError(f"{run}: exists, is not empty and is no run of ours (no {RUN_FILE}). Choose another output_dir.")
    facts = json.loads((run / RUN_FILE).read_text(encoding="utf-8"))
    if facts.get("kind") != "run":
        raise UserError(f"{run}: holds a {facts.get('kind')!r}, not a run. Choose another output_dir.")
    if facts["fingerprint"] != fingerprint(source):
        raise UserError(
            f"{run}: is a run of another model ({facts['model']}); {recipe.model.path} cannot resume it. "
            "Choose another output_dir."
        )
    for name, wanted in _shape_of_training(recipe).items():
        if facts[name] != wanted:
            raise UserError(
                f"{run}: was trained with {name} {facts[name]}; the recipe now says {wanted}. Choose another output_dir."
            )


def _shape_of_training(recipe: Recipe) -> dict:
    """What decides which weights a checkpoint holds: a run cannot change it in the middle."""
    return {
        "lora": recipe.lora.model_dump() if recipe.lora else None,
        "mtp": recipe.model.mtp_loss_scaling_factor > 0,
        "freeze": recipe.train.freeze,
    }


def open_run_directory(job: Job) -> None:
    """Create the run directory and write what it is. Called by one rank."""
    recipe = job.recipe
    job.run.mkdir(parents=True, exist_ok=True)
    facts = {
        "kind": "run",
        "model": str(Path(recipe.model.path).resolve()),
        "fingerprint": fingerprint(job.source),
        **_shape_of_training(recipe),
    }
    (job.run / RUN_FILE).write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (job.run / RECIPE_FILE).write_text(recipe.to_yaml(), encoding="utf-8")
