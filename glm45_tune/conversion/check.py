"""Are these tensors, by name, shape and dtype, a whole GLM-4.5 model of the sizes that config.json gives?"""

import re

import torch

from glm45_tune.conversion.names import hf_shapes, rows
from glm45_tune.conversion.plan import collector_off
from glm45_tune.conversion.tensors import HfReader
from glm45_tune.errors import CheckpointError
from glm45_tune.spec import unused_keys


@collector_off()
def check_tensors(source: HfReader) -> None:
    """Raise CheckpointError unless the tensors are this model's, all of them, in its shapes and dtypes."""
    expected, held, where = hf_shapes(source.spec), set(source.names), source.path
    missing, unknown = sorted(expected.keys() - held), sorted(held - expected.keys())
    if missing:
        raise CheckpointError(
            f"{where}: {missing[0]} is missing ({len(missing)} of {len(expected)} tensors are). {_why(source)}"
        )
    if unknown:
        raise CheckpointError(
            f"{where}: no place in a GLM-4.5 model for {unknown[0]} ({len(unknown)} such). {_why(source)}"
        )
    for name, shape in expected.items():
        if source.shape(name) != shape:
            raise CheckpointError(f"{where}: {name} has shape {source.shape(name)}; config.json makes it {shape}.")
    for row in rows(source.spec):
        for expert in range(row.num_experts or 1):
            dtypes = {name: source.dtype(name) for name in row.hf_names(expert)}
            if len(set(dtypes.values())) > 1:
                raise CheckpointError(f"{where}: tensors that are one in megatron differ in dtype: {dtypes}.")


def remarks(source: HfReader) -> list[str]:
    """What a checkpoint of others has that is read and unusual, a sentence each."""
    found = [f"{source.path}/config.json: {key} is not used here." for key in sorted(unused_keys(source.config))]
    biases = {source.dtype(name) for name in source.names if name.endswith("e_score_correction_bias")}
    if others := biases - {torch.float32}:
        kinds = ", ".join(str(dtype).removeprefix("torch.") for dtype in others)
        found.append(f"{source.path}: the routers' correction biases are {kinds}; they are read exactly, and kept so.")
    return found


def _why(source: HfReader) -> str:
    """What config.json counts otherwise than the weights, and what to do."""
    spec, names = source.spec, source.names
    layers = _numbers(names, r"model\.layers\.(\d+)\.")
    mtp = _numbers(names, r"model\.layers\.(\d+)\.eh_proj\.")
    counted = {
        "num_hidden_layers": (spec.num_layers, len(layers - mtp)),
        "num_nextn_predict_layers": (spec.mtp_num_layers, len(mtp)),
        "first_k_dense_replace": (
            spec.num_dense_layers,
            len(_numbers(names, r"model\.layers\.(\d+)\.mlp\.gate_proj\.")),
        ),
        "n_routed_experts": (spec.num_moe_experts, len(_numbers(names, r".*\.mlp\.experts\.(\d+)\."))),
    }
    wrong = {key: both for key, both in counted.items() if both[0] != both[1]}
    if not wrong:
        return "Is the download complete, and this a GLM-4.5 model of a known release?"
    said = "; ".join(f"{key} is {promised} there, {held} here" for key, (promised, held) in wrong.items())
    way = (
        " Convert with `--mtp off` to go on without it: num_nextn_predict_layers 0 is written. (A checkpoint of a run that left "
        "MTP alone becomes a whole model by `glm45-tune export RUN`.)"
    )
    return f"config.json and the weights disagree: {said}.{way if spec.mtp_num_layers and not mtp else ''}"


def _numbers(names: list[str], pattern: str) -> set[int]:
    return {int(found[1]) for name in names if (found := re.match(pattern, name))}
