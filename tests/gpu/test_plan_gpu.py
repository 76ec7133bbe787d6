"""The planner's peak against the allocator's on an NVIDIA card."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SETTINGS = ["lora-attention", "lora-attention-recompute", "lora-all-linear", "full", "full-16k", "lora-attention-16k"]


@pytest.mark.gpu(1)
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_predicted_peak_is_the_measured_one(setting, tmp_path):
    """Air-width layers under the Trainer that trains: within 8 % of `max_memory_allocated`. Needs 80 GB."""
    output = tmp_path / "rows.json"
    command = [sys.executable, str(ROOT / "scripts" / "bench_memory.py"), "--only", setting, "--output", str(output)]
    subprocess.run(command, check=True, timeout=600)
    row = json.loads(output.read_text())[0]
    assert row["predicted_peak_gib"] == pytest.approx(row["measured_peak_gib"], rel=0.08)
