"""Where rows come from, and what all rows of a recipe become: samples in order, every bad row with its reason."""

import hashlib
import inspect
import random
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import numpy as np

from glm45_tune.data.chat import ChatRenderer, Sample
from glm45_tune.data.files import as_row, files_of, left_out_of, read_rows, without_made_up
from glm45_tune.data.formats import KINDS, format_of
from glm45_tune.data.functions import function_named
from glm45_tune.data.labels import LabelledRenderer
from glm45_tune.data.packing import Rows, pack
from glm45_tune.data.pairs import PairRenderer
from glm45_tune.data.prompts import PromptRenderer
from glm45_tune.data.store import MOST_LEFT_OUT, Origins, Row, key_of, locked, render_once, store, stored
from glm45_tune.errors import DataError
from glm45_tune.progress import bar
from glm45_tune.recipe import DataConfig, Recipe, SourceConfig, Sources, sources_of


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a row was not used."""

    file: str
    line: int
    field: str | None
    message: str


@dataclass
class Corpus:
    """Everything some sources hold: samples in order, bad rows, and what was cut or left out, by reason."""

    samples: Sequence[Sample] = ()
    faults: list[Fault] = field(default_factory=list)
    counts: Counter = field(default_factory=Counter)
    num_rows: int = 0
    left_out: list[Fault] = field(default_factory=list)
    """Rows, or conversations of them, that are too long and so not among the samples; of many the first."""

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of every sample, int64."""
        return self.samples.lengths() if len(self.samples) else np.empty(0, np.int64)

    @property
    def weights(self) -> np.ndarray:
        """Sum of the loss mask of every sample, float64."""
        return self.samples.weights() if len(self.samples) else np.empty(0)

    @classmethod
    def of(cls, samples: Sequence[Sample], facts: dict) -> "Corpus":
        """Samples with what `store` and `render_once` say about them."""
        faults, left_out = ([Fault(*fault) for fault in facts[name]] for name in ("faults", "left_out"))
        return cls(samples, faults, Counter(facts["counts"]), facts["num_rows"], left_out)

    def _said(self) -> str:
        return ", ".join(f"{count} {what}" for what, count in {"bad": len(self.faults), **self.counts}.items())

    def check(self, on_bad_row: str, name: str = "data.train") -> None:
        """Raise DataError listing the bad rows (the first 20 in full) unless they are to be skipped, or where none is left."""
        if self.faults and on_bad_row == "error":
            raise DataError("\n".join(listed(self.faults)))
        if not self.samples:
            raise DataError(
                f"{name} holds no rows."
                if not self.num_rows
                else f"{name}: of {self.num_rows} rows none is left ({self._said()})."
            )


def listed(faults: list[Fault], most: int = 20) -> list[str]:
    """The first faults a line each, and how many there are of each kind where that is not all."""
    lines = [f"{fault.file}:{fault.line}: {fault.message}" for fault in faults[:most]]
    if len(faults) > most:
        kinds = Counter(kind_of_fault(fault) for fault in faults)
        lines.append(f"… and {len(faults) - most} more. In all:")
        lines += [f"  {count:,} × {kind}" for kind, count in kinds.most_common(10)]
    return lines


def kind_of_fault(fault: Fault) -> str:
    """A fault without what is its row's own: numbers, and texts in quotes."""
    return re.sub(r"\d[\d,]*", "N", re.sub(r"(['\"]).*?\1", "…", fault.message))[:160]


def read_source(source: str, seed: int = 0, read: Callable[[int], object] = int) -> Iterator[Row]:
    """(where, line, row) of a source: a file, a folder, hf:…, ms:… or module:function; SOURCE#N takes N rows by the seed.

    read: is told of a file's bytes as they are read.
    """
    name = name_of(source)
    if name == source:
        return _rows_of(source, read)
    count = source.rpartition("#")[2]
    if not int(count):
        raise DataError(f"{source}: asks for 0 rows of {name}; #N takes N of them, at least 1.")
    # files are read twice, the first time to count; what a hub or a function yields may differ then and is held
    again = Path(name).exists()
    everything = [] if again else list(_rows_of(name, read))
    total = sum(1 for _ in _rows_of(name, int)) if again else len(everything)
    if int(count) > total:
        raise DataError(f"{source}: asks for {count} rows of {total}.")
    chosen = set(random.Random(seed).sample(range(total), int(count)))
    return (row for index, row in enumerate(_rows_of(name, read) if again else everything) if index in chosen)


def _rows_of(source: str, read: Callable[[int], object]) -> Iterator[Row]:
    rows = generated(source)
    if rows is not None:
        return numbered(source, rows)
    return ((str(file), line, row) for file in files_of(source) for line, row in read_rows(file, read=read))


def generated(source: str, streaming: bool = False) -> Iterable | None:
    """What a hub or a function yields; None where the source is files. streaming: the hub's rows come as they are read."""
    if Path(source).exists():
        return None
    if source.startswith(("hf:", "ms:")):
        return _hub(source, streaming)
    return _called(source) if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", source) else None


def numbered(source: str, rows: Iterable) -> Iterator[Row]:
    """Rows with their numbers. Raises DataError where they break off: a function or a client may raise anything."""
    number = 0
    try:
        for number, row in enumerate(rows, start=1):
            yield source, number, as_row(row)
    except (Exception, SystemExit) as error:  # the user's program, or a hub's client
        raise DataError(f"{source}:{number + 1}: this row cannot be had: {error!r}. Mend what yields it.") from error


def _hub(source: str, streaming: bool) -> Iterable:
    """The rows of a hub dataset, hf:ORG/NAME[:CONFIG][@SPLIT] or ms:…; the hub's own client fetches it, datasets reads it."""
    hub, _, name = source.partition(":")
    name, _, split = name.partition("@")
    name, _, config = name.partition(":")
    if not name:
        raise DataError(f"{source}: names no data set; {hub}:ORG/NAME[:CONFIG][@SPLIT] is expected.")
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"{source}: needs {error.name}: pip install {error.name}.") from None
    try:
        name = _fetched(name) if hub == "ms" else name
        rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=streaming)
        return map(without_made_up, rows)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{source}: cannot be loaded: {(str(error).splitlines() or ['no reason given'])[0]}") from error


def _fetched(name: str) -> str:
    """The directory that ModelScope's data set is downloaded to. Raises OSError."""
    try:
        from modelscope_hub import HubApi
        from modelscope_hub.errors import HubError
    except ImportError:
        raise DataError(f"ms:{name}: needs modelscope: pip install modelscope.") from None
    try:
        return str(HubApi().download_repo(name, "dataset"))
    except HubError as error:
        raise OSError(error.message) from error


def _called(source: str) -> Iterable:
    """What a user's function gives; it is a program and may raise anything."""
    try:
        function = function_named(source)
    except ModuleNotFoundError as error:
        raise DataError(f"{source}: no such file, and {error}.") from error
    except ImportError as error:
        raise DataError(f"{source}: {error}.") from error
    if not callable(function) or inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        came = "an async function" if callable(function) else type(function).__name__
        raise DataError(f"{source}: is {came}; a plain function that yields or returns rows is expected.")
    try:
        rows = function()
    except (Exception, SystemExit) as error:  # the user's program
        raise DataError(f"{source}: the function, called without arguments, raised {error!r}.") from error
    try:
        return iter(rows)
    except TypeError:
        raise DataError(
            f"{source}: returned {type(rows).__name__}; rows are expected: yield them, or return a list."
        ) from None


def load(sources: Sources, renderer: ChatRenderer, seed: int = 0) -> Corpus:
    """Render every row of every source, or find it rendered. Raises DataError when a source is not there."""
    corpora = [_load_one(source, renderer, seed) for source in sources_of(sources)]
    if len(corpora) == 1:
        return corpora[0]
    return Corpus(
        Chain([corpus.samples for corpus in corpora]),
        [fault for corpus in corpora for fault in corpus.faults],
        sum((corpus.counts for corpus in corpora), Counter()),
        sum(corpus.num_rows for corpus in corpora),
        [fault for corpus in corpora for fault in corpus.left_out],
    )


def _load_one(source: SourceConfig, renderer: ChatRenderer, seed: int) -> Corpus:
    # what a hub or a function yields has no content to know it by, and is rendered anew
    name = name_of(source.path)
    files = files_of(name) if Path(name).exists() else None
    key = (
        key_of(files, renderer.options, renderer.tokenizer, f"{renderer.kind} {source.path} {seed}") if files else None
    )
    if key:
        with locked(key):
            if stored(key) is None:
                num_bytes = sum(file.stat().st_size for file in files)
                with bar(f"rendering {name}", num_bytes) as read:
                    store(key, read_source(source.path, seed, read), renderer, num_bytes)
            samples, facts = stored(key)
    else:
        with bar(f"rendering {name}, rows", None) as done:
            samples, facts = render_once(_counted(read_source(source.path, seed), done), renderer)
    if source.weight != 1:
        samples = Chosen(samples, _weighted(len(samples), source.weight, seed, renderer.per_row))
    corpus = Corpus.of(samples, facts)
    if others := left_out_of(name):
        corpus.counts["files of a folder left out, which hold no rows"] = len(others)
        why = "left out: hidden, or not a file of rows"
        corpus.left_out += [Fault(str(file), 1, None, why) for file in others[:MOST_LEFT_OUT]]
    return corpus


def _counted(rows: Iterable[Row], done: Callable[[int], object]) -> Iterator[Row]:
    for row in rows:
        yield row
        done(1)


class Chain(Sequence):
    """Several StoredSamples end to end."""

    def __init__(self, parts: list):
        self._parts, self._ends = parts, list(accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        part = bisect_right(self._ends, index)
        return self._parts[part][index - (self._ends[part - 1] if part else 0)]

    def lengths(self) -> np.ndarray:
        return np.concatenate([part.lengths() for part in self._parts])

    def weights(self) -> np.ndarray:
        return np.concatenate([part.weights() for part in self._parts])

    def digest(self) -> str:
        return hashlib.sha256("".join(part.digest() for part in self._parts).encode()).hexdigest()

    def origins(self) -> Origins:
        parts = [part.origins() for part in self._parts]
        names = list(dict.fromkeys(name for part in parts for name in part.names))
        number = {name: code for code, name in enumerate(names)}
        codes = [np.array([number[name] for name in part.names], np.int32)[part.codes] for part in parts]
        return Origins(names, np.concatenate(codes), np.concatenate([part.lines for part in parts]))


class Chosen(Sequence):
    """Some of StoredSamples, in a given order."""

    def __init__(self, whole, order: np.ndarray):
        self._whole, self._order = whole, order

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self._whole[i] for i in self._order[index].tolist()]
        return self._whole[int(self._order[index])]

    def lengths(self) -> np.ndarray:
        return self._whole.lengths()[self._order]

    def weights(self) -> np.ndarray:
        return self._whole.weights()[self._order]

    def digest(self) -> str:
        return hashlib.sha256(self._whole.digest().encode() + self._order.tobytes()).hexdigest()

    def origins(self) -> Origins:
        whole = self._whole.origins()
        return Origins(whole.names, whole.codes[self._order], whole.lines[self._order])


def _weighted(count: int, weight: float, seed: int, together: int) -> np.ndarray:
    """Every sample as often as the whole part of `weight` says, and a share of them, drawn by the seed, once more.

    `together` samples that follow each other share their fate.
    """
    whole, part = divmod(weight, 1)
    groups = count // together
    once_more = np.sort(np.random.default_rng(seed).choice(groups, round(part * groups), replace=False))
    chosen = np.concatenate([np.tile(np.arange(groups), int(whole)), once_more])
    return (chosen[:, None] * together + np.arange(together)).reshape(-1)


RENDERERS = {renderer.kind: renderer for renderer in (ChatRenderer, PairRenderer, LabelledRenderer, PromptRenderer)}


def kind_of(options: DataConfig) -> str:
    """What the data is for, "sft", "preference" or "rl": by its named format, else by the first row whose fields tell."""
    form = options.format
    if form is None:
        rows = (row for source in sources_of(options.train) for _, _, row in read_source(name_of(source.path)))
        form = next((form for row in rows if isinstance(row, dict) and (form := format_of(row))), None)
    return KINDS.get(form, "sft")


def kind_for(recipe: Recipe) -> str:
    """What a recipe trains on: its own kind, or "labelled" where the loss is kto and the data's first row is no pair."""
    if recipe.preference and recipe.preference.loss == "kto" and kind_of(recipe.data) != "preference":
        return "labelled"
    return recipe.kind


def name_of(source: str) -> str:
    """A source without the number of rows to take of it."""
    name, _, count = source.rpartition("#")
    return name if name and count.isdecimal() and not Path(source).exists() else source


def load_data(options: DataConfig, tokenizer, seed: int = 0, kind: str = "sft") -> tuple[Corpus, Corpus]:
    """The training and the held-out corpus (empty where neither eval nor eval_ratio is given) of a recipe's data section.

    kind "preference": pairs, read by `pairs.Pairs(corpus.samples)`; "labelled": answers, each with {"label": bool} as its `row`;
    "rl": prompts, each sample with its `row`.
    """
    renderer = RENDERERS[kind](tokenizer, options)
    train = load(options.train, renderer, seed)
    train.check(options.on_bad_row)
    if options.eval:
        held = load(options.eval, renderer, seed)
        held.check(options.on_bad_row, "data.eval")
        return train, held
    return train, hold_out(train, options, seed)


def hold_out(train: Corpus, options: DataConfig, seed: int) -> Corpus:
    """Move data.eval_ratio of a corpus's rows into another: all samples of a row, and its repetitions, are on one side."""
    held = Corpus()
    if options.eval_ratio and len(train.samples):
        row_of = train.samples.origins().rows()
        rows = row_of.max() + 1
        count = max(1, round(rows * options.eval_ratio))
        if count >= rows:
            raise DataError(f"data.eval_ratio {options.eval_ratio} of {rows} rows leaves none to train on.")
        is_held = np.isin(row_of, np.random.default_rng(seed).choice(rows, count, replace=False))
        held.samples = Chosen(train.samples, np.flatnonzero(is_held))
        train.samples = Chosen(train.samples, np.flatnonzero(~is_held))
    return held


def rows_of(corpus: Corpus, options: DataConfig, kind: str) -> Rows:
    """Which samples of a corpus share a row of training."""
    size = RENDERERS[kind].per_row  # a pair's two lie in one row
    lengths = corpus.lengths.reshape(-1, size).sum(axis=1)
    is_packed = options.packing and kind != "rl"  # prompts are chosen one by one; it is their answers that are packed
    rows = pack(lengths, options.seq_length) if is_packed else Rows.single(len(lengths))
    return rows.of_groups(size)
