"""Messages between interleaved pipeline stages: activations go forward in one group of ranks, gradients backward in another.

The last rank hands its activations on to the first one's next run of layers, so two ranks are each other's next and previous
at once. megatron sends both kinds in one group, where nothing but their order tells them apart, and refuses two ranks for it.
"""

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator


class TwoWayCommunicator(P2PCommunicator):
    """megatron's communicator with a group of its own for gradients. Made by all ranks of the job together."""

    def __init__(self, config):
        group = parallel_state.get_pipeline_model_parallel_group()
        super().__init__(group, config)
        pipelines: list = [None] * dist.get_world_size()
        dist.all_gather_object(pipelines, dist.get_process_group_ranks(group))
        self._backward_group, _ = dist.new_subgroups_by_enumeration(
            [list(ranks) for ranks in sorted(set(map(tuple, pipelines)))]
        )

    def _communicate(
        self,
        *,
        tensor_send_next,
        tensor_send_prev,
        recv_prev: bool,
        recv_next: bool,
        tensor_shape,
        wait_on_reqs: bool = True,
    ):
        """Returns (activations from the previous stage, gradients from the next, None); each None where not asked for."""
        forward = (tensor_send_next, self.next_rank, self.prev_rank if recv_prev else None, self.pp_group)
        backward = (tensor_send_prev, self.prev_rank, self.next_rank if recv_next else None, self._backward_group)
        shapes = [torch.empty(3, dtype=torch.int64, device=torch.cuda.current_device()) for _ in range(2)]
        lengths = [
            None if sent is None else torch.tensor(sent.shape, dtype=torch.int64, device=torch.cuda.current_device())
            for sent in (tensor_send_next, tensor_send_prev)
        ]
        self._exchange([(length, *way[1:], shape) for length, way, shape in zip(lengths, (forward, backward), shapes)])
        received = [
            None
            if way[2] is None
            else torch.empty(
                shape.tolist(), dtype=self.config.pipeline_dtype, device=torch.cuda.current_device(), requires_grad=True
            )
            for way, shape in zip((forward, backward), shapes)
        ]
        self._exchange([(*way, into) for way, into in zip((forward, backward), received)])
        return *received, None

    def _exchange(self, ways: list[tuple]) -> None:
        """Each way: (what to send or None, to whom, from whom or None, group, into what)."""
        requests = []
        for sent, target, source, group, into in ways:
            operations = [dist.P2POp(dist.isend, sent, target, group)] if sent is not None else []
            operations += [dist.P2POp(dist.irecv, into, source, group)] if source is not None else []
            requests += dist.batch_isend_irecv(operations) if operations else []
        for request in requests:
            request.wait()
