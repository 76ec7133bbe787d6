"""Everything about a run that can be known, or found wrong, before a rank is started."""

import inspect
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glm45_tune.checks import check
from glm45_tune.conversion.hf_files import HfDir
from glm45_tune.conversion.patterns import frozen
from glm45_tune.conversion.stream import has_mtp, open_model
from glm45_tune.conversion.tensors import HfReader
from glm45_tune.data.chat import Sample, load_tokenizer
from glm45_tune.data.functions import function_named
from glm45_tune.data.packing import BatchPlan, Rows
from glm45_tune.data.sources import Corpus, kind_for, load_data, rows_of
from glm45_tune.data.stream import Stream, load_stream
from glm45_tune.errors import RecipeError
from glm45_tune.layout import Layout
from glm45_tune.plan.cards import Card
from glm45_tune.recipe import Recipe
from glm45_tune.redaction import HIDDEN, references, resolved, secret_places, texts_of
from glm45_tune.rl.rewards import check_columns, check_rewards
from glm45_tune.rl.sandbox import check_functions
from glm45_tune.training import run_directory
from glm45_tune.training.trackers import check_trackers

_BY_ENVIRONMENT = (
    "Leave it out: the server has this command's environment and can read it there (vLLM: VLLM_API_KEY); "
    "rl.engine.api_key: ${env:VLLM_API_KEY} lets us send it."
)


@dataclass
class Job:
    """A checked run: the same on every rank."""

    recipe: Recipe
    kind: str
    """Of its data: sft, preference (pairs), labelled (answers with a label), rl (prompts)."""
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
    tokenizer: Any
    facts: dict
    """What the run is, on the first rank: see run_directory.py."""
    card: Card | None = None
    """What each rank runs on, known when they have joined."""
    last_rows: list[list[Sample]] = field(default_factory=list)
    """Those of the last step that was asked for; of reinforcement learning its answers, one a row."""

    @property
    def run(self) -> Path:
        return Path(self.recipe.output_dir)

    def rows_of_step(self, step: int) -> list[list[Sample]]:
        """The packed rows of a step (from 0), all ranks'. A stream gives them in order, once."""
        if self.stream:
            self.last_rows = self.stream.rows(self.plan.global_batch_size)
        else:
            rows, samples = self.plan.rows_of_step(step), self.train.samples
            self.last_rows = [[samples[index] for index in self.train_rows[row]] for row in rows]
        return self.last_rows


def world_size(recipe: Recipe) -> int:
    """Ranks of this job: torchrun's, else the recipe's, else every visible GPU, else the fewest the layout allows."""
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    import torch

    return recipe.parallel.world_size or torch.cuda.device_count() or recipe.parallel.layout().world_size


def prepare(recipe: Recipe) -> Job:
    """Check the recipe against the model, the ranks, the data and the output directory. Raises UserError."""
    check_trackers(recipe)
    _check_secrets(recipe)
    layout = recipe.parallel.layout(world_size(recipe))
    source = open_model(recipe.model.path)
    if isinstance(source, HfDir):
        source.check()
    check(source.spec, recipe, layout, has_mtp(source))
    if recipe.card.template and not Path(recipe.card.template).is_file():
        raise RecipeError(f"card.template: {recipe.card.template}: no such file.")
    train = recipe.train
    if recipe.rl:
        check_rewards(recipe.rl.rewards)
    frozen(source.spec, train.freeze, with_mtp=recipe.model.mtp_loss_scaling_factor > 0)
    is_first = os.environ.get("RANK", "0") == "0"  # what the others would find is the same
    if is_first:
        run_directory.check_ours(recipe)
        run_directory.check_disk(recipe, source)
        check_functions(recipe.rl.rewards if recipe.rl else [])
        if recipe.rl and recipe.rl.tools:
            _check_tools(recipe.rl.tools)
    tokenizer = load_tokenizer(recipe.model.path)
    stream, kind = None, kind_for(recipe)
    if recipe.data.streaming:
        stream, held_out = load_stream(recipe.data, tokenizer, train.seed)
        corpus = stream.seen
    else:
        corpus, held_out = load_data(recipe.data, tokenizer, train.seed, kind)
    if recipe.rl:
        _check_prompts(recipe, corpus, held_out)
    facts = run_directory.facts_of(recipe, source, corpus) if is_first else {}
    if is_first:
        run_directory.check_same(recipe, facts)
    rows = rows_of(corpus, recipe.data, kind)
    plan = BatchPlan(len(rows), train.global_batch_size, train.micro_batch_size, layout.data_parallel_size, train.seed)
    return Job(
        recipe,
        kind,
        layout,
        source,
        tokenizer.pad_token_id or 0,
        corpus,
        held_out,
        rows,
        rows_of(held_out, recipe.data, kind),
        plan,
        train.steps or train.epochs * plan.steps_per_epoch,
        stream,
        tokenizer,
        facts,
    )


def _check_secrets(recipe: Recipe) -> None:
    """Raise RecipeError where a secret cannot be used as it is given."""
    document = recipe.model_dump()
    is_first = os.environ.get("RANK", "0") == "0"
    if left_out := [place for place, text in texts_of(document) if HIDDEN in text]:
        raise RecipeError(
            f"{left_out[0]}: holds {HIDDEN}: a secret was left out when this copy of the recipe was written. Give it again, best as "
            "${env:NAME}."
        )
    for place, text in texts_of(document):
        allowed = re.match(r"rl\.(rewards\[\d+\]\.options|engine\.(urls|api_key))", place)
        if references(text) and place.startswith("rl.engine.command"):
            raise RecipeError(f"{place}: {text} would be seen in the list of processes. {_BY_ENVIRONMENT}")
        if references(text) and not allowed:
            raise RecipeError(
                f"{place}: {text}: an environment variable can be named in rl.rewards[].options, rl.engine.urls and "
                "rl.engine.api_key alone."
            )
        if is_first and allowed:  # where it is used
            resolved(text, place)
    if seen := [place for place in secret_places(document) if place.startswith("rl.engine.command")]:
        raise RecipeError(f"{seen[0]}: a secret in a command is seen in the list of processes. {_BY_ENVIRONMENT}")


def _check_tools(name: str) -> None:
    """Raise RecipeError unless rl.tools names a plain function."""
    try:
        function = function_named(name)
    except ImportError as error:
        raise RecipeError(f"rl.tools {name}: {error}.") from error
    if not callable(function) or inspect.iscoroutinefunction(function):
        came = "an async function" if callable(function) else type(function).__name__
        raise RecipeError(f"rl.tools {name}: is {came}; a plain function of the text and the row is expected.")


def _check_prompts(recipe: Recipe, *corpora: Corpus) -> None:
    """Raise RecipeError where the first prompt lacks what a reward needs."""
    for first in (corpus.samples[0] for corpus in corpora if len(corpus.samples)):
        check_columns(recipe.rl.rewards, first.row, f"{first.source}:{first.line}")
