#!/usr/bin/env bash
# Plan a recipe, write its batch script and submit it to Slurm; nothing is submitted that does not fit.
#   bash scripts/slurm.sh RECIPE --gpu h20 --gpus 32 [--gpus-per-node 8] [--minutes 1440] [key=value ...] [-- SBATCH OPTIONS]
# What comes before `--` goes to `glm45-tune plan`, what comes after it to sbatch, such as `-- --partition=train --account=me`.
# The script stays beside you as NAME.sbatch. Preempted or near its time limit, the job starts again and goes on by itself.
set -euo pipefail
if [ $# -eq 0 ] || [ "$1" = --help ]; then
    sed -n '2,5s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 2
fi
recipe=$1
planned=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    planned+=("$1")
    shift
done
[ $# -gt 0 ] && shift

script="$(basename "${recipe%.*}").sbatch"
text=$(glm45-tune plan "${planned[@]}" --sbatch)
printf '%s\n' "$text" > "$script"
echo "wrote $script" >&2
sbatch "$@" "$script"
