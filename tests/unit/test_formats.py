"""Every format becomes the same messages, every kind of file the same rows."""

import gzip
import json
from pathlib import Path

import pytest

from glm45_tune.data.chat import ChatRenderer, load_tokenizer
from glm45_tune.data.formats import FORMATS, canonical, format_of
from glm45_tune.data.sources import RENDERERS, kind_of, load, read_source
from glm45_tune.errors import DataError, RecipeError
from glm45_tune.recipe import DataConfig, Recipe

EXAMPLES = Path(__file__).parents[2] / "data_examples"
Q, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
S = {"role": "system", "content": "s"}


@pytest.fixture(scope="module")
def tokenizer(checkpoints):
    return load_tokenizer(checkpoints["air"])


@pytest.fixture(scope="module")
def renderer(tokenizer):
    def make(**options):
        return ChatRenderer(tokenizer, DataConfig(train="x", **options))

    return make


CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
SAME = {
    "messages": ({"messages": [S, Q, A]}, [S, Q, A]),
    "messages with aliases": (
        {"messages": [{"role": "human", "content": "q"}, {"role": "gpt", "content": "a"}]},
        [Q, A],
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
        [S, Q, A],
    ),
    "sharegpt with a call": (
        {
            "conversations": [
                {"from": "human", "value": "q"},
                {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
                {"from": "observation", "value": "r"},
                {"from": "gpt", "value": "a"},
            ]
        },
        [Q, {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "r"}, A],
    ),
    "alpaca": ({"instruction": "q", "output": "a"}, [Q, A]),
    "alpaca with all": (
        {"instruction": "q", "input": "more", "output": "a", "system": "s", "history": [["q", "a"]]},
        [S, Q, A, {"role": "user", "content": "q\nmore"}, A],
    ),
    "prompt": ({"prompt": "q", "completion": "a"}, [Q, A]),
    "prompt of messages": ({"prompt": [S, Q], "completion": [A]}, [S, Q, A]),
    "query": ({"query": "q", "response": "a", "history": [["q", "a"]], "system": "s"}, [S, Q, A, Q, A]),
}


@pytest.mark.parametrize("name", SAME)
def test_a_format_becomes_messages(name):
    row, messages = SAME[name]
    assert canonical(row) == {"messages": messages}
    assert canonical({**row, "tools": [{"t": 1}], "enable_thinking": False, "id": 7}) == {
        "messages": messages,
        "tools": [{"t": 1}],
        "enable_thinking": False,
    }


@pytest.mark.parametrize("name", SAME)
def test_a_null_column_is_none(name):
    """Merged data sets give every row every column."""
    row, messages = SAME[name]
    assert canonical(dict.fromkeys(field for fields in FORMATS.values() for field in fields) | row) == {
        "messages": messages
    }


def test_a_named_format_is_held_to():
    with pytest.raises(DataError, match="conversations is missing, which format sharegpt needs"):
        canonical({"messages": [Q, A]}, "sharegpt")
    assert set(FORMATS) == set(DataConfig.model_fields["format"].annotation.__args__[0].__args__)


def test_every_format_has_an_example_that_renders(tokenizer):
    found = {format_of(row) for path in EXAMPLES.iterdir() for _, _, row in read_source(str(path))}
    assert found == set(FORMATS)
    for path in EXAMPLES.iterdir():
        options = DataConfig(train=str(path), format="rl" if path.stem == "rl_messages" else None)
        corpus = load(options.train, RENDERERS[kind_of(options)](tokenizer, options))
        assert not corpus.faults and len(corpus.samples) >= corpus.num_rows > 0, path


def test_every_kind_of_file_gives_the_same_samples(renderer, tmp_path):
    import pyarrow
    import pyarrow.parquet
    import zstandard

    rows = [{"instruction": f"问题{n}", "input": "", "output": "答" * (n + 1)} for n in range(5)]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "b.jsonl").write_text("\ufeff" + lines, encoding="utf-8")  # a byte order mark
    (tmp_path / "c.json").write_text(json.dumps(rows), encoding="utf-8")
    (tmp_path / "d.csv").write_text(
        "instruction,input,output\n" + "".join(f"{r['instruction']},,{r['output']}\n" for r in rows)
    )
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "e.parquet")
    (tmp_path / "f.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "g.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    expected = [sample.input_ids.tolist() for sample in load(str(tmp_path / "a.jsonl"), renderer()).samples]
    assert len(expected) == 5
    for path in sorted(tmp_path.iterdir()):
        corpus = load(str(path), renderer())
        assert not corpus.faults and [s.input_ids.tolist() for s in corpus.samples] == expected, path
    whole = load(str(tmp_path), renderer())
    assert len(whole.samples) == 35 and whole.counts["duplicates"] == 30
    some = load(f"{tmp_path / 'a.jsonl'}#3", renderer(), seed=1)
    assert [s.line for s in some.samples] == [
        s.line for s in load(f"{tmp_path / 'a.jsonl'}#3", renderer(), seed=1).samples
    ]
    assert len(some.samples) == 3
    with pytest.raises(DataError, match="#0: asks for 0 rows"):
        load(f"{path}#0", renderer())
    with pytest.raises(DataError, match="asks for 9 rows of 5"):
        load(f"{tmp_path / 'a.jsonl'}#9", renderer())


def test_nested_messages_survive_parquet(renderer, tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [
        {"messages": [Q, {**A, "reasoning_content": "think"}]},
        {
            "messages": [
                S,
                Q,
                {"role": "assistant", "content": "", "tool_calls": [CALL]},
                {"role": "tool", "content": "r"},
                A,
            ]
        },
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    a, b = (load(str(tmp_path / name), renderer()) for name in ("x.parquet", "x.jsonl"))
    assert not a.faults and [s.input_ids.tolist() for s in a.samples] == [s.input_ids.tolist() for s in b.samples]


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.xml", b"<x/>", "unknown kind of file"),
        ("a.jsonl.gz", b"not gzip", "cannot be read on"),
        ("a.jsonl", b'{"text": "\xff"}\n', "a.jsonl:1: not UTF-8"),
        ("a.json", b'{"text": "x"}', "a list of rows is expected"),
        ("a.parquet", b"nonsense", "cannot be read on"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(renderer, tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as fault:
        load(str(tmp_path / name), renderer()).check("error")
    assert words in str(fault.value) and name in str(fault.value)


def test_sources_with_weights_functions_and_iterables(renderer, tmp_path, monkeypatch):
    (tmp_path / "my_rows.py").write_text(
        "def rows():\n    for n in range(4):\n        yield {'prompt': f'q{n}', 'completion': f'a{n}'}\n    yield 'not a row'\n"
    )
    monkeypatch.chdir(tmp_path)
    corpus = load("my_rows:rows", renderer())
    assert len(corpus.samples) == 4 and [(f.file, f.line) for f in corpus.faults] == [("my_rows:rows", 5)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": f"t{n}"}) + "\n" for n in range(10)))
    options = DataConfig(train=["my_rows:rows", {"path": "x.jsonl", "weight": 2.5}])
    corpus = load(options.train, renderer(), seed=3)
    assert len(corpus.samples) == 4 + 25 and len({s.line for s in corpus.samples[4:24]}) == 10
    again = load(options.train, renderer(), seed=3)
    assert [s.line for s in again.samples] == [s.line for s in corpus.samples]
    for source, words in {
        "no_such:thing": "no such Python function",
        "nothing.jsonl": "no such file",
        "hf:": "names no data set",
    }.items():
        with pytest.raises(DataError, match=words):
            load(source, renderer())


def test_a_hub_dataset_is_read_by_the_real_client(renderer, tmp_path, monkeypatch):
    """datasets' own loader on a local repository in the hub's layout; the hub itself is out of a test's reach."""
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo" / "train.jsonl").write_text(
        json.dumps({"messages": [Q, A]}) + "\n" + json.dumps({"messages": [Q]})
    )
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    corpus = load("hf:./repo@train", renderer())
    assert len(corpus.samples) == 1 and corpus.faults[0].line == 2


def test_a_csv_row_with_a_loose_comma_is_bad(renderer, tmp_path):
    (tmp_path / "x.csv").write_text("instruction,output\nGreet,Hello, world\nGreet,Hello\n")
    corpus = load(str(tmp_path / "x.csv"), renderer())
    assert len(corpus.samples) == 1 and corpus.faults[0].line == 2 and "quote a cell" in corpus.faults[0].message


def test_calls_by_alias_are_one_turn(renderer):
    """tool_call as ms-swift writes it: calls that follow each other, and the text before them, are one assistant turn."""
    call = {"role": "tool_call", "content": '{"name": "f", "arguments": {"a": 1}}'}
    messages = [Q, {"role": "assistant", "content": "look"}, call, call, {"role": "tool_response", "content": "r"}, A]
    assert canonical({"messages": messages}) == {
        "messages": [
            Q,
            {"role": "assistant", "content": "look", "tool_calls": [CALL, CALL]},
            {"role": "tool", "content": "r"},
            A,
        ]
    }


def test_damage_in_a_line_leaves_the_other_lines(renderer, tmp_path):
    good = json.dumps({"text": "好"}, ensure_ascii=False).encode()
    (tmp_path / "x.jsonl").write_bytes(b"\n".join([good, b'{"text": "\xff"}', good]))
    corpus = load(str(tmp_path / "x.jsonl"), renderer())
    assert [sample.line for sample in corpus.samples] == [1, 3] and [fault.line for fault in corpus.faults] == [2]
    whole = gzip.compress(b"\n".join([good] * 5000), compresslevel=0)
    (tmp_path / "y.jsonl.gz").write_bytes(whole[:-3000])
    lines = read_source(str(tmp_path / "y.jsonl.gz"))
    assert [next(lines)[1] for _ in range(4000)] == list(range(1, 4001))
    with pytest.raises(DataError, match=r"y.jsonl.gz:4\d\d\d: the file cannot be read on"):
        list(lines)


def test_no_rows_and_data_source(checkpoints, cli, tmp_path):
    """An empty file is an error; `source` is another name of data.train."""
    (tmp_path / "x.jsonl").write_text("\n")
    code, out, err = cli("data", tmp_path / "x.jsonl", "--model", checkpoints["air"])
    assert (code, out) == (2, "") and "holds no rows" in err
    code, out, err = cli("data", tmp_path / "x.jsonl", "--model", checkpoints["air"], "--json")
    assert code == 2 and "holds no rows" in err and json.loads(out)["summary"]["rows"] == 0
    assert DataConfig.model_validate({"source": "my_module:my_function"}).train == "my_module:my_function"
    recipe = {"model": {"path": "m"}, "data": {"source": "a", "train": "b"}, "train": {"steps": 1}, "output_dir": "o"}
    with pytest.raises(RecipeError, match="data.source"):
        Recipe.from_dict(recipe)
