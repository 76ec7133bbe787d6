"""The GPU kernels' arithmetic, on a CPU in Triton's interpreter. tests/gpu runs the same checks on a card."""

import os
import subprocess
import sys
from pathlib import Path

TWINS = Path(__file__).parents[1] / "kernel_twins.py"


def test_every_kernel_equals_its_plain_twin():
    """Forward and backward, fp32, sizes that do not fill a block."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, TWINS, "cpu"], env=environment, stderr=subprocess.PIPE, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
