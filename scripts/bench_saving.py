"""What saving in the background costs the step beside it.

Run on a CPU: python scripts/bench_saving.py [--directory DIR] [--batch 4]

Full fine-tuning of a few layers. The same step, of the same rows, is timed again and again: right after a save has begun, and with
nothing beside it, by turns. As a control the first half of the steps with nothing beside them stands against the second, turn by turn.
--directory /dev/shm tells what the saving itself costs from what the disk does: a virtual machine's disk may work on its processors.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from glm45_tune.conversion.hf_files import plan_hf
from glm45_tune.conversion.plan import literal
from glm45_tune.conversion.write import write_file
from glm45_tune.mcore import runtime
from glm45_tune.mcore.step import Trainer
from glm45_tune.recipe import Recipe
from glm45_tune.spec import ModelSpec
from glm45_tune.tiny import checkpoint
from glm45_tune.training.loop import METHODS, collector_spared
from glm45_tune.training.prepare import prepare
from glm45_tune.training.saver import Saver

DATA = Path(__file__).parents[1] / "data_examples" / "seats_at_once.jsonl"
WARM_UP = 3


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


def seconds_of(work, *arguments) -> float:
    started = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4, help="rows of a step: how long it takes beside what is saved")
    parser.add_argument("--directory", type=Path, help="where the checkpoints go")
    parser.add_argument("--pairs", type=int, default=40)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="glm45_saving_", dir=options.directory) as holder:
        root = Path(holder)
        write_model(root / "model", options.hidden)
        recipe = Recipe.from_dict(
            {
                "model": {"path": str(root / "model"), "params_dtype": "fp32"},
                "data": {"train": str(DATA), "seq_length": 512},
                "train": {"steps": 10**6, "global_batch_size": options.batch, "save_total_limit": 2},
                "optimizer": {"lr": 1e-4},
                "output_dir": str(root / "run"),
            }
        )
        job = prepare(recipe)
        runtime.start(job.layout)
        trainer = Trainer(recipe, job.layout, job.source)
        method, saver = METHODS[job.kind](job, trainer), Saver(job, trainer)
        method.train_step(0)
        with collector_spared():
            pauses, writes, beside, apart = [], [], [], []
            for turn in range(WARM_UP + options.pairs):
                pauses.append(seconds_of(saver.save, {"step": turn + 1}))
                started = time.perf_counter()
                beside.append(seconds_of(method.train_step, 0))
                saver.wait()
                writes.append(time.perf_counter() - started)
                apart += [seconds_of(method.train_step, 0), seconds_of(method.train_step, 0)]
        size = sum(path.stat().st_size for path in (root / "run" / "checkpoints" / f"step_{turn + 1:06d}").iterdir())
    beside, apart = beside[WARM_UP:], apart[2 * WARM_UP :]
    first, second = apart[::2], apart[1::2]
    for name, ones, others in (("beside a save", beside, second), ("after it, as a control", first, second)):
        ratio = statistics.median(one / other for one, other in zip(ones, others))
        mean = sum(ones) / sum(others)
        print(f"a step {name}: {ratio:.3f} of one alone (median of {len(ones)} turns; all together {mean:.3f})")
    print(
        f"a step alone: {statistics.median(apart):.3f} s; a checkpoint: {size / 1e6:.0f} MB; training stands still for"
    )
    print(
        f"{statistics.median(pauses[WARM_UP:]):.3f} s; a step and the rest of the writing: {statistics.median(writes[WARM_UP:]):.3f} s"
    )


if __name__ == "__main__":
    main()
