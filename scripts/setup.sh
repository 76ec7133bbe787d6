# Sourced by the other scripts: makes .venv in the checkout with the pinned packages, or finds it made. Quick the second time.
cd "$(dirname "${BASH_SOURCE[0]}")/.."

find_python() {
    for candidate in python3.12 python3.13 python3.14 python3; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "Python 3.12 or newer is needed (megatron-core 0.19 asks for it) and was not found." >&2
    exit 2
}

stamp=.venv/installed
wanted=$(cat setup.cfg constraints.txt | sha256sum)
if [ "$(cat $stamp 2>/dev/null)" != "$wanted" ]; then
    echo "installing into .venv (once; a few minutes) ..." >&2
    python=$(find_python)
    "$python" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
    echo "$wanted" > $stamp
fi
export PATH="$PWD/.venv/bin:$PATH"
