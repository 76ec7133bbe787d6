"""AdamW whose state takes less room on the GPU: moments in bf16, moments and masters in host memory between steps.

megatron has both, the first only with Transformer Engine's Adam. This one is torch's AdamW in the same arithmetic (fp32), done
piece by piece, so that what it moves to the GPU is never more than a few pieces.
"""

import torch

# elements updated at once: three fp32 temporaries of this size are 0.75 GiB
PIECE = 1 << 26


class LeanAdamW(torch.optim.AdamW):
    """Parameters are megatron's main parameters: flat fp32 shards, one for each weight a rank updates.

    What is offloaded: parameters in order until `offload_fraction` of their elements is reached.
    """

    def __init__(
        self, param_groups: list[dict], moment_dtypes: dict[str, torch.dtype], offload_fraction: float, masters: bool
    ):
        """moment_dtypes: of exp_avg and exp_avg_sq; masters: parameters are copies of the model's weights, not the weights."""
        super().__init__([torch.empty(0)])
        self.param_groups = (
            param_groups  # as megatron sets them: views of weights are no leaves, which torch's check asks for
        )
        self._dtypes = moment_dtypes
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        limit, taken, self._offloaded = offload_fraction * sum(p.numel() for p in parameters), 0, []
        for parameter in parameters:
            if taken < limit:
                taken += parameter.numel()
                self._offloaded.append(parameter)
        self._offloaded_ids = set(map(id, self._offloaded))
        self._device = (
            torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        )
        self._masters = masters
        self.release()

    def fetch(self) -> None:
        """Bring offloaded masters to the GPU: before megatron hands over gradients."""
        if self._masters:
            for parameter in self._offloaded:
                parameter.data = parameter.data.to(self._device, non_blocking=True)

    def release(self) -> None:
        """Send them back to host memory; their gradients are dropped."""
        if self._masters:
            for parameter in self._offloaded:
                parameter.grad = None
                parameter.data = self._kept(parameter.data)

    def _kept(self, values: torch.Tensor) -> torch.Tensor:
        """A copy in host memory, pinned where there is a GPU."""
        if values.device.type == "cpu":
            return values
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        return host.copy_(values)

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter.numel():
                    self._update(parameter, group)
        if self._device.type == "cuda":
            torch.cuda.current_stream().synchronize()  # host copies are read by checkpoints

    def _update(self, parameter: torch.Tensor, group: dict) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            for name, dtype in self._dtypes.items():
                zeros = torch.zeros(parameter.shape, dtype=dtype, device=self._device)
                state[name] = self._kept(zeros) if id(parameter) in self._offloaded_ids else zeros
        state["step"] += 1
        step, (beta1, beta2) = state["step"].item(), group["betas"]
        for first in range(0, parameter.numel(), PIECE):
            piece = slice(first, first + PIECE)
            master, gradient = parameter.data[piece], parameter.grad[piece].float()
            mean, square = (
                state[name][piece].to(parameter.device, torch.float, non_blocking=True) for name in self._dtypes
            )
            mean.lerp_(gradient, 1 - beta1)
            square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            divisor = (square / (1 - beta2**step)).sqrt_().add_(group["eps"])
            master.mul_(1 - group["lr"] * group["weight_decay"]).addcdiv_(
                mean, divisor, value=-group["lr"] / (1 - beta1**step)
            )
            state["exp_avg"][piece].copy_(mean, non_blocking=True)
            state["exp_avg_sq"][piece].copy_(square, non_blocking=True)

    def load_state_dict(self, state_dict: dict) -> None:
        """As torch's, which puts all state beside the parameter in its dtype; then each moment goes where it is kept."""
        super().load_state_dict(state_dict)
        for parameter, state in self.state.items():
            for name, dtype in self._dtypes.items():
                moment = state[name].to(dtype)
                state[name] = self._kept(moment) if id(parameter) in self._offloaded_ids else moment.to(self._device)
