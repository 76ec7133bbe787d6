"""The law: the same loss and gradient under every parallel layout, 1e-5 relative in fp32. One rank is the reference."""

import json
from pathlib import Path

import pytest

from glm45_tune.conversion.mcore_files import TorchDistFiles

WORKER = Path(__file__).parent / "worker.py"
TOLERANCE = 1e-5

# (tensor, pipeline, expert, expert tensor) by number of ranks
LAYOUTS = {
    2: [(2, 1, 1, 1), (1, 2, 1, 1), (1, 1, 2, 1), (2, 1, 2, 1), (1, 1, 1, 2)],
    4: [(1, 2, 2, 1), (2, 2, 1, 1), (2, 1, 4, 1), (1, 1, 1, 1)],
}
KEYS = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)
KINDS = {
    "lora": {"lora": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}, "model": {"mtp_loss_scaling_factor": 0.3}},
    "lora-hf-names": {"lora": {"r": 4, "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"]}},
    "full": {"model": {"mtp_loss_scaling_factor": 0.3}},
    "full-355b": {},
}


def _case(name, kind, sizes, checkpoints, corpus, make_recipe, output, **more):
    model = checkpoints["355b" if "355b" in kind else "air"]
    sections = {**KINDS[kind], "parallel": dict(zip(KEYS, sizes))}
    return {"name": name, "recipe": make_recipe(model, corpus, output / "run", **sections), **more}


@pytest.fixture(scope="module")
def results(checkpoints, corpus, make_recipe, ranks, tmp_path_factory):
    """Directory with the result of every case, all cases of one rank count run by one start of the ranks."""
    output = tmp_path_factory.mktemp("layouts")

    def start(world_size, cases):
        file = output / f"cases{world_size}.json"
        file.write_text(json.dumps(cases))
        ranks(world_size, WORKER, [str(file), str(output)])

    common = (checkpoints, corpus, make_recipe, output)
    start(1, [_case(f"{kind}-one", kind, (1, 1, 1, 1), *common) for kind in KINDS])
    for world_size, layouts in LAYOUTS.items():
        cases = [_case(_name(kind, sizes, world_size), kind, sizes, *common) for kind in KINDS for sizes in layouts]
        if world_size == 2:
            cases += [
                _case("broken-norms", "full", (2, 1, 1, 1), *common, sabotage="norms are not summed over tensor ranks"),
                _case("broken-experts", "full", (1, 1, 2, 1), *common, sabotage="experts are reduced over no rank"),
            ]
        start(world_size, cases)
    return output


def _name(kind, sizes, world_size):
    return f"{kind}-{'x'.join(map(str, sizes))}-on-{world_size}"


def _difference(results: Path, name: str, reference: str) -> float:
    """Largest relative difference of loss, gradient norm and any gradient tensor (against its own largest value)."""
    ours, theirs = (json.loads((results / f"{n}.json").read_text()) for n in (name, reference))
    worst = max(abs(ours[k] / theirs[k] - 1) for k in theirs if k in ("train/loss", "train/grad_norm", "train/mtp_loss"))
    a, b = TorchDistFiles(results / name), TorchDistFiles(results / reference)
    gradients = [key for key in b.tensors if key.startswith("optimizer.state.exp_avg.")]
    assert gradients and set(a.tensors) == set(b.tensors)
    for key in gradients:
        x, y = a.read_key(key), b.read_key(key)
        scale = y.abs().max().item()
        if scale > 1e-9:  # an expert that no token reached has no gradient
            worst = max(worst, (x - y).abs().max().item() / scale)
    return worst


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "world_size, sizes", [(n, sizes) for n, layouts in LAYOUTS.items() for sizes in layouts], ids=lambda x: str(x)
)
def test_a_layout_gives_one_ranks_loss_and_gradients(results, kind, world_size, sizes):
    assert _difference(results, _name(kind, sizes, world_size), f"{kind}-one") <= TOLERANCE


@pytest.mark.parametrize("broken", ["broken-norms", "broken-experts"])
def test_a_broken_reduction_is_seen(results, broken):
    assert _difference(results, broken, "full-one") > 100 * TOLERANCE
