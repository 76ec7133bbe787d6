"""Kill a run of 40 steps, saving every 5, at random moments; start it again; its final state must be that of a run left alone.

    python scripts/kill_test.py [--kills 30] [--ranks 2] [--seed N]

A moment is drawn over the whole life of the command, imports and the writing of checkpoints included. By turns every process of the
job dies at once (kill −9), or one of them alone, a rank or what started it, which must end the others. Compared are all tensors of the
last checkpoint, weights and optimizer, bit for bit. Exit code 3 when one differs.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from glm45_tune.conversion.torch_dist import TorchDistFiles
from glm45_tune.tiny import checkpoint

STEPS = 40
DATA = Path(__file__).parents[1] / "data_examples" / "seats_at_once.jsonl"


def recipe(root: Path, name: str, ranks: int) -> Path:
    document = {
        "model": {"path": str(root / "model"), "params_dtype": "fp32"},
        "data": {"train": str(DATA), "seq_length": 128},
        "lora": {"r": 4, "target_modules": "all-linear", "lora_dropout": 0.1},
        "parallel": {"expert_model_parallel_size": ranks},
        "optimizer": {"lr": 1e-3},
        "train": {"steps": STEPS, "global_batch_size": 4, "save_interval": 5},
        "output_dir": str(root / name),
    }
    path = root / f"{name}.yaml"
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    return path


def start(path: Path) -> subprocess.Popen:
    """The command in a process group of its own."""
    command = [sys.executable, "-m", "glm45_tune", "train", str(path)]
    log = open(path.with_suffix(".log"), "ab")
    return subprocess.Popen(command, start_new_session=True, stdout=log, stderr=log)


def finish(path: Path) -> float:
    """Run to the end. Returns its seconds."""
    started = time.monotonic()
    code = start(path).wait(timeout=900)
    if code:
        sys.exit(f"{path}: ended with {code}\n{path.with_suffix('.log').read_text()[-3000:]}")
    return time.monotonic() - started


def digest(run: Path) -> str:
    """Of every tensor of the last checkpoint."""
    files = TorchDistFiles(run / "checkpoints" / f"step_{STEPS:06d}")
    found = hashlib.sha256()
    for key in sorted(files.tensors):
        found.update(key.encode() + files.read_key(key).numpy().tobytes())
    return found.hexdigest()


def kill(job: subprocess.Popen, only_one: bool) -> None:
    group = subprocess.run(["pgrep", "-g", str(job.pid)], capture_output=True, text=True, check=False).stdout.split()
    others = [int(process) for process in group if int(process) != job.pid]
    if only_one and others:
        os.kill(random.choice(others), signal.SIGKILL)
    else:
        os.killpg(job.pid, signal.SIGKILL)
    job.wait(timeout=120)


def steps_done(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []
    return json.loads(lines[-1])["step"] if lines else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    random.seed(options.seed)
    with tempfile.TemporaryDirectory(prefix="glm45_kill_") as holder:
        root = Path(holder)
        checkpoint.write(root / "model", "air")
        seconds = finish(recipe(root, "alone", options.ranks))
        wanted, different = digest(root / "alone"), 0
        print(f"left alone: {STEPS} steps in {seconds:.1f} s", flush=True)
        for number in range(options.kills):
            path = recipe(root, f"killed{number}", options.ranks)
            job, moment = start(path), random.uniform(0, seconds)
            time.sleep(moment)
            was_running = job.poll() is None
            if was_running:
                kill(job, only_one=number % 2 == 1)
            done = steps_done(root / path.stem)
            finish(path)
            is_same = digest(root / path.stem) == wanted
            different += not is_same
            how = f"killed after step {done}" if was_running else "was done already"
            print(f"{number + 1}: at {moment:.1f} s, {how}: {'the same' if is_same else 'DIFFERENT'}", flush=True)
    print(f"{options.kills - different} of {options.kills} ended with the same weights and optimizer, bit for bit")
    return 3 if different else 0


if __name__ == "__main__":
    sys.exit(main())
