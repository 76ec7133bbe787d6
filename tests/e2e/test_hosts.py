"""Two hosts on one machine: network namespaces joined by a wire, torchrun on each, gloo between them."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

STEPS = 16
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
FAULTY = Path(__file__).parent / "faulty"


def ip(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=False)


@pytest.fixture
def hosts():
    """Names of two namespaces, 10.77.0.1 and 10.77.0.2, each with its end `wire` of a cable."""
    names = [f"glm{os.getpid()}a", f"glm{os.getpid()}b"]
    try:
        made = [ip("netns", "add", name) for name in names]
    except FileNotFoundError:
        pytest.skip("no `ip` here (iproute2)")
    if any(each.returncode for each in made):
        pytest.skip(f"no network namespace can be made here: {made[0].stderr.strip()}")
    try:
        ip("link", "add", "wire", "netns", names[0], "type", "veth", "peer", "name", "wire", "netns", names[1])
        for number, name in enumerate(names, start=1):
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "wire")
            for device in ("lo", "wire"):
                assert ip("-n", name, "link", "set", device, "up").returncode == 0
        yield names
    finally:
        for name in names:
            ip("netns", "del", name)


@pytest.fixture
def recipe(checkpoints, corpus, make_recipe, tmp_path):
    sections = {"lora": {"r": 4}, "parallel": {"expert_model_parallel_size": 2}}
    sections["train"] = {
        "steps": STEPS,
        "save_interval": 4,
        "global_batch_size": 4,
        "distributed_timeout_minutes": 0.25,
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(make_recipe(checkpoints["air"], corpus, tmp_path / "run", **sections)))
    return path


def start(hosts: list[str], recipe: Path, tag: str) -> list[subprocess.Popen]:
    """torchrun on each host; what they say goes to TAG0.log and TAG1.log beside the recipe."""
    options = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", "10.77.0.1:29511"]
    env = {**os.environ, "GLOO_SOCKET_IFNAME": "wire"}
    jobs = []
    for number, name in enumerate(hosts):
        command = ["ip", "netns", "exec", name, *TORCHRUN, *options, "--node-rank", str(number)]
        log = open(recipe.parent / f"{tag}{number}.log", "w")
        command += [
            "--rdzv-conf",
            f"is_host={number == 0}",
            "--local-addr",
            f"10.77.0.{number + 1}",
            "-m",
            "glm45_tune",
            "train",
            str(recipe),
        ]
        jobs.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))
    return jobs


def losses(run: Path) -> list[float]:
    path = run / "metrics.jsonl"
    return [json.loads(line)["train/loss"] for line in path.read_text().splitlines()] if path.exists() else []


def test_a_host_that_is_cut_off_is_named_and_the_job_goes_on_when_it_is_back(hosts, recipe, tmp_path, cli):
    """Both hosts end with the reason; the same command on both goes on from the last checkpoint; losses as on one rank, 1e-5."""
    alone = tmp_path / "alone"
    assert cli("train", recipe, "parallel.expert_model_parallel_size=1", f"output_dir={alone}")[0] == 0
    jobs = start(hosts, recipe, "first")
    try:
        deadline = time.monotonic() + 240
        while len(losses(tmp_path / "run")) < 6:
            assert time.monotonic() < deadline and jobs[0].poll() is None, (tmp_path / "first0.log").read_text()[-3000:]
            time.sleep(0.1)
        assert ip("-n", hosts[1], "link", "set", "wire", "down").returncode == 0
        assert jobs[0].wait(timeout=180) != 0
        said = (tmp_path / "first0.log").read_text()
        assert "rank 1 gives no sign of life" in said and "that host is gone or cut off" in said, said[-3000:]
        done = len(losses(tmp_path / "run"))
        assert done < STEPS
        jobs[1].kill()
        jobs[1].wait(timeout=60)
        for process in ip("netns", "pids", hosts[1]).stdout.split():
            os.kill(int(process), 9)  # the lost host's rank, should it still wait
        assert ip("-n", hosts[1], "link", "set", "wire", "up").returncode == 0
        jobs = start(hosts, recipe, "second")
        assert [job.wait(timeout=240) for job in jobs] == [0, 0], (tmp_path / "second0.log").read_text()[-3000:]
    finally:
        for job in jobs:
            if job.poll() is None:
                job.kill()
    assert "resumed after step" in (tmp_path / "second0.log").read_text()
    assert losses(tmp_path / "run") == pytest.approx(losses(alone), rel=1e-5)


def test_torchrun_starts_dead_ranks_again_and_the_run_goes_on(recipe, tmp_path):
    """--max-restarts: rank 1 is killed in step 7, once; one command, all steps, each once."""
    env = {**os.environ, "FAULT": "1:7:kill", "ONCE": str(tmp_path / "once")}
    env["PYTHONPATH"] = f"{FAULTY}:{os.environ.get('PYTHONPATH', '')}"
    command = [
        *TORCHRUN,
        "--standalone",
        "--nproc-per-node",
        "2",
        "--max-restarts",
        "1",
        "-m",
        "glm45_tune",
        "train",
        str(recipe),
    ]
    ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert (tmp_path / "once").exists() and "resumed after step 4" in ended.stderr
    rows = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows == [*range(1, STEPS + 1)]
