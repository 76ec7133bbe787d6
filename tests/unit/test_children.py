"""What a reward, a tool or an engine starts ends with it; every wait is bounded."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from glm45_tune.errors import ToldToStop
from glm45_tune.guard import Guarded
from glm45_tune.objectives import RewardConfig
from glm45_tune.rl.sandbox import Gone, ToolWorker, Worker

REWARDS = """
import os, subprocess, sys, time

def number(prompt, completion, columns, **options):
    "Each completion is a way to misbehave; columns say where to write the ids of what is started."
    def started(*ids):
        with open(columns["ids"], "a") as file:
            file.write("".join(f"{each}\\n" for each in ids))
    if completion == "ok":
        return 1.0
    if completion == "sleeps":
        started(os.getpid()); time.sleep(600)
    if completion == "spins":
        started(os.getpid())
        while True: pass
    if completion == "closes its files":
        started(os.getpid()); os.closerange(0, 100); time.sleep(600)
    if completion == "ignores signals":
        import signal
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP): signal.signal(number, signal.SIG_IGN)
        started(os.getpid()); time.sleep(600)
    if completion == "starts a loop":
        started(subprocess.Popen([sys.executable, "-c", "while True: pass"]).pid); time.sleep(600)
    if completion == "starts a session":
        started(subprocess.Popen(["sleep", "600"], start_new_session=True).pid); time.sleep(600)
    if completion == "starts and returns":
        started(subprocess.Popen(["sleep", "600"], start_new_session=True).pid); return 1.0
    if completion == "starts a daemon":
        if not os.fork():
            os.setsid()
            if not os.fork():
                started(os.getpid()); time.sleep(600)
            os._exit(0)
        time.sleep(600)
    if completion == "stops its guard":
        import signal
        os.kill(os.getppid(), signal.SIGSTOP); started(os.getpid()); time.sleep(600)
    if completion == "garbage":
        for number in range(3, 30):
            try: os.write(number, b"\\x00garbage\\n")
            except OSError: pass
    if completion == "wrong messages":
        for number in range(3, 30):
            try: os.write(number, b'{"results": [["a", 5, {}]]}\\n')
            except OSError: pass
    if completion == "too many results":
        for number in range(3, 30):
            try: os.write(number, b'{"results": [[1, null, ""], [1, null, ""], [1, null, ""]]}\\n')
            except OSError: pass
    if completion == "nested":
        for number in range(3, 30):
            try: os.write(number, b"[" * 100000 + b"\\n")
            except OSError: pass
    if completion == "endless line":
        while True:
            for number in range(3, 30):
                try: os.write(number, b"x" * 65536)
                except OSError: pass
    if completion == "reads its input":
        return float(len(sys.stdin.read()))
    if completion == "large fault":
        raise ValueError("x" * 10**7)
    if completion == "prints":
        for line in range(100): print(f"line {line} \\x1b[2J {options.get('key')}")
        print("x" * 10**7)
        sys.stderr.write("no line end")
    return 2.0

def tool(said, columns):
    if said == "hangs": time.sleep(600)
    if said == "dies": os._exit(3)
    if said == "odd": return {1, 2}
    if said == "raises": raise KeyError(said)
    if said == "counts": tool.count = getattr(tool, "count", 0) + 1; return tool.count
    return [os.getcwd(), os.environ.get("A_VARIABLE")]
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    (tmp_path / "misbehaving.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def evaluate(place: Path, completions: list[str], timeout=1.0, **options) -> list:
    worker = Worker(RewardConfig(function="misbehaving:number", options=options), timeout)
    try:
        columns = [{"ids": str(place / "ids")}] * len(completions)
        return worker.evaluate(["?"] * len(completions), completions, columns)
    finally:
        worker.close()


def ids_in(place: Path, count: int = 1, seconds: float = 30) -> list[int]:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError):
            if len(ids := [int(line) for line in (place / "ids").read_text().split()]) >= count:
                return ids
        time.sleep(0.05)
    raise AssertionError("nothing was started")


def lives(process: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    return False


def assert_ended(ids: list[int], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while any(map(lives, ids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    left = [process for process in ids if lives(process)]
    for process in left:
        os.kill(process, signal.SIGKILL)
    assert not left, "outlived its reward"


HANGS = ["sleeps", "spins", "ignores signals", "starts a loop", "starts a session", "starts a daemon"]


@pytest.mark.parametrize("way", [*HANGS, "closes its files", "stops its guard", "starts and returns"])
def test_nothing_of_a_reward_outlives_it(place, way):
    started = time.monotonic()
    found = evaluate(place, ["ok", way, "ok"])
    assert time.monotonic() - started < 20
    wanted = {"closes its files": "died", "starts and returns": None}.get(way, "timeout")
    assert [fault for _, fault, _ in found] == [None, wanted, None], found
    assert_ended(ids_in(place))


@pytest.mark.parametrize("way", HANGS)
def test_nothing_of_a_reward_outlives_a_trainer_that_is_killed(place, way):
    code = f"""
        from glm45_tune.objectives import RewardConfig
        from glm45_tune.rl.sandbox import Worker
        worker = Worker(RewardConfig(function="misbehaving:number"), 600)
        worker.evaluate(["?"], [{way!r}], [{{"ids": {str(place / "ids")!r}}}])
    """
    trainer = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)])
    try:
        ids = ids_in(place)
        guards = [child.pid for child in psutil.Process(trainer.pid).children(recursive=True)]
    finally:
        trainer.kill()
        trainer.wait()
    assert_ended([*ids, *guards])


@pytest.mark.parametrize(
    "way, said",
    [
        ("garbage", "what is no message of ours: b'.*garbage"),
        ("wrong messages", "what is no result"),
        ("too many results", "what is no message of ours"),
        ("nested", "what is no message of ours"),
        ("endless line", "a message of more than"),
    ],
)
def test_garbage_on_the_pipe_costs_one_reward_and_is_one_sentence(place, way, said):
    ok, found, after = evaluate(place, ["ok", way, "ok"])
    assert ok == after == (1.0, None, "") and found[1] == "garbled"
    assert re.search(said, found[2]) and len(found[2]) < 300 and "\n" not in found[2]


def test_a_reward_may_read_and_raise_what_it_likes(place):
    reads, raises = evaluate(place, ["reads its input", "large fault"])
    assert reads == (0.0, None, "") and raises[1] == "raised" and len(raises[2]) < 3000


def test_what_a_reward_prints_is_shown_within_bounds_and_without_its_secrets(place, capsys, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "a key of the judge")
    assert evaluate(place, ["prints"], key="${env:JUDGE_KEY}") == [(2.0, None, "")]
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "misbehaving:number: line 0 \\x1b[2J ***" and len(lines) == 21
    assert lines[-1] == "misbehaving:number: … and 82 more lines"


def test_a_large_answer_is_given_to_a_reward_whole(place):
    """More than a pipe holds, and more than it takes at once."""
    long = "x" * (3 << 20)
    worker = Worker(RewardConfig(function="misbehaving:number"), 5.0)
    try:
        assert worker.evaluate([long] * 3, ["ok", "ok", "?"], [{}] * 3) == [(1.0, None, "")] * 2 + [(2.0, None, "")]
    finally:
        worker.close()


def test_waiting_for_a_reward_ends_with_a_signal(place):
    told = iter([False] * 8 + [True] * 100)
    worker = Worker(RewardConfig(function="misbehaving:number"), 600.0, lambda: next(told))
    started = time.monotonic()
    try:
        with pytest.raises(ToldToStop):
            worker.evaluate(["?"], ["sleeps"], [{"ids": str(place / "ids")}])
    finally:
        worker.close()
    assert time.monotonic() - started < 30


def test_a_tool_that_hangs_dies_or_raises_is_one_sentence(place, monkeypatch):
    """It has the trainer's directory and environment, and keeps what it remembers."""
    monkeypatch.setenv("A_VARIABLE", "x")
    tool = ToolWorker("misbehaving:tool", 1.0)
    try:
        for said, fault in (
            ("hangs", r"took longer than 1 s \(rl.tool_timeout_seconds\)"),
            ("dies", "its process ended"),
            ("odd", r"returned set '\{1, 2\}', which JSON cannot hold"),
            ("raises", r"raised KeyError: 'raises' \(.*misbehaving.py:\d+, tool\)"),
        ):
            with pytest.raises(Gone, match=fault):
                tool.ask(said, {})
        assert tool.ask("", {}) == [str(place), "x"]
        assert [tool.ask("counts", {}) for _ in range(3)] == [1, 2, 3]
    finally:
        tool.close()


def test_a_module_called_as_pythons_own_in_the_working_directory_is_not_taken_for_it(place):
    for name in ("json", "numpy", "math_verify", "subprocess"):
        (place / f"{name}.py").write_text("raise SystemExit(7)")
    assert evaluate(place, ["ok"]) == [(1.0, None, "")]
    worker = Worker(RewardConfig(function="math"), 20.0)
    try:
        assert worker.evaluate([""], ["$8$"], [{"solution": "8"}]) == [(1.0, None, "")]
    finally:
        worker.close()


def test_a_guard_passes_the_exit_code_on_and_ends_what_is_left(tmp_path):
    for command, code in (("exit 3", 3), ("kill -9 $$", 137), ("exit 0", 0)):
        assert Guarded(["sh", "-c", command]).wait(20) == code
    left = subprocess.PIPE
    guarded = Guarded(["sh", "-c", "sleep 600 & echo $!; setsid sleep 600 & echo $!"], stdout=left, text=True)
    ids = [int(guarded.stdout.readline()) for _ in range(2)]
    assert guarded.wait(20) == 0
    assert_ended(ids)
    guarded.stdout.close()
    with pytest.raises(FileNotFoundError, match="no-such-command"):
        Guarded(["no-such-command"])


def test_an_engine_that_will_not_hear_ends_with_all_its_helpers(tmp_path):
    code = "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    code += "print(subprocess.Popen(['sleep', '600'], start_new_session=True).pid, flush=True); time.sleep(600)"
    with Guarded([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as guarded:
        helper = int(guarded.stdout.readline())
        guarded.end()
    assert_ended([helper])
