"""A run as one HTML page that needs nothing beside it: no server, no network, no other file."""

import html
import json
import math
from pathlib import Path

from glm45_tune.errors import UserError

# (title, unit, keys; one that ends with / stands for all keys that begin so)
CHARTS = (
    ("Loss", "", ("train/loss", "eval/loss", "train/mtp_loss")),
    ("Loss by channel", "", ("loss/",)),
    ("Reward", "", ("rl/reward_mean", "eval/reward_mean")),
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
_TEMPLATE = Path(__file__).with_name("page.html")


def write(run: str | Path, output: str | Path | None = None) -> Path:
    """Write the page of a run, finished or under way, to `output` (RUN/report.html). Raises UserError where there is no run."""
    run = Path(run)
    if not (run / "metrics.jsonl").is_file():
        raise UserError(f"{run}: no metrics.jsonl here. The report is of a run's output_dir, after its first step.")
    output = Path(output) if output else run / "report.html"
    rows = _lines(run / "metrics.jsonl")
    if not rows:
        raise UserError(f"{run}/metrics.jsonl: no step is done yet.")
    facts = json.loads((run / "glm45_tune.json").read_text(encoding="utf-8"))
    document = {
        "charts": _charts(rows),
        "layers": _table(rows, "moe/load/layer_"),
        "experts": _experts(run / "expert_load.json"),
    }
    page = _TEMPLATE.read_text(encoding="utf-8")
    parts = {
        "TITLE": html.escape(run.resolve().name),
        "FACTS": _facts(rows, facts),
        "SAMPLES": _samples(run / "samples.jsonl"),
        "RECIPE": html.escape((run / "recipe.yaml").read_text(encoding="utf-8")),
        "VERSIONS": html.escape(", ".join(f"{name} {version}" for name, version in facts.get("versions", {}).items())),
        # a text such as </script> in a key must not end the script
        "DATA": json.dumps(document).replace("<", "\\u003c"),
    }
    for name, value in parts.items():
        page = page.replace(f"@@{name}@@", value)
    output.write_text(page, encoding="utf-8")
    return output


def _lines(path: Path) -> list[dict]:
    """The whole lines; the last one may be under way."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        if line.endswith("}"):
            found.append(json.loads(line))
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
    return {"rows": labels, "columns": [f"step {step}" for step in steps], "values": [[v for _, v in c] for c in columns]}


def _experts(path: Path) -> dict | None:
    """Layers × experts: tokens over the layer's mean, of the last steps."""
    if not path.is_file():
        return None
    load = json.loads(path.read_text(encoding="utf-8"))["load"]
    columns = [f"expert {number}" for number in range(len(load[0]))] if load else []
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
    held_out = [row["eval/loss"] for row in rows if "eval/loss" in row]
    if held_out:
        told["best held-out loss"] = f"{min(held_out):.4f}"
    tiles = (f"<div><dt>{html.escape(k)}</dt><dd>{html.escape(str(v))}</dd></div>" for k, v in told.items() if v)
    return "\n".join(tiles)


def _samples(path: Path) -> str:
    """Of each prompt its first and its last answer, side by side."""
    by_prompt: dict[str, list[dict]] = {}
    for line in _lines(path):
        by_prompt.setdefault(line["prompt"], []).append(line)
    if not by_prompt:
        return "<p class=none>This run kept no samples (logging.num_samples).</p>"
    rows = []
    for prompt, answers in by_prompt.items():
        cells = [
            prompt,
            answers[0].get("wanted") or "",
            _answer(answers[0]),
            _answer(answers[-1]) if len(answers) > 1 else "",
        ]
        rows.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    head = "<tr><th>prompt</th><th>in the data</th><th>before</th><th>after</th></tr>"
    return f"<table class=samples>{head}{''.join(rows)}</table>"


def _answer(line: dict) -> str:
    return f"step {line['step']}: {line.get('text', line.get('completion', ''))}"
