"""What tests share: tiny checkpoints, made once; a small corpus; ranks that run the same worker."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
os.environ.setdefault("OMP_NUM_THREADS", "1")
# MKL chooses its AVX-512 kernels by shape, and a row's last bits with them: laws of equal bits need the same for any number of rows
os.environ.setdefault("MKL_CBWR", "AVX2")


# files that start ranks, servers or many processes: `scripts/test.sh --fast` leaves them out
SLOW = """
    ahead children crash_safe data_bounds data_faults docs_rl family foreign_files fp8_base generate kernels labelled preference
    processes report rl_loop rl_rewards router_losses run_files runtime secrets servers stream web
""".split()


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu(count): needs that many NVIDIA cards")
    config.addinivalue_line("markers", "slow: starts ranks, servers or many processes")


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.stem.removeprefix("test_") in SLOW:
            item.add_marker("slow")


def pytest_runtest_setup(item):
    for mark in item.iter_markers("gpu"):
        import torch

        if torch.cuda.device_count() < mark.args[0]:
            pytest.skip(f"needs {mark.args[0]} NVIDIA card(s), {torch.cuda.device_count()} here")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Rendered data of the tests stays with the tests."""
    os.environ["GLM45_TUNE_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """name → directory of a tiny HF checkpoint: air, 355b, air-no-mtp, 355b-no-mtp, air-other (another seed)."""
    from glm45_tune.tiny import checkpoint

    root = tmp_path_factory.mktemp("checkpoints")
    for like in ("air", "355b"):
        checkpoint.write(root / like, like)
        checkpoint.write(root / f"{like}-no-mtp", like, mtp=False)
    checkpoint.write(root / "air-other", "air", seed=7)
    return {path.name: path for path in root.iterdir()}


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A JSONL file of 24 conversations of very different lengths, some with two turns, some with thoughts."""
    path = tmp_path_factory.mktemp("corpus") / "train.jsonl"
    rows = []
    for number in range(24):
        messages = [
            {"role": "user", "content": f"第{number}个问题。" + "The weather? " * (number % 5)},
            {
                "role": "assistant",
                "content": "答案 " * (1 + number % 7),
                "reasoning_content": "想一想。" * (number % 3),
            },
        ]
        if number % 4 == 0:
            messages += [{"role": "user", "content": "再说。"}, {"role": "assistant", "content": f"好的 {number}。"}]
        rows.append({"messages": messages})
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def one_rank():
    """megatron's parallel state for one rank in this process, made anew where the test before has left its job."""
    from megatron.core import parallel_state

    from glm45_tune.layout import Layout
    from glm45_tune.mcore import runtime

    layout = Layout()
    if not parallel_state.model_parallel_is_initialized():
        runtime.start(layout)
    return layout


def recipe_dict(checkpoint, train, output, /, **sections) -> dict:
    """A small recipe in fp32; `sections` are merged over its own."""
    recipe = {
        "model": {"path": str(checkpoint), "params_dtype": "fp32"},
        "data": {"train": str(train), "seq_length": 160},
        "train": {"steps": 2, "global_batch_size": 4},
        "optimizer": {"lr": 1e-3, "min_lr": 1e-4, "warmup_ratio": 0.0},
        "output_dir": str(output),
    }
    for name, section in sections.items():
        recipe[name] = recipe.get(name, {}) | section
    return recipe


def run_ranks(world_size: int, script: Path, arguments: list[str], timeout: float = 600) -> None:
    """Call a script's `main(*arguments)` once a rank, in processes of their own; fails with the output of the first that failed."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    starter = subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "fork_ranks.py"), str(world_size), str(script), *arguments],
        env={**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output = starter.communicate(timeout=timeout)[0]
        assert starter.returncode == 0, output
        print(output)
    finally:
        starter.terminate()


@pytest.fixture(scope="session")
def train_here():
    """Train a recipe (a dict) in this process, one rank: a whole run directory with its checkpoints, metrics and adapter."""

    def train(recipe: dict) -> Path:
        from glm45_tune.recipe import Recipe
        from glm45_tune.training import loop
        from glm45_tune.training.prepare import prepare

        loop.run(prepare(Recipe.from_dict(recipe)))
        return Path(recipe["output_dir"])

    return train


@pytest.fixture(scope="session")
def lora_run(checkpoints, corpus, train_here, tmp_path_factory):
    """A LoRA run of 4 steps over the tiny Air-like model, saved every second, MTP left alone, some rows held out."""
    return train_here(
        recipe_dict(
            checkpoints["air"],
            corpus,
            tmp_path_factory.mktemp("runs") / "lora",
            lora={"r": 4, "target_modules": "all-linear"},
            data={"eval_ratio": 0.2},
            train={"steps": 4, "save_interval": 2, "eval_interval": 2},
        )
    )


@pytest.fixture(scope="session")
def full_run(checkpoints, corpus, train_here, tmp_path_factory):
    """All weights of the tiny 355B-like model trained for 2 steps, MTP along."""
    return train_here(
        recipe_dict(
            checkpoints["355b"],
            corpus,
            tmp_path_factory.mktemp("runs") / "full",
            model={"mtp_loss_scaling_factor": 0.1},
        )
    )


@pytest.fixture(scope="session")
def ranks():
    return run_ranks


@pytest.fixture(scope="session")
def make_recipe():
    return recipe_dict


@pytest.fixture(scope="module")
def backend():
    """What imitation engines write with, see tests/unit/fake_engine.py."""
    from fake_engine import Backend

    with Backend() as backend:
        yield backend


@pytest.fixture
def cli(capsys, monkeypatch):
    """Run the command line in this process: returns (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        from glm45_tune import cli as command_line

        monkeypatch.setattr(sys, "argv", ["glm45-tune", *map(str, arguments)])
        code = 0
        try:
            command_line.main()
        except SystemExit as end:
            code = end.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return run
