"""Rendered samples on disk as Arrow, memory-mapped: rendered once by all cores, read by every rank, found again next time."""

import contextlib
import hashlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console

from glm45_tune.data.chat import ChatRenderer, Sample
from glm45_tune.errors import DataError
from glm45_tune.recipe import DataConfig

_SCHEMA = pa.schema(
    [
        ("input_ids", pa.large_list(pa.int32())),
        ("loss_mask", pa.large_list(pa.float32())),
        ("source", pa.string()),
        ("line", pa.int64()),
        ("trained", pa.float64()),  # sum of the loss mask
        ("row", pa.large_string()),  # of an RL prompt, as JSON; what JSON does not know (dates, say) as text
    ]
)
CHUNK = 1000  # rows a worker renders at a time
# below this many bytes of sources, starting workers takes longer than rendering
_WORTH_WORKERS = 8 << 20

Row = tuple[str, int, "dict | DataError"]
# (file, line, field, message) of each bad row
Faults = list[tuple[str, int, str | None, str]]


def cache_directory() -> Path:
    """GLM45_TUNE_CACHE, or ~/.cache/glm45_tune."""
    return Path(os.environ.get("GLM45_TUNE_CACHE", Path.home() / ".cache" / "glm45_tune")) / "data"


class StoredSamples(Sequence):
    """Samples of an Arrow file, read from the memory map when they are asked for."""

    def __init__(self, path: Path):
        with pa.memory_map(str(path)) as source:
            table = pa.ipc.open_file(source).read_all()
        self._columns = [table.column(name) for name in _SCHEMA.names]

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

    def origins(self) -> list[tuple[str, int]]:
        """(source, line) of every sample."""
        return list(zip(self._columns[2].to_pylist(), self._columns[3].to_pylist()))


def key_of(files: list[Path], options: DataConfig, tokenizer, more: str) -> str:
    """Changes with the bytes of the files, the tokenizer, its template, and every option that shapes a sample."""
    digest = hashlib.sha256(f"5 {options.model_dump_json(exclude={'train', 'eval'})} {more}".encode())
    digest.update(tokenizer.chat_template.encode() + tokenizer.backend_tokenizer.to_str().encode())
    for file in files:
        digest.update(f"{file}\0".encode())
        with open(file, "rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()


def render_all(rows: Iterable[Row], renderer: ChatRenderer, path: Path, num_bytes: int) -> tuple[Faults, Counter, int]:
    """Render rows into an Arrow file at `path`, in order. Returns bad rows, counts by reason, and the number of rows."""
    faults, counts, seen, num_rows = [], Counter(), set(), 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, _SCHEMA) as writer, _progress() as tick:
        for batch, bad, reasons, keys, size in _rendered(rows, renderer, num_bytes):
            writer.write_batch(batch)
            faults += bad
            counts += reasons
            counts["duplicates"] += sum(key in seen for key in keys) + len(keys) - len(set(keys))
            seen.update(keys)
            num_rows += size
            tick(num_rows)
    return faults, +counts, num_rows


@contextlib.contextmanager
def _progress():
    """A line with the rows done, on a terminal; yields a function that takes their number."""
    console = Console(stderr=True)
    with console.status("rendering data") as status:
        yield lambda count: status.update(f"rendering data: {count:,} rows")


def _rendered(rows: Iterable[Row], renderer: ChatRenderer, num_bytes: int) -> Iterator[tuple]:
    chunks = iter(lambda source=iter(rows): list(islice(source, CHUNK)), [])
    workers = os.cpu_count() or 1
    if num_bytes < _WORTH_WORKERS or workers == 1:
        yield from (_render_chunk(chunk, renderer) for chunk in chunks)
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (renderer,)) as pool:
        waiting = [pool.submit(_in_worker, chunk) for chunk in islice(chunks, 2 * workers)]
        while waiting:
            yield waiting.pop(0).result()
            waiting += [pool.submit(_in_worker, chunk) for chunk in islice(chunks, 1)]


_renderer: ChatRenderer


def _start_worker(renderer: ChatRenderer) -> None:
    global _renderer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _renderer = renderer


def _in_worker(chunk: list[Row]) -> tuple:
    return _render_chunk(chunk, _renderer)


def _render_chunk(chunk: list[Row], renderer: ChatRenderer) -> tuple:
    samples, faults, counts, keys = [], [], Counter(), []
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
        digest = hashlib.blake2b(digest_size=12)
        for sample in rendering.samples:
            digest.update(sample.input_ids.tobytes())
        keys.append(digest.digest())
    return _batch(samples), faults, counts, keys, len(chunk)


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


def stored(key: str) -> tuple[Path, dict] | None:
    """The Arrow file under a key and what was written beside it, if both are there."""
    facts = cache_directory() / f"{key}.json"
    path = facts.with_suffix(".arrow")
    if not (facts.is_file() and path.is_file()):
        return None
    return path, json.loads(facts.read_text(encoding="utf-8"))


def store(key: str | None, rows: Iterable[Row], renderer: ChatRenderer, num_bytes: int) -> tuple[Path, dict]:
    """Render into the cache under `key`, or into a file of this process alone when there is none. Whole or not at all."""
    directory = cache_directory() if key else Path(tempfile.mkdtemp(prefix="glm45_tune_"))
    staging = directory / f"{key or 'rows'}.{os.getpid()}.partial"
    faults, counts, num_rows = render_all(rows, renderer, staging, num_bytes)
    facts = {"faults": faults, "counts": counts, "num_rows": num_rows}
    path = directory / f"{key or 'rows'}.arrow"
    staging.replace(path)
    beside = staging.with_suffix(".json.partial")
    beside.write_text(json.dumps(facts, ensure_ascii=False), encoding="utf-8")
    beside.replace(path.with_suffix(".json"))
    return path, facts
