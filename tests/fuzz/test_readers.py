"""A short run of the fuzzer over the readers; the long one is `python tests/fuzz/readers.py --megabytes 10`."""

import subprocess
import sys
from pathlib import Path

READERS = ("hf", "torch_dist", "values", "adapter", "recipe", "facts", "rows", "run")


def test_a_damaged_file_is_read_or_is_a_sentence():
    program = Path(__file__).parent / "readers.py"
    names = [argument for name in READERS for argument in ("--only", name)]
    command = [sys.executable, program, "--megabytes", "0.8", *names]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
