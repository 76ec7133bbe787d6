"""A Slurm batch script with a plan's numbers in it: one task a rank, its own log, the same command again after a preemption."""

from pathlib import Path

from glm45_tune.errors import UserError
from glm45_tune.plan.cards import CPU
from glm45_tune.plan.planner import Plan
from glm45_tune.quoting import one_line, sbatch, shell
from glm45_tune.recipe import Recipe

BODY = r"""
set -euo pipefail

# Rendezvous: the first node's address as Slurm knows it, and a port that follows from the job's number.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_ADDR=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p' | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
# of your network; unset lets NCCL choose:
# export NCCL_SOCKET_IFNAME=bond0 NCCL_IB_HCA=mlx5

mkdir -p "$logs"
echo "job $SLURM_JOB_ID, start ${SLURM_RESTART_COUNT:-0}: $SLURM_NTASKS ranks on $SLURM_JOB_NODELIST, rank 0 at $MASTER_ADDR:$MASTER_PORT"

# One task a rank; %t in a log's name is the rank, and a restart writes on below. When a rank fails, the others have a minute.
status=0
# shellcheck disable=SC2016  # every task expands its own rank
srun --wait=60 --open-mode=append --output="${logs//%/%%}/rank_%t.log" \
    bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS exec "$@"' rank "${command[@]}" || status=$?

# Told to stop, by a preemption or because the time limit is near: saved (75), or cut off before it could be (143). The job is not
# done and goes on in a new allocation, unless a person cancelled it: then it no longer runs.
if [ "$status" -eq 75 ] || [ "$status" -eq 143 ]; then
    if scontrol show job "$SLURM_JOB_ID" | grep -q JobState=RUNNING; then
        scontrol requeue "$SLURM_JOB_ID"
    fi
fi
exit "$status"
"""


def script(plan: Plan, recipe_path: Path, overrides: list[str], minutes: int | None) -> str:
    """The text of the script. Raises UserError when the ranks do not fill whole nodes."""
    hardware, recipe = plan.hardware, plan.recipe
    per_node = min(hardware.gpus_per_node, hardware.gpus)
    if hardware.gpus % per_node:
        raise UserError(
            f"--sbatch: {hardware.gpus} cards do not fill nodes of {per_node}; say how many a node has with --gpus-per-node."
        )
    run = Path(recipe.output_dir)
    name = run.name or "glm45"
    options = {
        "job-name": sbatch(name),
        "nodes": hardware.gpus // per_node,
        "ntasks-per-node": per_node,
        **({} if hardware.card.name == CPU else {"gpus-per-node": per_node}),
        **({"time": minutes} if minutes else {}),
        # % begins a number of Slurm's in a file's name, and a backslash would end that
        "output": sbatch(name.replace("%", "%%").replace("\\", "_") + "_%j.log"),
        "open-mode": "append",
        # SIGUSR1 two minutes before the time limit: training saves and ends
        "signal": "USR1@120",
    }
    lines = [
        "#!/usr/bin/env bash",
        *(f"#SBATCH --{key}={value}" for key, value in options.items()),
        "#SBATCH --requeue",
    ]
    words = " ".join(map(shell, ["train", str(recipe_path), *overrides]))
    lines += [
        f"# {one_line(str(recipe_path))}: {hardware.gpus} ranks on {hardware.gpus // per_node} node(s); written by `glm45-tune plan --sbatch`.",
        "# Submit it where glm45-tune is on the PATH and the recipe's paths hold on every node. A preempted job starts again by",
        "# itself and goes on from its last checkpoint: let train.save_interval bound what a preemption costs.",
        "",
        f"command=(glm45-tune {words})",
        f"logs={shell(f'{run}_logs')}",
    ]
    return "\n".join(lines) + "\n" + BODY.lstrip("\n")


def warn_unsaved(recipe: Recipe) -> str | None:
    """What to tell a user whose preempted job would start from nothing."""
    if recipe.train.save_interval is None:
        return "train.save_interval is not set: a preempted job would start again from its first step."
    return None
