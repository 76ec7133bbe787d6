"""What convert writes is plain megatron: megatron-core loads it without our model, in both dialects, and computes the same."""

import json
from pathlib import Path

import pytest
import torch
import transformers

from glm45_tune.conversion import mcore_files
from glm45_tune.conversion.stream import convert

SCRIPT = Path(__file__).parent / "plain_megatron.py"
transformers.utils.logging.set_verbosity_error()


LAYOUTS = [("air", (1, 1, 1)), ("355b", (2, 1, 1)), ("air", (1, 2, 1)), ("355b", (1, 1, 4))]  # tensor, pipeline, expert


@pytest.fixture(scope="module")
def computed(checkpoints, tmp_path_factory, ranks):
    """(model, layout, dialect) → tokens and logits of plain megatron, all from one start of four ranks."""
    output = tmp_path_factory.mktemp("converted")
    jobs, chunk = {}, mcore_files.MAX_CHUNK_BYTES
    mcore_files.MAX_CHUNK_BYTES = 2**15  # so that tensors lie in several chunks, as a whole model's do
    for dialect in ("hybrid", "gpt"):
        for like, sizes in LAYOUTS:
            directory = output / f"{like}-{dialect}"
            if not directory.exists():
                convert(checkpoints[like], directory, "mcore", dialect)
            jobs[like, sizes, dialect] = [str(directory), dialect, sizes, str(output / f"{len(jobs)}.pt")]
    mcore_files.MAX_CHUNK_BYTES = chunk
    ranks(4, SCRIPT, [json.dumps(list(jobs.values()))])
    return {key: torch.load(job[-1], weights_only=True) for key, job in jobs.items()}


@pytest.mark.parametrize("dialect", ["hybrid", "gpt"])
@pytest.mark.parametrize("like, sizes", LAYOUTS)
def test_plain_megatron_loads_it_under_any_layout(computed, checkpoints, dialect, like, sizes):
    """fp32 logits within 1e-4 of their range of transformers'; the MTP layer's tensors are asked for too."""
    tokens, logits = computed[like, sizes, dialect]
    reference = transformers.Glm4MoeForCausalLM.from_pretrained(str(checkpoints[like]), dtype=torch.float32).eval()
    with torch.no_grad():
        expected = reference(tokens).logits
    assert ((logits - expected).abs().max() / (expected.max() - expected.min())).item() <= 1e-4
