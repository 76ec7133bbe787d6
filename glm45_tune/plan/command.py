"""`glm45-tune plan`: from what was typed to what is printed."""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from glm45_tune.console import Terminal
from glm45_tune.errors import LayoutError, UserError
from glm45_tune.plan import planner, report, slurm
from glm45_tune.plan.cards import CARDS, Card, find_card
from glm45_tune.plan.memory import GIB
from glm45_tune.plan.models import find_spec, is_fp8
from glm45_tune.plan.planner import Hardware, Plan
from glm45_tune.recipe import Recipe
from glm45_tune.section import MOST_RANKS
from glm45_tune.spec import ModelSpec


@dataclass(frozen=True)
class Request:
    """What the command line asks for. gpu None: every known card."""

    recipe_path: Path
    overrides: list[str]
    gpu: str | None
    gpus: int | None
    gpus_per_node: int
    document_tokens: int | None
    data_tokens: float | None
    minutes: int | None = None


class PlanError(UserError):
    """A recipe that does not fit its cards, with what would."""


@dataclass(frozen=True)
class Question:
    """A checked request."""

    request: Request
    recipe: Recipe
    spec: ModelSpec
    origin: str
    gpus: int

    def hardware(self, card: Card) -> Hardware:
        length = self.request.document_tokens or self.recipe.data.seq_length
        return Hardware(card, self.gpus, self.request.gpus_per_node, length)


def ask(request: Request) -> Question:
    if request.data_tokens is not None and not 0 < request.data_tokens < float("inf"):
        raise UserError(f"plan: --tokens {request.data_tokens}: a positive number is expected.")
    if request.gpus and request.gpus > MOST_RANKS:
        raise UserError(f"plan: --gpus {request.gpus}: at most {MOST_RANKS} are planned.")
    recipe = Recipe.load(request.recipe_path, request.overrides)
    length = recipe.data.seq_length
    if request.document_tokens and request.document_tokens > length:
        raise UserError(
            f"plan: --document-tokens {request.document_tokens} is more than a row holds, data.seq_length {length}; documents are "
            f"cut to that. Give at most {length}, or raise data.seq_length."
        )
    spec, origin = find_spec(recipe.model.path)
    if recipe.model.frozen_dtype == "auto" and recipe.lora is not None and is_fp8(recipe.model.path):
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"frozen_dtype": "fp8"})})
    return Question(request, recipe, spec, origin, request.gpus or recipe.parallel.layout().world_size)


def plan_as_it_is(question: Question, as_json: bool, as_script: bool) -> None:
    """Print the recipe's own plan. Raises PlanError when it fits on no card asked for."""
    request = question.request
    if request.gpu is None and not as_script:
        plans = {name: _plan(question, card) for name, card in CARDS.items()}
        fitting = [plan for plan in plans.values() if plan.fits]
        shown = min(
            fitting or plans.values(), key=lambda plan: plan.hardware.card.memory_gib * (1 if plan.fits else -1)
        )
    else:
        if request.gpu is None:
            raise UserError(f"--sbatch wants to know the card: --gpu, one of {', '.join(CARDS)}, cpu.")
        plans, shown = {}, _plan(question, find_card(request.gpu))
        fitting = [shown] if shown.fits else []
    if as_json:
        document = report.document(shown, question.origin, request.data_tokens)
        if plans:
            document["cards"] = {name: plan.fits for name, plan in plans.items()}
        print(json.dumps(document))
    elif not as_script:
        console = _console()
        report.show(shown, question.origin, request.data_tokens, console)
        if plans:
            report.show_cards(plans, console)
    if not fitting:
        raise PlanError(_refusal(question, shown))
    if as_script:
        print(slurm.script(shown, request.recipe_path, request.overrides, request.minutes), end="")
        if warning := slurm.warn_unsaved(question.recipe):
            print(warning, file=sys.stderr)


def _console() -> Terminal:
    """As wide as the terminal; wide enough for the tables in a file. A path may hold what looks like markup."""
    width = None if Terminal().is_terminal else 140
    return Terminal(width=width, markup=False, emoji=False)


def _plan(question: Question, card: Card) -> Plan:
    try:
        return planner.plan(
            question.spec, question.recipe, question.recipe.parallel.layout(question.gpus), question.hardware(card)
        )
    except LayoutError as error:
        nearest = _nearest(question, question.hardware(card), fits_as_it_is=False)
        raise PlanError(f"{error}\n{nearest}") from None


def _refusal(question: Question, shown: Plan) -> str:
    worst, card = shown.worst, shown.hardware.card
    return (
        f"{question.gpus} × {card.name}: stage {worst.stage} needs {worst.needed / GIB:.1f} GiB of {card.memory_gib:.1f}; "
        f"{planner.what_binds(shown)}.\n{_nearest(question, shown.hardware, fits_as_it_is=True)}"
    )


def _nearest(question: Question, hardware: Hardware, fits_as_it_is: bool) -> str:
    """What comes nearest to the request and fits: the same layout with more recompute, another layout, more cards, a larger card."""
    lines, recipe, spec = [], question.recipe, question.spec
    name = hardware.card.name
    same = None
    if fits_as_it_is:
        same = planner.with_least_recompute(spec, recipe, recipe.parallel.layout(question.gpus), hardware)
    if same:
        lines.append(f"the same layout, {report.recompute_text(same)} recomputed: {report.settings_text(same)}")
    elif found := planner.search(spec, recipe, hardware):
        best = found[0]
        lines.append(f"{question.gpus} × {name}: {report.layout_text(best)}, {planner.reason(best, best)}:")
        lines.append(f"  {report.settings_text(best)}")
    else:
        lines.append(f"no layout fits {question.gpus} × {name}")
    if more := planner.fewest(spec, recipe, hardware):
        lines.append(f"{more} × {name}, the recipe as it is")
    if fits_as_it_is:
        layout = recipe.parallel.layout(question.gpus)
        larger = [c for c in CARDS.values() if planner.plan(spec, recipe, layout, replace(hardware, card=c)).fits]
        if larger:
            card = min(larger, key=lambda c: c.memory_gib)
            lines.append(f"{question.gpus} × {card.name} ({card.memory_gib:.0f} GiB), the recipe as it is")
    return "Nearest that fits:\n  " + "\n  ".join(lines)


def search(question: Question, as_json: bool) -> None:
    """Print the best layouts. Raises PlanError when none fits."""
    if question.request.gpu is None:
        raise UserError(f"--search wants to know the card: --gpu, one of {', '.join(CARDS)}.")
    hardware = question.hardware(find_card(question.request.gpu))
    found = planner.search(question.spec, question.recipe, hardware)
    if as_json:
        documents = [report.document(plan, question.origin, question.request.data_tokens) for plan in found[:10]]
        whys = [planner.reason(plan, found[0]) for plan in found[:10]]
        settings = [report.settings_text(plan) for plan in found[:10]]
        keys = ("why", "settings")
        print(json.dumps([dict(zip(keys, extra)) | document for document, *extra in zip(documents, whys, settings)]))
    elif found:
        console = _console()
        report.show_search(found, console)
        console.print(f"the first: {report.settings_text(found[0])}", highlight=False, soft_wrap=True)
        for line in report.time_lines(found[0], question.request.data_tokens):
            console.print(line, highlight=False, soft_wrap=True)
    if not found:
        raise PlanError(_none_fits(question, hardware))


def _none_fits(question: Question, hardware: Hardware) -> str:
    name = hardware.card.name
    most = max(question.gpus, min(4 * question.gpus + 8, planner.MOST_CARDS))
    for gpus in range(question.gpus + 1, most + 1):
        if found := planner.search(question.spec, question.recipe, replace(hardware, gpus=gpus)):
            best = found[0]
            return (
                f"no layout of {question.gpus} × {name} holds this recipe. Nearest that fits: {gpus} × {name}, "
                f"{report.layout_text(best)}: {report.settings_text(best)}"
            )
    return f"no layout of {question.gpus} × {name} holds this recipe, nor of up to {most}; take a larger card."
