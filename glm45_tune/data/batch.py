"""One micro batch: samples laid end to end, with positions, edges, labels and weights."""

from dataclasses import dataclass, field, replace

import numpy as np
import torch

from glm45_tune.data.chat import Sample
from glm45_tune.data.context import Share


@dataclass(frozen=True)
class Batch:
    """T tokens, M = 1 + number of MTP layers predictions each.

    tokens, positions int64 [T]; bounds: edges of the documents, 0 first, T last; labels int64 [M, T]: what each position's
    m-th prediction should be; weights float32 [M, T]: how much it counts; num_padding: tokens at the end that are no data;
    share: where the row is cut over context ranks, which part of it this is (bounds then are the edges of its pieces).
    sequence int64 [T]: which sample each token belongs to, −1 padding. along: what else goes with the tokens, each [T, …], at
    the position that predicts the token it is of. routes: for each of this rank's routers, by layer number, the experts its part
    of the row is to go to, int [its tokens, K], −1 where the router chooses; None: it chooses all.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    bounds: list[int]
    labels: torch.Tensor
    weights: torch.Tensor
    num_padding: int = 0
    share: Share | None = None
    sequence: torch.Tensor | None = None
    num_samples: int = 0
    along: dict[str, torch.Tensor] = field(default_factory=dict)
    routes: dict[int, torch.Tensor] | None = None

    @property
    def counted(self) -> list[torch.Tensor]:
        """For each prediction which tokens' weigh anything, int64: for the others no head needs to run. Asked for on the host."""
        return [weights.nonzero().squeeze(1) for weights in self.weights]

    def to(self, device: torch.device) -> "Batch":
        names = ("tokens", "positions", "labels", "weights", "sequence")
        moved = {
            name: tensor.to(device, non_blocking=True) for name in names if (tensor := getattr(self, name)) is not None
        }
        along = {name: values.to(device, non_blocking=True) for name, values in self.along.items()}
        return replace(self, **moved, along=along, share=self.share and self.share.to(device))

    def cut(self, share: Share, pad_id: int) -> "Batch":
        """The part of this row that a context rank holds. The row must be data alone, or padding alone."""
        assert self.num_padding in (0, len(self.tokens)), "padding inside a row that is to be cut"
        index = torch.from_numpy(share.index).clamp(min=0)
        is_padding = torch.from_numpy(share.index < 0)
        num_padding = len(index) if self.num_padding else int(is_padding.sum())
        return Batch(
            self.tokens[index].masked_fill(is_padding, pad_id),
            self.positions[index].masked_fill(is_padding, 0),
            share.bounds,
            self.labels[:, index].masked_fill(is_padding, pad_id),
            self.weights[:, index].masked_fill(is_padding, 0),
            num_padding,
            share,
            self.sequence[index].masked_fill(is_padding, -1),
            self.num_samples,
            {name: values[index] for name, values in self.along.items()},
            self.routes,
        )


def collate(
    samples: list[Sample],
    num_predictions: int,
    multiple: int,
    pad_id: int,
    along: dict[str, list[np.ndarray]] | None = None,
) -> Batch:
    """Lay samples end to end; a document of padding makes the length a multiple of `multiple` (tensor ranks cut it evenly).

    No samples make a batch of padding alone, which trains nothing: a rank that has no row left takes part with it.
    along: more values of every token, an array a sample, [tokens, …].
    """
    lengths = [len(sample.input_ids) for sample in samples]
    padding = -sum(lengths) % multiple or (0 if samples else multiple)
    documents = [(sample.input_ids, sample.loss_mask) for sample in samples]
    if padding:
        documents.append((np.full(padding, pad_id), np.zeros(padding, np.float32)))
        lengths.append(padding)
    labels = np.concatenate([_ahead(ids, num_predictions, pad_id) for ids, _ in documents], axis=1)
    weights = np.concatenate([_ahead(mask, num_predictions, 0.0) for _, mask in documents], axis=1)
    return Batch(
        torch.from_numpy(np.concatenate([ids for ids, _ in documents]).astype(np.int64)),
        torch.from_numpy(np.concatenate([np.arange(length) for length in lengths])),
        np.cumsum([0, *lengths]).tolist(),
        torch.from_numpy(labels.astype(np.int64)),
        torch.from_numpy(weights.astype(np.float32)),
        padding,
        sequence=torch.from_numpy(np.repeat([*range(len(samples)), *([-1] if padding else [])], lengths)),
        num_samples=len(samples),
        along={name: _along(values, padding) for name, values in (along or {}).items()},
    )


def _along(values: list[np.ndarray], padding: int) -> torch.Tensor:
    """The samples' values end to end, each where the token it is of is predicted; 0 behind the last ones and in padding."""
    moved = [np.concatenate([value[1:], np.zeros_like(value[:1])]) for value in values]
    shape = values[0].shape[1:] if values else ()
    return torch.from_numpy(
        np.concatenate([*moved, np.zeros((padding, *shape), values[0].dtype if values else np.float32)])
    )


def _ahead(values: np.ndarray, count: int, fill) -> np.ndarray:
    """[count, n]: row m holds each position's value m + 1 places on, `fill` behind the document's end."""
    padded = np.concatenate([values, np.full(count, fill, values.dtype)])
    return np.stack([padded[1 + m : 1 + m + len(values)] for m in range(count)])


def total_weights(samples: list[Sample], num_predictions: int) -> np.ndarray:
    """Sum of the weights of all predictions, float64 [num_predictions]: the denominators of the losses."""
    return sum(
        (_ahead(sample.loss_mask, num_predictions, 0.0).sum(axis=1, dtype=np.float64) for sample in samples),
        np.zeros(num_predictions),
    )
