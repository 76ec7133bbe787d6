"""How a row is cut over context ranks: every token once, every key where it belongs, the same work for all."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glm45_tune.data.batch import collate
from glm45_tune.data.chat import Sample
from glm45_tune.data.context import shares

lengths_of_documents = st.lists(st.integers(1, 40), min_size=1, max_size=12)


def _document_of(bounds: list[int], token: int) -> int:
    return int(np.searchsorted(bounds, token, side="right")) - 1


@settings(max_examples=60, deadline=None)
@given(lengths_of_documents, st.sampled_from([1, 2, 3, 4, 8]), st.sampled_from([1, 2, 4]))
def test_every_token_is_held_once_and_sees_its_document_up_to_itself(lengths, size, multiple):
    bounds = np.cumsum([0, *lengths]).tolist()
    parts = shares(bounds, size, multiple)
    held = np.concatenate([part.index[part.index >= 0] for part in parts])
    assert sorted(held.tolist()) == list(range(bounds[-1]))
    # the gathered buffer, by the row's token (−1: nothing)
    buffer = np.full(size * parts[0].longest, -1)
    for rank, part in enumerate(parts):
        assert len(part.index) % multiple == 0 and len(part.index) <= part.longest == parts[0].longest
        buffer[rank * part.longest : rank * part.longest + len(part.index)] = part.index
    for part in parts:
        keys = part.keys.numpy()
        assert len(np.unique(keys[: part.num_front])) == part.num_front
        assert len(np.unique(keys[part.num_front :])) == len(keys) - part.num_front
        for a, b, c, d in zip(part.bounds, part.bounds[1:], part.key_bounds, part.key_bounds[1:]):
            tokens, seen = part.index[a:b].tolist(), buffer[keys[c:d]].tolist()
            if tokens[0] < 0:  # padding sees itself
                assert set(tokens) == set(seen) == {-1} and len(seen) == len(tokens)
                continue
            start = bounds[_document_of(bounds, tokens[0])]
            assert tokens == list(range(tokens[0], tokens[-1] + 1)) and seen == list(range(start, tokens[-1] + 1))
        assert part.bounds[-1] == len(part.index) and part.key_bounds[-1] == len(keys)


def test_ranks_share_the_work_evenly():
    """Pairs of query and key a rank computes, over the mean: a long document alone, and many short ones."""
    for lengths in ([32768], [5000, 900, 31, 2, 700, 1], [7] * 500):
        bounds = np.cumsum([0, *lengths]).tolist()
        parts = shares(bounds, 8, 1)
        work = [
            sum(
                (b - a) * (d - c) - (b - a) * (b - a - 1) / 2
                for a, b, c, d in zip(part.bounds, part.bounds[1:], part.key_bounds, part.key_bounds[1:])
            )
            for part in parts
        ]
        assert max(work) / np.mean(work) < 1.05
        assert max(len(part.index) for part in parts) / np.mean([len(part.index) for part in parts]) < 1.05


def test_a_cut_row_keeps_tokens_labels_and_weights_together():
    samples = [Sample(np.arange(10 * n, 10 * n + n + 3), np.ones(n + 3, np.float32), "x", n) for n in range(1, 6)]
    whole = collate(samples, num_predictions=2, multiple=1, pad_id=0)
    parts = [whole.cut(share, pad_id=0) for share in shares(whole.bounds, 4, 2)]
    together = sorted(
        (*row[:3].tolist(), *row[3:].tolist())
        for part in parts
        for row in torch.cat((part.tokens[None], part.positions[None], part.labels, part.weights))[
            :, : len(part.tokens) - part.num_padding
        ].T
    )
    expected = torch.cat((whole.tokens[None], whole.positions[None], whole.labels, whole.weights)).T
    assert together == sorted((*row[:3].tolist(), *row[3:].tolist()) for row in expected)
    assert all(part.weights[:, len(part.tokens) - part.num_padding :].sum() == 0 for part in parts)


def test_a_micro_batch_without_rows_is_all_padding():
    empty = collate([], num_predictions=1, multiple=1, pad_id=3)
    for share in shares(empty.bounds, 2, 2):
        part = empty.cut(share, pad_id=3)
        assert part.num_padding == len(part.tokens) == 2 and part.weights.sum() == 0


@pytest.mark.parametrize("square", [True, False])
def test_a_piece_attends_as_the_end_of_its_document_does(square):
    """The last queries of a whole causal attention are the piece's: 1e-6 in fp32."""
    import torch.nn.functional as F

    from glm45_tune.mcore.layers.context_parallel import _one_piece

    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(17, heads, 8, generator=generator) for heads in (4, 2, 2))
    whole = F.scaled_dot_product_attention(
        *(x.transpose(0, 1)[None] for x in (query, key, value)), is_causal=True, enable_gqa=True
    )[0].transpose(0, 1)
    first = 0 if square else 11
    assert (_one_piece(query[first:], key, value) - whole[first:]).abs().max() < 1e-6
