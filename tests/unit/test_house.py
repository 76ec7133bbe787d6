"""The house: a floor imports only floors below it and its own room; one room imports megatron; files stay readable."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "glm45_tune"
FLOORS = {
    "errors": 0, "documents": 0, "foreign": 0, "progress": 0, "processes": 0, "sizes": 0, "spec": 0, "section": 0, "faults": 0,
    "redaction": 0, "terminal": 0, "console": 0, "web": 0, "versions": 0, "quoting": 0, "guard": 0,
    "objectives": 0, "recipe": 0, "layout": 0, "checks": 0, "system": 0, "run": 0, "surroundings": 0,
    "data": 1, "report": 1, "conversion": 1, "plan": 1, "rl": 1, "tiny": 2,
    "mcore": 2,
    "training": 3, "chat": 3, "hub": 4,
    "cli": 5, "__main__": 6, "__init__": 6,
}  # fmt: skip
FILES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Every module a file imports, at its top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names if node.module == "glm45_tune"}
    return found


GROUND = {name for name, floor in FLOORS.items() if floor == 0}  # one room of four files


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_keeps_to_its_floor(path):
    mine = room(path)
    for module in imports(path):
        parts = module.split(".")
        if parts[0] == "megatron":
            assert mine == "mcore", f"{module} outside mcore/"
        if parts[0] == "torch":
            assert FLOORS[mine] > 0 and mine != "plan", f"{module} on the ground floor or in plan/"
        if parts[0] == "glm45_tune" and len(parts) > 1 and parts[1] != mine and not {parts[1], mine} <= GROUND:
            assert FLOORS[parts[1]] < FLOORS[mine], f"{module} is not below {mine}"
    assert path.stem not in ("utils", "common", "helpers")
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno <= 60, f"{node.name} is too long"


def test_every_recipe_field_is_read():
    """An option nobody reads is a promise nobody keeps."""
    from glm45_tune.recipe import Recipe

    source = "\n".join(path.read_text(encoding="utf-8") for path in FILES)
    for section in Recipe.model_fields.values():
        kinds = (section.annotation, *getattr(section.annotation, "__args__", ()))
        for kind in kinds:
            for field in getattr(kind, "model_fields", {}):
                assert f".{field}" in source or field in ("tensor_model_parallel_size",), field


def test_help_is_quick_and_heavy_things_wait():
    """0.3 s is the promise; its processor time counts here, as others share the machine. What is heavy is not imported for it."""
    code = (
        "import sys, time; sys.argv = ['glm45-tune', '--help']\n"
        "from glm45_tune.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'megatron', 'transformers', 'pydantic', 'peft'} & set(sys.modules)), time.process_time())"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *said, last = ended.stdout.splitlines()
    heavy, seconds = last.rsplit(" ", 1)
    assert heavy == "[]" and float(seconds) < 1.0 and "convert" in "".join(said)


def test_the_reference_is_what_the_code_says():
    ended = subprocess.run(
        [sys.executable, "scripts/reference.py", "--check"], cwd=PACKAGE.parent, capture_output=True, text=True
    )
    assert ended.returncode == 0, f"{ended.stdout}{ended.stderr}\nRun: python scripts/reference.py"
