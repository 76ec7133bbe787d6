"""A run as one HTML page that needs nothing beside it: no server, no network, no other file."""

import html
import json
import math
import sys
from pathlib import Path

from glm45_tune.errors import UserError
from glm45_tune.redaction import redacted_yaml

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
_TEMPLATE = Path(__file__).with_name("page.html")


def write(run: str | Path, output: str | Path | None = None) -> Path:
    """Write the page of a run, finished or under way, to `output` (RUN/report.html). Raises UserError where there is no run."""
    run = Path(run)
    if not (run / "metrics.jsonl").is_file():
        raise UserError(f"{run}: no metrics.jsonl here. The report is of a run's output_dir, after its first step.")
    output = Path(output) if output else run / "report.html"
    if output.is_file() and not output.read_bytes().lstrip()[:14].lower().startswith(b"<!doctype html"):
        raise UserError(f"{output}: exists and is no HTML page, so it is not replaced. Choose another --output.")
    rows = _lines(run / "metrics.jsonl")
    if not rows:
        raise UserError(f"{run}/metrics.jsonl: no step is done yet.")
    try:
        facts = json.loads((run / "glm45_tune.json").read_text(encoding="utf-8"))
        told = _facts(rows, facts)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{run}/glm45_tune.json: is damaged ({error!r}): it does not say what was trained.") from error
    document = {
        "charts": _charts(rows),
        "layers": _table(rows, "moe/load/layer_"),
        "experts": _experts(run / "expert_load.json"),
    }
    page = _TEMPLATE.read_text(encoding="utf-8")
    parts = {
        "TITLE": html.escape(run.resolve().name),
        "FACTS": told,
        "EVALUATION": _evaluation(run / "eval.json"),
        "SAMPLES": _samples(run / "samples.jsonl"),
        "RECIPE": html.escape(redacted_yaml((run / "recipe.yaml").read_text(encoding="utf-8"))),
        "VERSIONS": html.escape(", ".join(f"{name} {version}" for name, version in facts.get("versions", {}).items())),
        # a text such as </script> in a key must not end the script
        "DATA": json.dumps(document).replace("<", "\\u003c"),
    }
    for name, value in parts.items():
        page = page.replace(f"@@{name}@@", value)
    try:
        output.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{output}: {error.strerror}.") from error
    return output


def _lines(path: Path) -> list[dict]:
    """The whole lines; the last one may be under way."""
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines() if path.is_file() else [], 1):
        if line.endswith("}"):
            try:
                found.append(json.loads(line))
            except ValueError as error:
                raise UserError(
                    f"{path}: line {number} is not JSON: {error}. Its run wrote something else there."
                ) from error
    return found


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
    labels = [f"layer {int(name.removeprefix(front))}" for name in names]
    return {
        "rows": labels,
        "columns": [f"step {step}" for step in steps],
        "values": [[v for _, v in c] for c in columns],
    }


def _experts(path: Path) -> dict | None:
    """Layers × experts: tokens over the layer's mean, of the last steps."""
    if not path.is_file():
        return None
    try:
        load = json.loads(path.read_text(encoding="utf-8"))["load"]
        columns = [f"expert {number}" for number in range(len(load[0]))] if load else []
    except (ValueError, KeyError, TypeError) as error:
        print(f"{path}: is damaged ({error!r}), so the page leaves out the load of each expert.", file=sys.stderr)
        return None
    return {"rows": [f"MoE layer {number}" for number in range(len(load))], "columns": columns, "values": load}


def _facts(rows: list[dict], facts: dict) -> str:
    last = rows[-1]
    speeds = sorted(row["perf/tokens_per_second"] for row in rows if "perf/tokens_per_second" in row)
    lora = facts["lora"]
    told = {
        "model": Path(facts["model"]).name,
        "trained": f"LoRA r {lora['r']}" if lora else "all weights",
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


def _evaluation(path: Path) -> str:
    """What `glm45-tune eval RUN` found, base and tuned under each other."""
    if not path.is_file():
        return "<p class=none>Not evaluated: glm45-tune eval RUN --data FILE.</p>"
    rows = []
    for entry in json.loads(path.read_text(encoding="utf-8")):
        mode = {None: "", True: ", thinking on", False: ", thinking off"}[entry["think"]]
        for which in ("base", "tuned"):
            score = entry[which]
            calls = "" if score["valid_calls"] is None else f"{score['valid_calls']:.0%}"
            shares = [f"{score['exact']:.0%}", f"{score['non_thinking']:.0%}", calls, f"{score['perplexity']:.4g}"]
            rows.append(
                [f"{entry['data']}{mode}", str(score["num_questions"]), f"{which}, step {entry['step']}", *shares]
            )
    return _html_table(["data", "questions", "model", "exact", "non-thinking", "calls valid", "perplexity"], rows)


def _samples(path: Path) -> str:
    lines = _lines(path)
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
