"""What training will see: counts, lengths, packing, every bad row, and samples with their trained tokens in colour."""

import contextlib
import json
from dataclasses import asdict

import numpy as np
from rich.table import Table
from rich.text import Text

from glm45_tune.console import Terminal
from glm45_tune.data.chat import Sample
from glm45_tune.data.formats import PROMPT_FIELDS
from glm45_tune.data.packing import BatchPlan
from glm45_tune.data.sources import RENDERERS, Corpus, hold_out, kind_for, kind_of, listed, load, rows_of
from glm45_tune.data.stream import Stream
from glm45_tune.errors import DataError
from glm45_tune.recipe import Recipe
from glm45_tune.terminal import visible

TRAINED, CONTEXT, SPECIAL = "black on green", "dim", "bold"
BRACKETS = "⟦", "⟧"  # around what is trained, where there are no colours
_EDGES = [0, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072]


def read(recipe: Recipe, tokenizer) -> tuple[Corpus, Corpus, str]:
    """What training would take, what it would hold out of that, and the kind of both; of a stream its first window.

    Without an objective in the recipe, or a recipe, the first row says the kind. Bad rows are listed, whatever on_bad_row says.
    """
    options, seed = recipe.data, recipe.train.seed
    kind = kind_of(options) if recipe.kind == "sft" else kind_for(recipe)
    if options.streaming:
        return Stream(options, tokenizer, seed).first_window(), Corpus(), kind
    corpus = load(options.train, RENDERERS[kind](tokenizer, options), seed)
    return corpus, hold_out(corpus, options, seed), kind


def summarise(corpus: Corpus, held_out: Corpus, recipe: Recipe, tokenizer, kind: str) -> dict:
    """Numbers of what `read` gave, plain enough for JSON."""
    options, settings = recipe.data, recipe.train
    lengths = corpus.lengths
    packed = rows_of(corpus, options, kind)
    fill = float(lengths.sum()) / max(len(packed) * options.seq_length, 1)
    batch = settings.global_batch_size, settings.micro_batch_size
    steps = BatchPlan(len(packed), *batch, data_parallel_size=1, seed=settings.seed).steps_per_epoch
    opens, closes, call = (tokenizer.convert_tokens_to_ids(token) for token in ("<think>", "</think>", "<tool_call>"))
    thinking = tools = trained = desirable = 0
    for sample in corpus.samples:
        thinking += _thinks(sample, opens, closes)
        tools += bool((sample.input_ids == call).any())
        trained += int((sample.loss_mask > 0).sum())
        desirable += kind == "labelled" and sample.row["label"]
    counts = np.histogram(lengths, _EDGES)[0].tolist() if len(lengths) else []
    return {
        "kind": kind,
        "rows": corpus.num_rows,
        "bad_rows": len(corpus.faults),
        "samples": len(corpus.samples),
        **({"held_out": len(held_out.samples)} if options.eval_ratio else {}),
        "tokens": int(lengths.sum()),
        "trained_tokens": trained,
        "trained_weight": float(corpus.weights.sum()),
        "longest": int(lengths.max(initial=0)),
        "mean_length": float(lengths.mean()) if len(lengths) else 0.0,
        "lengths": {f"{a}-{b - 1}": n for a, b, n in zip(_EDGES, _EDGES[1:], counts) if n},
        "thinking_share": thinking / max(len(lengths), 1),
        "tool_share": tools / max(len(lengths), 1),
        "seq_length": options.seq_length,
        "packed_rows": len(packed),
        "fill_ratio": fill,
        "padding_ratio": 1 - fill,
        "steps_per_epoch": steps,
        "epochs": settings.epochs or (settings.steps / steps if steps else 0.0),
        "steps": settings.steps or settings.epochs * steps,
        **({"desirable": desirable} if kind == "labelled" else {}),
        "duplicates": 0,
        **{reason.replace(" ", "_"): count for reason, count in sorted(corpus.counts.items())},
    }


def _thinks(sample: Sample, opens: int, closes: int) -> bool:
    """A thought that is trained and not empty."""
    at = np.flatnonzero((sample.input_ids == opens) & (sample.loss_mask > 0))
    return bool(len(at)) and bool((sample.input_ids[np.minimum(at + 1, len(sample.input_ids) - 1)] != closes).any())


def _first(corpus: Corpus, kind: str, count: int) -> list[tuple[Sample, dict]]:
    """The first `count` samples (of preference: pairs) and what only samples of their kind have."""
    if kind == "preference":
        sides = ("chosen", "rejected")
        return [(sample, {"answer": sides[n % 2]}) for n, sample in enumerate(corpus.samples[: 2 * count])]
    if kind == "labelled":
        said = {True: "desirable", False: "undesirable"}
        return [(sample, {"answer": said[sample.row["label"]]}) for sample in corpus.samples[:count]]
    return [(sample, {"row": sample.row} if kind == "rl" else {}) for sample in corpus.samples[:count]]


@contextlib.contextmanager
def unread_in_json(source: str, as_json: bool):
    """Around the reading of a source: where that ends it, the machine has a document too, with the one error that is raised."""
    try:
        yield
    except DataError as error:
        if as_json:
            file, line = error.place or (source, None)
            fault = {"file": file, "line": line, "field": error.field, "message": str(error)}
            print(json.dumps({"summary": {}, "samples": [], "errors": [fault]}, ensure_ascii=False))
        raise


def document(corpus: Corpus, summary: dict, tokenizer, show: int) -> dict:
    """The machine's view: summary, the first `show` samples (pairs: both answers), every bad row."""
    return {
        "summary": summary,
        "samples": [
            {
                "source": sample.source,
                "line": sample.line,
                "text": tokenizer.decode(sample.input_ids.tolist()),
                "input_ids": sample.input_ids.tolist(),
                "loss_mask": sample.loss_mask.tolist(),
                **more,
            }
            for sample, more in _first(corpus, summary["kind"], show)
        ],
        "errors": [asdict(fault) for fault in corpus.faults],
        "left_out": [asdict(fault) for fault in corpus.left_out],
    }


def show(corpus: Corpus, summary: dict, tokenizer, count: int) -> None:
    """The person's view of the same."""
    console = Terminal(markup=False, emoji=False)  # rows and names of files may hold what looks like markup
    has_colour = console.color_system is not None and not console.no_color
    table = Table(show_header=False, box=None, pad_edge=False)
    lengths = summary["lengths"]
    shown = {key: value for key, value in summary.items() if key != "lengths"}
    for key, value in shown.items():
        said = (
            value
            if isinstance(value, str)
            else f"{value:.1%}"
            if key.endswith(("_share", "_ratio"))
            else f"{value:,}"
            if isinstance(value, int)
            else f"{value:,.1f}"
        )
        table.add_row(key.replace("_", " "), said)
    console.print(table)
    most = max(lengths.values(), default=1)
    for span, number in lengths.items():
        console.print(f"{span + ' tokens':>22s} {'█' * max(1, round(40 * number / most))} {number:,}", highlight=False)
    for sample, more in _first(corpus, summary["kind"], count):
        side = f" {more['answer']}" if "answer" in more else ""
        title = Text.assemble((f"\n{visible(sample.source)}:{sample.line}{side}", "bold"), "  ")
        if summary["kind"] != "rl":
            opens, closes = ("", "") if has_colour else BRACKETS
            title.append_text(Text.assemble("(", (f"{opens}trained{closes}", TRAINED), ", ", ("context", CONTEXT), ")"))
        console.print(title)
        console.print(coloured(sample, tokenizer, has_colour))
        if summary["kind"] == "rl":
            columns = ", ".join(f"{key}={value!r}" for key, value in sample.row.items() if key not in PROMPT_FIELDS)
            console.print(f"kept for the reward: {columns or 'nothing'}", highlight=False)
    for line in (*listed(corpus.left_out), *listed(corpus.faults)):
        console.print(Text(visible(line), "red" if corpus.faults else ""))


def coloured(sample: Sample, tokenizer, with_colour: bool = True) -> Text:
    """The sample's text, run by run: what is trained stands out (with its weight where that is not 1), line ends are visible.

    with_colour: False puts what is trained in brackets, as a file or a terminal without colours shows no other sign.
    """
    opens, closes = ("", "") if with_colour else BRACKETS
    text, special = Text(), set(tokenizer.added_tokens_decoder)
    ids, mask = sample.input_ids.tolist(), sample.loss_mask.tolist()
    first = 0
    for position in range(1, len(ids) + 1):
        if (
            position < len(ids)
            and mask[position] == mask[first]
            and (ids[position] in special) == (ids[first] in special)
        ):
            continue
        style = TRAINED if mask[first] else CONTEXT
        style += f" {SPECIAL}" if ids[first] in special else ""
        said = visible(tokenizer.decode(ids[first:position])).replace("\n", "⏎\n")
        if mask[first]:
            said = (opens if not first or not mask[first - 1] else "") + said
            said += closes if position == len(ids) or not mask[position] else ""
        text.append(said, style)
        if mask[first] not in (0.0, 1.0):
            text.append(f"×{mask[first]:g}", "yellow")
        first = position
    return text
