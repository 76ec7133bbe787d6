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
        if torch.cuda.is_available():  # see runtime's groups: NCCL takes its memory now, not in the middle of a step
            dist.all_reduce(torch.zeros(1, device=torch.cuda.current_device()), group=self._backward_group)

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
        """Returns (activations from the previous stage, gradients from the next, None); each None where not asked for.

        Lengths go ahead, for rows differ. Only a length that is needed is waited for before the tensors are on their way: whoever
        waited for its own lengths to be taken could wait for a rank that is not there yet and waits itself for a tensor to be taken.
        """
        ways = (
            (tensor_send_next, self.next_rank, self.prev_rank if recv_prev else None, self.pp_group),
            (tensor_send_prev, self.prev_rank, self.next_rank if recv_next else None, self._backward_group),
        )
        device = torch.cuda.current_device()
        shapes = [torch.empty(3, dtype=torch.int64, device=device) for _ in ways]
        under_way, lengths = [], []
        for (sent, *way), shape in zip(ways, shapes):
            ours = None if sent is None else torch.tensor(sent.shape, dtype=torch.int64, device=device)
            lengths.append(_exchange(ours, *way, shape))
        received = []
        for (sent, target, source, group), shape, requests in zip(ways, shapes, lengths):
            into = None
            if source is not None:
                requests.pop().wait()  # a receive stands last, or all is one request
                into = torch.empty(shape.tolist(), dtype=self.config.pipeline_dtype, device=device, requires_grad=True)
            received.append(into)
            under_way += requests + _exchange(sent, target, source, group, into)
        for request in under_way:
            request.wait()
        return *received, None


def _exchange(sent: torch.Tensor | None, target: int, source: int | None, group, into: torch.Tensor | None) -> list:
    """Begin to send to `target`, where there is something, and to receive from `source`, where it is given."""
    operations = [dist.P2POp(dist.isend, sent, target, group)] if sent is not None else []
    operations += [dist.P2POp(dist.irecv, into, source, group)] if source is not None else []
    return dist.batch_isend_irecv(operations) if operations else []
