"""LoRA adapters in PEFT's format: written from a run's checkpoint, merged into a model while it is read.

PEFT with transformers 5 moves every `gate_proj`, `up_proj`, `down_proj` in `target_modules` to the stacked experts, so the
adapters of dense and shared MLPs, and of the experts themselves, are declared as `target_parameters`. There an expert
stack's lora_A is [E · r, in], expert by expert, and its lora_B [out, r · E], expert fastest.
"""

import math
import re
import time
from collections import defaultdict
from pathlib import Path

import regex
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from glm45_tune.conversion.hf_files import SafetensorsFile
from glm45_tune.conversion.names import Row, is_mtp, rows
from glm45_tune.conversion.outdir import Beside, file_hash, nothing, read_marker, whole
from glm45_tune.conversion.tensors import ALL, HfReader, fingerprint, split_row
from glm45_tune.conversion.torch_dist import TorchDistFiles
from glm45_tune.errors import CheckpointError
from glm45_tune.foreign import member, read_json, short, shown
from glm45_tune.recipe import LoraConfig
from glm45_tune.spec import ModelSpec

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."
_BLOCK_ROWS = 512
_PATTERN_SECONDS, _MAX_PATTERN = 5.0, 500
# what a LoRA may have that is more than base + scaling · B · A: (key, which values are harmless, why not)
_NOT_PLAIN = (
    ("use_dora", lambda value: False, "DoRA scales each row by a norm of its own"),
    ("bias", lambda value: value == "none", "it trained biases of the base as well"),
    ("lora_bias", lambda value: False, "its B carries a bias"),
    ("modules_to_save", lambda value: False, "these were trained whole; it is a model more than an adapter"),
    ("trainable_token_indices", lambda value: False, "it trained rows of the embedding whole"),
    ("fan_in_fan_out", lambda value: False, "its weights are stored the other way round"),
    (
        "alora_invocation_tokens",
        lambda value: False,
        "an activated LoRA is switched on by the text, and PEFT does not merge it",
    ),
    ("layer_replication", lambda value: False, "it belongs to a model with repeated layers"),
    (
        "init_lora_weights",
        lambda value: value is True or not re.match(r"pissa|olora|corda|loftq|lora_ga", str(value).lower()),
        "it began by changing the base; in PEFT, save it with path_initial_model_for_weight_conversion",
    ),
)
# what says nothing of how the adapter is merged: where it sits shows in its tensors' names, its rank in their shapes
_NOT_OF_THE_MERGE = set(
    """
    task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode r target_modules exclude_modules
    lora_alpha lora_dropout use_rslora layers_to_transform layers_pattern rank_pattern alpha_pattern target_parameters
    megatron_config megatron_core loftq_config eva_config corda_config lora_ga_config qalora_group_size runtime_config
    ensure_weight_tying
    """.split()
)
_STACKS = ("gate_up_proj", "down_proj")  # transformers' names of the stacked experts, in the order PEFT wraps them


def write_peft(
    checkpoint: Path,
    config: LoraConfig,
    base: HfReader,
    output: Path,
    beside: Beside = nothing,
    base_name: str | None = None,
) -> None:
    """Write the adapter that a run's checkpoint holds as a PEFT directory for the model `base`; see `write_peft_of`."""
    write_peft_of(TorchDistFiles(checkpoint), config, base, output, beside, base_name)


def write_peft_of(
    files, config: LoraConfig, base: HfReader, output: Path, beside: Beside = nothing, base_name: str | None = None
) -> None:
    """The same of tensors wherever they are: `files.tensors` are megatron's names, `files.read_key(name)` gives one whole.

    beside: adds files to the directory. base_name: what the base is called on a hub; its directory's name stands there otherwise.
    """
    table = {row.hybrid.removesuffix(".weight"): row for row in rows(base.spec)}
    pairs: dict[str, dict[str, tuple[torch.Tensor, torch.Tensor]]] = defaultdict(dict)
    for key in files.tensors:
        if ".adapter." in key and key.endswith(".lora_A") and not key.startswith("optimizer."):
            linear, target = key.removesuffix(".lora_A").split(".adapter.")
            pairs[linear][target] = files.read_key(key), files.read_key(key.replace("lora_A", "lora_B"))
    tensors: dict[str, torch.Tensor] = {}
    names: list[str] = []  # HF parameters that carry an adapter
    ranks: dict[str, int] = {}
    for linear, targets in pairs.items():
        row = table[linear]
        if row.num_experts is None:
            found = _of_linear(row, targets)
        else:
            both = all(linear.rpartition(".")[0] + f".linear_fc{n}" in pairs for n in (1, 2))
            found, stack, ranks[stack] = _of_experts(row, targets, both)
            names += [] if is_mtp(row) else [row.parts[0].name.partition("{e}")[0] + stack]
        tensors |= {f"{_PREFIX}{name}.weight": tensor.contiguous() for name, tensor in found.items()}
        if row.num_experts is None and not is_mtp(row):
            names += [name.removesuffix(".lora_A") + ".weight" for name in found if name.endswith(".lora_A")]
    with whole(output, "adapter", base=base_name or base.path.name, fingerprint=fingerprint(base)) as staging:
        save_file(tensors, staging / WEIGHTS, metadata={"format": "pt"})
        _peft_config(names, ranks, config, base, base_name or base.path.resolve().name).save_pretrained(str(staging))
        beside(staging)


def check_base(adapter: str | Path, base: HfReader) -> None:
    """Raise CheckpointError when `adapter` says that it was made for another model than `base`. Ours say it, by a hash."""
    facts = read_marker(Path(adapter)) or {}
    if facts.get("fingerprint") not in (None, fingerprint(base)):
        raise CheckpointError(
            f"{adapter}: was trained on {facts['base']}, and {base.path} is another model. Give the model it was trained on."
        )


def _of_linear(row: Row, targets: dict) -> dict[str, torch.Tensor]:
    """lora_A and lora_B of each HF projection in a fused linear; one shared lora_A is repeated for each."""
    found = {}
    for target, (lora_A, lora_B) in targets.items():
        projections = [part.name.removesuffix(".weight") for part in row.parts]
        if target.startswith("linear_"):
            halves = split_row(row, lora_B)
        else:
            projections, halves = [p for p in projections if p.endswith("." + target)], [lora_B]
        for projection, half in zip(projections, halves, strict=True):
            found[f"{projection}.lora_A"], found[f"{projection}.lora_B"] = lora_A.clone(), half
    return found


def _of_experts(row: Row, targets: dict, both: bool) -> tuple[dict[str, torch.Tensor], str, int]:
    """The experts' pairs as one pair of the stacked parameter, that parameter's name, and the pair's rank.

    both: fc1 and fc2 are adapted; PEFT then nests its wrappers, fc1's inside.
    """
    stack = _STACKS[len(row.parts) == 1]
    out = sum(part.shape[0] for part in row.parts)
    lora_As, lora_Bs = [], []
    for target, (lora_A, lora_B) in targets.items():
        wide = lora_B
        if target in ("gate_proj", "up_proj"):
            wide = lora_B.new_zeros(lora_B.shape[0], out, lora_B.shape[2])
            first = 0 if target == "gate_proj" else out // 2
            wide[:, first : first + out // 2] = lora_B
        lora_As.append(lora_A)
        lora_Bs.append(wide)
    lora_A, lora_B = torch.cat(lora_As, dim=1), torch.cat(lora_Bs, dim=2)  # [E, R, in], [E, out, R]
    module = row.parts[0].name.partition(".{e}")[0] + (".base_layer" if both and stack == _STACKS[0] else "")
    found = {
        f"{module}.lora_A": lora_A.flatten(0, 1),
        f"{module}.lora_B": lora_B.permute(1, 2, 0).flatten(1),
    }
    return found, stack, lora_A.shape[1]


def _peft_config(names: list[str], ranks: dict[str, int], config: LoraConfig, base: HfReader, base_name: str):
    import peft

    leaves: dict[str, list[str]] = defaultdict(list)
    for name in names:
        leaves[re.sub(r"^model\.layers\.\d+\.", "", name)].append(name)
    modules, parameters = [], []
    for leaf, full in leaves.items():
        everywhere = len(full) == len(_layers_with(leaf, base.spec))
        if leaf.startswith("self_attn."):
            modules += [leaf.split(".")[1]] if everywhere else [name.removesuffix(".weight") for name in full]
        else:
            parameters += [leaf] if everywhere else full
    other = {f"mlp.experts.{stack}": rank for stack, rank in ranks.items() if rank != config.r}
    return peft.LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_name,
        r=config.r,
        lora_alpha=config.lora_alpha,
        # PEFT refuses dropout beside target_parameters; it plays no part in using the adapter
        lora_dropout=0.0 if parameters else config.lora_dropout,
        use_rslora=config.use_rslora,
        target_modules=sorted(modules),
        target_parameters=sorted(parameters) or None,
        rank_pattern=other,
        alpha_pattern={
            name: config.scaling * (math.sqrt(rank) if config.use_rslora else rank) for name, rank in other.items()
        },
        inference_mode=True,
    )


def _layers_with(leaf: str, spec: ModelSpec) -> range:
    if leaf.startswith("self_attn."):
        return range(spec.num_layers)
    moe = leaf.startswith(("mlp.experts.", "mlp.shared_experts."))
    return range(spec.num_dense_layers, spec.num_layers) if moe else range(spec.num_dense_layers)


class Merged:
    """An HfReader: `base` with a PEFT adapter added to its weights, in fp32, rounded once to the base's dtype."""

    def __init__(self, base: HfReader, adapter: str | Path):
        self.base, self.spec, self.path, self.config = base, base.spec, base.path, base.config
        self._directory = Path(adapter)
        self._lora = self._read_config()
        self._patterns, self._seconds = self._compiled(), _PATTERN_SECONDS
        check_base(adapter, base)
        self._factors = self._read_factors()

    def __reduce__(self):
        return Merged, (self.base, self._directory)

    def stamp(self) -> object:
        return [self.base.stamp(), file_hash(self._directory / CONFIG), file_hash(self._directory / WEIGHTS)]

    def _read_config(self) -> dict:
        path = self._directory / CONFIG
        if not path.is_file() and (self._directory / "adapter" / CONFIG).is_file():
            raise CheckpointError(
                f"{self._directory}: a run, not an adapter; its adapter is {self._directory / 'adapter'}."
            )
        if (read_marker(self._directory) or {}).get("kind") == "run":
            raise CheckpointError(
                f"{self._directory}: has no adapter yet: the run is not done, or trained all weights. `glm45-tune export` takes its "
                "last checkpoint."
            )
        if not path.is_file() or not (self._directory / WEIGHTS).is_file():
            raise CheckpointError(f"{self._directory}: no {CONFIG} with {WEIGHTS} here; not a PEFT adapter.")
        config = read_json(path)
        if config.get("peft_type") != "LORA":
            raise CheckpointError(f"{path}: peft_type is {shown(config.get('peft_type'))}; allowed: LORA.")
        for key, plain, why in _NOT_PLAIN:
            if (value := config.get(key)) and not plain(value):
                raise CheckpointError(f"{path}: {key} is {shown(value)}, which cannot be merged: {why}.")
        known = _NOT_OF_THE_MERGE | {key for key, _, _ in _NOT_PLAIN}
        for key in sorted(config.keys() - known):
            # null, false and empty are every setting's way to say that it is off; 0 is a number
            if config[key] is not None and config[key] is not False and config[key] not in ("", [], {}):
                raise CheckpointError(
                    f"{path}: {short(key)} is {shown(config[key])}, which is not known here, so what it does would be left out. "
                    "Merge this adapter by PEFT."
                )
        patterns = config.get("alpha_pattern") or {}
        if not isinstance(patterns, dict):
            raise CheckpointError(
                f"{path}: alpha_pattern is {shown(patterns)}; patterns with a number each are expected."
            )
        for key, alpha in {"lora_alpha": config.get("lora_alpha"), **patterns}.items():
            if type(alpha) not in (int, float) or not -(2**31) < alpha < 2**31:
                raise CheckpointError(f"{path}: {short(key)} is {shown(alpha)}; a number is expected.")
        return config

    def _compiled(self) -> dict[regex.Pattern, float]:
        """The patterns of alpha_pattern, with their numbers."""
        found = {}
        for pattern, alpha in (self._lora.get("alpha_pattern") or {}).items():
            try:
                if len(pattern) > _MAX_PATTERN:
                    raise regex.error(f"longer than {_MAX_PATTERN} characters", pattern)
                found[regex.compile(rf"(.*\.)?({pattern})$")] = alpha
            except (regex.error, RecursionError, OverflowError, ValueError) as error:
                raise CheckpointError(
                    f"{self._directory / CONFIG}: alpha_pattern {shown(pattern)} is not a regular expression: {error}."
                ) from error
        return found

    def _matches(self, pattern: regex.Pattern, name: str) -> bool:
        """Does a pattern of somebody else match? All of them together have so many seconds: one may take for ever."""
        began = time.monotonic()
        try:
            return bool(pattern.match(name, timeout=max(self._seconds, 0.001)))
        except (TimeoutError, MemoryError) as error:
            raise CheckpointError(
                f"{self._directory / CONFIG}: alpha_pattern {shown(pattern.pattern)} takes longer than {_PATTERN_SECONDS} s "
                "to compare with the names of the weights. Write it more simply."
            ) from error
        finally:
            self._seconds -= time.monotonic() - began

    def _read_factors(self) -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
        """HF tensor name → (lora_A [r, in], lora_B [out, r], scaling)."""
        for name in (CONFIG, WEIGHTS):
            member(self._directory, name, CONFIG)
        SafetensorsFile(self._directory / WEIGHTS)  # which checks its header
        try:
            tensors = load_file(self._directory / WEIGHTS)
        except SafetensorError as error:
            raise CheckpointError(f"{self._directory / WEIGHTS}: not a whole safetensors file ({error}).") from error
        known, factors = set(self.base.names), {}
        for key, lora_A in tensors.items():
            if not key.endswith(".lora_A.weight"):
                if not key.endswith(".lora_B.weight"):
                    raise CheckpointError(f"{self._directory / WEIGHTS}: {key} is no LoRA weight.")
                if key.replace(".lora_B.", ".lora_A.") not in tensors:
                    raise CheckpointError(f"{self._directory / WEIGHTS}: {key} has no lora_A beside it.")
                continue
            module = key.removeprefix(_PREFIX).removesuffix(".lora_A.weight")
            lora_B = tensors.get(key.replace(".lora_A.", ".lora_B."))
            if lora_B is None:
                raise CheckpointError(f"{self._directory / WEIGHTS}: {key} has no lora_B beside it.")
            if module.endswith((".experts", ".experts.base_layer")):
                factors |= self._of_stack(module, lora_A, lora_B)
            else:
                if {lora_A.ndim, lora_B.ndim} != {2} or lora_A.shape[0] != lora_B.shape[1] or not lora_A.shape[0]:
                    raise CheckpointError(
                        f"{self._directory / WEIGHTS}: {key} {tuple(lora_A.shape)} and its lora_B {tuple(lora_B.shape)} differ in rank."
                    )
                factors[f"{module}.weight"] = lora_A, lora_B, self._scaling(module, lora_A.shape[0])
        if not factors:
            raise CheckpointError(f"{self._directory / WEIGHTS}: holds no LoRA weights.")
        for name, (lora_A, lora_B, _) in factors.items():
            shape = (lora_B.shape[0], lora_A.shape[1])
            if name not in known or self.base.shape(name) != shape:
                what = f"has shape {self.base.shape(name)}" if name in known else "does not exist"
                raise CheckpointError(
                    f"{self._directory}: was made for another model: {name} [{shape}] {what} in {self.path}."
                )
        return factors

    def _of_stack(self, module: str, lora_A, lora_B) -> dict:
        front = module.removesuffix(".base_layer")
        if {lora_A.ndim, lora_B.ndim} != {2} or lora_A.shape[0] != lora_B.shape[1] or not lora_A.shape[0]:
            raise CheckpointError(
                f"{self._directory / WEIGHTS}: lora_A {tuple(lora_A.shape)} and lora_B {tuple(lora_B.shape)} of {module} differ in "
                "rank."
            )
        # PEFT names only the module; which of its two parameters is meant shows in the widths
        shape = lora_B.shape[0], lora_A.shape[1]
        hidden, inner = self.spec.hidden_size, self.spec.moe_ffn_hidden_size
        if shape not in ((2 * inner, hidden), (hidden, inner)) or lora_A.shape[0] % self.spec.num_moe_experts:
            raise CheckpointError(
                f"{self._directory}: was made for another model: {module} has lora_A {tuple(lora_A.shape)} and lora_B "
                f"{tuple(lora_B.shape)}, which fits neither {' nor '.join(_STACKS)} of {self.path}."
            )
        stack = _STACKS[0] if shape == (2 * inner, hidden) else _STACKS[1]
        count = self.spec.num_moe_experts
        rank = lora_A.shape[0] // count
        scaling = self._scaling(f"{front}.{stack}", rank)
        stacked_A, stacked_B = lora_A.view(count, rank, -1), lora_B.view(lora_B.shape[0], rank, count)
        names = ("gate_proj", "up_proj") if stack == _STACKS[0] else ("down_proj",)
        return {
            f"{front}.{expert}.{name}.weight": (stacked_A[expert], half, scaling)
            for expert in range(count)
            for name, half in zip(names, stacked_B[:, :, expert].chunk(len(names)))
        }

    def _scaling(self, name: str, rank: int) -> float:
        alpha = self._lora["lora_alpha"]
        for pattern, value in self._patterns.items():
            if self._matches(pattern, name):  # PEFT takes the first that matches
                alpha = value
                break
        return alpha / (math.sqrt(rank) if self._lora.get("use_rslora") else rank)

    @property
    def names(self) -> list[str]:
        return self.base.names

    def shape(self, name: str) -> tuple[int, ...]:
        return self.base.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self.base.dtype(name)

    def read(self, name: str, first: int = 0, last: int | None = None, columns: slice = ALL) -> torch.Tensor:
        if name not in self._factors:
            return self.base.read(name, first, last, columns)
        last = self.shape(name)[0] if last is None else last
        found = [self._merged(name, block, columns) for block in range(first // _BLOCK_ROWS, -(-last // _BLOCK_ROWS))]
        start = first % _BLOCK_ROWS
        return torch.cat(found)[start : start + last - first]

    def _merged(self, name: str, block: int, columns: slice) -> torch.Tensor:
        """Always the same rows at once: a product of other rows may round otherwise, and what is verified must not."""
        lora_A, lora_B, scaling = self._factors[name]
        first, last = block * _BLOCK_ROWS, min((block + 1) * _BLOCK_ROWS, self.shape(name)[0])
        tensor = self.base.read(name, first, last, columns)
        product = lora_B[first:last].float(), lora_A[:, columns].float()
        return torch.addmm(tensor.float(), *product, alpha=scaling).to(tensor.dtype)
