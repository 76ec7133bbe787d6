"""Our losses against TRL's own, on the same random log-probabilities: values and gradients, to fp32 rounding.

TRL's losses are methods of its trainers. Each is called here unbound, on a stand-in that holds the settings it reads, with a model
that returns the log-probabilities of the test; nothing of the method is copied or replaced. Left out, as TRL computes them in the
middle of its rollouts: advantages, and the ratio of trainer to engine, which is given to both sides.
"""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from glm45_tune.rl.losses import answer_weights, divergence, policy_losses, sequence_ratios
from glm45_tune.rl.preference import kto_losses, pair_losses

ROUNDING = 2e-6
"""Sums of up to 60 terms in fp32, each side in its own order: a few units of 6e-8 times the terms."""
ANSWERS, LONGEST = 6, 10


class Alone(SimpleNamespace):
    """What a trainer asks of accelerate, in one process."""

    num_processes, device = 1, torch.device("cpu")

    def gather(self, values):
        return values

    gather_for_metrics = gather

    def reduce(self, values, reduction):
        return values


def trainer(**settings) -> SimpleNamespace:
    """A stand-in for `self`, in evaluation: no accumulation, no counters."""
    model = SimpleNamespace(training=False)
    metrics = defaultdict(lambda: defaultdict(list))
    plain = {"aux_loss_enabled": False, "_total_train_tokens": 0, "precompute_ref_logps": True}
    return SimpleNamespace(model=model, accelerator=Alone(), _metrics=metrics, **plain | settings)


def outputs(logps: torch.Tensor) -> SimpleNamespace:
    """What TRL's fused head returns; all but log_probs is for its metrics."""
    zeros = torch.zeros_like(logps)
    return SimpleNamespace(log_probs=logps, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())


def drawn(seed: int) -> SimpleNamespace:
    """Answers of random lengths, padded to LONGEST: `mask`, and log-probabilities of policy, old policy, reference and engine."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, LONGEST + 1, (ANSWERS,), generator=generator)
    mask = torch.arange(LONGEST) < lengths[:, None]
    policy, old, reference, engine = (torch.randn(4, ANSWERS, LONGEST, generator=generator) * 0.3 - 1).unbind()
    return SimpleNamespace(
        lengths=lengths.numpy(),
        mask=mask,
        policy=policy,
        old=old,
        reference=reference,
        ratio=(old - engine).exp().clamp(max=2),
        advantages=torch.randn(ANSWERS, generator=generator),
    )


def with_gradient(loss, values: torch.Tensor) -> tuple[float, torch.Tensor]:
    values = values.clone().requires_grad_()
    found = loss(values)
    return found.item(), torch.autograd.grad(found, values)[0]


def differ(ours, theirs) -> float:
    """The larger of the differences of loss and of gradient, as a share of what TRL has."""
    largest = theirs[1].abs().max()
    return max(abs(ours[0] - theirs[0]) / abs(theirs[0]), ((ours[1] - theirs[1]).abs().max() / largest).item())


# -- policy gradient -----------------------------------------------------------------------------------------------------------


def trl_policy(drawn, kind: str, level: str, low: float, high: float, coef: float):
    from trl import GRPOTrainer

    def loss(policy):
        it = trainer(
            _get_per_token_logps_and_entropies=lambda *_, **__: (policy, torch.zeros_like(policy), None),
            args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
            loss_type=kind, importance_sampling_level=level, beta=coef, epsilon_low=low, epsilon_high=high,
            top_entropy_quantile=1.0, off_policy_mask_threshold=None, _entropy_bonus_enabled=False,
            use_vllm=True, vllm_importance_sampling_correction=True, max_completion_length=LONGEST + 2,
        )  # fmt: skip
        prompt = torch.zeros(ANSWERS, 1, dtype=torch.long)
        batch = {
            "prompt_ids": prompt, "prompt_mask": prompt + 1, "completion_ids": torch.zeros_like(drawn.mask, dtype=torch.long),
            "completion_mask": drawn.mask.long(), "num_items_in_batch": drawn.mask.sum(), "advantages": drawn.advantages,
            "old_per_token_logps": drawn.old, "ref_per_token_logps": drawn.reference, "importance_sampling_ratio": drawn.ratio,
        }  # fmt: skip
        return GRPOTrainer._compute_loss(it, None, batch)

    return with_gradient(loss, drawn.policy)


def our_policy(drawn, kind: str, average: str, low: float, high: float, coef: float):
    """As `training/policy.py` does it: the answers end to end, every token weighed."""
    mask, sequence = drawn.mask.reshape(-1), torch.arange(ANSWERS).repeat_interleave(LONGEST)
    weights = torch.from_numpy(answer_weights(drawn.lengths, average, LONGEST + 2)).float()[sequence]

    def loss(policy):
        logp = policy.reshape(-1)
        logs = torch.where(mask, logp - drawn.old.reshape(-1), 0.0)
        if kind == "gspo":
            logs = sequence_ratios(logs, mask, sequence, ANSWERS, lambda x: x, lambda x: x)
        each, _ = policy_losses(logp, logs, drawn.advantages[sequence], kind, low, high)
        each = each * drawn.ratio.reshape(-1) + coef * divergence(logp, drawn.reference.reshape(-1), "k3")
        return torch.where(mask, each * weights, 0.0).sum()

    return with_gradient(loss, drawn.policy)


@pytest.mark.parametrize(
    "ours, theirs",
    [
        (("grpo", "sequence", 0.2, 0.2), ("grpo", "token", 0.2, 0.2)),
        (("grpo", "token", 0.2, 0.28), ("dapo", "token", 0.2, 0.28)),
        (("grpo", "token", 0.1, 0.2), ("bnpo", "token", 0.1, 0.2)),
        (("grpo", "constant", 0.2, 0.2), ("dr_grpo", "token", 0.2, 0.2)),
        (("gspo", "sequence", 0.03, 0.04), ("grpo", "sequence", 0.03, 0.04)),
        # TRL's epsilon_high is here the highest ratio itself, and it has no lowest one
        (("cispo", "token", 1.0, 0.2), ("cispo", "token", 0.0, 1.2)),
    ],
    ids=["grpo", "dapo", "bnpo", "dr_grpo", "gspo", "cispo"],
)
def test_policy_losses_are_trls(ours, theirs):
    """Loss and gradient of every log-probability, importance ratios and k3 divergence included; wrong averages are seen."""
    for seed in range(3):
        case = drawn(seed)
        for coef in (0.0, 0.05):
            reference = trl_policy(case, *theirs, coef)
            assert differ(our_policy(case, *ours, coef), reference) < ROUNDING
            for average in {"sequence", "token", "constant"} - {ours[1]}:
                assert differ(our_policy(case, ours[0], average, *ours[2:], coef), reference) > 0.01
    other = "gspo" if ours[0] != "gspo" else "grpo"
    assert differ(our_policy(case, other, *ours[1:], coef), reference) > 0.01


# -- preference ----------------------------------------------------------------------------------------------------------------


def preference_batch(drawn) -> dict:
    """A batch whose sequences begin with one token of prompt; log_probs, as TRL's head gives them, are 0 where nothing is trained."""
    ids = torch.zeros(ANSWERS, LONGEST + 1, dtype=torch.long)
    mask = torch.cat([torch.zeros(ANSWERS, 1, dtype=torch.long), drawn.mask.long()], 1)
    return {"input_ids": ids, "attention_mask": ids + 1, "completion_mask": mask}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind, normalised", [("sigmoid", False), ("ipo", True), ("sigmoid", True)])
def test_pair_losses_are_trls(kind, normalised, seed):
    """DPO; IPO, which TRL takes over means of tokens as `length_normalised` does; and DPO over means (TRL's sigmoid_norm)."""
    from trl import DPOTrainer

    case, half = drawn(seed), ANSWERS // 2
    reference = (case.reference * case.mask).sum(1)

    def theirs(policy):
        it = trainer(
            loss_types=["sigmoid_norm" if normalised and kind == "sigmoid" else kind],
            loss_weights=[1.0], beta=0.3, ld_alpha=None, f_divergence_type="reverse_kl", use_weighting=False,
        )  # fmt: skip
        batch = preference_batch(case) | {"ref_chosen_logps": reference[:half], "ref_rejected_logps": reference[half:]}
        return DPOTrainer._compute_loss(it, lambda **_: outputs(policy * case.mask), batch, False)

    def ours(policy, beta=0.3):
        sums = torch.stack([(policy * case.mask).sum(1), reference])
        sums = sums / torch.from_numpy(case.lengths) if normalised else sums
        return pair_losses(sums[0, :half], sums[0, half:], sums[1, :half], sums[1, half:], kind, beta).mean()

    wanted = with_gradient(theirs, case.policy)
    assert differ(with_gradient(ours, case.policy), wanted) < ROUNDING
    assert differ(with_gradient(lambda policy: ours(policy, 0.31), case.policy), wanted) > 0.01


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shift", [1.0, -1.0])
def test_kto_is_trls(shift, seed):
    """Desirable and undesirable answers with weights, the reference point from answers to other prompts: positive, and clamped at 0."""
    from trl import KTOTrainer

    case = drawn(seed)
    labels = torch.tensor([True, False, True, True, False, False])
    reference, mixed = (case.reference * case.mask).sum(1), (case.old * case.mask).sum(1)
    mixed_reference = mixed - shift * 0.1 * torch.arange(ANSWERS)

    def theirs(policy):
        it = trainer(
            _compute_kl_logps=lambda *_: mixed,
            loss_type="kto", calculate_KL=True, beta=0.3, desirable_weight=1.5, undesirable_weight=0.5,
        )  # fmt: skip
        batch = preference_batch(case) | {"label": labels, "ref_logps": reference, "ref_KL_logps": mixed_reference}
        return KTOTrainer._compute_loss(it, lambda **_: outputs(policy * case.mask), batch, False)

    def ours(policy, weights=(1.5, 0.5)):
        kl = (mixed - mixed_reference).mean().clamp(min=0)
        assert (kl > 0) == (shift > 0)
        return kto_losses((policy * case.mask).sum(1), reference, labels, kl, 0.3, weights).mean()

    wanted = with_gradient(theirs, case.policy)
    assert differ(with_gradient(ours, case.policy), wanted) < ROUNDING
    assert differ(with_gradient(lambda policy: ours(policy, (0.5, 1.5)), case.policy), wanted) > 0.01
