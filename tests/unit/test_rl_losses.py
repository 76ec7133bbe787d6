"""Every loss of preference tuning and reinforcement learning, held to the papers' formulas written out, answer by answer."""

import math

import numpy as np
import pytest
import torch

from glm45_tune.rl.advantages import advantages, equal_groups, overlong_penalties
from glm45_tune.rl.losses import (
    answer_weights,
    divergence,
    importance_weights,
    policy_losses,
    sequence_ratios,
    sum_by_sequence,
)
from glm45_tune.rl.preference import kto_losses, pair_losses


@pytest.fixture(autouse=True)
def in_fp64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def same(value):
    return value


def test_advantages_by_hand():
    rewards, groups = np.array([1.0, 0.0, 0.0, 1.0, 5.0, 5.0, 2.0]), np.array([0, 0, 0, 0, 1, 1, 2])
    deviation = math.sqrt(4 * 0.25 / 3) + 1e-4
    half = 0.5 / deviation
    assert advantages(rewards, groups, "group") == pytest.approx([half, -half, -half, half, 0, 0, 0])
    assert advantages(rewards, groups, "centred") == pytest.approx([0.5, -0.5, -0.5, 0.5, 0, 0, 0])
    third = 2 / 3  # 1 − mean(0, 0, 1)
    assert advantages(rewards, groups, "leave_one_out") == pytest.approx([third, -third, -third, third, 0, 0, 0])
    assert equal_groups(rewards, groups).tolist() == [False] * 4 + [True] * 3


@pytest.mark.parametrize("kind", ["group", "centred", "leave_one_out"])
def test_an_answer_without_a_reward_changes_no_other(kind):
    generator = np.random.default_rng(3)
    rewards, groups = generator.normal(size=12), np.repeat([4, 9, 2], 4)
    holed = rewards.copy()
    holed[[1, 6, 7]] = np.nan
    kept = ~np.isnan(holed)
    found = advantages(holed, groups, kind)
    assert not found[~kept].any() and found[kept] == pytest.approx(advantages(rewards[kept], groups[kept], kind))
    for group in (4, 9, 2):
        assert found[groups == group].sum() == pytest.approx(0, abs=1e-12)
    shuffle = generator.permutation(12)
    assert advantages(holed[shuffle], groups[shuffle], kind) == pytest.approx(found[shuffle])


def test_overlong_shaping_is_the_papers():
    """DAPO's equation 13 with L_max 100 and L_cache 20."""
    lengths = np.array([0, 80, 81, 90, 100])
    assert overlong_penalties(lengths, 100, 20, 1.0) == pytest.approx([0, 0, -0.05, -0.5, -1])
    assert not overlong_penalties(lengths, 100, 0, 1.0).any()


def random_answers(seed: int):
    """Log-probabilities of answers of random lengths as lists, and laid end to end with padding, a prompt token between them."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (5,), generator=generator).tolist()

    def draw():
        return [torch.randn(length, generator=generator) * 0.3 - 1 for length in lengths]

    def flat(parts, fill):
        return torch.cat(
            [torch.cat([torch.full((1,), fill).to(part), part]) for part in parts] + [parts[0].new_zeros(2)]
        )

    sequence = torch.cat([torch.full((length + 1,), n) for n, length in enumerate(lengths)] + [torch.full((2,), -1)])
    mask = flat([torch.ones(length, dtype=torch.bool) for length in lengths], False)
    return lengths, draw, flat, sequence, mask


def reference_loss(kind, average, new, old, advantage, low, high, longest):
    """Equations of GRPO (2402.03300), DAPO (2503.14476), Dr.GRPO (2503.20783), GSPO (2507.18071) and CISPO (2506.13585)."""
    answers = []
    for logp, before, a in zip(new, old, advantage):
        ratio = (logp - before).exp()
        if kind == "gspo":
            ratio = ((logp - before).sum() / len(logp)).exp().expand(len(logp))
        clip = ratio.clamp(1 - low, 1 + high)
        answers.append(-clip.detach() * a * logp if kind == "cispo" else -torch.stack((ratio * a, clip * a)).amin(0))
    if average == "sequence":
        return sum(answer.mean() for answer in answers) / len(answers)
    total = sum(answer.sum() for answer in answers)
    return total / (sum(map(len, answers)) if average == "token" else len(answers) * longest)


@pytest.mark.parametrize("average", ["sequence", "token", "constant"])
@pytest.mark.parametrize("kind", ["grpo", "gspo", "cispo"])
def test_policy_losses_and_gradients_are_the_papers(kind, average):
    for seed in range(5):
        lengths, draw, flat, sequence, mask = random_answers(seed)
        new, old = [part.requires_grad_() for part in draw()], draw()
        advantage = torch.randn(5, generator=torch.Generator().manual_seed(seed + 50))
        wanted = reference_loss(kind, average, new, old, advantage, 0.2, 0.28, 16)
        gradients = torch.autograd.grad(wanted, new)

        logp = flat([part.detach() for part in new], -7.0).requires_grad_()
        logs = logp - flat(old, -2.0)
        if kind == "gspo":
            logs = sequence_ratios(logs, mask, sequence, 5, same, same)
        a = torch.where(sequence >= 0, advantage[sequence.clamp(min=0)], 0.0)
        losses, clipped = policy_losses(logp, logs, a, kind, 0.2, 0.28)
        weights = torch.from_numpy(answer_weights(np.array(lengths), average, 16))[sequence.clamp(min=0)] * mask
        loss = (losses * weights).sum()
        assert loss.item() == pytest.approx(wanted.item(), abs=1e-12)
        (gradient,) = torch.autograd.grad(loss, logp)
        assert torch.allclose(gradient[mask], torch.cat(gradients), atol=1e-12) and not gradient[~mask].any()
        assert 0 < clipped[mask].double().mean() < 1 or kind == "gspo"


def test_the_first_update_has_ratio_one_and_no_divergence():
    """New and old the same bits: the ratio is exactly 1, every KL estimate exactly 0, nothing is clipped."""
    logp = torch.randn(9, dtype=torch.float32)
    a = torch.randn(9, dtype=torch.float32)
    losses, clipped = policy_losses(logp, logp - logp.clone(), a, "grpo", 0.0, 0.0)
    assert torch.equal(losses, -a) and not clipped.any()
    for kind in ("k1", "k2", "k3"):
        assert not divergence(logp, logp.clone(), kind).any()


def test_divergence_estimators_by_hand():
    p, q = torch.log(torch.tensor([0.5, 0.2])), torch.log(torch.tensor([0.25, 0.4]))
    assert divergence(p, q, "k1").tolist() == pytest.approx([math.log(2), -math.log(2)])
    assert divergence(p, q, "k2").tolist() == pytest.approx([math.log(2) ** 2 / 2] * 2)
    assert divergence(p, q, "k3").tolist() == pytest.approx([0.5 - 1 + math.log(2), 2 - 1 - math.log(2)])


def test_divergence_estimators_estimate_the_divergence():
    """k1 and k3 are unbiased: their expectation over all words is KL(p ‖ q); k2's is not."""
    p, q = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)).log_softmax(1)
    exact = (p.exp() * (p - q)).sum().item()
    means = {kind: (p.exp() * divergence(p, q, kind)).sum().item() for kind in ("k1", "k2", "k3")}
    assert (
        means["k1"] == pytest.approx(exact)
        and means["k3"] == pytest.approx(exact)
        and means["k2"] != pytest.approx(exact)
    )


def test_truncated_importance_sampling_by_hand():
    old, engine = (
        torch.log(torch.tensor([0.5, 0.5, 0.9, 0.3, 0.5])),
        torch.log(torch.tensor([0.25, 0.1, 0.9, 0.6, 0.5])),
    )
    sequence, mask = torch.tensor([0, 0, 1, 1, -1]), torch.tensor([True, True, False, True, False])
    weigh = importance_weights
    assert weigh(old, engine, mask, sequence, 2, "token", 3.0)[mask].tolist() == pytest.approx([2, 3, 0.5])
    assert weigh(old, engine, mask, sequence, 2, "sequence", 20.0)[mask].tolist() == pytest.approx([10, 10, 0.5])
    assert weigh(old, engine, mask, sequence, 2, "none", 3.0).tolist() == [1.0] * 5


def test_answers_left_out_weigh_nothing():
    weights = answer_weights(np.array([4, 0, 2]), "sequence", 8)
    assert weights == pytest.approx([1 / 8, 0, 1 / 4])
    assert answer_weights(np.array([4, 0, 2]), "token", 8) == pytest.approx([1 / 6, 0, 1 / 6])
    assert answer_weights(np.array([4, 0, 2]), "constant", 8) == pytest.approx([1 / 16, 0, 1 / 16])
    assert not answer_weights(np.zeros(3, int), "token", 8).any()


def test_sums_leave_padding_out():
    found = sum_by_sequence(torch.tensor([1.0, 2, 3, 4]), torch.tensor([1, 0, 1, -1]), 3)
    assert found.tolist() == [2, 4, 0]


def test_preference_losses_by_hand():
    values = [torch.tensor([value]) for value in (-10.0, -12.0, -11.0, -11.5)]
    h = (-10 + 12) - (-11 + 11.5)
    assert pair_losses(*values, "sigmoid", 0.1).item() == pytest.approx(-math.log(1 / (1 + math.exp(-0.1 * h))))
    assert pair_losses(*values, "ipo", 0.1).item() == pytest.approx((h - 5) ** 2)
    policy, reference, good = torch.tensor([-10.0, -12.0]), torch.tensor([-11.0, -11.5]), torch.tensor([True, False])
    found = kto_losses(policy, reference, good, torch.tensor(0.25), 0.2, (1.5, 0.5))

    def sigma(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    wanted = [1.5 * (1 - sigma(0.2 * (1 - 0.25))), 0.5 * (1 - sigma(0.2 * (0.25 + 0.5)))]
    assert found.tolist() == pytest.approx(wanted)


def test_before_the_first_update_every_pair_loss_is_its_constant():
    same_values = torch.randn(6)
    others = torch.randn(6)
    assert pair_losses(same_values, others, same_values, others, "sigmoid", 0.3).tolist() == pytest.approx(
        [math.log(2)] * 6
    )
    assert pair_losses(same_values, others, same_values, others, "ipo", 0.5).tolist() == pytest.approx([1.0] * 6)
