"""CPU mode: lets megatron-core, which names `cuda` in some sixty places, run over gloo on a machine without a GPU.

Entered explicitly by `runtime.start`, once a process, only where no GPU is visible, and never left. Each turn below says
what megatron does there and why the turn keeps the numbers: they replace where a tensor lives or when a stream waits,
never arithmetic.
"""

import functools

import torch
from torch.overrides import TorchFunctionMode

class _Now:
    """Stands for a CUDA stream, event and stream context: on a CPU everything has already happened, in order."""

    def __init__(self, *args, **kwargs):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        return False

    def record_event(self, *args):
        return self

    def wait_stream(self, *args):
        pass

    wait_event = wait = synchronize = record = wait_stream

    def query(self):
        return True


class _CudaMeansCpu(TorchFunctionMode):
    """Turns device="cuda" into "cpu" in every torch call."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if kwargs and kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
            kwargs["device"] = "cpu"
        return func(*args, **(kwargs or {}))


def _cuda_type_name(type_of):
    @functools.wraps(type_of)
    def name(self, dtype=None, *args, **kwargs):
        if dtype is not None:
            return type_of(self, dtype, *args, **kwargs)
        return type_of(self).replace("torch.", "torch.cuda.", 1)

    return name


def enter() -> None:
    """Turn this process. Raises AssertionError where a GPU is visible or when entered twice."""
    assert not torch.cuda.is_available(), "CPU mode is for machines without a GPU"
    from megatron.core.tensor_parallel import random as mcore_random
    from megatron.core.transformer.moe import token_dispatcher

    assert torch.cuda.Stream is not _Now, "CPU mode was entered already"
    # megatron allocates buffers and scalars with device="cuda" or device=current_device()
    torch.cuda.current_device = lambda: torch.device("cpu")
    _CudaMeansCpu().__enter__()
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    # the dispatcher copies counts on a side stream; recompute and p2p wait for the device
    torch.cuda.Stream = torch.cuda.Event = _Now
    torch.cuda.current_stream = torch.cuda.stream = torch.cuda.synchronize = _Now
    # the tensor-parallel RNG tracker swaps the device generator: here the CPU generator is the device's
    torch.cuda.manual_seed = torch.manual_seed
    torch.cuda.get_rng_state = mcore_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    torch.cuda.set_rng_state = mcore_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    # gloo's all-to-all takes split sizes as lists, where NCCL's takes the numpy arrays megatron makes of GPU tensors
    token_dispatcher.maybe_move_tensor_to_cpu = (
        lambda tensor, as_numpy=False, record_stream=False: tensor.tolist()
        if as_numpy and torch.is_tensor(tensor)
        else tensor
    )
    # the optimizer and the gradient clipping recognise parameters by the name of their CUDA type
    torch.Tensor.type = _cuda_type_name(torch.Tensor.type)
