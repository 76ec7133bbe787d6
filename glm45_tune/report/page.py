"""A run as one HTML page that needs nothing beside it: no server, no network, no other file."""

import html
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from glm45_tune.errors import UserError
from glm45_tune.redaction import redacted_yaml
from glm45_tune.run.files import (
    METRICS_FILE,
    REPORT_FILE,
    Conversation,
    DamagedError,
    Evaluation,
    Facts,
    Text,
    read_evaluations,
    read_facts,
    read_load,
    read_metrics,
    read_recipe,
    read_samples,
)
from glm45_tune.run.scratch import sweep
from glm45_tune.system.files import write_whole

# (title, unit, keys; one that ends with / stands for all keys that begin so)
CHARTS = (
    ("Loss", "", ("train/loss", "eval/loss", "train/mtp_loss")),
    ("Loss by channel", "", ("loss/",)),
    ("Reward", "", ("rl/reward_mean", "eval/reward_mean")),
    ("Reward by part", "", ("rl/reward/", "eval/reward/")),
    ("Answers", "tokens", ("rl/response_tokens_mean", "eval/response_tokens_mean")),
    ("Divergence from the reference", "nats", ("rl/kl",)),
    ("Trainer against engine", "nats a token", ("rl/logprob_gap_mean", "rl/sync_gap")),
    ("Chosen over rejected", "", ("preference/margin", "preference/accuracy", "eval/margin", "eval/accuracy")),
    ("Gradient norm", "", ("train/grad_norm",)),
    ("Gradient norm by group", "", ("grad_norm/",)),
    ("Learning rate", "", ("train/learning_rate",)),
    ("Throughput", "tokens/s", ("perf/tokens_per_second",)),
    ("Work", "TFLOP/s a rank", ("perf/model_tflops_per_gpu",)),
    ("MFU", "of the card's peak", ("perf/mfu",)),
    ("Seconds a step", "s", ("perf/step_seconds",)),
    ("Peak memory", "GiB", ("perf/peak_memory_gib",)),
    ("Filled", "of the rows' tokens", ("data/fill_ratio",)),
    ("Router losses", "", ("train/aux_loss", "train/z_loss")),
    ("Steps left out", "", ("train/skipped_steps",)),
)
# a page stays light: of a longer run so many points are drawn, each the mean of its neighbours
MAX_POINTS = 1000
# of whose conversations a report of reinforcement learning shows some
MAX_STEPS_SHOWN = 6
MAX_DAMAGED_SHOWN = 20
_DOCTYPE = b"<!doctype html"
_TEMPLATE = Path(__file__).with_name("page.html")


def write(run: str | Path, output: str | Path | None = None) -> Path:
    """Write the page of a run, finished or under way, to `output` (RUN/report.html). Raises UserError where there is no run."""
    run = Path(run)
    if not (run / METRICS_FILE).is_file():
        raise UserError(f"{run}: no {METRICS_FILE} here. The report is of a run's output_dir, after its first step.")
    output = Path(output) if output else run / REPORT_FILE
    _check_replaced(output)
    sweep(run)
    rows, damaged = read_metrics(run)
    if not rows:
        raise UserError(f"{run / METRICS_FILE}: {'no line can be read' if damaged else 'no step is done yet'}.")
    facts = read_facts(run)
    samples, more = read_samples(run)
    damaged += more
    document = {
        "charts": _charts(rows),
        "layers": _table(rows, "moe/load/layer_"),
        "experts": _experts(_unless_damaged(read_load, run, damaged)),
    }
    evaluations = _unless_damaged(read_evaluations, run, damaged)
    recipe = _unless_damaged(read_recipe, run, damaged)
    parts = {
        "TITLE": html.escape(run.resolve().name),
        "FACTS": _facts(rows, facts),
        "EVALUATION": _evaluation(evaluations),
        "SAMPLES": _samples(samples),
        "RECIPE": html.escape(redacted_yaml(recipe or "")),
        "VERSIONS": html.escape(", ".join(f"{name} {version}" for name, version in facts.get("versions", {}).items())),
        "DAMAGED": "".join(f"<p class=none>{html.escape(sentence)}</p>" for sentence in damaged[:MAX_DAMAGED_SHOWN]),
        # a text such as </script> in a key must not end the script
        "DATA": json.dumps(document, allow_nan=False).replace("<", "\\u003c"),
    }
    # one pass: what a part holds is not looked at again
    page = re.sub(r"@@([A-Z]+)@@", lambda found: parts[found[1]], _TEMPLATE.read_text(encoding="utf-8"))
    for sentence in damaged[:MAX_DAMAGED_SHOWN]:
        print(f"{run}: {sentence} The page leaves it out.", file=sys.stderr)
    if len(damaged) > MAX_DAMAGED_SHOWN:
        print(f"{run}: {len(damaged) - MAX_DAMAGED_SHOWN} more such faults.", file=sys.stderr)
    try:
        write_whole(output, page.encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror}).") from error
    return output


def _check_replaced(output: Path) -> None:
    """Raise UserError when a file stands there that is neither a page nor the beginning of one."""
    try:
        head = output.read_bytes().lstrip()[: len(_DOCTYPE)].lower() if output.is_file() else b""
    except OSError as error:
        raise UserError(f"{output}: cannot be read ({error.strerror}). Choose another --output.") from error
    if not _DOCTYPE.startswith(head):
        raise UserError(f"{output}: exists and is no HTML page, so it is not replaced. Choose another --output.")


def _unless_damaged(read: Callable[[Path], Any], run: Path, damaged: list[str]) -> Any:
    """What a reader returns, or None with its sentence in `damaged`."""
    try:
        return read(run)
    except DamagedError as error:
        damaged.append(str(error))
        return None


def _charts(rows: list[dict]) -> list[dict]:
    names = sorted({name for row in rows for name in row})
    charts = []
    for title, unit, keys in CHARTS:
        chosen = [name for key in keys for name in names if name == key or (key.endswith("/") and name.startswith(key))]
        series = {name: [[row["step"], row[name]] for row in rows if name in row] for name in chosen}
        if series:
            lines = [{"name": name, "points": _thinned(points)} for name, points in series.items()]
            charts.append({"title": title, "unit": unit, "lines": lines})
    return charts


def _thinned(points: list[list[float]]) -> list[list[float]]:
    """At most MAX_POINTS: neighbours become their mean, at the last one's step."""
    size = math.ceil(len(points) / MAX_POINTS)
    groups = [points[first : first + size] for first in range(0, len(points), size)]
    return [[group[-1][0], sum(value for _, value in group) / len(group)] for group in groups]


def _table(rows: list[dict], front: str) -> dict | None:
    """Steps × layers: the busiest expert over the mean."""
    names = sorted({name for row in rows for name in row if name.startswith(front)})
    if not names:
        return None
    columns = [_thinned([[row["step"], row[name]] for row in rows if name in row]) for name in names]
    steps = [step for step, _ in columns[0]]
    labels = [f"layer {name.removeprefix(front).lstrip('0') or 0}" for name in names]
    return {
        "rows": labels,
        "columns": [f"step {step}" for step in steps],
        "values": [[v for _, v in c] for c in columns],
    }


def _experts(load: list[list[float | None]] | None) -> dict | None:
    """Layers × experts: tokens over the layer's mean, of the last steps."""
    if not load:
        return None
    columns = [f"expert {number}" for number in range(len(load[0]))]
    return {"rows": [f"MoE layer {number}" for number in range(len(load))], "columns": columns, "values": load}


def _facts(rows: list[dict], facts: Facts) -> str:
    last = rows[-1]
    speeds = sorted(row["perf/tokens_per_second"] for row in rows if "perf/tokens_per_second" in row)
    lora = facts["lora"]
    told = {
        "model": Path(facts["model"]).name,
        "trained": f"LoRA r {lora.get('r', '?')}" if lora else "all weights",
        "ranks": facts.get("layout", ""),
        "steps": f"{last['step']:,}",
        "tokens": f"{sum(row.get('train/tokens', 0) for row in rows):,}",
        "loss": f"{rows[0].get('train/loss', math.nan):.4f} → {last.get('train/loss', math.nan):.4f}",
        "tokens/s, median": f"{speeds[len(speeds) // 2]:,.0f}" if speeds else "",
        "peak memory": f"{max(row.get('perf/peak_memory_gib', 0) for row in rows):.1f} GiB",
    }
    rewards = [row["rl/reward_mean"] for row in rows if "rl/reward_mean" in row]
    if rewards:
        told["mean reward"] = f"{rewards[0]:.3f} → {rewards[-1]:.3f}"
    held_out = [row["eval/loss"] for row in rows if "eval/loss" in row]
    if held_out:
        told["best held-out loss"] = f"{min(held_out):.4f}"
    tiles = (f"<div><dt>{html.escape(k)}</dt><dd>{html.escape(str(v))}</dd></div>" for k, v in told.items() if v)
    return "\n".join(tiles)


def _evaluation(evaluations: list[Evaluation] | None) -> str:
    """What `glm45-tune eval RUN` found, base and tuned under each other."""
    if evaluations is None:
        return "<p class=none>The scores cannot be read.</p>"
    if not evaluations:
        return "<p class=none>Not evaluated: glm45-tune eval RUN --data FILE.</p>"
    rows = []
    for entry in evaluations:
        mode = {None: "", True: ", thinking on", False: ", thinking off"}[entry["think"]]
        for which in ("base", "tuned"):
            score = entry[which]
            calls = "" if score["valid_calls"] is None else f"{score['valid_calls']:.0%}"
            shares = [f"{score['exact']:.0%}", f"{score['non_thinking']:.0%}", calls, f"{score['perplexity']:.4g}"]
            rows.append(
                [f"{entry['data']}{mode}", str(score["num_questions"]), f"{which}, step {entry['step']}", *shares]
            )
    return _html_table(["data", "questions", "model", "exact", "non-thinking", "calls valid", "perplexity"], rows)


def _samples(lines: list[Conversation | Text]) -> str:
    if not lines:
        return "<p class=none>This run kept no samples (logging.num_samples).</p>"
    return _conversations(lines) if "reward" in lines[0] else _before_and_after(lines)


def _conversations(lines: list[dict]) -> str:
    """Of reinforcement learning: those of some steps, from the first to the last, each with what it was worth."""
    steps = sorted({line["step"] for line in lines})
    count = min(len(steps), MAX_STEPS_SHOWN)
    shown = {steps[round(number * (len(steps) - 1) / max(count - 1, 1))] for number in range(count)}
    rows = []
    for line in lines:
        if line["step"] in shown:
            reward = "none" if line["reward"] is None else f"{line['reward']:.3g}"
            cells = [
                str(line["step"]),
                line["prompt"],
                line["completion"],
                reward,
                f"{line['advantage']:+.2f}",
                line["finish"],
            ]
            rows.append(cells)
    return _html_table(["step", "prompt", "answer", "reward", "advantage", "ended by"], rows)


def _before_and_after(lines: list[dict]) -> str:
    """Of each prompt its first and its last answer, side by side."""
    by_prompt: dict[str, list[dict]] = {}
    for line in lines:
        by_prompt.setdefault(line["prompt"], []).append(line)
    rows = []
    for prompt, answers in by_prompt.items():
        cells = [
            prompt,
            answers[0].get("wanted") or "",
            _answer(answers[0]),
            _answer(answers[-1]) if len(answers) > 1 else "",
        ]
        rows.append(cells)
    return _html_table(["prompt", "in the data", "before", "after"], rows)


def _html_table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["".join(f"<td>{html.escape(cell)}</td>" for cell in cells) for cells in rows]
    lines.insert(0, "".join(f"<th>{html.escape(name)}</th>" for name in head))
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _answer(line: dict) -> str:
    return f"step {line['step']}: {line['text']}"
