"""The files of a run directory: whatever is damaged is one sentence, and nothing whole is lost with it."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from glm45_tune.errors import UserError
from glm45_tune.hub.evaluation import check_run
from glm45_tune.report import page
from glm45_tune.run import files
from glm45_tune.run.scratch import sweep
from glm45_tune.system.files import append_whole, write_whole
from glm45_tune.training import trackers

OTHERS = (
    b"",
    b"null",
    b"[]",
    b"{}",
    b"7",
    b'"text"',
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"load": [[1], [1, 2]]}',
    b"[{}]\n",
)


@pytest.fixture
def run(lora_run, tmp_path):
    """A copy of a small run with every file that a reader knows."""
    copy = tmp_path / "run"
    shutil.copytree(Path(lora_run), copy)
    score = {"num_questions": 1, "exact": 1.0, "non_thinking": 1.0, "valid_calls": None, "perplexity": 2.0}
    entry = {"data": "a", "sha256": None, "step": 4, "think": None, "base": score, "tuned": score}
    (copy / files.EVALUATION_FILE).write_text(json.dumps([entry]))
    return copy


def damages(whole: bytes, chance: random.Random) -> list[bytes | None]:
    cuts = [whole[: chance.randrange(len(whole) + 1)] for _ in range(6)]
    flips = []
    for _ in range(3):
        place = chance.randrange(max(len(whole), 1))
        flips.append(whole[:place] + bytes([chance.randrange(256)]) + whole[place + 1 :])
    return [None, *OTHERS, *cuts, *flips, whole.replace(b"1", b"NaN"), whole.replace(b":", b': "x", "y":')]


NAMES = [value for name, value in vars(files).items() if name.endswith("_FILE")]


@pytest.mark.parametrize("name", sorted(set(NAMES) - {files.LOCK_FILE, files.REPORT_FILE, files.TRACKER_FILE}))
def test_a_damaged_file_is_a_sentence_or_left_out_by_every_reader(run, name, checkpoints):
    from glm45_tune.hub.card import Card
    from glm45_tune.spec import load_spec

    chance, path = random.Random(name), run / name
    whole = path.read_bytes() if path.exists() else b'{"step": 1, "load": [[1.0]]}'
    spec = load_spec(checkpoints["air"])
    readers = [
        lambda: page.write(run),
        lambda: check_run(run, {}),
        lambda: Card(run, files.read_facts(run), 4, spec, True),
        lambda: files.kept_until(path, 2),
    ]
    for damage in damages(whole, chance):
        path.unlink(missing_ok=True)
        if damage is not None:
            path.write_bytes(damage)
        for reader in readers:
            try:
                reader()
            except UserError as error:
                assert str(error).strip()


def test_only_a_line_feed_ends_a_line(tmp_path):
    text = "a\u2028b\u2029c\u0085d"
    lines = [{"step": step, "prompt": text, "text": text, "wanted": None} for step in (1, 2)]
    (tmp_path / files.SAMPLES_FILE).write_text("".join(json.dumps(x, ensure_ascii=False) + "\n" for x in lines))
    assert files.read_samples(tmp_path) == (lines, [])
    kept = files.kept_until(tmp_path / files.SAMPLES_FILE, 1)
    assert [json.loads(line) for line in kept.split(b"\n") if line] == lines[:1]


def test_a_resumed_run_keeps_the_damaged_line_before_a_whole_one(tmp_path):
    path = tmp_path / files.METRICS_FILE
    path.write_bytes(b'{"step": 1}\n{"st\n{"step": 2}\n{"step": 3}\n{"ste')
    assert files.kept_until(path, 2) == b'{"step": 1}\n{"st\n{"step": 2}\n'


def test_a_text_cannot_put_parts_into_the_page(run):
    evil = "@@DATA@@ @@RECIPE@@ </script><script>bad()</script>"
    line = {"step": 1, "prompt": evil, "text": evil, "wanted": evil}
    (run / files.SAMPLES_FILE).write_text(json.dumps(line) + "\n{broken\n")
    (run / files.LOAD_FILE).write_text('{"step": 1, "load": [[NaN, 1.0]]}')
    text = page.write(run).read_text(encoding="utf-8")
    assert text.count("@@DATA@@") == 3 and "<script>bad" not in text
    assert "samples.jsonl: line 2 is not whole JSON" in text and "default-src &#x27;none" not in text
    assert "Content-Security-Policy" in text and "default-src 'none'" in text
    document = text.split('<script id="data" type="application/json">')[1].split("</script>")[0]
    assert json.loads(document, parse_constant=pytest.fail)["experts"]["values"] == [[None, 1.0]]


@pytest.mark.parametrize("there", [b"", b"<!doc", b"<!DOCTYPE html><p>half"])
def test_a_report_replaces_a_broken_page_and_no_other_file(run, there):
    (run / files.REPORT_FILE).write_bytes(there)
    page.write(run)
    (run / files.REPORT_FILE).write_bytes(b"my notes")
    with pytest.raises(UserError, match="not replaced"):
        page.write(run)


def no_room(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_write_that_fails_leaves_the_earlier_file_and_nothing_beside_it(tmp_path, monkeypatch):
    path = tmp_path / "a"
    write_whole(path, "before")
    monkeypatch.setattr(os, "fsync", no_room)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, "after")
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_a_report_on_a_full_disk_leaves_no_page(run, monkeypatch):
    monkeypatch.setattr(os, "fsync", no_room)
    with pytest.raises(UserError, match="No space"):
        page.write(run)
    assert not (run / files.REPORT_FILE).exists()


def test_a_line_added_to_a_full_device_is_an_error(tmp_path):
    with pytest.raises(OSError):
        append_whole(Path("/dev/full"), "line\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_evaluation_leaves_nothing_after_the_next_start(tmp_path, number):
    code = (
        "import sys, time, pathlib\nfrom glm45_tune.run.scratch import scratch\n"
        "with scratch(pathlib.Path(sys.argv[1])) as holder:\n"
        "    (holder / 'base').mkdir()\n    print('ready', flush=True)\n    time.sleep(60)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"ready\n"
    sweep(tmp_path)
    assert len(list(tmp_path.glob(".eval_*/base"))) == 1, "a living evaluation keeps its files"
    child.send_signal(number)
    child.wait(30)
    child.stdout.close()
    if number == signal.SIGKILL:
        assert list(tmp_path.iterdir())
        sweep(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_trackers_id_is_the_runs_own_and_stays(tmp_path):
    first, second = tmp_path / "a" / "air", tmp_path / "b" / "air"
    for run in (first, second):
        run.mkdir(parents=True)
    found = trackers.tracker_id(first, 0)
    assert found == trackers.tracker_id(first, 4) != trackers.tracker_id(second, 0)
    (first / files.TRACKER_FILE).unlink()
    (first / "wandb").mkdir()
    assert trackers.tracker_id(first, 4) == "air", "a run of an earlier version goes on under its name"


def test_a_tracker_that_fails_is_said_once_and_training_goes_on(capsys):
    def send(client, step, values):
        raise RuntimeError("no route\nmore")

    tracker = trackers.Tracker("wandb", object, send, "finish")
    for step in range(3):
        tracker.write(step, {})
    tracker.close()
    assert capsys.readouterr().err.count("no route. Training goes on") == 1


@pytest.mark.parametrize("arguments", [["--help"], ["plan", "--help"], ["plan", "/nowhere.yaml"]])
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_full_output_is_no_traceback(arguments, stream):
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "glm45_tune", *arguments]
        ended = subprocess.run(command, **(streams | {stream: full}), text=True)
    failed = "--help" not in arguments
    assert ended.returncode == (2 if failed else stream == "stdout")
    assert "Traceback" not in (ended.stderr or "")
    assert stream == "stderr" or failed or "cannot be written" in ended.stderr


@pytest.mark.parametrize(
    ("project", "environment", "said"),
    [
        ("a#b", {"WANDB_API_KEY": "k"}, "refuses"),
        ("glm", {}, "nobody is logged in"),
        ("glm", {"WANDB_MODE": "offline"}, None),
    ],
)
def test_what_a_user_can_mend_of_wandb_is_said_before_the_model(
    make_recipe, tmp_path, monkeypatch, project, environment, said
):
    from glm45_tune.recipe import Recipe

    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(sys.modules, "wandb", type(sys)("wandb"))
    recipe = Recipe.from_dict(make_recipe("model", "data", tmp_path, logging={"wandb_project": project}))
    if said is None:
        return trackers.check_trackers(recipe)
    with pytest.raises(UserError, match=said):
        trackers.check_trackers(recipe)
