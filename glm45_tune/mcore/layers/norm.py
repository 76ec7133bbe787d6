"""RMSNorm as GLM-4.5 has it, knowing sequence parallelism."""

import torch


class RMSNorm(torch.nn.Module):
    """y = x / rms(x) · weight over the last dim; the mean square in fp32, the product in x's dtype (as transformers does).

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
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * x32.to(x.dtype)
