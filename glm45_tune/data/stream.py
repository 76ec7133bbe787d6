"""Data that is kept nowhere: read, rendered and packed a window at a time while training goes on.

A window is `data.streaming_window` rows as they come. Its samples are packed best fit, its packed rows shuffled by the seed and
handed out; then it is forgotten. Every rank walks the same stream and trains its share of each step, so ranks tell each other
nothing and no parallel layout changes what a step sees. Where a stream stands is a few numbers: its cursor.
"""

import os
from collections import Counter, deque
from collections.abc import Iterator
from itertools import chain, count, islice
from math import ceil
from pathlib import Path

import numpy as np

from glm45_tune.data.chat import ChatRenderer, Sample
from glm45_tune.data.files import files_of, read_rows
from glm45_tune.data.packing import Rows, pack
from glm45_tune.data.sources import Corpus, Fault, generated, load, numbered
from glm45_tune.data.store import CHUNK, WORTH_WORKERS, Made, Row, render_once, rendered
from glm45_tune.errors import DataError
from glm45_tune.layout import ranks_here
from glm45_tune.recipe import DataConfig, sources_of

_NONE_AGAIN = (
    "gave rows the first time and none when it was read again. A function must give its rows anew each time it is called: "
    "yield them, or return a list or a new iterator."
)
_MOST_WORKERS = 4  # of a rank: rendering is far quicker than training


class Stream:
    """Packed rows without end. `seen` says how many rows were read and what was left out of them; it holds no samples."""

    def __init__(self, options: DataConfig, tokenizer, seed: int):
        self._options, self._renderer, self._seed = options, ChatRenderer(tokenizer, options), seed
        self._sources = sources_of(options.train)
        start = [[0, 0, 0] for _ in self._sources]  # epoch, file, line
        self.seek({"window": 0, "row": 0, "positions": start, "num_rows": 0, "counts": {}})

    def seek(self, cursor: dict) -> None:
        """Go on where `cursor` was taken. Raises DataError when it is of other sources."""
        if len(cursor["positions"]) != len(self._sources):
            raise DataError(
                f"data.train: {len(self._sources)} sources; the stream was left with {len(cursor['positions'])}."
            )
        self.cursor = cursor
        self.seen = Corpus(num_rows=cursor["num_rows"], counts=Counter(cursor["counts"]))
        self._walk, self._peeked = self._rows_from(cursor), []

    def rows(self, number: int) -> list[list[Sample]]:
        """The next packed rows. Raises DataError at bad rows, unless they are skipped."""
        taken = []
        while len(taken) < number:
            self.cursor, row = self._peeked.pop() if self._peeked else next(self._walk)
            taken.append(row)
        return taken

    def check(self) -> None:
        """Raise DataError when the first window already shows that nothing can be trained."""
        self._peeked.append(next(self._walk))

    def close(self) -> None:
        """End the workers."""
        self._walk.close()

    def first_window(self) -> Corpus:
        """What the first window holds, to be looked at."""
        size = ceil(self._options.streaming_window / CHUNK)
        rows = chain.from_iterable(islice(self._read(self.cursor, deque()), size))
        return Corpus.of(*render_once(rows, self._renderer))

    def _rows_from(self, cursor: dict) -> Iterator[tuple[dict, list[Sample]]]:
        """Packed rows, each with the cursor that stands behind it."""
        starts: deque[dict] = deque()  # of the windows that are read and not yet handed out
        size, done = ceil(self._options.streaming_window / CHUNK), cursor["row"]
        chunks = rendered(self._read(cursor, starts), self._renderer, self._num_workers(), ahead=size)
        while True:
            start = {"num_rows": self.seen.num_rows, "counts": dict(self.seen.counts)}
            made = list(islice(chunks, size))
            start |= starts.popleft()
            self._count(made)
            samples = [sample for part in made for sample in part.samples()]
            if not samples:
                raise DataError(
                    f"of {self._options.streaming_window} rows (data.streaming_window) none can be trained."
                )
            for place, row in enumerate(self._packed(samples, start["window"])):
                if place >= done:
                    yield start | {"row": place + 1}, row
            done = 0

    def _count(self, made: list[Made]) -> None:
        for part in made:
            self.seen.num_rows += part.num_rows
            self.seen.counts += part.counts
            if part.faults and self._options.on_bad_row == "error":
                Corpus(faults=[Fault(*fault) for fault in part.faults]).check("error")
            self.seen.counts["bad rows skipped"] += len(part.faults)

    def _packed(self, samples: list[Sample], window: int) -> Iterator[list[Sample]]:
        lengths = [len(sample.input_ids) for sample in samples]
        rows = pack(lengths, self._options.seq_length) if self._options.packing else Rows.single(len(samples))
        for index in np.random.default_rng((self._seed, window, 1)).permutation(len(rows)).tolist():
            yield [samples[member] for member in rows[index]]

    def _read(self, cursor: dict, starts: deque) -> Iterator[list[Row]]:
        """The rows of window after window, in chunks; where each window starts goes into `starts`."""
        sources = [_Endless(s.path, self._seed, place) for s, place in zip(self._sources, cursor["positions"])]
        shares = np.array([source.weight for source in self._sources])
        for window in count(cursor["window"]):
            starts.append({"window": window, "positions": [list(source.position) for source in sources]})
            random = np.random.default_rng((self._seed, window, 0))
            picks = random.choice(len(sources), self._options.streaming_window, p=shares / shares.sum()).tolist()
            for first in range(0, len(picks), CHUNK):
                yield [next(sources[pick]) for pick in picks[first : first + CHUNK]]

    def _num_workers(self) -> int:
        """0: what is small is rendered by this process."""
        paths = [source.path for source in self._sources]
        are_here = all(Path(path).exists() for path in paths)
        if are_here and sum(file.stat().st_size for path in paths for file in files_of(path)) < WORTH_WORKERS:
            return 0
        return max(1, min(_MOST_WORKERS, (os.cpu_count() or 1) // ranks_here()))


class _Endless(Iterator[Row]):
    """The rows of one source, over and over; a folder's files in another order each time. position: epoch, file, line last read."""

    def __init__(self, path: str, seed: int, position: list[int]):
        self.position = list(position)
        self._path, self._seed = path, seed
        self._rows = self._all()

    def __next__(self) -> Row:
        return next(self._rows)

    def _all(self) -> Iterator[Row]:
        epoch, first, behind = self.position
        while True:
            is_whole, any_row = (first, behind) == (0, 0), False
            for number, part in islice(enumerate(self._parts(epoch)), first, None):
                for where, line, row in part(behind):
                    any_row, self.position = True, [epoch, number, line]
                    yield where, line, row
                behind = 0
            if is_whole and not any_row:
                raise DataError(f"{self._path}: {_NONE_AGAIN if epoch else 'holds no rows.'}")
            epoch, first, behind = epoch + 1, 0, 0

    def _parts(self, epoch: int) -> list:
        """Of each file a function that reads it behind a line."""
        if not Path(self._path).exists():
            rows = generated(self._path, streaming=True)
            if rows is not None:
                return [lambda behind: islice(numbered(self._path, rows), behind, None)]
        files = files_of(self._path)
        order = np.random.default_rng((self._seed, epoch)).permutation(len(files)).tolist()
        return [lambda behind, file=files[i]: ((str(file), *row) for row in read_rows(file, behind)) for i in order]


def load_stream(options: DataConfig, tokenizer, seed: int = 0) -> tuple[Stream, Corpus]:
    """The training stream, its first window checked, and the held-out corpus, which is small and kept."""
    stream, held = Stream(options, tokenizer, seed), Corpus()
    stream.check()
    if options.eval:
        held = load(options.eval, ChatRenderer(tokenizer, options), seed)
        held.check(options.on_bad_row)
    return stream, held
