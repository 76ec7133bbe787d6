"""AdamW with its state in bf16 or in host memory, against torch's."""

import pytest
import torch

from glm45_tune.mcore import adam
from glm45_tune.mcore.adam import LeanAdamW

FP32 = {"exp_avg": torch.float32, "exp_avg_sq": torch.float32}
SETTINGS = dict(lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)


def _steps(optimizer, parameters, count=5, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def _parameters():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator) for size in (7, 300, 41)]


def _lean(parameters, dtypes=FP32, fraction=0.0):
    return LeanAdamW([{"params": parameters, **SETTINGS}], dtypes, fraction, masters=True)


@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
def test_fp32_state_is_torchs_adamw(fraction, monkeypatch):
    """The same update within fp32 rounding, whatever waits in host memory and in however many pieces it is done."""
    monkeypatch.setattr(adam, "PIECE", 64)
    ours, theirs = _parameters(), _parameters()
    _steps(_lean(ours, fraction=fraction), ours)
    _steps(torch.optim.AdamW(theirs, **SETTINGS), theirs)
    for a, b in zip(ours, theirs):
        assert (a - b).abs().max() <= 1e-6 * b.abs().max()


def test_bf16_moments_take_half_and_stay_close():
    ours, theirs = _parameters(), _parameters()
    optimizer = _lean(ours, {"exp_avg": torch.bfloat16, "exp_avg_sq": torch.bfloat16})
    _steps(optimizer, ours)
    _steps(torch.optim.AdamW(theirs, **SETTINGS), theirs)
    assert all(
        state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.bfloat16 for state in optimizer.state.values()
    )
    moved = torch.cat([b - a for a, b in zip(_parameters(), theirs)])
    error = torch.cat([a - b for a, b in zip(ours, theirs)])
    assert 0 < error.norm() <= 2**-7 * moved.norm()


def test_loading_keeps_every_moment_in_its_dtype():
    ours = _parameters()
    optimizer = _lean(ours, {"exp_avg": torch.bfloat16, "exp_avg_sq": torch.float32})
    _steps(optimizer, ours)
    optimizer.load_state_dict(optimizer.state_dict())
    assert {(s["exp_avg"].dtype, s["exp_avg_sq"].dtype) for s in optimizer.state.values()} == {
        (torch.bfloat16, torch.float32)
    }
