"""The loss straight from hidden states, a few rows of logits at a time, against torch's over all of them."""

import pytest
import torch
import torch.nn.functional as F

from glm45_tune.mcore.layers import loss

TOKENS, HIDDEN, WORDS = 37, 8, 50


def _losses_and_gradients(function, trains_head, factors, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator, requires_grad=True)
    head = torch.randn(WORDS, HIDDEN, generator=generator, requires_grad=trains_head)
    labels = torch.randint(0, WORDS, (TOKENS,), generator=generator)
    losses = function(hidden, head, labels)
    (losses * factors).sum().backward()
    return [losses.detach(), hidden.grad, *([head.grad] if trains_head else [])]


def _plain(hidden, head, labels):
    return F.cross_entropy(hidden @ head.t(), labels, reduction="none")


@pytest.fixture(params=[1, 7 * WORDS, 2**27], ids=["row by row", "seven rows", "at once"])
def some_logits(request, monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", request.param)


@pytest.mark.parametrize("trains_head", [False, True])
@pytest.mark.parametrize("counted", [range(TOKENS), [3, 4, 36], [0], []], ids=["all", "some", "one", "none"])
def test_only_what_counts_is_computed(some_logits, trains_head, counted):
    """Losses where they count, and every gradient, are those of all tokens with the others weighed 0."""
    is_counted = torch.zeros(TOKENS, dtype=torch.bool)
    is_counted[list(counted)] = True
    factors = torch.rand(TOKENS, generator=torch.Generator().manual_seed(1)) * is_counted
    index = torch.tensor(list(counted), dtype=torch.int64)
    ours = _losses_and_gradients(lambda *args: loss.linear_cross_entropy(*args, counted=index), trains_head, factors)
    plain = _losses_and_gradients(_plain, trains_head, factors)
    plain[0] = plain[0] * is_counted
    for own, theirs in zip(ours, plain, strict=True):
        torch.testing.assert_close(own, theirs)
    if len(counted) == TOKENS:
        unsaid = _losses_and_gradients(loss.linear_cross_entropy, trains_head, factors)
        assert all(torch.equal(own, again) for own, again in zip(ours, unsaid, strict=True))


def test_a_token_that_does_not_count_costs_no_logits(monkeypatch):
    """And what it says does not matter, however broken."""
    seen = []
    real = loss._row_sums
    monkeypatch.setattr(loss, "_row_sums", lambda logits, labels: seen.append(len(logits)) or real(logits, labels))
    hidden = torch.randn(TOKENS, HIDDEN)
    hidden[5] = float("nan")
    hidden.requires_grad_()
    head, labels, counted = torch.randn(WORDS, HIDDEN), torch.zeros(TOKENS, dtype=torch.int64), torch.tensor([1, 2, 30])
    losses = loss.linear_cross_entropy(hidden, head, labels, counted=counted)
    losses.sum().backward()
    assert seen == [3] and losses.isfinite().all() and hidden.grad.isfinite().all()
    assert (hidden.grad.abs().sum(1) > 0).nonzero().squeeze(1).tolist() == counted.tolist()
