"""What saving in the background costs the steps beside it. Run on a CPU: python scripts/bench_saving.py [--hidden 512] [--batch 4] [--rounds 3]

One full fine-tuning of a few layers, saved after every fourth step and saved only at its end, by turns, in one process. The same step
of both has the same rows, so the steps that a save goes on beside are compared with themselves; and the rest too, as a measure of noise.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

from glm45_tune.conversion.hf_files import plan_hf
from glm45_tune.conversion.plan import literal
from glm45_tune.conversion.write import write_file
from glm45_tune.recipe import Recipe
from glm45_tune.spec import ModelSpec
from glm45_tune.tiny import checkpoint
from glm45_tune.training.launch import train
from glm45_tune.training.saver import Saver

STEPS, INTERVAL = 24, 4
DATA = Path(__file__).parents[1] / "data_examples" / "seats_at_once.jsonl"


def write_model(directory: Path, hidden: int) -> None:
    """The tiny checkpoint, wider."""
    checkpoint.write(directory, "air")
    config = json.loads((directory / "config.json").read_text())
    config |= {"hidden_size": hidden, "intermediate_size": 3 * hidden, "moe_intermediate_size": hidden}
    source = checkpoint.RandomModel(ModelSpec.from_config(config, "config.json"), 0, config)
    for old in directory.glob("model*"):
        old.unlink()
    for file in [*plan_hf(source, 10**9), literal("config.json", json.dumps(config).encode())]:
        (directory / file.name).unlink(missing_ok=True)
        write_file(directory / file.name, source, file)


def timed_saves() -> list[float]:
    """Seconds that every Saver.save from now on takes: training stands still for it."""
    seconds, save = [], Saver.save

    def timed(self, facts: dict) -> None:
        started = time.perf_counter()
        save(self, facts)
        seconds.append(time.perf_counter() - started)

    Saver.save = timed
    return seconds


def step_seconds(root: Path, name: str, batch: int, interval: int | None) -> dict[int, float]:
    """Step → seconds of a run; the first step, which warms up, is left out."""
    train(
        Recipe.from_dict(
            {
                "model": {"path": str(root / "model"), "params_dtype": "fp32"},
                "data": {"train": str(DATA), "seq_length": 512},
                "train": {"steps": STEPS, "global_batch_size": batch, "save_interval": interval},
                "optimizer": {"lr": 1e-4},
                "output_dir": str(root / name),
            }
        )
    )
    lines = [json.loads(line) for line in (root / name / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["perf/step_seconds"] for line in lines[1:]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4, help="rows of a step: how long it takes beside what is saved")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    beside, apart, pauses = [], [], timed_saves()
    with tempfile.TemporaryDirectory(prefix="glm45_saving_") as holder:
        root = Path(holder)
        write_model(root / "model", options.hidden)
        for number in range(options.rounds):
            saved = step_seconds(root, f"saved{number}", options.batch, INTERVAL)
            left_alone = step_seconds(root, f"alone{number}", options.batch, None)
            beside += [(saved[step], left_alone[step]) for step in saved if step > INTERVAL and step % INTERVAL == 1]
            apart += [(saved[step], left_alone[step]) for step in saved if step < INTERVAL or step % INTERVAL != 1]
        size = sum(path.stat().st_size for path in (root / "saved0" / "checkpoints").glob(f"*{STEPS}/*"))
    for name, pairs in (("steps right after a save", beside), ("the other steps", apart)):
        ratios = sorted(saved / alone for saved, alone in pairs)
        seconds = sorted(alone for _, alone in pairs)
        print(
            f"{name}: {ratios[len(ratios) // 2]:.3f} of the time without (median of {len(ratios)}, {seconds[len(seconds) // 2]:.2f} s)"
        )
    print(f"a checkpoint: {size / 1e6:.0f} MB; training stands still for {sorted(pauses)[len(pauses) // 2]:.2f} s (median)")


if __name__ == "__main__":
    main()
