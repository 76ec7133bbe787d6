"""A stream gives the same rows to every rank and every resumed run, and holds a window at a time."""

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from glm45_tune.data.chat import load_tokenizer
from glm45_tune.data.sources import load
from glm45_tune.data.stream import Stream, load_stream
from glm45_tune.errors import DataError, RecipeError, UserError
from glm45_tune.recipe import DataConfig, Recipe

ROWS = 70


@pytest.fixture(scope="module")
def tokenizer(checkpoints):
    return load_tokenizer(checkpoints["air"])


@pytest.fixture
def folder(tmp_path):
    """70 rows of different lengths in three files of three kinds."""
    import pyarrow
    import pyarrow.parquet

    rows = [{"prompt": f"question {n}", "completion": f"answer {n} " * (1 + n % 7)} for n in range(ROWS)]
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.jsonl").write_text("\n\n".join(map(json.dumps, rows[:30])))  # with empty lines between
    (tmp_path / "set" / "b.json").write_text(json.dumps(rows[30:50]))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[50:]), tmp_path / "set" / "c.parquet")
    return tmp_path / "set"


def options(path, **changes) -> DataConfig:
    return DataConfig(**{"train": str(path), "streaming": True, "streaming_window": 20, "seq_length": 128, **changes})


def plain(rows):
    return [[(sample.source, sample.line, sample.input_ids.tolist()) for sample in row] for row in rows]


def test_an_epoch_of_the_stream_is_the_data_and_rows_are_full(tokenizer, folder):
    """With a window of all rows the first window holds every sample once, packed within seq_length."""
    stream = Stream(options(folder, streaming_window=ROWS), tokenizer, 1)
    taken = []
    while stream.seen.num_rows in (0, ROWS):
        taken += stream.rows(1)
    taken.pop()  # the second window's first
    found = sorted(sample for row in plain(taken) for sample in row)
    from glm45_tune.data.chat import ChatRenderer

    whole = load(str(folder), ChatRenderer(tokenizer, options(folder)))
    assert found == sorted(sample for row in plain([whole.samples]) for sample in row)
    lengths = [sum(len(sample.input_ids) for sample in row) for row in taken]
    assert max(lengths) <= 128 and sum(lengths) / (len(lengths) * 128) > 0.9


def test_a_stream_goes_on_exactly_where_its_cursor_was_taken(tokenizer, folder):
    """At every row of two epochs: what follows a resumed cursor is what followed it; the cursor is plain JSON."""
    first = Stream(options(folder), tokenizer, 3)
    first.check()
    cursors, rows = [], []
    for _ in range(60):
        cursors.append(json.dumps(first.cursor))
        rows += plain(first.rows(1))
    assert first.seen.num_rows >= 2 * ROWS
    for place in range(0, 60, 7):
        again = Stream(options(folder), tokenizer, 3)
        again.seek(json.loads(cursors[place]))
        assert plain(again.rows(60 - place)) == rows[place:]
        assert again.seen == first.seen and again.cursor == first.cursor
    assert plain(Stream(options(folder), tokenizer, 4).rows(60)) != rows


def test_a_source_that_ends_begins_anew_and_sees_every_row_each_time(tokenizer, folder):
    """Twin of an exact epoch: over three epochs each row comes three times, whatever the order of the files."""
    stream = Stream(options(folder, packing=False, streaming_window=7), tokenizer, 1)
    seen = [(row[0].source, row[0].line) for row in stream.rows(3 * ROWS)]
    assert len(set(seen)) == ROWS and {seen.count(place) for place in set(seen)} == {3}
    assert seen[:ROWS] != seen[ROWS : 2 * ROWS]


def test_sources_are_mixed_by_weight(tokenizer, folder, tmp_path):
    (tmp_path / "other.jsonl").write_text(json.dumps({"text": "other"}))
    stream = Stream(
        options(folder, train=[{"path": str(tmp_path / "other.jsonl"), "weight": 3}, str(folder)], packing=False),
        tokenizer,
        1,
    )
    share = sum(row[0].source.endswith("other.jsonl") for row in stream.rows(1000)) / 1000
    assert 0.7 < share < 0.8


def test_bad_rows_stop_the_stream_or_are_counted(tokenizer, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"prompt": "q", "completion": "a"} if n != 3 else {}) + "\n" for n in range(10)))
    with pytest.raises(DataError, match="x.jsonl:4: "):
        load_stream(options(path), tokenizer)
    stream, _ = load_stream(options(path, on_bad_row="skip"), tokenizer)
    assert stream.seen.num_rows == 20 and stream.seen.counts["bad rows skipped"] == 2
    path.write_text("{}\n")
    with pytest.raises(DataError, match="none can be trained"):
        load_stream(options(path, on_bad_row="skip"), tokenizer)
    path.write_text("")
    with pytest.raises(DataError, match="holds no rows"):
        load_stream(options(path), tokenizer)


def test_workers_give_what_one_process_gives(tokenizer, folder, monkeypatch):
    alone = plain(Stream(options(folder), tokenizer, 1).rows(30))
    monkeypatch.setattr(Stream, "_num_workers", lambda self: 1)
    stream = Stream(options(folder), tokenizer, 1)
    assert plain(stream.rows(30)) == alone
    stream.close()


def test_functions_and_hub_data_stream(tokenizer, folder, tmp_path, monkeypatch):
    (tmp_path / "stream_rows.py").write_text(
        "def rows():\n    n = 0\n    while True:\n        yield {'text': f'row {n}'}\n        n += 1\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Stream, "_num_workers", lambda self: 0)
    stream = Stream(options("stream_rows:rows"), tokenizer, 1)
    rows = plain(stream.rows(30))
    middle = Stream(options("stream_rows:rows"), tokenizer, 1)
    middle.rows(11)
    again = Stream(options("stream_rows:rows"), tokenizer, 1)
    again.seek(json.loads(json.dumps(middle.cursor)))
    assert plain(again.rows(19)) == rows[11:]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo" / "train.jsonl").write_text("".join(json.dumps({"text": f"t{n}"}) + "\n" for n in range(9)))
    lines = [
        row[0].line for row in Stream(options("hf:./repo", packing=False, streaming_window=9), tokenizer, 1).rows(18)
    ]
    assert sorted(lines) == sorted(2 * list(range(1, 10)))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"data": {"eval_ratio": 0.1}}, "eval instead of eval_ratio"),
        ({"data": {"train": "x.jsonl#5"}}, "cannot take a sample"),
        ({"train": {"epochs": 1}}, "data.streaming needs train.steps"),
    ],
)
def test_what_streaming_cannot_do_is_said(changes, words):
    recipe = {"model": {"path": "x"}, "output_dir": "y"}
    recipe["data"] = {"train": "x", "streaming": True} | changes.get("data", {})
    recipe["train"] = changes.get("train", {"steps": 3})
    with pytest.raises(RecipeError, match=words):
        Recipe.from_dict(recipe)


def test_a_run_goes_on_as_it_began(tmp_path):
    """A checkpoint with a cursor is no start for a run that does not stream, and the other way round."""
    from glm45_tune.training.sft import Supervised

    for stream, state in ((None, {"cursor": {}}), (object(), {})):
        with pytest.raises(UserError, match="data.streaming was changed"):
            Supervised(SimpleNamespace(run=tmp_path, stream=stream), None).resume(state)


def test_a_worker_ends_when_its_rank_is_killed(tokenizer, tmp_path):
    """kill −9 of a process that renders by workers leaves none of them behind."""
    code = (
        "import os, sys, time\nfrom glm45_tune.data.store import rendered\n"
        "from glm45_tune.data.chat import ChatRenderer, load_tokenizer\nfrom glm45_tune.recipe import DataConfig\n"
        "if __name__ == '__main__':\n"
        "    renderer = ChatRenderer(load_tokenizer(sys.argv[1]), DataConfig(train='x'))\n"
        "    made = rendered(iter([[('x', 1, {'text': 'a'})]] * 9), renderer, 1)\n"
        "    next(made)\n    print('ready', flush=True)\n    time.sleep(60)\n"
    )
    (tmp_path / "work.py").write_text(code)
    started = subprocess.Popen(
        [sys.executable, str(tmp_path / "work.py"), tokenizer.name_or_path], stdout=subprocess.PIPE, text=True
    )
    assert started.stdout.readline() == "ready\n"
    children = subprocess.run(["pgrep", "-P", str(started.pid)], capture_output=True, text=True).stdout.split()
    assert children
    started.kill()
    started.wait()
    started.stdout.close()
    deadline = time.monotonic() + 20
    while any(_runs(int(child)) for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _runs(pid: int) -> bool:
    try:
        return "zombie" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_a_function_that_gives_the_same_iterator_twice_is_told_so(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "spent_rows.py").write_text("once = iter([{'text': 'a'}] * 9)\ndef rows():\n    return once\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(DataError, match="spent_rows:rows: gave rows the first time and none when it was read again"):
        load_stream(options("spent_rows:rows"), tokenizer)
