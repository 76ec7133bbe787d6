"""A recipe's text: `key=value` put into it, and what is wrong with it in words."""

import difflib
import re
import reprlib

import yaml
from pydantic import BaseModel

from glm45_tune.documents import DocumentError, parse_yaml
from glm45_tune.errors import RecipeError

# a spelling less like a key than this may mean anything
_CLOSE = 0.75

# words of ms-swift, axolotl, LLaMA-Factory, TRL and Hugging Face's Trainer → the key that says it here
_CALLED_HERE = {
    "model.path": "model_name_or_path base_model model_id model_id_or_path",
    "model.params_dtype": "torch_dtype dtype bf16 fp16 precision",
    "model.moe_aux_loss_coeff": "aux_loss_coef aux_loss_coeff router_aux_loss_coef moe_aux_loss_coef",
    "model.mtp_loss_scaling_factor": "mtp_num_layers mtp_loss_coef",
    "data.train": "dataset datasets train_dataset train_file dataset_name data_path",
    "data.eval": "val_dataset eval_dataset test_datasets validation_file",
    "data.eval_ratio": "split_dataset_ratio val_size val_set_size",
    "data.seq_length": "max_length cutoff_len sequence_len max_seq_length max_seq_len model_max_length seq_len",
    "data.packing": "sample_packing neat_packing",
    "data.overlong": "truncation_strategy excess_length_strategy",
    "data.enable_thinking": "thinking",
    "lora": "finetuning_type train_type tuner_type peft_config peft adapter use_peft",
    "lora.r": "lora_rank lora_r rank",
    "lora.lora_alpha": "alpha",
    "lora.lora_dropout": "dropout",
    "lora.target_modules": "lora_target lora_target_modules lora_target_linear target_linear",
    "preference.beta": "pref_beta dpo_beta",
    "preference.loss": "pref_loss loss_type rlhf_type",
    "preference.sft_weight": "pref_ftx rpo_alpha",
    "rl.rewards": "reward_funcs reward_functions",
    "rl.group_size": "num_generations",
    "rl.max_new_tokens": "max_completion_length",
    "rl.engine.urls": "vllm_server_base_url",
    "parallel.tensor_model_parallel_size": "tensor_parallel tensor_parallel_size tp tp_size",
    "parallel.pipeline_model_parallel_size": "pipeline_parallel pipeline_parallel_size pp pp_size",
    "parallel.expert_model_parallel_size": "expert_parallel expert_parallel_size ep ep_size",
    "parallel.context_parallel_size": "context_parallel cp cp_size sequence_parallel_size",
    "parallel.world_size": "nproc_per_node num_processes num_gpus",
    "optimizer.lr": "learning_rate max_lr",
    "optimizer.min_lr": "min_learning_rate",
    "optimizer.warmup_ratio": "warmup warmup_steps lr_warmup_fraction warmup_fraction",
    "optimizer.adam_eps": "adam_epsilon",
    "optimizer.clip_grad": "max_grad_norm gradient_clipping",
    "train.micro_batch_size": "per_device_train_batch_size per_device_batch_size",
    "train.global_batch_size": "gradient_accumulation_steps train_batch_size batch_size",
    "train.epochs": "num_train_epochs num_epochs max_epochs",
    "train.steps": "max_steps train_iters",
    "train.save_interval": "save_steps",
    "train.eval_interval": "eval_steps",
    "train.recompute_granularity": "gradient_checkpointing activation_checkpointing",
    "train.freeze": "freeze_parameters freeze_trainable_layers",
    "train.on_change": "overwrite_output_dir resume_from_checkpoint",
    "logging.wandb_project": "report_to",
}
OTHER_WORDS = {word: place for place, words in _CALLED_HERE.items() for word in words.split()}


class UniqueKeys(yaml.SafeLoader):
    """YAML whose mappings have each key once: of a section that stands twice the first would be lost without a word."""

    def construct_mapping(self, node, deep=False):
        found = set()
        for name, mark in [(key.value, key.start_mark) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]:
            if name in found and name != "<<":
                raise yaml.constructor.ConstructorError(None, None, f"the key {name} stands there twice", mark)
            found.add(name)
        return super().construct_mapping(node, deep)


def override(document: dict, text: str) -> None:
    """Put `a.b=value` into a recipe's document. Raises RecipeError."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise RecipeError(f"{text!r}: an override is key=value, such as optimizer.lr=5e-5.")
    *sections, last = key.split(".")
    for section in sections:
        document = document.setdefault(section, {})
        if not isinstance(document, dict):
            raise RecipeError(f"{text!r}: {section} is {document!r}, not a section.")
    if sections == ["data"] and last in ("train", "source"):  # two names of one key
        document.pop("train", None)
        document.pop("source", None)
    try:
        document[last] = parse_yaml(value)
    except (DocumentError, ValueError) as error:
        raise RecipeError(f"{text[:200]!r}: the value is {error}") from error


def explain(faults: list[dict], recipe: type[BaseModel]) -> list[str]:
    """What pydantic found, a sentence a place: where, what came, what is allowed."""
    by_place: dict[tuple, list[dict]] = {}
    for fault in faults:
        by_place.setdefault(_place(fault), []).append(fault)
    return [
        _sentence(place, here, recipe)
        for place, here in by_place.items()
        # a list, say, that might have been one string: what is wrong inside it tells more
        if here[0]["type"] != "string_type" or not any(place == other[: len(place)] != other for other in by_place)
    ]


def _place(fault: dict) -> tuple:
    """Without the kinds of value that pydantic tried there."""
    kinds = ("str", "SourceConfig")
    return tuple(
        part for part in fault["loc"] if part not in kinds and not str(part).startswith(("list[", "function-"))
    )


def _sentence(place: tuple, faults: list[dict], recipe: type[BaseModel]) -> str:
    """faults: one, or of a value that may be of several kinds one for each."""
    where, fault = ".".join(map(str, place)), faults[0]
    if fault["type"] == "extra_forbidden":
        return f"{where}: unknown key. {_hint(place, recipe)}"
    if fault["type"] == "missing":
        return f"{where}: missing."
    messages = (fault["msg"].removeprefix("Value error, ") for fault in faults)
    first, *others = (re.sub(r"a valid dictionary( or instance of \w+)?", "a mapping", message) for message in messages)
    message = first + "".join(f" or {other.removeprefix('Input should be ')}" for other in others)
    came = "" if fault["type"] == "value_error" else f" (got {_shown(fault['input'])})"
    return f"{where}: {message}{came}." if where else f"{message}{came}."


def _shown(value: object) -> str:
    """A value as a message shows it: cut where it is long."""
    shown = reprlib.Repr(maxlevel=3, maxdict=6, maxlist=6, maxstring=120, maxother=120, maxlong=40)
    try:
        return shown.repr(value)
    except ValueError:  # Python refuses to write out a number of so many digits
        return "a number of very many digits"


def _hint(place: tuple, recipe: type[BaseModel]) -> str:
    """What was meant by an unknown key: another tool's word, a key of another section, a near spelling, or all keys."""
    key, front = str(place[-1]), ".".join(map(str, place[:-1]))
    allowed = _keys_at(recipe, tuple(part for part in place[:-1] if isinstance(part, str)))
    word = key.lower().replace("-", "_")
    if word in OTHER_WORDS:
        return f"Here it is called {OTHER_WORDS[word]}."
    if elsewhere := [where for where in places(recipe) if where.rpartition(".")[2] == word]:
        return f"Did you mean {' or '.join(elsewhere)}?"
    near = difflib.get_close_matches(word, [*allowed, *OTHER_WORDS], 1, _CLOSE)
    if near and near[0] not in allowed:
        return f"Did you mean {OTHER_WORDS[near[0]]}?"
    return f"Did you mean {f'{front}.' if front else ''}{near[0]}?" if near else f"Allowed: {', '.join(allowed)}."


def places(recipe: type[BaseModel], front: str = "") -> list[str]:
    """Every key of a recipe, sections' own ones with their front: optimizer.lr. What stands in lists is left out."""
    found = []
    for name, field in recipe.model_fields.items():
        found.append(front + name)
        section = None if "list[" in str(field.annotation).lower() else _section_in(field.annotation)
        found += places(section, f"{front}{name}.") if section else []
    return found


def _keys_at(model: type[BaseModel], location: tuple[str, ...]) -> list[str]:
    for part in location:
        model = _section_in(model.model_fields[part].annotation)
    return list(model.model_fields)


def _section_in(annotation) -> type[BaseModel]:
    """The section inside an annotation such as `LoraConfig | None` or `str | list[str | SourceConfig]`."""
    if hasattr(annotation, "model_fields"):
        return annotation
    found = (_section_in(inner) for inner in getattr(annotation, "__args__", ()) if inner is not type(None))
    return next((section for section in found if section is not None), None)
