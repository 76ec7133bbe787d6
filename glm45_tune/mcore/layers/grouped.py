"""Products of rows sorted by expert, each with its expert's matrix: one kernel where there is one, else a loop."""

from itertools import pairwise

import torch

from glm45_tune.mcore.layers import fast


def _one_kernel(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether a grouped kernel takes them: bf16 on a GPU, rows of whole 16-byte words, something to do."""
    sizes = (a.shape[1], *b.shape[1:])
    return a.is_cuda and a.dtype == torch.bfloat16 and a.shape[0] > 0 and all(size % 8 == 0 for size in sizes)


def _rows_of_experts(x: torch.Tensor, edges: torch.Tensor) -> list[torch.Tensor]:
    return [x[first:last] for first, last in pairwise(edges.tolist())]


def grouped_mm(x: torch.Tensor, weight: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
    """x [N, A] sorted by expert, weight [E, A, B] → [N, B], each row times its expert's matrix."""
    if _one_kernel(x, weight):
        return fast.grouped_mm(x, weight, edges)
    return torch.cat([rows @ w for rows, w in zip(_rows_of_experts(x, edges), weight)])


def grouped_add_(
    output: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, edges: torch.Tensor, scaling: float
) -> None:
    """Add scaling times what `grouped_mm` gives to output [N, B]."""
    if _one_kernel(x, weight):
        fast.grouped_add_(output, x, weight, edges, scaling)
    else:
        output.add_(grouped_mm(x, weight, edges), alpha=scaling)


def grouped_outer(x: torch.Tensor, y: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
    """x [N, A], y [N, B], both sorted by expert → [E, A, B], the sum over each expert's rows of xᵀ y."""
    if _one_kernel(x, y):
        return fast.grouped_outer(x, y, edges)
    return torch.stack([a.t() @ b for a, b in zip(_rows_of_experts(x, edges), _rows_of_experts(y, edges))])
