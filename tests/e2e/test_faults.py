"""What dies, hangs, fills up or is changed: what is said, with which exit code a run ends, and that nothing is lost."""

import gc
import json
import os
import random
import shutil
import signal
import subprocess
import time
import weakref
from pathlib import Path

import pytest
import torch
import yaml

from glm45_tune.conversion.torch_dist import TorchDistFiles
from glm45_tune.mcore.checkpoint import Snapshot
from glm45_tune.mcore.step import Trainer
from glm45_tune.recipe import Recipe
from glm45_tune.training import run_directory
from glm45_tune.training.metrics import Metrics
from glm45_tune.training.sft import Supervised


@pytest.fixture
def run(checkpoints, corpus, make_recipe, tmp_path, cli):
    """Train one LoRA rank in this process, with overrides; returns (exit code, what was said)."""
    path = tmp_path / "recipe.yaml"
    data = tmp_path / "train.jsonl"
    shutil.copy(corpus, data)
    train = {"steps": 6, "save_interval": 2}
    path.write_text(yaml.safe_dump(make_recipe(checkpoints["air"], data, tmp_path / "run", lora={"r": 4}, train=train)))

    def train(*overrides):
        code, _, err = cli("train", path, *overrides)
        return code, err

    return train


def losses(directory: Path) -> list[float]:
    return [json.loads(line)["train/loss"] for line in (directory / "metrics.jsonl").read_text().splitlines()]


def steps(directory: Path) -> list[int]:
    return [int(path.parent.name[-6:]) for path in sorted(directory.glob("checkpoints/*/complete.json"))]


def test_a_run_that_ended_leaves_nothing_behind_in_its_process(run, tmp_path, monkeypatch):
    """Neither its model nor the threads of its groups, whose waiting would slow down all that comes after."""
    made, build = [], Trainer.__init__
    monkeypatch.setattr(
        Trainer, "__init__", lambda self, *rest: (made.append(weakref.ref(self)), build(self, *rest))[1]
    )
    threads = []
    for seed in (1, 2):
        assert run(f"train.seed={seed}", f"output_dir={tmp_path / str(seed)}")[0] == 0
        gc.collect()
        threads.append(len(os.listdir("/proc/self/task")))
    assert [trainer() for trainer in made] == [None, None] and threads[0] == threads[1], threads


def test_a_checkpoint_that_is_not_whole_is_passed_over_with_a_sentence(run, tmp_path):
    """Four ways of damage to a file drawn by chance; always the one before is taken, and the losses are the same again."""
    assert run()[0] == 0
    directory, wanted = tmp_path / "run", losses(tmp_path / "run")
    last = directory / "checkpoints" / "step_000006"
    files = sorted(json.loads((last / "complete.json").read_text())["files"])
    assert {".metadata", "config.json", "metadata.json"} < set(files)

    def flip(path):
        content = bytearray(path.read_bytes())
        content[random.randrange(len(content))] ^= 1
        path.write_bytes(content)

    ways = {
        "does not hold what was written": lambda: flip(last / random.choice(files)),
        "bytes, ": lambda: os.truncate(last / random.choice(files), 7),
        "is not a file there": lambda: (last / random.choice(files)).unlink(),
        "has no complete.json": (last / "complete.json").unlink,
        "complete.json: not JSON": lambda: (last / "complete.json").write_text("{"),
    }
    for words, damage in ways.items():
        damage()
        code, said = run()
        assert code == 0 and words in said, said
        assert f"{last} is not used" in said and "going on from" in said and "resumed after step 4" in said
        assert losses(directory) == wanted and steps(directory) == [2, 4, 6]


def test_the_last_and_the_best_are_kept(run, tmp_path):
    """save_best keeps the lowest held-out loss, early here: what is held out says other things than what is learned."""
    other, talk = (
        tmp_path / "other.jsonl",
        [{"role": "user", "content": "?"}, {"role": "assistant", "content": "zebra " * 9}],
    )
    other.write_text(json.dumps({"messages": talk}) + "\n")
    code, said = run(
        "train.steps=10", "train.save_interval=1", "train.save_total_limit=2", "train.save_best=true", f"data.eval={other}",
        "train.eval_interval=1", "lora=null", "optimizer.lr=0.01", "optimizer.min_lr=0.01",
    )  # fmt: skip
    assert code == 0, said
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    best = min(rows, key=lambda row: row["eval/loss"])["step"]
    assert steps(tmp_path / "run") == sorted({best, 9, 10})
    assert best < 9, "the held-out loss should have risen"


def test_a_resumed_run_trains_by_the_recipes_rate_and_decay(run, tmp_path):
    """What the recipe says holds from the step on; a run that is further than the recipe is done."""
    assert run()[0] == 0
    begun = tmp_path / "begun"
    (tmp_path / "run").rename(begun)
    found = {}
    for change in ("train.seed=1234", "optimizer.lr=1e-2", "optimizer.weight_decay=1e3", "optimizer.adam_beta1=0.0"):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(begun, tmp_path / "run")
        code, said = run("train.steps=9", change)
        assert code == 0 and "resumed after step 6" in said, said
        found[change] = losses(tmp_path / "run")[-1]
    assert len({round(loss, 4) for loss in found.values()}) == len(found), found
    code, said = run("train.steps=4", "optimizer.adam_beta1=0.0")
    assert code == 0 and "done: 9 steps" in said and "further than the 4 steps" in said


def test_two_jobs_cannot_write_to_one_run(run, tmp_path):
    assert run()[0] == 0
    with run_directory.locked(tmp_path / "run"):
        code, said = run()
        assert code == 2 and "another job is writing to it (process" in said
    assert run()[0] == 0


def test_a_changed_run_says_what_changed_and_what_allows_it(run, tmp_path, checkpoints):
    """Data, model and LoRA; continue where the weights still fit, restart always."""
    assert run()[0] == 0
    rows = (tmp_path / "train.jsonl").read_text(encoding="utf-8")
    changed = rows.replace("想一想", "想一下", 1)  # as many tokens
    assert changed != rows
    (tmp_path / "train.jsonl").write_text(changed, encoding="utf-8")
    code, said = run()
    assert code == 2 and "the samples are others" in said and "train.on_change=continue" in said
    (tmp_path / "train.jsonl").write_text(rows, encoding="utf-8")
    code, said = run("train.global_batch_size=2", "lora.lora_alpha=7")
    assert code == 2 and "train.global_batch_size was 4, now 2" in said and "lora.lora_alpha was 64.0, now 7.0" in said
    code, said = run(f"model.path={checkpoints['air-other']}", "train.steps=7", "train.on_change=continue")
    assert code == 0 and "resumed after step 6" in said
    for way in ("error", "continue"):
        code, said = run("lora.r=8", f"train.on_change={way}")
        assert code == 2 and "lora.r was 4, now 8" in said and "restart" in said and "on_change=continue" not in said
    code, said = run("lora.r=8", "train.on_change=restart", "train.steps=2")
    assert code == 0 and "run.before1" in said and "resumed" not in said
    assert steps(tmp_path / "run") == [2] and steps(tmp_path / "run.before1") == [2, 4, 6, 7]
    code, said = run("lora.r=8", "train.on_change=restart", "train.steps=4")
    assert code == 0 and "resumed after step 2" in said  # a restart is one


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, of so many KiB; give it options to mount it again with."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options: str) -> Path:
        ended = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "none", place], capture_output=True, text=True, check=False
        )
        if ended.returncode:
            pytest.skip(f"no file system can be mounted here: {ended.stderr.strip()}")
        return place

    yield mount
    subprocess.run(["umount", "--lazy", place], capture_output=True, check=False)


def test_a_disk_that_is_full_or_read_only_is_said_at_the_start(run, small_disk):
    place = small_disk("size=64k")
    code, said = run(f"output_dir={place}/run")
    assert code == 2 and "a checkpoint of this run takes" in said and "Make room" in said
    (place / "rest").write_bytes(bytes(60 << 10))
    code, said = run(f"output_dir={place}/run")
    assert code == 2 and "cannot be written to (No space left on device)" in said
    small_disk("remount,ro")
    code, said = run(f"output_dir={place}/run")
    assert code == 2 and "cannot be written to (Read-only file system)" in said
    assert sorted(path.name for path in place.iterdir()) == ["rest"]


def test_a_disk_that_fills_up_keeps_the_last_good_checkpoint(run, small_disk, monkeypatch):
    """Step 2 is saved, then the disk is full: training goes on to its end, says so, ends with 1; with room it goes on from 2."""
    place = small_disk("size=40m")
    directory, train_step = place / "run", Supervised.train_step

    def filling(self, step):
        if step == 3:
            with open(place / "other", "wb") as file, pytest.raises(OSError):
                while True:
                    file.write(bytes(1 << 16))
                    file.flush()
        return train_step(self, step)

    monkeypatch.setattr(Supervised, "train_step", filling)
    code, said = run(f"output_dir={directory}")
    assert code == 1 and "Traceback" not in said, said
    assert (
        "step 4 could not be saved" in said
        and f"the last good checkpoint is {directory}/checkpoints/step_000002" in said
    )
    assert "its last step, 6, could not be saved" in said
    assert steps(directory) == [2]
    monkeypatch.undo()
    (place / "other").unlink()
    code, said = run(f"output_dir={directory}")
    assert code == 0 and "resumed after step 2" in said and len(losses(directory)) == 6


def test_metrics_that_a_full_disk_refuses_are_written_when_there_is_room(small_disk, make_recipe, capsys):
    """Never half a line; said once."""
    place = small_disk("size=100k")
    metrics = Metrics(place, Recipe.from_dict(make_recipe("model", "data", place)), 0)
    (place / "other").write_bytes(bytes(88 << 10))
    for step in range(1, 11):
        metrics.write(step, {f"value/{number:03d}": 0.5 for number in range(200)})
    kept = (place / "metrics.jsonl").read_text().splitlines()
    assert 0 < len(kept) < 10 and all(json.loads(line) for line in kept)
    assert capsys.readouterr().err.count("cannot be written") == 1
    (place / "other").unlink()
    metrics.write(11, {"value": float("nan")})
    assert [json.loads(line)["step"] for line in (place / "metrics.jsonl").read_text().splitlines()] == [*range(1, 12)]


def test_a_step_that_is_not_finite_is_left_out_and_too_many_end_the_run(run, tmp_path, monkeypatch):
    """A rate beyond all measure: the first update makes every later loss NaN. What is being written when the run ends is written."""
    write = Snapshot.write

    def slowly(*arguments):
        time.sleep(0.5)  # longer than a step
        write(*arguments)

    monkeypatch.setattr(Snapshot, "write", slowly)
    code, said = run("optimizer.lr=1e30", "train.steps=20", "train.max_skipped_steps=3", "train.save_interval=1")
    assert code == 1 and "Traceback" not in said
    assert "step 2 is left out: loss nan" in said and "in 3 steps in a row, up to step 4" in said
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row.get("train/skipped_steps") for row in rows] == [None, 1, 2]
    batch = [
        json.loads(line) for line in (tmp_path / "run" / "nonfinite" / "step_000004.jsonl").read_text().splitlines()
    ]
    assert {"row", "source", "line", "text", "input_ids", "loss_mask"} <= batch[0].keys() and "[gMASK]" in batch[0][
        "text"
    ]
    # what was saved while steps were left out is what was saved before them
    first, last = (TorchDistFiles(tmp_path / "run" / "checkpoints" / f"step_00000{step}") for step in (1, 3))
    assert steps(tmp_path / "run") == [1, 2, 3] and len(first.tensors) > 20
    for key in first.tensors:
        assert torch.equal(first.read_key(key), last.read_key(key)), key


def test_out_of_memory_names_the_phase_and_the_next_layout(run, monkeypatch):
    def exhausted(optimizer, *others):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    from glm45_tune.mcore import optimizer

    monkeypatch.setattr(optimizer, "step", exhausted)
    code, said = run()
    assert code == 1 and "Traceback" not in said
    assert "out of memory in step 1, optimizer: CUDA out of memory" in said and "planner" in said


def test_a_signal_saves_and_ends_with_75(run, tmp_path, monkeypatch):
    """SIGTERM and SIGUSR1 in the middle of a step; the same command ends with the losses of a run that nobody stopped."""
    assert run("output_dir=" + str(tmp_path / "whole"))[0] == 0
    train_step = Supervised.train_step
    told = {2: signal.SIGTERM, 4: signal.SIGUSR1}

    def signalled(self, step):
        if step in told:
            os.kill(os.getpid(), told.pop(step))
        return train_step(self, step)

    monkeypatch.setattr(Supervised, "train_step", signalled)
    for step in (3, 5):
        code, said = run("train.save_interval=null")
        assert code == 75 and f"stopped by a signal after step {step} of 6" in said
        assert steps(tmp_path / "run")[-1] == step
    assert run("train.save_interval=null")[0] == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_an_adapter_of_an_earlier_end_is_gone_when_its_run_goes_on(run, tmp_path, monkeypatch, cli, checkpoints):
    assert run("train.steps=1")[0] == 0
    adapter = tmp_path / "run" / "adapter" / "adapter_config.json"
    assert adapter.is_file()
    assert run("train.steps=1")[0] == 0 and adapter.is_file()
    train_step = Supervised.train_step
    told = [signal.SIGTERM]

    def signalled(self, step):
        if told:
            os.kill(os.getpid(), told.pop())
        return train_step(self, step)

    monkeypatch.setattr(Supervised, "train_step", signalled)
    assert run("train.steps=3")[0] == 75 and not adapter.exists()
    merge = (
        "convert",
        "--to-hf",
        "--model",
        checkpoints["air"],
        "--adapter",
        tmp_path / "run",
        "--output",
        tmp_path / "hf",
    )
    code, _, err = cli(*merge)
    assert code == 2 and "has no adapter yet" in err
    assert run("train.steps=3")[0] == 0 and cli(*merge)[0] == 0


def test_the_same_prompts_are_answered_before_and_after(run, tmp_path, cli):
    """logging.num_samples; the losses of a run that keeps none; the report shows both."""
    code, said = run("logging.num_samples=2")
    assert code == 0, said
    lines = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines] == [0, 0, 6, 6] and lines[0]["prompt"] == lines[2]["prompt"]
    assert all(line["prompt"].startswith("[gMASK]<sop>") and "答案" in line["wanted"] for line in lines)
    assert run("output_dir=" + str(tmp_path / "without"))[0] == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "without")
    assert cli("report", tmp_path / "run")[0] == 0
    assert "step 6: " in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    code, said = run("logging.num_samples=2", "parallel.pipeline_model_parallel_size=2")
    assert code == 2 and "logging.num_samples needs pipeline_model_parallel_size 1" in said


def test_losses_by_channel_make_up_the_loss(run, tmp_path):
    """Two files of one name, and rows that name their channel: the means, weighted by trained tokens, are the step's loss."""
    other = tmp_path / "more" / "train.jsonl"
    other.parent.mkdir()
    lines = [
        {"messages": [{"role": "user", "content": "x" * n}, {"role": "assistant", "content": "yes " * n}]}
        | ({"channel": "yes/long"} if n > 4 else {})
        for n in range(1, 9)
    ]
    other.write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, said = run(f"data.train=[{tmp_path}/train.jsonl,{other}]", "train.steps=3", "train.save_interval=null")
    assert code == 0, said
    names, seen = {f"loss/{tmp_path}/train.jsonl", f"loss/{other}", "loss/yes/long"}, set()
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        found = {name: row[name] for name in row if name.startswith("loss/")}
        seen |= found.keys()
        assert min(found.values()) - 1e-6 <= row["train/loss"] <= max(found.values()) + 1e-6
    assert seen == names
    other.write_text(json.dumps(lines[0] | {"channel": 3}) + "\n")
    code, said = run(f"data.train={other}")
    assert code == 2 and f"{other}:1: channel is 3" in said
