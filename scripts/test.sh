#!/usr/bin/env bash
# Every test that needs no GPU; arguments go to pytest. Sets up .venv, .venv-vllm for the tests that ask a real vLLM, Slurm and Chromium.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
bash scripts/setup_vllm.sh
bash scripts/setup_slurm.sh
bash scripts/setup_chromium.sh
export OMP_NUM_THREADS=1
python -m pytest "$@"
