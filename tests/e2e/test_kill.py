"""Killed at random moments and started again, a run ends as if nothing had happened. `scripts/kill_test.py` does it any number of times."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "kill_test.py"


def test_five_kills_change_no_bit():
    command = [sys.executable, str(SCRIPT), "--kills", "5", "--ranks", "2"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=2400, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "5 of 5 ended with the same weights" in ended.stdout
