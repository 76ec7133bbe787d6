"""chat as a process: bytes that are not UTF-8, and Ctrl-C."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

from wire import answering, delta, events, stream

ENV = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONUTF8": "0", "LC_ALL": "C.UTF-8"}
SAID = stream(events(delta(content="好")))


def chat(url: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "glm45_tune", "chat", "--server", url, *arguments]


def test_bytes_that_are_not_utf8_are_told_and_the_conversation_goes_on():
    with answering(SAID) as (url, asked):
        typed = b"\xc4\xe3\xba\xc3\n" + "你好\n".encode() + b"a\xff\n" + b"again\n\nnot read\n"
        ended = subprocess.run(chat(url), input=typed, capture_output=True, env=ENV, timeout=120, check=False)
    err = ended.stderr.decode()
    assert ended.returncode == 0 and "Traceback" not in err, err
    assert err.count("bytes that are not UTF-8") == 2 and "Type a question. /help lists" in err
    assert len([head for head in asked if head.startswith(b"POST")]) == 2 and ended.stdout.decode().split() == [
        "好",
        "好",
    ]


def test_a_prompt_that_is_not_utf8_is_one_sentence():
    with answering(SAID) as (url, _):
        command = [*map(str.encode, chat(url, "--prompt")), b"\xff?"]
        ended = subprocess.run(command, capture_output=True, env=ENV, timeout=120, check=False)
    assert ended.returncode == 2 and b"--prompt holds bytes that are not UTF-8" in ended.stderr, ended.stderr


def test_ctrl_c_in_a_conversation_says_nothing_of_training():
    """While a server is waited for, which may be long."""
    is_asked = threading.Event()

    def hang(connection):
        is_asked.set()
        connection.recv(1)

    with answering(hang) as (url, _):
        process = subprocess.Popen(chat(url, "--prompt", "?"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENV)
        assert is_asked.wait(120)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and not out.strip()
    assert err.decode().strip() == "interrupted", err
