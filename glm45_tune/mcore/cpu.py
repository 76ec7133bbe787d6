"""CPU mode: lets megatron-core, which names `cuda` in some sixty places, run over gloo on a machine without a GPU.

Entered by `runtime.start`, only where no GPU is visible, and left by `runtime.stop`: afterwards torch and megatron are as
before. Each turn below says what megatron does there and why the turn keeps the numbers: they replace where a tensor
lives or when a stream waits, never arithmetic.
"""

import contextlib
import functools
import warnings
from collections.abc import Iterator

import torch
import torch._dynamo
import torch.distributed as dist
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
        return "torch.cuda." + type_of(self).rpartition(".")[2]

    return name


def _uneven_gather(gather):
    @functools.wraps(gather)
    def along_first_dim(input_, group, output_split_sizes=None, use_global_buffer=False):
        if output_split_sizes is None or group.size() == 1:
            return gather(input_, group, output_split_sizes, use_global_buffer)
        parts = [input_.new_empty(size, *input_.shape[1:]) for size in output_split_sizes]
        parts[group.rank()] = input_.contiguous()
        for rank, part in enumerate(parts):
            dist.broadcast(part, group=group, group_src=rank)
        return torch.cat(parts)

    return along_first_dim


def _uneven_reduce_scatter(reduce_scatter):
    @functools.wraps(reduce_scatter)
    def along_first_dim(input_, group, input_split_sizes=None, use_global_buffer=False):
        if input_split_sizes is None or group.size() == 1:
            return reduce_scatter(input_, group, input_split_sizes, use_global_buffer)
        total = input_.clone()
        dist.all_reduce(total, group=group)
        return total.split(list(input_split_sizes))[group.rank()].contiguous()

    return along_first_dim


@contextlib.contextmanager
def entered() -> Iterator[None]:
    """Turn this process, and turn it back. Raises AssertionError where a GPU is visible or when entered twice."""
    assert not torch.cuda.is_available(), "CPU mode is for machines without a GPU"
    assert torch.cuda.Stream is not _Now, "CPU mode was entered already"
    with contextlib.ExitStack() as undo:
        for owner, name, value in _turns():
            undo.callback(_setter(owner, name))
            setattr(owner, name, value)
        # megatron compiles small functions, which costs 20 s of C++ compilation on a CPU and computes the same
        undo.enter_context(torch._dynamo.config.patch(disable=True))
        # megatron looks at .grad of activations; seen through the mode below, torch warns of it once
        undo.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
        undo.enter_context(_CudaMeansCpu())
        yield


def _turns() -> list[tuple[object, str, object]]:
    """(where, name, what stands there in CPU mode)."""
    from megatron.core.tensor_parallel import mappings
    from megatron.core.tensor_parallel import random as mcore_random

    def get_state(*args, **kwargs):
        return torch.get_rng_state()

    def set_state(state, *args, **kwargs):
        return torch.set_rng_state(state)

    gather, reduce_scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim
    return [
        # megatron allocates buffers and scalars with device="cuda" or device=current_device()
        (torch.cuda, "current_device", lambda: torch.device("cpu")),
        (torch.Tensor, "cuda", lambda self, *args, **kwargs: self),
        # recompute and p2p wait for the device
        *((torch.cuda, name, _Now) for name in ("Stream", "Event", "current_stream", "stream", "synchronize")),
        # the tensor-parallel RNG tracker swaps the device generator: here the CPU generator is the device's
        (torch.cuda, "manual_seed", torch.manual_seed),
        *(
            (owner, name, get_state)
            for owner, name in ((torch.cuda, "get_rng_state"), (mcore_random, "_get_cuda_rng_state"))
        ),
        *(
            (owner, name, set_state)
            for owner, name in ((torch.cuda, "set_rng_state"), (mcore_random, "_set_cuda_rng_state"))
        ),
        # expert tensor ranks exchange parts of different lengths; gloo's own collectives want equal ones
        (mappings, "_gather_along_first_dim", _uneven_gather(gather)),
        (mappings, "_reduce_scatter_along_first_dim", _uneven_reduce_scatter(reduce_scatter)),
        # the optimizer and the gradient clipping recognise parameters by the name of their CUDA type
        (torch.Tensor, "type", _cuda_type_name(torch.Tensor.type)),
    ]


def _setter(owner, name: str):
    """What puts an attribute back; one that the owner only inherits is taken away."""
    if name in vars(owner):
        return functools.partial(setattr, owner, name, vars(owner)[name])
    return functools.partial(delattr, owner, name)
