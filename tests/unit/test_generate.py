"""The model in training writes as the model in training reads: log-probabilities, experts and limits of what is generated."""

import pytest
import torch

from glm45_tune.conversion.stream import open_model
from glm45_tune.mcore.generate import Writer, draw
from glm45_tune.mcore.layers.router import Replay, Router
from glm45_tune.mcore.load import load_weights
from glm45_tune.mcore.model import GLM45Model, ModelOptions
from glm45_tune.rl.engine import Request


@pytest.fixture(params=["air", "355b"])
def model(request, checkpoints, one_rank):
    source = open_model(checkpoints[request.param])
    model = GLM45Model(source.spec, one_rank, ModelOptions(temperature=0.8 if request.param == "air" else 1.0))
    load_weights(model, source)
    return model


def requests(count: int, groups: int, seed: int = 0) -> list[Request]:
    """Prompts of different lengths, each several times, the answers' limits different too."""
    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(0, 600, (3 + 7 * n,), generator=generator).tolist() for n in range(groups)]
    limits = torch.randint(1, 24, (count,), generator=generator).tolist()
    return [Request(prompts[n % groups], limit) for n, limit in enumerate(limits)]


def read(model, ids: list[int]) -> torch.Tensor:
    """Log-probability of each token but the first, by one pass over all of them."""
    tokens = torch.tensor(ids)
    with torch.no_grad():
        return -model(tokens, torch.arange(len(ids)), [0, len(ids)], torch.roll(tokens, -1)[None])[0, :-1]


def test_what_is_written_has_the_log_probabilities_it_is_read_with(model):
    """fp32: 1e-5. Answers end at a stop token or their limit, whatever goes on beside them; the twin: another token's differs."""
    asked = requests(24, 4)
    for concurrency in (24, 5):
        written = Writer(model, model.spec.eos_token_ids, concurrency).write(asked, seed=3, version=7)
        for request, answer in zip(asked, written, strict=True):
            assert len(answer.token_ids) == len(answer.logprobs) <= request.max_new_tokens and answer.version == 7
            stops = [token in model.spec.eos_token_ids for token in answer.token_ids]
            assert not any(stops[:-1]) and stops[-1] == (answer.finish == "stop")
            assert answer.finish == "stop" or len(answer.token_ids) == request.max_new_tokens
        for request, answer in list(zip(asked, written))[::3]:
            logps = read(model, request.token_ids + answer.token_ids)[len(request.token_ids) - 1 :]
            assert (logps - torch.tensor(answer.logprobs)).abs().max() <= 1e-5
            changed = read(model, [*request.token_ids[:-1], request.token_ids[-1] ^ 1, *answer.token_ids])
            assert (changed[len(request.token_ids) - 1 :] - torch.tensor(answer.logprobs)).abs().max() > 1e-3


def test_the_seed_decides_what_is_written(model):
    writer = Writer(model, model.spec.eos_token_ids, 8)
    asked = [Request([5, 6, 7], 12)] * 8
    first, again, other = (writer.write(asked, seed, 0) for seed in (1, 1, 2))
    assert first == again and first != other
    assert len({tuple(answer.token_ids) for answer in first}) > 4  # answers to one prompt differ


def test_draws_follow_the_distribution():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]]).expand(40_000, -1)
    tokens, logps = draw(logits, torch.Generator().manual_seed(0))
    shares = torch.bincount(tokens, minlength=4) / len(tokens)
    assert (shares - logits[0].softmax(0)).abs().max() < 0.01
    assert torch.equal(logps, logits.log_softmax(1).gather(1, tokens[:, None])[:, 0])


def test_the_experts_of_what_is_written_are_recorded_and_can_be_taken_again(model):
    """Recorded: of every token read, prompt and answer, those a pass over all of them chooses. Replayed: they decide, gaps apart."""
    routers = [module for module in model.modules() if isinstance(module, Router)]
    asked = requests(6, 2, seed=5)
    written = Writer(model, model.spec.eos_token_ids, 6, records_routing=True).write(asked, seed=0, version=0)
    request, answer = max(zip(asked, written), key=lambda pair: len(pair[1].token_ids))
    ids = request.token_ids + answer.token_ids
    for router in routers:
        router.router_replay = Replay()
    try:
        plain = read(model, ids)
        chosen = torch.stack([router.router_replay.history[0] for router in routers], 1)
        recorded = torch.from_numpy(answer.experts).long()
        assert torch.equal(recorded.sort(2)[0], chosen[:-1].sort(2)[0])
        for taken in (chosen, (chosen + 1) % model.spec.num_moe_experts, torch.full_like(chosen, -1)):
            for place, router in enumerate(routers):
                router.router_replay = Replay()
                router.router_replay.expect(taken[:, place])
            assert torch.equal(read(model, ids), plain) == (torch.equal(taken, chosen) or bool((taken < 0).all()))
            replay = routers[0].router_replay
            assert replay.asked == (taken[:, 0] >= 0).sum()
    finally:
        for router in routers:
            router.router_replay = None


def test_tokens_have_the_same_bits_with_gradient_and_without(model):
    """So the first update's ratio is exactly 1."""
    tokens = torch.randint(0, 600, (90,), generator=torch.Generator().manual_seed(1))
    arguments = (tokens, torch.arange(90), [0, 40, 90], torch.roll(tokens, -1)[None])
    with torch.no_grad():
        without = model(*arguments)
    assert torch.equal(model(*arguments).detach(), without)
