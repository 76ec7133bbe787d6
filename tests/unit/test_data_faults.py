"""What is wrong with data is said, in a sentence that names the place: no row is lost, changed or trained in silence."""

import csv
import datetime
import gzip
import json
import random
import re
import subprocess
import sys

import numpy as np
import pytest
import yaml
import zstandard

from glm45_tune.data.chat import ChatRenderer, load_tokenizer
from glm45_tune.data.files import read_rows
from glm45_tune.data.formats import canonical
from glm45_tune.data.sources import RENDERERS, load
from glm45_tune.data.store import cache_directory
from glm45_tune.data.stream import Stream
from glm45_tune.errors import DataError, RecipeError
from glm45_tune.recipe import DataConfig, Recipe

Q, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALL = {"role": "function_call", "content": '{"name": "f", "arguments": {}}'}


@pytest.fixture(scope="module")
def tokenizer(checkpoints):
    return load_tokenizer(checkpoints["air"])


@pytest.fixture
def fault_of(tokenizer):
    """What is said of a row, as (field, sentence)."""

    def fault(row, kind="sft", **options):
        with pytest.raises(DataError) as found:
            RENDERERS[kind](tokenizer, DataConfig(train="x", **options)).render(row, "x", 1)
        return found.value.field, str(found.value)

    return fault


def packed(rows: int) -> bytes:
    draw = random.Random(0)
    return "".join(json.dumps({"text": draw.randbytes(60).hex()}) + "\n" for _ in range(rows)).encode()


@pytest.mark.parametrize("name", ["x.jsonl.zst", "x.txt.zst", "x.csv.zst", "x.jsonl.gz"])
@pytest.mark.parametrize("share", [0.001, 0.3, 0.6, 0.999])
def test_a_file_that_was_cut_off_is_an_error_whatever_on_bad_row_says(tokenizer, tmp_path, name, share):
    whole = packed(5000)
    whole = zstandard.compress(whole) if name.endswith("zst") else gzip.compress(whole)
    (tmp_path / name).write_bytes(whole[: int(len(whole) * share)])
    before = set(cache_directory().glob("*.partial"))
    with pytest.raises(DataError, match=rf"{name}:\d+: the file cannot be read on: Compressed file ended before"):
        load(str(tmp_path / name), ChatRenderer(tokenizer, DataConfig(train="x", on_bad_row="skip", seq_length=10**7)))
    assert set(cache_directory().glob("*.partial")) == before
    if name == "x.jsonl.zst" and share > 0.1:
        stream = Stream(DataConfig(train=str(tmp_path / name), on_bad_row="skip", streaming=True), tokenizer, 1)
        with pytest.raises(DataError, match="the file cannot be read on"):
            stream.check()


def test_frames_one_behind_the_other_are_one_file(tmp_path):
    lines = packed(3000)
    pack, path = zstandard.ZstdCompressor().compress, tmp_path / "x.jsonl.zst"
    skipped = b"\x50\x2a\x4d\x18\x03\x00\x00\x00abc"  # a frame that holds no data, by zstandard's format
    path.write_bytes(pack(lines[:100_000]) + pack(b"") + skipped + pack(lines[100_000:]))
    assert [row for _, row in read_rows(path)] == [json.loads(line) for line in lines.splitlines()]
    path.write_bytes(pack(b" " * 10**7 + b"\n" + lines))
    assert len(list(read_rows(path))) == 3000


@pytest.mark.parametrize(
    "name, content", [("x.json", '[{"text": "a"}, {"te'), ("x.json", '{"a": 1}'), ("x.csv", "text,a,text\nb,c,d\n")]
)
def test_a_file_that_is_not_what_its_name_says_is_an_error_under_skip(tokenizer, tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=f"{name}:1: the file cannot be read on: .*on_bad_row"):
        load(str(tmp_path / name), ChatRenderer(tokenizer, DataConfig(train="x", on_bad_row="skip")))


def test_a_file_that_cannot_be_read_has_a_document_for_machines(checkpoints, tmp_path, cli):
    """With file and line of where it ends; the sentence and the exit code stay."""
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress(packed(5000))[:-2000])
    code, out, err = cli("data", path, "--model", checkpoints["air"], "--json")
    found = json.loads(out)
    assert code == 2 and "cannot be read on" in err and found["summary"] == {} and found["samples"] == []
    (fault,) = found["errors"]
    assert (
        fault["file"] == str(path)
        and fault["line"] > 1
        and fault["field"] is None
        and "cannot be read on" in fault["message"]
    )


def test_a_source_that_is_not_there_has_a_document_for_machines(checkpoints, tmp_path, cli):
    code, out, _ = cli("data", tmp_path / "none.jsonl", "--model", checkpoints["air"], "--json")
    assert code == 2 and "no such file" in json.loads(out)["errors"][0]["message"]


def test_a_csv_cell_is_text_unless_its_column_and_content_are_messages(tokenizer, tmp_path):
    def read(*cells):
        with open(tmp_path / "x.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(cells)
        return [row for _, row in read_rows(tmp_path / "x.csv")]

    for answer in (
        '{"a": 1}',
        "[1, 2]",
        "[]",
        '[{"a": 1}]',
        '{"role": "admin"}',
        '{"from": "Paris", "to": "Rome"}',
        "[x",
    ):
        assert read(["instruction", "output"], ["q", answer]) == [{"instruction": "q", "output": answer}]
        assert read(["query", "response"], [answer, answer]) == [{"query": answer, "response": answer}]
        assert read(["text"], [answer]) == [{"text": answer}]
    (row,) = read(["prompt", "chosen", "rejected"], [json.dumps([Q]), json.dumps(A), json.dumps([A])])
    assert row == {"prompt": [Q], "chosen": A, "rejected": [A]}
    (row,) = read(["messages", "tools", "enable_thinking"], [json.dumps([Q, A]), "[]", "False"])
    assert row == {"messages": [Q, A], "tools": [], "enable_thinking": False}
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    assert read(["conversations", "x"], [json.dumps(turns), ""]) == [{"conversations": turns}]
    rows = read(["prompt", "completion", "label"], ["q", "a", "TRUE"], ["q", "a", "false"], ["q", "a", "1"])
    assert [row["label"] for row in rows] == [True, False, "1"]


@pytest.mark.parametrize("token", ["<|endoftext|>", "[gMASK]", "<sop>", "[gMASK]<sop>", "<|user|>"])
def test_a_control_token_in_a_conversation_is_refused(fault_of, tokenizer, token):
    said, held = "one of the control tokens .*" + re.escape(token[:7]), {"role": "user", "content": f"a{token}b"}
    for messages, tools in (([Q, {**A, "content": f"a{token}"}], []), ([held, A], []), ([Q, A], [{"name": token}])):
        assert re.search(said, fault_of({"messages": messages, "tools": tools})[1])
    assert re.search(said, fault_of({"prompt": [held]}, "rl")[1])
    assert re.search(said, fault_of({"prompt": "q", "chosen": f"a{token}", "rejected": "b"}, "preference")[1])
    assert re.search(said, fault_of({"prompt": "q", "completion": token, "label": True}, "labelled")[1])
    assert ChatRenderer(tokenizer, DataConfig(train="x")).render({"text": f"a{token}b"}, "x", 1).samples


FUNCTIONS = """
number = 5
def at_once(): raise KeyError("k")
def midway():
    yield {"text": "a"}
    yield {"text": "b"}
    raise ValueError("broken pipe")
def leaves_at_once(): raise SystemExit(3)
def leaves_midway():
    yield {"text": "a"}
    raise SystemExit(3)
def wants(path): return []
def nothing(): pass
def one(): return 1
async def waits(): return []
async def waits_and_yields(): yield {}
"""


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "source, words",
    [
        ("faulty_rows:at_once", r"faulty_rows:at_once: .*raised KeyError\('k'\)"),
        ("faulty_rows:midway", r"faulty_rows:midway:3: .*ValueError\('broken pipe'\)"),
        ("faulty_rows:leaves_at_once", r"faulty_rows:leaves_at_once: .*raised SystemExit\(3\)"),
        ("faulty_rows:leaves_midway", r"faulty_rows:leaves_midway:2: this row cannot be had: SystemExit\(3\)"),
        ("faulty_rows:wants", "faulty_rows:wants: .*TypeError.*missing 1 required"),
        ("faulty_rows:nothing", "returned NoneType; rows are expected"),
        ("faulty_rows:one", "returned int; rows are expected"),
        ("faulty_rows:waits", "is an async function"),
        ("faulty_rows:waits_and_yields", "is an async function"),
        ("faulty_rows:number", "is int; a plain function"),
        ("faulty_rows:missing", "no such Python function: faulty_rows has no missing"),
        ("no_such_rows:f", "no such Python function: No module named"),
        ("faulty_syntax:f", "module faulty_syntax cannot be imported: SyntaxError"),
        ("faulty_import:f", r"module faulty_import cannot be imported: RuntimeError\('at import'\)"),
        ("faulty_needs:f", "module faulty_needs cannot be imported: ModuleNotFoundError.*no_such_dependency"),
        ("faulty_exit:f", "module faulty_exit cannot be imported: SystemExit"),
    ],
)
def test_a_function_that_gives_no_rows_says_why(tokenizer, tmp_path, monkeypatch, source, words, streaming):
    (tmp_path / "faulty_rows.py").write_text(FUNCTIONS)
    (tmp_path / "faulty_syntax.py").write_text("def f(:\n")
    (tmp_path / "faulty_import.py").write_text("raise RuntimeError('at import')\n")
    (tmp_path / "faulty_needs.py").write_text("import no_such_dependency\n")
    (tmp_path / "faulty_exit.py").write_text("raise SystemExit(0)\n")
    monkeypatch.syspath_prepend(tmp_path)
    options = DataConfig(train=source, on_bad_row="skip", streaming=streaming)
    with pytest.raises(DataError, match=words):
        Stream(options, tokenizer, 1).check() if streaming else load(source, ChatRenderer(tokenizer, options))


LOOP: dict = {"messages": [Q, A]}
LOOP["self"] = LOOP


@pytest.mark.parametrize(
    "row, words",
    [
        ({"messages": [Q, A], "when": datetime.date(2020, 1, 1)}, "not JSON serializable"),
        ({"messages": [Q, {**A, "loss_scale": np.float32(0.5)}]}, "float32 is not JSON serializable"),
        (LOOP, "Circular reference"),
        ("x", "is str; a dict is expected"),
        ({"messages": [Q, {**A, "content": "\ud800"}]}, "no valid Unicode"),
        ({"messages": [Q, {**A, "role": "\ud800"}]}, r"messages\[1\].role is"),
    ],
)
def test_a_bad_row_given_to_train_is_named_by_its_number(checkpoints, make_recipe, tmp_path, row, words):
    from glm45_tune.training.launch import train

    recipe = Recipe.from_dict(make_recipe(checkpoints["air"], "x", tmp_path / "run"))
    with pytest.raises(DataError, match=f"^row 2 of the rows given: .*{words}"):
        train(recipe, [{"messages": [Q, A], "id": "\ud800"}, row])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "row",
    [{"messages": [{"role": "\ud800", "content": "q"}, A]}, {"prompt": "q", "answer": "\ud800"}],
    ids=["role", "column"],
)
@pytest.mark.parametrize("more", [[], ["--json"]])
def test_half_a_surrogate_pair_is_shown(checkpoints, tmp_path, row, more):
    """By a process of its own: pytest's stdout is not one that refuses it."""
    (tmp_path / "x.jsonl").write_text(json.dumps(row))
    command = [sys.executable, "-m", "glm45_tune", "data", tmp_path / "x.jsonl", "--model", checkpoints["air"], *more]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == (2 if "messages" in row else 0) and "Traceback" not in ended.stderr, ended.stderr
    assert "\\ud800" in ended.stdout
    if more:
        document = json.loads(ended.stdout)
        assert "\ud800" in (
            document["errors"][0]["message"] if "messages" in row else document["samples"][0]["row"]["answer"]
        )


def test_half_a_surrogate_pair_in_a_question_is_a_bad_row(tmp_path):
    from glm45_tune.chat.evaluate import load_questions

    (tmp_path / "x.jsonl").write_text(json.dumps({"messages": [{**Q, "content": "\ud800"}, A]}))
    with pytest.raises(DataError, match="x.jsonl:1: .*surrogate"):
        load_questions(str(tmp_path / "x.jsonl"))


@pytest.mark.parametrize("field", ["train", "eval"])
def test_no_source_is_an_error(field):
    recipe = {"model": {"path": "m"}, "data": {"train": "a", field: []}, "train": {"steps": 1}, "output_dir": "o"}
    with pytest.raises(RecipeError, match=f"data.{field}: is empty; at least one source"):
        Recipe.from_dict(yaml.safe_load(yaml.safe_dump(recipe)))


def test_empty_tools_are_none(tokenizer):
    renderer = ChatRenderer(tokenizer, DataConfig(train="x"))
    samples = [
        renderer.render({"messages": [Q, A], "tools": tools}, "x", 1).samples for tools in ("", " ", "[]", "null", None)
    ]
    assert {tuple(sample.input_ids.tolist()) for (sample,) in samples} == {tuple(samples[-1][0].input_ids.tolist())}


def test_a_field_behind_calls_that_were_joined_is_named_by_its_own_number(fault_of):
    bad = {"role": "user", "content": None}
    messages = [Q, A, CALL, CALL, {"role": "tool", "content": "r"}, bad]
    assert fault_of({"messages": messages})[0] == "messages[5].content"
    turns = [{"from": message["role"], "value": message["content"]} for message in messages]
    assert fault_of({"conversations": turns})[0] == "conversations[5].value"
    assert fault_of({"conversations": turns, "system": "s"})[0] == "conversations[5].value"
    other = {"prompt": "q", "completion": [{"role": "bot"}], "messages": 5}
    assert fault_of(other, format="prompt")[0] == "messages[1].role"


def test_a_call_that_calls_nothing_is_an_error(fault_of):
    assert "function_call holds no call" in fault_of({"messages": [Q, {"role": "function_call", "content": "[]"}]})[1]


@pytest.mark.parametrize("row", [{"query": None, "response": "a"}, {"instruction": None, "output": "a"}])
def test_no_question_is_an_error(fault_of, row):
    field, said = fault_of(row)
    assert field == next(iter(row)) and "is null; a question is expected" in said
    assert canonical({"instruction": None, "input": "q", "output": "a"}) == {"messages": [Q, A]}


def test_answers_that_render_alike_are_no_pair(fault_of):
    assert (
        "are the same to the model" in fault_of({"prompt": "q", "chosen": "same", "rejected": "same "}, "preference")[1]
    )


def test_what_looks_like_markup_in_rows_and_names_is_shown_as_it_is(checkpoints, tmp_path, cli, monkeypatch):
    path = tmp_path / "[/a]" / "[set1]{0}.jsonl"
    path.parent.mkdir(parents=True)
    rows = [{"messages": [Q, A]}] * 99 + [
        {"messages": [{"role": role, "content": "q"}]} for role in ("[bold]u", "[/x]")
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setenv("COLUMNS", "500")
    for forced in (False, True):  # a terminal has a bar, too
        if forced:
            monkeypatch.setenv("FORCE_COLOR", "1")
            monkeypatch.setenv("GLM45_TUNE_CACHE", str(tmp_path / "cache"))
        code, out, err = cli("data", path, "--model", checkpoints["air"])
        out = re.sub(r"\x1b\[[0-9;]*m", "", out)
        assert code == 2 and "2 of 101 rows are bad" in err and "Traceback" not in err
        assert f'{path}:100: messages[0].role is "[bold]u"' in out and f'{path}:101: messages[0].role is "[/x]"' in out
        assert f"{path}:1  (trained, context)" in out.replace("⟦", "").replace("⟧", "")
