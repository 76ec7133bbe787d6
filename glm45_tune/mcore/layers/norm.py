"""RMSNorm as GLM-4.5 has it, knowing sequence parallelism."""

import torch
import torch.nn.functional as F


class RMSNorm(torch.nn.Module):
    """y = x / rms(x) · weight over the last dim, in fp32 inside, rounded once to x's dtype. Keeps x and one number a row.

    Under sequence parallelism every tensor rank sees its own tokens, so the weight's gradient is summed over the
    tensor ranks: the attribute `sequence_parallel` tells megatron to.
    """

    def __init__(self, config, hidden_size: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
