"""The curves of a run as one SVG picture, drawn from metrics.jsonl: losses, and what moved them."""

import math
from html import escape

WIDTH, HEIGHT = 760, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 34, 30
_COLOURS = ("#2563eb", "#dc2626", "#d97706", "#059669")
# one panel each: its title, and the metrics in it with the names they are shown by
_PANELS = (
    ("loss", {"train/loss": "training", "eval/loss": "held out", "train/mtp_loss": "MTP"}),
    ("reward", {"rl/reward_mean": "reward"}),
    ("pairs told apart", {"preference/accuracy": "pairs told apart"}),
    ("gradient norm", {"train/grad_norm": "gradient norm"}),
    ("learning rate", {"train/learning_rate": "learning rate"}),
)
_MOST_POINTS = 600

Points = list[tuple[float, float]]


def draw(metrics: list[dict]) -> str:
    """SVG text. A panel whose metrics never came is left out."""
    panels = []
    for title, names in _PANELS:
        series = {shown: _points(metrics, key) for key, shown in names.items()}
        series = {shown: points for shown, points in series.items() if points}
        if series:
            panels.append(_panel(title, series, HEIGHT * len(panels)))
    height = HEIGHT * max(len(panels), 1)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        'font-family="sans-serif" font-size="12">\n'
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>\n' + "\n".join(panels) + "\n</svg>\n"
    )


def _points(metrics: list[dict], key: str) -> Points:
    """(step, value) of a metric, means of neighbours where there are more than a picture shows."""
    found = [(line["step"], line[key]) for line in metrics if math.isfinite(line.get(key, math.nan))]
    together = -(-len(found) // _MOST_POINTS)
    groups = [found[first : first + together] for first in range(0, len(found), together or 1)]
    return [tuple(sum(values) / len(values) for values in zip(*group)) for group in groups]


def _panel(title: str, series: dict[str, Points], top: int) -> str:
    steps = [step for points in series.values() for step, _ in points]
    values = [value for points in series.values() for _, value in points]
    first, last = min(steps), max(max(steps), min(steps) + 1)
    low, high = min(0.0, *values), max(values)
    high = high if high > low else low + 1
    left, right, above, below = _LEFT, WIDTH - _RIGHT, top + _TOP, top + HEIGHT - _BOTTOM

    def x(step: float) -> float:
        return left + (step - first) / (last - first) * (right - left)

    def y(value: float) -> float:
        return below - (value - low) / (high - low) * (below - above)

    parts = [f'<text x="{left}" y="{top + 20}" font-weight="bold" fill="#111827">{escape(title)}</text>']
    for tick in _ticks(low, high):
        parts.append(f'<line x1="{left}" x2="{right}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" stroke="#e5e7eb"/>')
        parts.append(f'<text x="{left - 6}" y="{y(tick) + 4:.1f}" text-anchor="end" fill="#4b5563">{tick:.4g}</text>')
    for tick in _ticks(first, last):
        parts.append(f'<text x="{x(tick):.1f}" y="{below + 18}" text-anchor="middle" fill="#4b5563">{tick:.6g}</text>')
    place = right
    for (name, points), colour in zip(series.items(), _COLOURS):
        line = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
        parts += [
            f'<circle cx="{x(s):.1f}" cy="{y(v):.1f}" r="2.4" fill="{colour}"/>' for s, v in points if len(points) < 40
        ]
        if len(series) > 1:
            parts.append(f'<text x="{place}" y="{top + 20}" text-anchor="end" fill="{colour}">{escape(name)}</text>')
            place -= 10 + 7 * len(name)
    return "\n".join(parts)


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers between low and high, four to eight of them."""
    raw = (high - low) / 5
    size = 10 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= raw)
    return [round(step * n, 12) for n in range(math.ceil(low / step), math.floor(high / step) + 1)]
