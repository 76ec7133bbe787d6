#!/usr/bin/env bash
# Every test that needs no GPU, a file at a time on two workers; arguments go to pytest. Sets up .venv, .venv-vllm for the tests
# that ask a real vLLM, Slurm and Chromium. With --fast first: unit tests that start no ranks and no servers, in about a minute.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
export OMP_NUM_THREADS=1
workers=(-n "${TEST_WORKERS:-2}" --dist loadfile)
if [ "${1:-}" = "--fast" ]; then
    exec python -m pytest tests/unit -m "not slow" "${workers[@]}" "${@:2}"
fi
bash scripts/setup_vllm.sh
bash scripts/setup_slurm.sh
bash scripts/setup_chromium.sh
python -m pytest "${workers[@]}" "$@"
