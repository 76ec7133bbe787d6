"""What convert writes is plain megatron: megatron-core loads it without our model, in both dialects, and computes the same."""

from pathlib import Path

import pytest
import torch
import transformers

from glm45_tune.conversion.stream import convert

SCRIPT = Path(__file__).parent / "plain_megatron.py"
transformers.utils.logging.set_verbosity_error()


@pytest.fixture(scope="module")
def converted(checkpoints, tmp_path_factory):
    output = tmp_path_factory.mktemp("converted")
    for like in ("air", "355b"):
        for dialect in ("hybrid", "gpt"):
            convert(checkpoints[like], output / f"{like}-{dialect}", "mcore", dialect)
    return output


@pytest.mark.parametrize("dialect", ["hybrid", "gpt"])
@pytest.mark.parametrize(
    "like, world_size, sizes",
    [("air", 1, "1,1,1"), ("355b", 2, "2,1,1"), ("air", 2, "1,2,1"), ("355b", 4, "1,1,4")],
)
def test_plain_megatron_loads_it_under_any_layout(converted, checkpoints, ranks, tmp_path, dialect, like, world_size, sizes):
    """fp32 logits within 1e-4 of their range of transformers'; the MTP layer's tensors are asked for too."""
    output = tmp_path / "logits.pt"
    ranks(world_size, SCRIPT, [str(converted / f"{like}-{dialect}"), dialect, sizes, str(output)])
    tokens, logits = torch.load(output, weights_only=True)
    reference = transformers.Glm4MoeForCausalLM.from_pretrained(str(checkpoints[like]), dtype=torch.float32).eval()
    with torch.no_grad():
        expected = reference(tokens).logits
    assert ((logits - expected).abs().max() / (expected.max() - expected.min())).item() <= 1e-4
