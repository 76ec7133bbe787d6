"""Start and stop of a rank: device, process groups, megatron's parallel state, seeds."""

import atexit
import contextlib
import datetime
import hashlib
import os
import sys
import time
import uuid
from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker, set_moe_metrics_tracker

from glm45_tune import surroundings
from glm45_tune.layout import Layout
from glm45_tune.mcore import cpu

_undo: contextlib.ExitStack | None = None
"""Puts back what `start` changed; None: not started."""
_store: dist.Store | None = None


def device() -> torch.device:
    """Where this rank's tensors live."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def store() -> dist.Store | None:
    """What all ranks of the job can read and write; None for a rank alone."""
    return _store


def stage() -> int:
    """This rank's pipeline stage, from 0."""
    return parallel_state.get_pipeline_model_parallel_rank()


def barrier() -> None:
    """Wait for every rank of the job."""
    dist.barrier(device_ids=[torch.cuda.current_device()] if torch.cuda.is_available() else None)


def start(layout: Layout, seed: int = 1234, deterministic: bool = False, timeout_minutes: float = 30) -> None:
    """Join the job that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe (alone when they are absent).

    timeout_minutes: how long joining may take; a call between ranks gives up after twice as long.
    Safe to call again with another layout in one process: the parallel state is rebuilt over the same ranks.
    """
    global _undo, _store
    if _undo is None:
        _undo = contextlib.ExitStack()
        atexit.register(_put_back)  # while all it needs is still there
        _undo.callback(setattr, sys, "excepthook", sys.excepthook)  # torch's groups set their own
        _undo.enter_context(surroundings.quiet())
        _undo.enter_context(surroundings.environment("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO"))
        _undo.enter_context(_same_algorithms())
        if not torch.cuda.is_available():
            _undo.enter_context(cpu.entered())
    _choose_algorithms(deterministic)
    if not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        timeout = datetime.timedelta(minutes=timeout_minutes)
        shared, rank, size = dist.HashStore(), 0, 1
        if "RANK" in os.environ:
            shared, rank, size = next(dist.rendezvous("env://", timeout=timeout))
            shared = _store = _fresh(shared, rank, size)
        dist.init_process_group(
            "nccl" if torch.cuda.is_available() else "gloo",
            store=dist.PrefixStore("groups", shared),
            rank=rank,
            world_size=size,
            # the watchdog speaks first
            timeout=2 * timeout + datetime.timedelta(minutes=1),
        )  # without device_id: with it NCCL takes memory for each of megatron's groups, most of which never speak
    _close_groups()
    with _one_group_for_the_same_ranks():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tensor_model_parallel_size,
            pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
            expert_model_parallel_size=layout.expert_model_parallel_size,
            expert_tensor_parallel_size=layout.expert_tensor_parallel_size,
            context_parallel_size=layout.context_parallel_size,
            virtual_pipeline_model_parallel_size=(
                layout.virtual_pipeline_model_parallel_size if layout.virtual_pipeline_model_parallel_size > 1 else None
            ),
        )
    if torch.cuda.is_available():
        _open_groups()
    seed_all(seed)


def _fresh(store: dist.Store, rank: int, size: int) -> dist.Store:
    """Return a part of the job's store that no earlier attempt wrote to, the same on every rank.

    torchrun keeps one store over its restarts, and with it the addresses of ranks that are dead;
    its hosts count attempts differently. So every rank leaves a token, and the first one says which
    tokens it sees, anew until all have answered to the same. Raises TimeoutError.
    """
    mine, attempt, last = uuid.uuid4().hex, "", time.monotonic() + store.timeout.total_seconds()
    store.set(f"token/{rank}", mine)
    while time.monotonic() < last:
        if rank == 0:
            store.set("tokens", " ".join(store.get(f"token/{other}").decode() for other in range(size)))
        tokens = store.get("tokens")
        if mine in tokens.decode().split():
            attempt = hashlib.sha256(tokens).hexdigest()
            store.set(f"{attempt}/{rank}", "")
        if attempt and store.check([f"{attempt}/{other}" for other in range(size)]):
            return dist.PrefixStore(attempt, store)
        time.sleep(0.05)
    raise TimeoutError("some rank of this job has not joined it")


def _close_groups() -> None:
    """Leave the groups of a layout before. megatron only forgets them, and each keeps threads (gloo) or device memory (NCCL)."""
    parallel_state.destroy_model_parallel()
    set_moe_metrics_tracker(MoEMetricsTracker())  # keeps the groups it sums over, and the number of layers
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


@contextlib.contextmanager
def _one_group_for_the_same_ranks():
    """Make groups of the same ranks one, the job's own among them.

    megatron makes a group for each of its purposes, and over NCCL each that communicates takes
    memory of the GPU.
    """
    create = dist.new_group
    made = {(tuple(range(dist.get_world_size())), None): dist.group.WORLD}

    def new_group(ranks, backend=None, **settings):
        key = tuple(sorted(ranks)), backend
        if key not in made:
            made[key] = create(ranks, backend=backend, **settings)
        return made[key]

    dist.new_group = new_group
    try:
        yield
    finally:
        dist.new_group = create


def _open_groups() -> None:
    """Communicate once in every group, in the same order on every rank.

    NCCL takes memory of the GPU when a group first communicates, which is too late in the middle of
    a step that has filled it. Two ranks that begin with different groups would wait for ever.
    """
    spoken = torch.zeros(1, device=device())
    experts = parallel_state.get_expert_model_parallel_group()
    groups = (
        dist.group.WORLD,
        parallel_state.get_tensor_model_parallel_group(),
        parallel_state.get_data_parallel_group(),
        parallel_state.get_data_parallel_group(with_context_parallel=True),
        parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True),
        parallel_state.get_tensor_and_context_parallel_group(),
        parallel_state.get_expert_data_parallel_group(),
        parallel_state.get_pipeline_model_parallel_group(),
        parallel_state.get_embedding_group(check_initialized=False),  # only first and last stages have one
        parallel_state.get_expert_tensor_parallel_group(),
        parallel_state.get_context_parallel_group(),
        experts,
    )
    for group in dict.fromkeys(groups):  # a set would have an order of its own on each rank
        if group is not None:
            dist.all_reduce(spoken, group=group)
    sent = torch.zeros(experts.size(), device=device())
    dist.all_to_all_single(torch.empty_like(sent), sent, group=experts)
    dist.all_gather_into_tensor(sent, spoken, group=experts)


def _choose_algorithms(deterministic: bool) -> None:
    """Let torch refuse what would not give the same bits twice, or allow it again. On a CPU nothing changes."""
    if deterministic:
        # read when cuBLAS and NCCL start: a workspace of fixed size, and one way of summing over ranks
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        os.environ.setdefault("NCCL_ALGO", "Ring")
        torch.backends.cudnn.benchmark = False
        torch.utils.deterministic.fill_uninitialized_memory = (
            False  # for finding bugs; costs a write of every new tensor
        )
    torch.use_deterministic_algorithms(deterministic)


def seed_all(seed: int) -> None:
    """Set every generator of this rank: the same on all ranks outside tensor-parallel regions, different inside."""
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def stop() -> None:
    """Leave the job; what `start` changed in this process is put back."""
    global _store
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
    _store = None
    _put_back()


def _put_back() -> None:
    global _undo
    atexit.unregister(_put_back)
    undo, _undo = _undo, None
    if undo is not None:
        undo.close()


@contextlib.contextmanager
def borrowed() -> Iterator[None]:
    """Around a job in a process that goes on afterwards: it ends as `stop` leaves it, or still runs where it ran before."""
    if _undo is not None:
        yield
        return
    try:
        yield
    except BaseException:
        # of several ranks the others may be gone or wait, and leaving groups waits for them: the process ends anyway
        if "RANK" not in os.environ:
            stop()
        raise
    stop()


@contextlib.contextmanager
def _same_algorithms() -> Iterator[None]:
    """Torch's choice of algorithms and its generator are afterwards as before."""
    state, benchmark = torch.get_rng_state(), torch.backends.cudnn.benchmark
    fills = torch.utils.deterministic.fill_uninitialized_memory
    is_strict, only_warns = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    try:
        yield
    finally:
        torch.set_rng_state(state)
        torch.backends.cudnn.benchmark = benchmark
        torch.utils.deterministic.fill_uninitialized_memory = fills
        torch.use_deterministic_algorithms(is_strict, warn_only=only_warns)
