#!/usr/bin/env bash
# Format, lint and types, in under a minute. `scripts/lint.sh --fix` mends what ruff can mend by itself.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
if [ "${1:-}" = "--fix" ]; then
    ruff format .
    ruff check --fix .
fi
ruff format --check .
ruff check .
python scripts/type_errors.py
