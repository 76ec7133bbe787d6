"""Count pyright's errors in the package. The count may only fall: more than `pyright_errors` says is a failure."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
ALLOWED = ROOT / "scripts" / "pyright_errors"


def main() -> int:
    command = ["pyright", "--outputjson", "--pythonpath", sys.executable, "glm45_tune"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if not ended.stdout.startswith("{"):
        sys.exit(f"pyright did not run: {ended.stdout}{ended.stderr}")
    found = [each for each in json.loads(ended.stdout)["generalDiagnostics"] if each["severity"] == "error"]
    allowed = int(ALLOWED.read_text())
    print(f"pyright: {len(found)} errors, {allowed} allowed")
    if len(found) < allowed:
        print(f"Fewer than before. Keep it so: echo {len(found)} > {ALLOWED.relative_to(ROOT)}")
    if len(found) <= allowed:
        return 0
    for each in found:
        line = each["range"]["start"]["line"] + 1
        print(f"{Path(each['file']).relative_to(ROOT)}:{line}: {each['message'].splitlines()[0]}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
