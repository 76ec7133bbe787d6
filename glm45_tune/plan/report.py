"""A plan for people (a table and ten lines) and for programs (one JSON document)."""

from rich.console import Console
from rich.table import Table

from glm45_tune.plan import activations as acts
from glm45_tune.plan import rates
from glm45_tune.plan.activations import Sizes
from glm45_tune.plan.cards import CARDS
from glm45_tune.plan.memory import GIB, StageMemory
from glm45_tune.plan.planner import Plan, reason, what_binds

PARTS = {
    "weights": "weights",
    "lora": "LoRA weights",
    "gradients": "gradients (fp32)",
    "optimizer": "optimizer state",
    "activations": "activations kept",
    "working": "backward's worst moment",
    "optimizer_working": "Adam's own buffers",
    "peak": "peak of the allocator",
    "margin": "margin",
    "needed": "needed",
}


def layout_text(plan: Plan) -> str:
    layout = plan.layout
    context, runs = layout.context_parallel_size, layout.virtual_pipeline_model_parallel_size
    etp = layout.expert_tensor_parallel_size
    parts = [f"tensor {layout.tensor_model_parallel_size}", f"context {context}" if context > 1 else ""]
    parts += [f"pipeline {layout.pipeline_model_parallel_size}" + (f" ({runs} runs each)" if runs > 1 else "")]
    parts += [f"data {layout.data_parallel_size}"]
    experts = f"expert {layout.expert_model_parallel_size}" + (f" × expert tensor {etp}" if etp > 1 else "")
    return f"{' × '.join(filter(None, parts))}, {experts}"


def recompute_text(plan: Plan) -> str:
    train, again, all_layers = plan.recipe.train, plan.recomputed, plan.spec.num_layers
    modules = train.recompute_modules
    if train.recompute_granularity == "selective" and modules is None:
        modules = ["core_attn"]
    whole = f"{'all' if again == all_layers else f'{again} of the'} {all_layers} layers" if again else ""
    halves = ""
    if again < all_layers and train.recompute_granularity is not None and modules:
        halves = f"{' and '.join(modules)} of " + ("the others" if again else "all layers")
    return ", ".join(filter(None, (whole, halves))) or "none"


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


def stage_document(stage: StageMemory) -> dict:
    parts = {f"{name}_gib": round(getattr(stage, name) / GIB, 3) for name in (*PARTS, "logits", "wire")}
    facts = {
        "stage": stage.stage,
        "layers": stage.num_layers,
        "in_flight": stage.in_flight,
        "worst_moment": stage.worst,
    }
    return {**facts, **parts, "recompute": list(stage.recompute)}


def document(plan: Plan, origin: str, data_tokens: float | None) -> dict:
    layout, card = plan.layout, plan.hardware.card
    sizes = Sizes(plan.spec, layout, plan.recipe)
    names = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "data_parallel_size")
    names += ("expert_model_parallel_size", "expert_tensor_parallel_size", "world_size")
    found = {
        "model": {"path": plan.recipe.model.path, "sizes_from": origin},
        "card": {"name": card.name, "memory_gib": card.memory_gib, "gpus": plan.hardware.gpus},
        "layout": {name: getattr(layout, name) for name in names},
        "fits": plan.fits,
        "binds": what_binds(plan),
        "recompute": recompute_text(plan),
        "stages": [stage_document(stage) for stage in plan.stages],
        "kept_by_a_layer": [
            {"what": term.what, "bytes": term.bytes, "why": term.why} for term in acts.layer_terms(sizes, True)
        ],
    }
    if plan.time:
        found["time"] = {
            "estimate": True,
            "measured_card": rates.MEASURED_CARD,
            "source": rates.SOURCE,
            "tokens_per_step": plan.time.tokens,
            "seconds_per_step": plan.time.total,
            "seconds_by_part": plan.time.parts,
            "bubble_share": plan.time.bubble_share,
            "tokens_per_second": plan.tokens_per_second,
            "tokens_per_second_per_gpu": plan.tokens_per_second / plan.hardware.gpus,
            "seconds_per_epoch": data_tokens / plan.tokens_per_second if data_tokens else None,
        }
    return found


def columns(plan: Plan) -> list[StageMemory]:
    """The stages worth showing: all of few, else the first, the fullest and the last."""
    if len(plan.stages) <= 4:
        return plan.stages
    shown = {0, plan.worst.stage, len(plan.stages) - 1}
    return [plan.stages[stage] for stage in sorted(shown)]


def show(plan: Plan, origin: str, data_tokens: float | None, console: Console) -> None:
    """The whole plan."""
    spec, card, hardware = plan.spec, plan.hardware.card, plan.hardware
    recipe = plan.recipe
    what = f"LoRA r {recipe.lora.r} on {', '.join(recipe.lora.targets)}" if recipe.lora else "all weights"
    console.print(
        f"model      {spec.num_layers} layers, {spec.num_moe_experts} experts; sizes from {origin}", highlight=False
    )
    if recipe.model.frozen_dtype == "fp8":
        console.print(f"base       frozen in FP8, products in {recipe.model.frozen_products}", highlight=False)
    console.print(f"training   {what}; rows of {recipe.data.seq_length} tokens", highlight=False, soft_wrap=True)
    console.print(f"layout     {layout_text(plan)}: {hardware.gpus} × {card.name}", highlight=False, soft_wrap=True)
    console.print(f"recompute  {recompute_text(plan)}", highlight=False, soft_wrap=True)
    table = Table("GiB a rank", *(f"stage {s.stage} ({s.num_layers} layers)" for s in columns(plan)))
    for name, title in PARTS.items():
        values = [getattr(stage, name) / GIB for stage in columns(plan)]
        if any(values):
            table.add_row(title, *(f"{value:.2f}" for value in values), style="bold" if name == "needed" else None)
    console.print(table)
    if any(stage.logits or stage.wire for stage in plan.stages):
        last = plan.stages[-1]
        wire = max(stage.wire for stage in plan.stages)
        console.print(
            f"           of the worst moments: logits {last.logits / GIB:.2f}, all-to-all {wire / GIB:.2f} GiB",
            highlight=False,
        )
    verdict = "fits" if plan.fits else "does NOT fit"
    console.print(
        f"memory     {verdict}: {plan.worst.needed / GIB:.1f} of {card.memory_gib:.1f} GiB on stage {plan.worst.stage}",
        highlight=False,
        soft_wrap=True,
    )
    console.print(f"binds      {what_binds(plan)}", highlight=False, soft_wrap=True)
    if recipe.train.freeze:
        console.print(
            "note       train.freeze is counted as trained: what is needed is less", highlight=False, soft_wrap=True
        )
    for line in time_lines(plan, data_tokens):
        console.print(line, highlight=False, soft_wrap=True)


def time_lines(plan: Plan, data_tokens: float | None) -> list[str]:
    if plan.time is None:
        is_rl = getattr(plan.recipe, "rl", None) is not None
        why = "the engine's rollouts are not counted, nor its memory where it shares cards" if is_rl else "on a CPU"
        return [f"time       not estimated: {why}"]
    time = plan.time
    each = f"{plan.tokens_per_second:,.0f} tokens/s, {plan.tokens_per_second / plan.hardware.gpus:,.0f} a card"
    lines = [
        f"step       {time.tokens:,} tokens, about {time.total:.1f} s: {each}; pipeline idle {time.bubble_share:.0%}"
    ]
    if data_tokens:
        epoch = data_tokens / plan.tokens_per_second
        lines.append(f"epoch      of {data_tokens:,.0f} tokens: about {duration(epoch)}")
    else:
        lines.append(
            f"epoch      about {duration(1e9 / plan.tokens_per_second)} for 1e9 tokens; --tokens says how many yours has"
        )
    if plan.recipe.train.steps:
        lines.append(
            f"run        {plan.recipe.train.steps} steps: about {duration(plan.recipe.train.steps * time.total)}"
        )
    name = plan.hardware.card.name
    source = (
        "measured on this kind of card"
        if name == rates.MEASURED_CARD
        else f"scaled from the {rates.MEASURED_CARD} measured"
    )
    lines.append(f"           an estimate, {source} ({rates.SOURCE})")
    return lines


def show_cards(plans: dict[str, Plan], console: Console) -> None:
    """The same layout on every known card."""
    table = Table(
        "card", "GiB", "needed", "fits", "s a step", "tokens/s a card", title="without --gpu: on every known card"
    )
    for name, plan in plans.items():
        time = (
            [f"{plan.time.total:.1f}", f"{plan.tokens_per_second / plan.hardware.gpus:,.0f}"] if plan.time else ["", ""]
        )
        fits = "yes" if plan.fits else "no"
        table.add_row(name, f"{CARDS[name].memory_gib:.1f}", f"{plan.worst.needed / GIB:.1f}", fits, *time)
    console.print(table)


def show_search(found: list[Plan], console: Console, count: int = 10) -> None:
    """The best layouts, ranked."""
    table = Table("", "layout", "GiB", "s a step", "tokens/s", "why")
    for place, plan in enumerate(found[:count], 1):
        time = [f"{plan.time.total:.1f}", f"{plan.tokens_per_second:,.0f}"] if plan.time else ["", ""]
        table.add_row(str(place), layout_text(plan), f"{plan.worst.needed / GIB:.1f}", *time, reason(plan, found[0]))
    console.print(table)


def settings_text(plan: Plan) -> str:
    """A found plan as overrides that the command line takes: planned with them, the recipe gives the same figures."""
    layout, train = plan.layout, plan.recipe.train
    names = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size")
    names += ("expert_tensor_parallel_size", "world_size")
    keys = [f"parallel.{name}={getattr(layout, name)}" for name in names]
    keys.append(f"train.recompute_granularity={train.recompute_granularity or 'null'}")
    if train.recompute_granularity == "full":
        keys.append(f"train.recompute_method={train.recompute_method}")
        keys.append(f"train.recompute_num_layers={train.recompute_num_layers}")
    modules = train.recompute_modules
    keys.append(f"train.recompute_modules={'[' + ','.join(modules) + ']' if modules else 'null'}")
    return " ".join(keys)
