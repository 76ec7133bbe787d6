"""The recipe's sections for what is not supervised fine-tuning: preference pairs, and rewards for the model's own answers."""

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from glm45_tune.section import NotNegative, Positive, PositiveFloat, Section

FUNCTION = r"[A-Za-z_][\w.]*:[A-Za-z_]\w*"
"""What module:function looks like."""


class PreferenceConfig(Section):
    loss: Literal["sigmoid", "ipo", "kto"] = "sigmoid"
    """sigmoid: DPO (arXiv:2305.18290); ipo: arXiv:2310.12036; kto: arXiv:2402.01306, of pairs, whose chosen answers are the

    desirable ones, or of single answers with `label: true` or `false`.
    """
    beta: PositiveFloat = 0.1
    """How much the policy is held to the reference."""
    length_normalised: bool = False
    """Mean log-probability of an answer's tokens instead of their sum, so that long answers count as short ones do."""
    sft_weight: NotNegative = 0.0
    """Weight of the chosen (desirable) answers' cross entropy beside the loss (arXiv:2404.19733)."""
    desirable_weight: NotNegative = 1.0
    """Of kto: weight of the desirable answers."""
    undesirable_weight: NotNegative = 1.0
    """Of kto: weight of the undesirable answers. The paper has weight times number within 1 to 4/3 of the other sort's."""
    reference: Literal["adapter_off", "precomputed"] = "adapter_off"
    """adapter_off: the model without its LoRA adapter, run forward beside every step. precomputed: once, before the first step."""

    @model_validator(mode="after")
    def _kto_asks_for_more(self):
        if self.loss == "kto" and self.reference == "precomputed":
            raise ValueError(
                "kto measures how far the policy is from the reference on answers mixed anew each step: adapter_off"
            )
        return self


class RewardConfig(Section):
    function: str
    """exact_match, regex, math, json_schema, format, length, or module:function, a Python function of (prompt, completion, columns)."""
    weight: float = 1.0
    options: dict[str, Any] = {}
    """Keyword arguments of the function.

    A text may be or hold ${env:NAME}: that environment variable, read when the run starts and never
    written down; so a judge gets its key.
    """

    @field_validator("function")
    @classmethod
    def _known(cls, value):
        if value not in BUILT_IN and not re.fullmatch(FUNCTION, value):
            raise ValueError(f"is neither module:function nor one of {', '.join(BUILT_IN)}")
        return value


BUILT_IN = ("exact_match", "regex", "math", "json_schema", "format", "length")


class EngineConfig(Section):
    kind: Literal["local", "vllm", "sglang"] = "local"
    """local: the training ranks themselves; vllm, sglang: servers spoken to over HTTP."""
    urls: list[str] = []
    """Servers that run already, such as http://10.0.0.7:8000.

    Empty: one is started from `command`. A part may be ${env:NAME}.
    """
    command: list[str] = []
    """How a server of ours is started: {model} and {port} are filled in.

    It has the environment of this command.
    """
    api_key: str | None = None
    """The servers' bearer token, named by its environment variable: ${env:VLLM_API_KEY}."""
    sync: Literal["lora", "directory"] = "directory"
    """How servers get new weights: lora loads the adapter at run time; directory writes merged weights, which the server reads

    again, or is started anew with where that gives other log-probabilities than the trainer's.
    """
    probe_tolerance: PositiveFloat = 0.02
    """Largest mean difference between server's and trainer's log-probabilities of the tokens that every new set of weights is tried on."""
    timeout_seconds: PositiveFloat = 600.0
    """Longest wait for an answer, after which the server counts as hung."""
    retries: Annotated[int, Field(ge=0)] = 2
    """How often a request that failed is sent again, to another server where there is one."""
    start_seconds: PositiveFloat = 600.0
    """Longest wait for a server to start."""
    concurrency: Positive = 64
    """Answers under way at a time: on a rank (local), or at a server."""

    @model_validator(mode="after")
    def _reachable(self):
        if self.kind == "local" and (self.urls or self.command or self.api_key):
            raise ValueError("engine local runs in the training ranks; leave urls, command and api_key out")
        if self.kind != "local" and bool(self.urls) == bool(self.command):
            raise ValueError(f"engine {self.kind} needs either urls of running servers or a command that starts one")
        if self.kind == "vllm" and self.urls and self.sync == "directory":
            raise ValueError(
                "vllm at urls cannot be given a directory: it takes whole weights by a new start alone, which is not ours to "
                "make; use sync: lora, or a command"
            )
        return self


class RLConfig(Section):
    """A step is a rollout of train.global_batch_size prompts, group_size answers each, and the updates made from it."""

    rewards: Annotated[list[RewardConfig], Field(min_length=1)]
    """An answer's reward is the weighted sum of these."""
    reward_timeout_seconds: PositiveFloat = 10.0
    """Longest time for one answer's reward; a call of a batched function has it once for each of its answers."""
    on_reward_error: Literal["mask", "stop"] = "mask"
    """An answer whose reward raised, hung or was no number: leave it out of its group and of training, or stop. Both are counted."""
    engine: EngineConfig = EngineConfig()
    group_size: Annotated[int, Field(ge=2)] = 8
    """Answers to each prompt."""
    max_new_tokens: Positive = 1024
    temperature: PositiveFloat = 1.0
    """Of sampling; the trainer's log-probabilities are taken at the same temperature."""
    tools: str | None = None
    """module:function of (said, columns) that answers an assistant turn with messages, or with nothing to end it.

    said: the text of the answer so far, turns of tools and role tokens in it; columns: the prompt's row.
    """
    tool_timeout_seconds: PositiveFloat = 60.0
    """Longest time for one call of `tools`, after which the run ends with a sentence."""
    max_turns: Positive = 1
    """Assistant turns of an answer."""
    advantage: Literal["group", "centred", "leave_one_out"] = "group"
    """(reward − mean) / deviation of the group (GRPO); reward − mean (Dr.GRPO); reward − mean of the others (RLOO)."""
    loss: Literal["grpo", "gspo", "cispo"] = "grpo"
    """The ratio to the old policy, of a token (grpo) or of a sequence (gspo, arXiv:2507.18071), clipped; or a clipped weight (cispo,

    arXiv:2506.13585).
    """
    loss_average: Literal["sequence", "token", "constant"] = "sequence"
    """Mean over answers of the mean over their tokens (GRPO); mean over all tokens (DAPO); sum over answers' length limit (Dr.GRPO)."""
    epsilon: NotNegative = 0.2
    """Lowest ratio is 1 − epsilon."""
    epsilon_high: NotNegative | None = None
    """Highest ratio is 1 + epsilon_high; null: epsilon. DAPO has 0.28."""
    kl_estimator: Literal["none", "k1", "k2", "k3"] = "none"
    """Of the distance to the base model: k1 is taken off the reward, token by token, k2 and k3 are added to the loss."""
    kl_coef: NotNegative = 0.0
    importance_sampling: Literal["none", "token", "sequence"] = "token"
    """Weigh by trainer's over engine's probability, of a token or of a sequence, at most importance_cap (truncated)."""
    importance_cap: PositiveFloat = 2.0
    updates_per_rollout: Positive = 1
    """Optimizer steps of a rollout, each on its share of the answers."""
    staleness: Annotated[int, Field(ge=0)] = 0
    """Rollouts by which the weights that wrote a token may be behind those that train on it. 0: a step writes, then trains. 1: while a

    step trains, the servers write the next step's answers, with the weights that the step began with. More is for answers that
    were broken off (extra_prompts). What is older is never trained: it is counted, and written anew.
    """
    extra_prompts: Annotated[int, Field(ge=0)] = 0
    """Prompts under way beside a step's own: the step takes the first whose answers are all there. The other answers are broken off

    when new weights come, keep what is written, and go on with those (partial rollouts). Needs a staleness of 2.
    """
    dynamic_sampling: bool = False
    """Replace groups whose rewards are all equal by other prompts' (DAPO), at most max_refills times a step."""
    max_refills: Positive = 3
    overlong_buffer: Annotated[int, Field(ge=0)] = 0
    """Tokens before max_new_tokens over which an answer's reward falls by overlong_penalty (DAPO)."""
    overlong_penalty: NotNegative = 1.0
    mask_truncated: bool = False
    """Answers cut at max_new_tokens train nothing."""
    router_replay: Literal["none", "engine", "trainer"] = "none"
    """Experts of an update: chosen anew; those the engine chose; those the trainer chose when it took the old log-probabilities."""

    @property
    def highest(self) -> float:
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    @field_validator("tools")
    @classmethod
    def _function(cls, value):
        if value is not None and not re.fullmatch(FUNCTION, value):
            raise ValueError("is no module:function")
        return value

    @model_validator(mode="after")
    def _consistent(self):
        if (self.kl_estimator == "none") != (self.kl_coef == 0):
            raise ValueError("kl_estimator and kl_coef go together: give both or neither")
        if self.overlong_buffer >= self.max_new_tokens:
            raise ValueError(
                f"overlong_buffer {self.overlong_buffer} is not below max_new_tokens {self.max_new_tokens}"
            )
        if self.max_turns > 1 and self.tools is None:
            raise ValueError("max_turns above 1 needs tools, the function that answers the turns")
        if self.staleness:
            self._check_ahead()
        if self.extra_prompts and self.staleness < 2:
            raise ValueError(
                f"extra_prompts {self.extra_prompts} needs a staleness of at least 2, and it is {self.staleness}: what is broken "
                "off once is two rollouts old when it is trained"
            )
        return self

    def _check_ahead(self) -> None:
        if self.engine.kind == "local":
            raise ValueError(
                f"staleness {self.staleness}: engine local writes in the training ranks, which cannot train meanwhile; serve the "
                "model (engine.kind vllm or sglang), or set staleness to 0"
            )
        if self.tools:
            raise ValueError("staleness is for answers of one turn; leave tools out, or set staleness to 0")
        if self.importance_sampling == "none":
            raise ValueError(
                "staleness needs importance_sampling token or sequence: older weights write the answers, and that is what weighs them"
            )


def check_objective(recipe) -> None:
    """Raise ValueError where a recipe's sections do not go with what it trains for."""
    if recipe.kind != "sft" and (recipe.data.streaming or recipe.model.mtp_loss_scaling_factor):
        what = "data.streaming" if recipe.data.streaming else "model.mtp_loss_scaling_factor"
        raise ValueError(f"{what} goes with supervised training alone; leave it out beside {recipe.kind}")
    if recipe.preference and recipe.rl:
        raise ValueError("preference and rl are both given; give one")
    if recipe.rl:
        _check_rl(recipe)
    if recipe.preference and recipe.preference.reference == "adapter_off" and recipe.lora is None:
        raise ValueError(
            "preference.reference adapter_off is the model without its adapter, and there is no lora section; set it to "
            "precomputed"
        )


def _check_rl(recipe) -> None:
    rl, parallel = recipe.rl, recipe.parallel
    if rl.kl_coef and recipe.lora is None:
        raise ValueError("rl.kl_coef needs lora: the distance is to the model without its adapter")
    if recipe.lora and recipe.lora.lora_dropout:
        raise ValueError("lora.lora_dropout draws another policy for every update; set it to 0 beside rl")
    if rl.engine.kind != "local" and rl.engine.sync == "lora" and recipe.lora is None:
        raise ValueError("rl.engine.sync lora needs a lora section; set it to directory to serve whole weights")
    if rl.router_replay == "engine" and rl.engine.kind == "sglang":
        raise ValueError(
            "rl.router_replay engine: this client cannot read experts from sglang; use trainer, or another engine"
        )
    if rl.max_new_tokens >= recipe.data.seq_length:
        raise ValueError(
            f"rl.max_new_tokens {rl.max_new_tokens} leaves no room for a prompt in data.seq_length {recipe.data.seq_length}"
        )
    if rl.engine.kind == "local" and parallel.pipeline_model_parallel_size * parallel.context_parallel_size > 1:
        raise ValueError(
            "rl.engine local writes in the training ranks, which pipeline and context ranks cannot: set "
            "pipeline_model_parallel_size and context_parallel_size to 1, or serve the model (engine vllm or sglang)"
        )
    if recipe.train.global_batch_size % rl.updates_per_rollout:
        raise ValueError(
            f"rl.updates_per_rollout {rl.updates_per_rollout} does not divide the {recipe.train.global_batch_size} prompts of a step "
            "(train.global_batch_size)"
        )
