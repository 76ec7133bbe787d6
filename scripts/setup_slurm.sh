#!/usr/bin/env bash
# Slurm's and munge's Debian packages, and shellcheck: for the test that trains under a real Slurm on this one machine. Quick when
# they are there. Where they cannot be installed it says so, and that test is skipped.
set -euo pipefail
missing=()
command -v slurmctld >/dev/null || missing+=(slurmctld)
command -v slurmd >/dev/null || missing+=(slurmd)
command -v srun >/dev/null || missing+=(slurm-client)
command -v munged >/dev/null || missing+=(munge)
command -v shellcheck >/dev/null || missing+=(shellcheck)
[ ${#missing[@]} -eq 0 ] && exit 0

if ! command -v apt-get >/dev/null || [ "$(id -u)" -ne 0 ]; then
    echo "Slurm is installed by apt as root, which cannot be done here: the test under a real Slurm will be skipped." >&2
    exit 0
fi
echo "installing ${missing[*]} for the tests (once) ..." >&2
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
install() { apt-get install -y -qq --no-install-recommends "${missing[@]}" >"$log" 2>&1; }
if ! install; then
    apt-get update -qq >/dev/null 2>&1 || true
    install || { tail -n 3 "$log" >&2; echo "apt could not install them: the test is skipped." >&2; }
fi
