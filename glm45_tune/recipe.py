"""The recipe: everything a run is told, strict, checked whole before anything heavy is imported.

Keys keep the field's names: megatron's for parallelism and the model, PEFT's for LoRA. A recipe file gives what differs from
the defaults below; `key=value` on the command line comes on top. Relative paths are taken from the working directory.
"""

import math
import re
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import AliasChoices, Field, ValidationError, field_validator, model_validator

from glm45_tune.documents import DocumentError, parse_yaml
from glm45_tune.errors import RecipeError
from glm45_tune.faults import UniqueKeys, explain, override
from glm45_tune.layout import Layout
from glm45_tune.objectives import PreferenceConfig, RLConfig, check_objective
from glm45_tune.redaction import redacted, redacted_text
from glm45_tune.section import Dtype, NotNegative, Positive, PositiveFloat, Ranks, Section

# the linears LoRA can sit on, megatron's name → the HF projections fused in it
LINEARS = {
    "linear_qkv": ("q_proj", "k_proj", "v_proj"),
    "linear_proj": ("o_proj",),
    "linear_fc1": ("gate_proj", "up_proj"),
    "linear_fc2": ("down_proj",),
}
ALL_LINEAR = "all-linear"
# what may stand in front of a name to narrow it
FRONTS = ("self_attention", "self_attn", "mlp", "shared_experts", "experts", "mlp.shared_experts", "mlp.experts")

# above it Adam's second moment falls by less than half a bf16 step and so stays where it is
LARGEST_BF16_BETA2 = 0.99


class ModelConfig(Section):
    path: str
    """Checkpoint directory, Hugging Face or megatron format."""
    params_dtype: Dtype = "bf16"
    """What weights and activations are computed in; bf16 keeps fp32 master weights of what is trained."""
    frozen_dtype: Literal["auto", "bf16", "fp8"] = "auto"
    """What LoRA's frozen linears are kept in. fp8 halves their memory: e4m3 with a scale an output channel; a bf16 checkpoint is

    quantized while it loads. bf16: in params_dtype. auto: fp8 where the checkpoint is FP8.
    """
    frozen_products: Literal["auto", "bf16", "fp8"] = "auto"
    """What frozen FP8 weights are multiplied in, forward and backward. fp8: rows of activations and gradients are quantized too. bf16:

    in params_dtype, by an exact cast. auto: fp8 where the card has such products (Hopper and later; a CPU computes the same).
    """
    frozen_turned: bool | None = None
    """Keep the transposes of FP8 weights, which their products in backward want, instead of making them each time: twice the memory

    for less time. null: where it fits without recompute.
    """
    mtp_loss_scaling_factor: NotNegative = 0.0
    """Weight of the MTP layers' loss. 0 leaves the MTP layers out of training; export keeps them as they were."""
    moe_aux_loss_coeff: NotNegative = 0.0
    """Weight of the load-balancing loss. Fine-tuning needs none; the known GLM-4.5-Air recipe has 1e-3."""
    moe_z_loss_coeff: NotNegative = 0.0
    """Weight of the router's z-loss (arXiv:2202.08906), which keeps its logits small."""
    moe_router_bias_update_rate: NotNegative = 0.0
    """How far a step moves each expert's correction bias towards an even load (arXiv:2408.15664); 0 leaves the biases as they

    are. GLM-4.5's pre-training had 1e-3. Full fine-tuning only: an adapter cannot carry biases.
    """


class SourceConfig(Section):
    path: str
    """A file or folder (.jsonl, .json, .csv, .parquet, .txt, also .gz and .zst), hf:ORG/NAME[:CONFIG][@SPLIT], ms:… the same of

    ModelScope, or module:function, a Python function that yields rows. PATH#5000 takes a sample of 5000 rows.
    """
    weight: PositiveFloat = 1.0
    """How often an epoch sees its samples: 2 is twice, 0.5 is half of them, drawn by the seed."""


Sources = str | list[str | SourceConfig]


class DataConfig(Section):
    train: Sources = Field(validation_alias=AliasChoices("train", "source"))
    """One source, or a list of them; a source is a path or {path, weight}. `source` is another name for it."""
    eval: Sources | None = None
    """Held-out sources."""
    eval_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of `train` held out where `eval` is not given, chosen by the seed."""
    seq_length: Positive = 8192
    """Tokens of a packed row."""
    format: Literal["messages", "sharegpt", "alpaca", "prompt", "query", "text", "preference", "rl"] | None = None
    """How rows hold conversations, pairs (preference) or prompts (rl); null: recognised by their fields, row by row."""
    overlong: Literal["error", "drop", "truncate", "split"] = "error"
    """A sample longer than seq_length: an error, left out, cut to its last turns, or made into several. All are counted."""
    on_bad_row: Literal["error", "skip"] = "error"
    """skip trains the rest and says at start and end how many rows were left out. A source that breaks off stays an error."""
    turns: Literal["all", "last", "expand"] = "all"
    """Which assistant turns are trained: all, the last, or each as a sample of its own, in the context it has at inference."""
    packing: bool = True
    """Fill rows with several samples. Off: one sample a row."""
    streaming: bool = False
    """For data that shall not be kept on disk: rows are rendered while training goes on. Needs train.steps, as the rows are not counted

    beforehand; several sources are mixed by `weight`, each row drawn by the seed; a source that ends begins anew.
    """
    streaming_window: Positive = 10_000
    """Rows of the data that are held, packed and shuffled together under streaming."""
    history_thinking: Literal["template", "keep"] = "template"
    """keep: thoughts of earlier turns stay, where the checkpoint's template can (GLM-4.7's); template: as it does by itself."""
    enable_thinking: bool | None = None
    """Passed to the chat template as it is; null passes nothing. A row's own field wins."""
    train_empty_think: bool = False
    """Also train the empty thought of answers without one: so a model learns to stop thinking under the default prompt."""

    @field_validator("train", "eval")
    @classmethod
    def _names_some(cls, value):
        if value is not None and not value:
            raise ValueError("is empty; at least one source is expected (of eval: or leave it out)")
        return value

    @model_validator(mode="after")
    def _one_kind_of_eval(self):
        if self.eval is not None and self.eval_ratio:
            raise ValueError("eval and eval_ratio are both given; give one")
        return self

    @model_validator(mode="after")
    def _streams(self):
        if self.streaming and self.eval_ratio:
            raise ValueError(
                "streaming cannot hold a share of rows out; name held-out files in eval instead of eval_ratio"
            )
        if self.streaming and any(re.search(r"#\d+$", source.path) for source in sources_of(self.train)):
            raise ValueError("streaming cannot take a sample of a source (PATH#N); give the path alone and a weight")
        return self


class LoraConfig(Section):
    r: Positive = 32
    lora_alpha: PositiveFloat = 64.0
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    use_rslora: bool = False
    """Scale by lora_alpha / √r instead of lora_alpha / r."""
    target_modules: str | list[str] = ["linear_qkv", "linear_proj"]
    """megatron's names, HF's, or all-linear (experts included). A dotted front narrows: shared_experts.linear_fc1."""

    @property
    def scaling(self) -> float:
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    @property
    def targets(self) -> list[str]:
        names = [self.target_modules] if isinstance(self.target_modules, str) else self.target_modules
        return list(LINEARS) if ALL_LINEAR in names else names

    def targets_of(self, module: str) -> list[str]:
        """Return what is targeted of a megatron linear (`decoder.layers.0.self_attention.linear_qkv`).

        That is [its own name], or some of its HF projections, or nothing.
        """
        front, _, kind = module.rpartition(".")
        fused = [name for name in (kind, *LINEARS[kind]) if any(_ends(f"{front}.{name}", t) for t in self.targets)]
        return [kind] if kind in fused else fused

    @field_validator("target_modules")
    @classmethod
    def _known(cls, value):
        allowed = [ALL_LINEAR, *LINEARS, *(projection for fused in LINEARS.values() for projection in fused)]
        names = [value] if isinstance(value, str) else value
        if not names:
            raise ValueError("is empty; leave `lora` out to train every weight")
        for name in names:
            front, _, last = name.rpartition(".")
            if last not in allowed:
                raise ValueError(f"{name!r} is no linear of the model; allowed: {', '.join(allowed)}")
            if front and (front not in FRONTS or last == ALL_LINEAR):
                raise ValueError(f"{name!r}: in front of {last} nothing or one of {', '.join(FRONTS)} is allowed")
        return value


def _ends(path: str, target: str) -> bool:
    target = target.replace("self_attn.", "self_attention.")
    return path == target or path.endswith("." + target)


class ParallelConfig(Section):
    tensor_model_parallel_size: Ranks = 1
    """Sequence parallelism goes with it."""
    pipeline_model_parallel_size: Ranks = 1
    virtual_pipeline_model_parallel_size: Ranks = 1
    """Runs of layers a pipeline rank holds, interleaved; more of them shorten the pipeline's idle time. Any depth divides."""
    context_parallel_size: Ranks = 1
    """Ranks that share the tokens of a row, for rows too long for one; every document is cut over all of them."""
    expert_model_parallel_size: Ranks = 1
    expert_tensor_parallel_size: Ranks = 1
    world_size: Ranks | None = None
    """Ranks to start without torchrun; null: all visible GPUs, or on a CPU the fewest that the sizes above allow."""

    def layout(self, world_size: int | None = None) -> Layout:
        sizes = self.model_dump(exclude={"world_size"})
        if world_size is None:
            world_size = self.world_size or Layout(**sizes).smallest_world_size
        return Layout(**sizes, world_size=world_size)


class OptimizerConfig(Section):
    lr: PositiveFloat = 1e-4
    min_lr: NotNegative | None = None
    """Where the cosine ends; null: at a tenth of lr."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the steps over which lr rises from 0."""
    weight_decay: NotNegative = 0.0
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    adam_eps: PositiveFloat = 1e-8
    clip_grad: NotNegative = 1.0
    """Largest gradient norm; 0 does not clip."""
    exp_avg_dtype: Dtype = "fp32"
    """What Adam's first moment is kept in; the arithmetic is fp32."""
    exp_avg_sq_dtype: Dtype = "fp32"
    """The same of the second moment."""
    main_grads_dtype: Dtype = "fp32"
    """What gradients are summed and reduced in; bf16 halves their memory, and rounds every micro batch's sum."""
    optimizer_offload_fraction: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the optimizer's state (moments and fp32 masters) that waits in host memory between steps."""

    @model_validator(mode="after")
    def _falls(self):
        if self.min_lr is not None and self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr} exceeds lr {self.lr}")
        if self.exp_avg_sq_dtype == "bf16" and self.adam_beta2 > LARGEST_BF16_BETA2:
            raise ValueError(
                f"exp_avg_sq_dtype bf16 needs adam_beta2 ≤ {LARGEST_BF16_BETA2} (it is {self.adam_beta2}): bf16 has 8 bits, "
                "so a moment that changes by less than 1/256 a step would never fall"
            )
        return self


class TrainConfig(Section):
    micro_batch_size: Positive = 1
    """Packed rows a rank computes at once."""
    global_batch_size: Positive = 16
    """Packed rows an optimizer step."""
    epochs: Positive | None = None
    steps: Positive | None = None
    """Give epochs or steps."""
    freeze: list[str] = []
    """Weights that full fine-tuning leaves as they are: parts of names as the checkpoint or megatron (GPTModel) has them, such as
    embed_tokens, router, self_attn, layers.0, layers.[0-9].mlp; `*` stands for anything. One that names nothing is an error.
    """
    deterministic: bool = False
    """Two runs under the same layout end with the same bits. On a GPU this takes slower kernels."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 1234
    eval_interval: Positive | None = None
    """Steps between evaluations; null: at the end only."""
    save_interval: Positive | None = None
    """Steps between checkpoints; null: at the end only."""
    save_interval_minutes: PositiveFloat | None = None
    """Minutes between checkpoints, beside save_interval or instead of it."""
    save_total_limit: Positive | None = None
    """How many of the last checkpoints are kept; null: all."""
    save_best: bool = False
    """Also save whenever the held-out loss is the lowest so far, and keep that checkpoint beside the last ones."""
    on_change: Literal["error", "continue", "restart"] = "error"
    """Of a run that is resumed with other data, another model or another shape of training: say what changed; or go on from its
    last checkpoint, where the weights still fit; or set the earlier run aside, beside this one, and begin anew.
    """
    max_skipped_steps: Positive = 5
    """Steps in a row whose loss or gradient is not finite, or whose answers all lack a reward, after which the run ends."""
    distributed_timeout_minutes: PositiveFloat = 30.0
    """How long a rank may take over one pass, an update or a load before the run ends and says which rank hangs, and where."""
    recompute_granularity: Literal["auto", "full", "selective"] | None = None
    """auto: full with block, the fewest layers that fit the cards, and of the others the modules that make the fastest step."""
    recompute_method: Literal["uniform", "block"] = "uniform"
    """Of full: uniform recomputes every run of recompute_num_layers layers, block the first recompute_num_layers only."""
    recompute_num_layers: Positive = 1
    recompute_modules: list[Literal["core_attn", "attention", "mlp", "moe"]] | None = None
    """Of selective (null: core_attn): what is computed again in backward, attention being the whole half of a layer around
    core_attn. Of full with block, and of auto: the same in the layers that are not recomputed whole."""

    @model_validator(mode="after")
    def _keys_agree(self):
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give either epochs or steps")
        whole = self.recompute_granularity == "full" and self.recompute_method == "uniform"
        if self.recompute_modules and (whole or self.recompute_granularity is None):
            raise ValueError(
                "recompute_modules needs recompute_granularity auto, selective, or full with recompute_method block"
            )
        return self


class LoggingConfig(Section):
    tensorboard: bool = False
    wandb_project: str | None = None
    """Also log to this Weights & Biases project (WANDB_MODE=offline works)."""
    num_samples: Annotated[int, Field(ge=0)] = 0
    """Prompts of the data that the model answers before the first step and after the last, for the report. (RL keeps its rollouts.)
    Not with pipeline or context parallelism."""


class CardConfig(Section):
    """What the model card says that a run cannot know. What is left out is taken from the base's own card, if it has one."""

    base_model: str | None = None
    """The base's name on a hub, such as zai-org/GLM-4.5-Air; null: of a release, known by its directory's name."""
    license: str | None = None
    language: list[str] = []
    datasets: list[str] = []
    tags: list[str] = []
    template: str | None = None
    """A Jinja file; with `{% extends "card.md" %}` it changes blocks of ours (glm45_tune/hub/card.md)."""


class Recipe(Section):
    """One run. Frozen: what was checked is what runs."""

    model: ModelConfig
    data: DataConfig
    output_dir: str
    lora: LoraConfig | None = None
    """Absent: every weight is trained."""
    preference: PreferenceConfig | None = None
    """Given: the data are pairs, of which the chosen answer is made likelier than the rejected one."""
    rl: RLConfig | None = None
    """Given: the data are prompts, and the model learns from what its own answers are worth."""
    parallel: ParallelConfig = ParallelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig
    logging: LoggingConfig = LoggingConfig()
    card: CardConfig = CardConfig()

    def __init__(self, *unnamed, **sections):
        if unnamed:
            raise RecipeError(
                f"Recipe({unnamed[0]!r}): sections are given by their names; a file is read by Recipe.load(path)."
            )
        try:
            super().__init__(**sections)
        except ValidationError as error:
            faults = [redacted_text(fault) for fault in explain(error.errors(), type(self))]
            raise RecipeError("recipe: " + ("" if len(faults) == 1 else "\n  ") + "\n  ".join(faults)) from None

    @model_validator(mode="after")
    def _knows_its_end(self):
        if self.data.streaming and self.train.steps is None:
            raise ValueError("data.streaming needs train.steps: how many rows an epoch has is not known beforehand")
        return self

    @property
    def asked_rl(self) -> RLConfig:
        """`rl` of a recipe that has it."""
        assert self.rl is not None, "not a recipe of reinforcement learning"
        return self.rl

    @property
    def asked_preference(self) -> PreferenceConfig:
        """`preference` of a recipe that has it."""
        assert self.preference is not None, "not a recipe of preference tuning"
        return self.preference

    @property
    def kind(self) -> str:
        """What the data are for."""
        return "preference" if self.preference else "rl" if self.rl else "sft"

    @model_validator(mode="after")
    def _objective_fits(self):
        check_objective(self)
        return self

    @model_validator(mode="after")
    def _writes_samples_only_where_it_can(self):
        parallel = self.parallel
        if self.logging.num_samples and max(parallel.pipeline_model_parallel_size, parallel.context_parallel_size) > 1:
            raise ValueError(
                "logging.num_samples needs pipeline_model_parallel_size 1 and context_parallel_size 1; set it to 0"
            )
        return self

    @model_validator(mode="after")
    def _an_adapter_is_all_that_lora_trains(self):
        if self.lora is not None and self.train.freeze:
            raise ValueError(
                "train.freeze is of full fine-tuning: LoRA freezes every weight; narrow lora.target_modules"
            )
        if self.lora is not None and self.model.moe_router_bias_update_rate:
            raise ValueError(
                "model.moe_router_bias_update_rate moves router biases, which an adapter cannot carry; set it to 0 or leave "
                "lora out"
            )
        if self.lora is None and self.model.frozen_dtype == "fp8":
            raise ValueError(
                "model.frozen_dtype fp8 keeps weights that are not trained; full fine-tuning trains all, and a step of Adam is "
                "smaller than FP8 can hold. Use LoRA, or bf16"
            )
        if self.optimizer.main_grads_dtype == "bf16" and self.model.params_dtype != "bf16":
            raise ValueError("optimizer.main_grads_dtype bf16 needs model.params_dtype bf16")
        return self

    @classmethod
    def load(cls, path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> "Recipe":
        """Read a YAML file, apply `a.b=value` overrides. Raises RecipeError with every fault in one message."""
        path = Path(path)
        if not path.is_file():
            raise RecipeError(f"{path}: {'a directory, not a recipe' if path.is_dir() else 'no such recipe'}.")
        try:
            document = parse_yaml(path.read_text(encoding="utf-8"), UniqueKeys)
        except UnicodeDecodeError as error:
            raise RecipeError(f"{path}: not YAML: {error}") from error
        except DocumentError as error:
            raise RecipeError(f"{path}: {error}") from error
        except OSError as error:
            raise RecipeError(f"{path}: cannot be read: {error.strerror}.") from error
        if not isinstance(document, dict):
            raise RecipeError(f"{path}: holds {type(document).__name__}; a recipe is a mapping of sections.")
        for text in overrides:
            override(document, text)
        return cls.from_dict(document, str(path))

    @classmethod
    def of_data(cls, source: str, model: str, overrides: list[str]) -> "Recipe":
        """A recipe around one data source, everything else at its defaults."""
        document = {
            "model": {"path": model},
            "data": {"train": source},
            "train": {"epochs": 1},
            "output_dir": "runs/unnamed",
        }
        for text in overrides:
            override(document, text)
        return cls.from_dict(document, source)

    @classmethod
    def from_dict(cls, document: dict, where: str = "recipe") -> "Recipe":
        """Check a recipe given as nested dicts."""
        if not isinstance(document, dict):
            raise RecipeError(f"{where}: holds {type(document).__name__}; a recipe is a mapping of sections.")
        if odd := [key for key in document if not isinstance(key, str)]:
            raise RecipeError(f"{where}: {odd[0]!r}: unknown key. Allowed: {', '.join(cls.model_fields)}.")
        try:
            return cls(**document)
        except RecipeError as error:
            raise RecipeError(where + str(error).removeprefix("recipe")) from None

    def shown(self, **options) -> dict:
        """The recipe as it may be written and shown: without its secrets. options: of model_dump."""
        return redacted(self.model_dump(**options))

    def to_yaml(self, with_secrets: bool = False) -> str:
        """with_secrets: for another process of this run alone, in a file that nobody else reads."""
        document = self.model_dump() if with_secrets else self.shown()
        return yaml.safe_dump(document, sort_keys=False, allow_unicode=True)


def with_frozen(recipe: Recipe, is_fp8: bool, has_fp8_products: bool) -> Recipe:
    """The recipe with what `auto` means for its frozen weights. is_fp8: the checkpoint is; has_fp8_products: the card has."""
    kept, products = recipe.model.frozen_dtype, recipe.model.frozen_products
    if kept == "auto":
        kept = "fp8" if is_fp8 and recipe.lora is not None else "bf16"
    if products == "auto":
        products = "fp8" if has_fp8_products else "bf16"
    model = recipe.model.model_copy(update={"frozen_dtype": kept, "frozen_products": products})
    return recipe.model_copy(update={"model": model})


def sources_of(sources: Sources) -> list[SourceConfig]:
    """The sources of a data section, each with its weight."""
    listed = [sources] if isinstance(sources, str) else sources
    return [SourceConfig(path=source) if isinstance(source, str) else source for source in listed]
