"""Rendered samples on disk as Arrow, memory-mapped: rendered once by all cores, read by every rank, found again next time."""

import contextlib
import fcntl
import gc
import hashlib
import json
import os
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from glm45_tune.data.chat import ChatRenderer, Sample
from glm45_tune.errors import DataError
from glm45_tune.processes import Spawn
from glm45_tune.recipe import DataConfig

_SCHEMA = pa.schema(
    [
        ("input_ids", pa.large_list(pa.int32())),
        ("loss_mask", pa.large_list(pa.float32())),
        ("source", pa.string()),
        ("line", pa.int64()),
        ("trained", pa.float64()),  # sum of the loss mask
        ("row", pa.large_string()),  # what is kept of it, as JSON; what JSON does not know (dates, say) as text
    ]
)
CHUNK = 1000  # rows a worker renders at a time
# below this many bytes of sources, starting workers takes longer than rendering
WORTH_WORKERS = 8 << 20
MOST_LEFT_OUT = 1000  # are listed; all are counted

Row = tuple[str, int, "dict | DataError"]
# (file, line, field, message) of each bad row
Faults = list[tuple[str, int, str | None, str]]


def cache_directory() -> Path:
    """GLM45_TUNE_CACHE, or glm45_tune in XDG_CACHE_HOME, or ~/.cache/glm45_tune."""
    own = os.environ.get("GLM45_TUNE_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(own or Path(home) / "glm45_tune") / "data"


def _no_cache(error: OSError) -> DataError:
    return DataError(
        f"{cache_directory()}: rendered data cannot be kept there ({error.strerror or error}). Make room, or name another directory "
        "in the environment variable GLM45_TUNE_CACHE."
    )


class StoredSamples(Sequence):
    """Samples in Arrow's columns; of a file they are read from the memory map when they are asked for."""

    def __init__(self, table: pa.Table):
        self._columns = [table.column(name) for name in _SCHEMA.names]

    @classmethod
    def of_file(cls, path: Path) -> "StoredSamples":
        with pa.memory_map(str(path)) as source:
            return cls(pa.ipc.open_file(source).read_all())

    def __len__(self) -> int:
        return len(self._columns[0])

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        ids, mask, source, line, _, row = (column[index] for column in self._columns)
        kept = json.loads(row.as_py()) if row.is_valid else None
        return Sample(ids.values.to_numpy(), mask.values.to_numpy(), source.as_py(), line.as_py(), kept)

    def lengths(self) -> np.ndarray:
        """Tokens of every sample, int64, without reading any."""
        return pc.list_value_length(self._columns[0]).to_numpy().astype(np.int64)

    def weights(self) -> np.ndarray:
        """Sum of the loss mask of every sample, float64."""
        return self._columns[4].to_numpy()

    def digest(self) -> str:
        """Tells what would be trained apart: every sample's tokens and weights, and what was kept of its row, in order."""
        digest = hashlib.sha256(self.lengths().tobytes())
        for column in self._columns[:2]:
            for chunk in column.chunks:
                digest.update(chunk.flatten().to_numpy())
        if self._columns[5].null_count < len(self):
            digest.update(json.dumps(self._columns[5].to_pylist()).encode())
        return digest.hexdigest()

    def origins(self) -> "Origins":
        sources = pc.dictionary_encode(self._columns[2]).unify_dictionaries()
        names = sources.chunk(0).dictionary.to_pylist() if sources.num_chunks else []
        codes = np.concatenate([np.empty(0, np.int32), *(chunk.indices.to_numpy() for chunk in sources.chunks)])
        return Origins(names, codes.astype(np.int32), self._columns[3].to_numpy())


@dataclass(frozen=True)
class Origins:
    """Where each sample came from: source names[codes[i]], line lines[i]."""

    names: list[str]
    codes: np.ndarray
    lines: np.ndarray

    def rows(self) -> np.ndarray:
        """int64: the number of each sample's row; samples of one row have the same."""
        return np.unique((self.codes.astype(np.int64) << 40) + self.lines, return_inverse=True)[1]


def key_of(files: list[Path], options: DataConfig, tokenizer, more: str) -> str:
    """Changes with the bytes of the files, the tokenizer, its template, and every option that shapes a sample."""
    digest = hashlib.sha256(f"8 {options.model_dump_json(exclude={'train', 'eval'})} {more}".encode())
    digest.update((tokenizer.chat_template or "").encode() + tokenizer.backend_tokenizer.to_str().encode())
    for file in files:
        digest.update(f"{file}\0".encode())
        try:
            with open(file, "rb") as handle:
                digest.update(hashlib.file_digest(handle, "sha256").digest())
        except OSError as error:
            raise DataError(f"{file}: cannot be read: {error.strerror}.") from error
    return digest.hexdigest()


def render_all(rows: Iterable[Row], renderer: ChatRenderer, path: Path, num_bytes: int) -> dict:
    """Render rows into an Arrow file at `path`, in order. Returns its facts: bad rows, those left out, counts, number of rows."""
    faults, left_out, counts, keys, num_rows = [], [], Counter(), [], 0
    path.parent.mkdir(parents=True, exist_ok=True)
    source = iter(rows)
    chunks = iter(lambda: list(islice(source, CHUNK)), [])
    workers = 0 if num_bytes < WORTH_WORKERS or os.cpu_count() == 1 else os.cpu_count()
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, _SCHEMA) as writer:
        for made in rendered(chunks, renderer, workers):
            writer.write_batch(made.batch)
            faults += made.faults
            left_out += made.left_out[: MOST_LEFT_OUT - len(left_out)]
            counts += made.counts
            keys.append(made.keys)
            num_rows += made.num_rows
    every = np.concatenate(keys) if keys else np.empty(0)
    counts["duplicates"] = len(every) - len(np.unique(every))
    return {"faults": faults, "left_out": left_out, "counts": +counts, "num_rows": num_rows}


@dataclass
class Made:
    """What became of some rows. keys uint64: of each row that gave samples a hash of them, equal rows have equal ones."""

    batch: pa.RecordBatch
    faults: Faults
    left_out: Faults
    counts: Counter
    keys: np.ndarray
    num_rows: int

    def samples(self) -> list[Sample]:
        return list(StoredSamples(pa.Table.from_batches([self.batch])))


def rendered(
    chunks: Iterable[list[Row]], renderer: ChatRenderer, workers: int, ahead: int = 0
) -> Generator[Made, None, None]:
    """Each chunk of rows rendered, in order, by `workers` processes (0: by this one) that are some, or `ahead`, chunks ahead."""
    chunks = iter(chunks)
    if not workers:
        yield from (_render_chunk(chunk, renderer) for chunk in chunks)
        return
    pool = ProcessPoolExecutor(workers, Spawn(), _start_worker, (renderer,))
    try:
        waiting = deque(pool.submit(_in_worker, chunk) for chunk in islice(chunks, max(2 * workers, ahead)))
        while waiting:
            yield waiting.popleft().result()
            waiting += [pool.submit(_in_worker, chunk) for chunk in islice(chunks, 1)]
    finally:
        pool.shutdown(cancel_futures=True)


_renderer: ChatRenderer


def _start_worker(renderer: ChatRenderer) -> None:
    global _renderer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _renderer = renderer
    gc.freeze()  # what was imported stays: the collector need not walk it again with every thousand rows (a tenth of the time)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    """A worker whose parent was killed would wait for work forever."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _in_worker(chunk: list[Row]) -> Made:
    return _render_chunk(chunk, _renderer)


def _render_chunk(chunk: list[Row], renderer: ChatRenderer) -> Made:
    samples, faults, left_out, counts, keys = [], [], [], Counter(), []
    for file, line, row in chunk:
        try:
            if isinstance(row, DataError):
                raise row
            rendering = renderer.render(row, file, line)
        except DataError as error:
            faults.append((file, line, error.field, str(error).removeprefix(f"{file}:{line}: ")))
            continue
        samples += rendering.samples
        counts += rendering.counts
        left_out += [(file, line, None, why) for why in rendering.left_out]
        digest = hashlib.blake2b(digest_size=8)
        for sample in rendering.samples:
            digest.update(sample.input_ids.tobytes())
        if rendering.samples:
            keys.append(digest.digest())
    return Made(_batch(samples), faults, left_out, counts, np.frombuffer(b"".join(keys), np.uint64), len(chunk))


def _batch(samples: list[Sample]) -> pa.RecordBatch:
    edges = np.cumsum([0, *(len(sample.input_ids) for sample in samples)])

    def lists(values: list[np.ndarray], dtype) -> pa.Array:
        flat = np.concatenate(values) if values else np.empty(0, dtype)
        return pa.LargeListArray.from_arrays(pa.array(edges, pa.int64()), pa.array(flat.astype(dtype)))

    columns = [
        lists([sample.input_ids for sample in samples], np.int32),
        lists([sample.loss_mask for sample in samples], np.float32),
        pa.array([sample.source for sample in samples], pa.string()),
        pa.array([sample.line for sample in samples], pa.int64()),
        pa.array([float(sample.loss_mask.sum(dtype=np.float64)) for sample in samples], pa.float64()),
        pa.array([sample.row and json.dumps(sample.row, default=str) for sample in samples], pa.large_string()),
    ]
    return pa.record_batch(columns, schema=_SCHEMA)


@contextlib.contextmanager
def locked(key: str):
    """One process at a time renders what `key` stands for; the others wait and find it done."""
    try:
        cache_directory().mkdir(parents=True, exist_ok=True)
        handle = open(cache_directory() / f"{key}.lock", "w")
    except OSError as error:
        raise _no_cache(error) from error
    with handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def stored(key: str) -> tuple[StoredSamples, dict] | None:
    """The samples under a key and what was written beside them, if both are there."""
    facts = cache_directory() / f"{key}.json"
    path = facts.with_suffix(".arrow")
    if not (facts.is_file() and path.is_file()):
        return None
    return StoredSamples.of_file(path), json.loads(facts.read_text(encoding="utf-8"))


def store(key: str, rows: Iterable[Row], renderer: ChatRenderer, num_bytes: int) -> None:
    """Render into the cache under `key`, whole or not at all."""
    path = cache_directory() / f"{key}.arrow"
    staging = path.with_suffix(".partial")
    try:
        facts = render_all(rows, renderer, staging, num_bytes)
        staging.replace(path)
        staging.write_text(json.dumps(facts), "utf-8")
        staging.replace(path.with_suffix(".json"))
    except OSError as error:
        raise _no_cache(error) from error
    finally:
        staging.unlink(missing_ok=True)


def render_once(rows: Iterable[Row], renderer: ChatRenderer) -> tuple[StoredSamples, dict]:
    """Samples of this process alone, of what has no content to be known by: on disk under no name."""
    with tempfile.TemporaryDirectory(prefix="glm45_tune_") as holder:
        path = Path(holder) / "rows.arrow"
        facts = render_all(rows, renderer, path, 0)
        return StoredSamples.of_file(path), facts  # the memory map outlives the file's name
