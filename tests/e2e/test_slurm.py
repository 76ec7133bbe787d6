"""A plan's batch script under a real Slurm: two nodes on this machine, preempted in the middle, requeued, gone on with."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
NEEDED = ("slurmctld", "slurmd", "srun", "sbatch", "munged", "mungekey", "shellcheck")
PROGRAMS = {name: shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") for name in NEEDED}
STEPS = 24

CONFIGURATION = """
ClusterName=glm45
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge/socket
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool.%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/linear
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,batch_sched_delay=0
KillWait=10
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={first} CPUs=2 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={second} CPUs=2 State=UNKNOWN
PartitionName=low Nodes=n1,n2 Default=YES PriorityTier=1 GraceTime=30 State=UP
PartitionName=high Nodes=n1,n2 PriorityTier=10 PreemptMode=OFF State=UP
"""


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """munged, slurmctld and two slurmd on loopback. Gives the environment in which Slurm's commands find them."""
    missing = [name for name, path in PROGRAMS.items() if path is None]
    if missing or os.geteuid():
        pytest.skip(f"Slurm cannot be started here: {', '.join(missing)} missing (scripts/setup_slurm.sh), or not root")
    root = tmp_path_factory.mktemp("slurm")
    munge = root / "munge"
    munge.mkdir(mode=0o711)
    host, ports = socket.gethostname().split(".")[0], _free_ports(3)
    names = dict(zip(("controller", "first", "second"), ports))
    (root / "slurm.conf").write_text(CONFIGURATION.format(host=host, root=root, **names))
    (root / "state").mkdir()
    env = {
        **os.environ,
        "SLURM_CONF": str(root / "slurm.conf"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    env["PYTHONPATH"] = str(ROOT)
    subprocess.run([PROGRAMS["mungekey"], "--create", f"--keyfile={munge}/key"], check=True)
    files = [f"--{kind}={munge}/{kind}" for kind in ("socket", "pid-file", "log-file", "seed-file")]
    commands = [
        [PROGRAMS["munged"], "--foreground", "--force", f"--key-file={munge}/key", *files],
        [PROGRAMS["slurmctld"], "-D", "-i"],
        [PROGRAMS["slurmd"], "-D", "-N", "n1"],
        [PROGRAMS["slurmd"], "-D", "-N", "n2"],
    ]
    daemons = []
    try:
        for command in commands:
            with open(root / f"{len(daemons)}.out", "w") as output:
                daemons.append(subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT))
            if len(daemons) == 1:
                _wait(lambda: (munge / "socket").exists(), 10, "munged")
        _wait(
            lambda: _run(env, "sinfo", "-h", "-o", "%T", check=False).strip() == "idle", 30, f"idle nodes; see {root}"
        )
        yield env
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            daemon.wait(timeout=20)


def _wait(holds, seconds: float, what: str, log: Path | None = None) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        end = log.read_text()[-3000:] if log and log.exists() else ""
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}\n{end}"
        time.sleep(0.3)


def _run(env, *command: str, check: bool = True, cwd=None) -> str:
    ended = subprocess.run(command, env=env, capture_output=True, text=True, cwd=cwd, check=False)
    assert ended.returncode == 0 or not check, ended.stdout + ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, checkpoints, corpus, make_recipe) -> Path:
    """LoRA on two expert-parallel ranks, long enough to be preempted."""
    root = tmp_path_factory.mktemp("job")
    sections = {"lora": {"r": 4}, "parallel": {"expert_model_parallel_size": 2}}
    sections["train"] = {"steps": STEPS, "save_interval": 4, "global_batch_size": 4}
    path = root / "tiny.yaml"
    path.write_text(yaml.safe_dump(make_recipe(checkpoints["air"], corpus, root / "run", **sections)))
    return path


@pytest.fixture(scope="module")
def script(recipe) -> Path:
    """What `plan --sbatch` prints for two nodes of one rank."""
    command = [
        sys.executable,
        "-m",
        "glm45_tune",
        "plan",
        str(recipe),
        "--gpu",
        "cpu",
        "--gpus-per-node",
        "1",
        "--sbatch",
    ]
    path = recipe.with_suffix(".sbatch")
    path.write_text(subprocess.run(command, capture_output=True, text=True, check=True, cwd=recipe.parent).stdout)
    return path


def _metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_script_is_sound(script):
    """bash and shellcheck find nothing; the plan's world size is in it."""
    subprocess.run(["bash", "-n", str(script)], check=True)
    if PROGRAMS["shellcheck"]:
        subprocess.run(
            [PROGRAMS["shellcheck"], str(script), *map(str, (ROOT / "scripts").glob("*slurm.sh"))], check=True
        )
    text = script.read_text()
    assert "#SBATCH --nodes=2\n#SBATCH --ntasks-per-node=1\n" in text and "#SBATCH --requeue" in text
    assert "gpus-per-node" not in text


def test_a_preempted_job_is_requeued_and_ends_like_one_that_was_not(slurm, recipe, script, cli):
    """The job is preempted behind its first checkpoint, starts again by itself, and its losses are those of one rank left alone

    (fp32 sums in another order: 1e-5; a step lost or done twice is 1e-2)."""
    run, alone = recipe.parent / "run", recipe.parent / "alone"
    code, _, err = cli("train", recipe, "parallel.expert_model_parallel_size=1", f"output_dir={alone}")
    assert code == 0, err
    controller = Path(slurm["SLURM_CONF"]).with_name("slurmctld.log")
    job = _run(slurm, "sbatch", "--parsable", "--partition=low", str(script), cwd=recipe.parent).strip()

    def state() -> str:
        return _run(slurm, "squeue", "-h", "-j", job, "-t", "all", "-o", "%T", check=False).strip()

    _wait(lambda: (run / "checkpoints" / "step_000004" / "complete.json").exists(), 120, "the first checkpoint")
    assert state() == "RUNNING"
    _run(slurm, "sbatch", "--partition=high", "--nodes=2", "--output=/dev/null", "--wrap", "sleep 1", cwd=recipe.parent)
    _wait(lambda: "PENDING" in state(), 90, "the preemption", controller)
    assert len(_metrics(run)) < STEPS, "the job was done before it was preempted"
    # a requeued job waits two minutes by Slurm's own rule
    _wait(lambda: _run(slurm, "squeue", "-h", "-p", "high").strip() == "", 60, "the other job's end")
    _run(slurm, "scontrol", "update", f"JobId={job}", "StartTime=now")
    _wait(lambda: state() in ("COMPLETED", "FAILED", "CANCELLED"), 120, "the job's end", controller)

    log = next(recipe.parent.glob("*.log")).read_text()
    assert state() == "COMPLETED", log
    assert f"job {job}, start 0: 2 ranks on n[1-2], rank 0 at 127.0.0.1:" in log and f"job {job}, start 1:" in log
    assert sorted(path.name for path in (recipe.parent / "run_logs").iterdir()) == ["rank_0.log", "rank_1.log"]
    assert "resumed after step" in (Path(f"{run}_logs") / "rank_0.log").read_text()
    found, wanted = _metrics(run), _metrics(alone)
    assert [row["step"] for row in found] == list(range(1, STEPS + 1))
    assert [row["train/loss"] for row in found] == pytest.approx([row["train/loss"] for row in wanted], rel=1e-5)
