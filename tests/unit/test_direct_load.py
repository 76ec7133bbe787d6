"""Loading from an HF directory: each rank reads the bytes it holds, and no others."""

import json
from pathlib import Path

from glm45_tune.conversion.stream import open_model, total_bytes

SCRIPT = Path(__file__).with_name("direct_load.py")
LAYOUTS = [
    {"tensor_model_parallel_size": 2},
    {"expert_model_parallel_size": 2},
    {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2},
    {"expert_tensor_parallel_size": 2},
    {"pipeline_model_parallel_size": 2},
]


def test_a_rank_reads_its_share_to_the_byte(checkpoints, ranks, tmp_path):
    """What the system's read calls returned, against the rank's own parameters as the checkpoint stores them."""
    ranks(2, SCRIPT, [str(checkpoints["air"]), json.dumps(LAYOUTS), str(tmp_path)])
    whole = total_bytes(open_model(checkpoints["air"]))
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    for layout, *both in zip(LAYOUTS, first, second):
        for read, held in both:
            assert read == held < whole, layout
