"""What a process shares is after `train` as it was before: a notebook or a server goes on with its own torch."""

import json
import os
import subprocess
import sys

import pytest
import yaml
from conftest import recipe_dict

SNAPSHOT = """
import json, logging, os, signal, sys, threading, warnings
import torch, torch.distributed as dist, torch._dynamo

def state():
    return {
        "device": str(torch.ones(1, device="cpu").device),
        "type": torch.ones(1).type(),
        "cuda": [repr(vars(torch.cuda).get(name)) for name in sorted(vars(torch.cuda)) if not name.startswith("__")
                 and callable(vars(torch.cuda)[name])],
        "tensor": sorted((name, repr(value)) for name, value in vars(torch.Tensor).items() if callable(value)),
        "dynamo": torch._dynamo.config.disable,
        "filters": [repr(found) for found in warnings.filters],
        "dtype": str(torch.get_default_dtype()), "default device": str(torch.get_default_device()),
        "environment": dict(os.environ),
        "signals": [repr(signal.getsignal(number)) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)],
        "distributed": dist.is_initialized(),
        "deterministic": [torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark,
                          torch.utils.deterministic.fill_uninitialized_memory],
        "random": torch.get_rng_state().sum().item(), "threads": torch.get_num_threads(),
        "modes": torch._C._len_torch_function_stack(),
        "levels": [logging.getLogger(name).level for name in ("", "megatron", "torch.utils.cpp_extension")],
        "hooks": [repr(sys.excepthook), repr(threading.excepthook), repr(warnings.showwarning)],
        "gradients": torch.is_grad_enabled(), "precision": torch.get_float32_matmul_precision(),
    }

def refuses_cuda():
    try:
        torch.ones(1, device="cuda")
    except (AssertionError, RuntimeError):
        return True
    return False

torch.manual_seed(3)
signal.signal(signal.SIGTERM, lambda *_: None)
before = state()
"""
TRAIN = """
from glm45_tune import Recipe, train
how, raised = sys.argv[2], None
for _ in range(2):
    if how == "raises":
        from glm45_tune.training import loop
        def _fails(*_): raise KeyError("in the middle")
        loop._step = _fails
    try:
        code = train(sys.argv[1])
        assert code == 0, code
    except KeyError as error:
        raised = str(error)
assert (raised is not None) == (how == "raises"), raised
"""
IMPORT = """
import importlib, pkgutil, glm45_tune
import pandas, pyarrow, requests, sympy, torch._inductor.config, transformers  # these add filters of their own
before = state()
for found in pkgutil.walk_packages(glm45_tune.__path__, "glm45_tune."):
    if not found.name.endswith("__main__"):
        try:
            importlib.import_module(found.name)
        except ModuleNotFoundError as error:  # of kernels that are not installed here
            assert error.name in ("quack", "flash_attn", "cutlass", "triton"), error
"""
COMPARE = """
after = state()
print(json.dumps({name: [str(before[name])[:3000], str(after[name])[:3000]] for name in before if before[name] != after[name]}))
assert refuses_cuda(), "cuda is taken for the CPU"
"""


def _changed(work: str, *arguments: object) -> dict:
    ended = subprocess.run(
        [sys.executable, "-c", SNAPSHOT + work + COMPARE, *map(str, arguments)],
        capture_output=True, text=True, timeout=300, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-4000:]
    return json.loads(ended.stdout.splitlines()[-1])


@pytest.mark.parametrize("how", ["ends", "raises"])
def test_train_leaves_the_process_as_it_was(checkpoints, corpus, tmp_path, how):
    """Twice in a row; also where a step raises; with deterministic algorithms, which set variables and torch's choice."""
    document = recipe_dict(
        checkpoints["air"], corpus, tmp_path / "run", lora={"r": 2}, train={"steps": 1, "deterministic": True}
    )
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
    assert _changed(TRAIN, tmp_path / "recipe.yaml", how) == {}


def test_importing_changes_nothing():
    """No module of ours patches or filters when it is imported; what other libraries set by themselves is not ours."""
    changed = _changed(IMPORT)
    changed.pop("environment", None)
    assert changed == {}
