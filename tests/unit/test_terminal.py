"""What others wrote is shown on a terminal, not obeyed."""

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm45_tune.terminal import visible

HOSTILE = {
    "a title": "\x1b]0;owned\x07",
    "a colour": "\x1b[31mred",
    "a link": "\x1b]8;;http://x\x1b\\here",
    "C1": "\x9b31m",
    "delete": "a\x7f",
    "back space": "abc\x08\x08\x08xyz",
    "a carriage return": "shown\rhidden",
    "writing from right to left": "a\u202eb\u2066c",
}


@given(st.text())
def test_no_control_character_is_left(text):
    made = visible(text)
    assert all(letter in "\t\n" or not (ord(letter) < 32 or 127 <= ord(letter) < 160) for letter in made)
    assert visible("".join(letter for letter in text if letter.isprintable())) == "".join(
        letter for letter in text if letter.isprintable()
    )


@pytest.mark.parametrize("kind", HOSTILE)
def test_data_is_shown_and_not_obeyed(checkpoints, cli, tmp_path, kind):
    said = HOSTILE[kind]
    rows = [
        {"messages": [{"role": "user", "content": said}, {"role": "assistant", "content": said + "."}]},
        {"messages": [{"role": said, "content": "x"}]},
        {said: 1},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, err = cli("data", path, "--model", checkpoints["air"])
    assert code == 2
    for letter in set(said) - set(visible(said)):
        assert letter not in out + err


def test_what_is_trained_is_marked_without_colours(checkpoints, corpus):
    command = [sys.executable, "-m", "glm45_tune", "data", str(corpus), "--model", str(checkpoints["air"])]
    made = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert (
        "⟧⟦" not in made and "⟦trained⟧" in made and "<|user|>⟧" in made and "⟦<|user|>" not in made.split("samples")[0]
    )
