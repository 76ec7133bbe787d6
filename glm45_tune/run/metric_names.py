"""What each key of metrics.jsonl means; docs/reference/metrics.md is made from it.

A name in capitals stands for many: `loss/SOURCE` is one key a source.
"""

import re

METRICS = {
    "step": "Number of the optimizer step, from 1.",
    "train/loss": "Loss of the step: mean cross entropy of trained tokens (nats), or the method's own loss.",
    "train/mtp_loss": "Mean loss of the MTP layers' predictions.",
    "train/aux_loss": "Load-balancing loss before its coefficient, mean over MoE layers and micro batches.",
    "train/z_loss": "Router's z-loss before its coefficient, the same mean.",
    "train/grad_norm": "Norm of the whole gradient before clipping.",
    "train/learning_rate": "Learning rate of the step.",
    "train/tokens": "Tokens of the step, padding left out.",
    "train/trained_tokens": "Total loss weight of the step: trained tokens, each times its weight.",
    "train/skipped_steps": "Steps so far whose update was left out.",
    "loss/SOURCE": "Loss of one source or channel, where there are several.",
    "grad_norm/GROUP": "Gradient norm of one group of weights: attention, experts and so on.",
    "eval/loss": "Mean loss of the held-out rows.",
    "eval/NAME": "The method's other numbers on the held-out rows: accuracy, margin, reward_mean and so on.",
    "data/fill_ratio": "Tokens of the step over the tokens its packed rows could hold.",
    "moe/expert_load_max_over_mean": "Tokens of the busiest expert of all layers over its layer's mean.",
    "moe/load/LAYER": "The same of one layer.",
    "perf/step_seconds": "Seconds of the step, data and saving included.",
    "perf/tokens_per_second": "Tokens of the step over its seconds, all ranks together.",
    "perf/tokens_per_second_per_gpu": "The same over the number of ranks.",
    "perf/model_tflops_per_gpu": "Arithmetic of the model, without recomputation, in TFLOP/s a rank.",
    "perf/mfu": "That over the GPU's peak in bf16.",
    "perf/peak_memory_gib": "Most memory so far: the GPU's allocator, or the process on a CPU.",
    "perf/rollout_seconds": "RL: seconds to write and judge the answers.",
    "perf/train_seconds": "RL: seconds of the updates.",
    "perf/sync_seconds": "RL: seconds to give the engine the new weights.",
    "perf/waited_seconds": "RL, written ahead: seconds the trainer waited for answers.",
    "preference/margin": "Mean reward of chosen answers less that of rejected ones (labelled: of desirable and undesirable).",
    "preference/accuracy": "Share of pairs whose chosen answer has the higher reward.",
    "preference/reference_point": "KTO's estimate of KL(policy ‖ reference).",
    "preference/cross_entropy": "Mean cross entropy of the chosen answers, where sft_weight is set.",
    "preference/SIDE_reward": "Mean reward, beta · log(policy / reference), of one side's answers.",
    "preference/SIDE_logprob": "Mean log-probability of one side's answers.",
    "rl/reward_mean": "Mean reward of the step's answers that have one.",
    "rl/reward/NAME": "Mean of one reward before its weight.",
    "rl/reward_errors/KIND": "Answers whose reward failed in this way.",
    "rl/without_reward": "Answers without a reward.",
    "rl/equal_groups_share": "Share of answers whose group all has one reward, which teaches nothing.",
    "rl/kept_share": "Share of answers that dynamic sampling kept.",
    "rl/response_tokens_mean": "Mean length of an answer in tokens.",
    "rl/response_tokens_max": "Length of the longest answer.",
    "rl/truncated_share": "Share of answers that were cut at max_new_tokens.",
    "rl/aborted": "Answers that the engine broke off.",
    "rl/entropy": "Mean of −log p of the tokens drawn.",
    "rl/kl": "Mean k3 estimate of KL(policy ‖ reference) a token.",
    "rl/ratio_mean": "Mean ratio of the policy to that before the first update.",
    "rl/ratio_max": "Largest such ratio.",
    "rl/clipped_share": "Share of tokens whose ratio was clipped.",
    "rl/effective_sample_size": "Of the importance weights, as a share of the tokens: 1 is all alike.",
    "rl/logprob_gap_mean": "Mean absolute difference of the trainer's and the engine's log-probabilities.",
    "rl/logprob_gap_max": "Largest such difference.",
    "rl/logprob_gap_exp": "exp of the mean difference.",
    "rl/router_agreement": "Share of replayed expert choices that the trainer's router would have made too.",
    "rl/replay_gaps": "Tokens whose experts the engine did not tell.",
    "rl/version": "Updates behind the policy at the end of the step.",
    "rl/sync_gap": "Mean difference of log-probabilities when the engine's new weights were tried.",
    "rl/engine_faults/KIND": "Requests to the engine that failed in this way.",
    "rl/staleness_mean": "Written ahead: mean age of the trained answers, in updates.",
    "rl/staleness_max": "Written ahead: age of the oldest.",
    "rl/partial_answers": "Written ahead: answers that several versions of the policy wrote.",
    "rl/broken_off": "Written ahead: answers broken off when new weights came.",
    "rl/too_old": "Written ahead: answers that grew too old and were written anew.",
}

_PATTERNS = [re.compile(re.sub(r"[A-Z]{2,}", ".+", re.escape(name))) for name in METRICS]


def is_known(name: str) -> bool:
    """Whether a metric stands in the table, by itself or under a name for many."""
    return any(pattern.fullmatch(name) for pattern in _PATTERNS)
