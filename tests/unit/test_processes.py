"""A script that calls us at its top level, as our examples do, is run once, however many processes share the work."""

import os
import subprocess
import sys

import pytest

# each with so little work that a process of its own is worth it
RENDERS = """
from glm45_tune.data import store
from glm45_tune.data.chat import ChatRenderer, load_tokenizer
from glm45_tune.data.sources import load
from glm45_tune.recipe import DataConfig
store.WORTH_WORKERS = 1
print("begun", flush=True)
print(len(load(CORPUS, ChatRenderer(load_tokenizer(MODEL), DataConfig(train=CORPUS))).samples))
"""
CONVERTS = """
from glm45_tune import convert
from glm45_tune.conversion import mcore_files
mcore_files.MAX_FILE_BYTES = 300_000
print("begun", flush=True)
convert(MODEL, OUTPUT, "mcore", workers=2)
"""


@pytest.mark.parametrize(
    "script, said", [(RENDERS, ["begun", "24"]), (CONVERTS, ["begun"])], ids=["renders", "converts"]
)
def test_a_script_without_a_guard_runs_once(checkpoints, corpus, tmp_path, script, said):
    names = {"CORPUS": corpus, "MODEL": checkpoints["air"], "OUTPUT": tmp_path / "out"}
    path = tmp_path / "script.py"
    path.write_text("".join(f"{name} = {str(value)!r}\n" for name, value in names.items()) + script)
    env = os.environ | {"GLM45_TUNE_CACHE": str(tmp_path / "cache")}
    ended = subprocess.run([sys.executable, path], capture_output=True, text=True, timeout=300, env=env, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines() == said and (tmp_path / "out").exists() == (script is CONVERTS)


TRAINS = """
import threading
from glm45_tune import Recipe, train
codes = []
for ranks in (1, 2):
    sections = {"parallel": {"world_size": ranks}, "output_dir": f"{OUTPUT}{ranks}"}
    recipe = Recipe.from_dict(RECIPE | sections)
    thread = threading.Thread(target=lambda: codes.append(train(recipe)))
    thread.start()
    thread.join()
print(codes)
"""


def test_a_program_may_train_in_a_thread_of_its_own(checkpoints, corpus, make_recipe, tmp_path):
    """A server, say: Python's threads cannot hear signals, which are then the program's own affair."""
    recipe = make_recipe(checkpoints["air"], corpus, tmp_path / "run", train={"steps": 1})
    path = tmp_path / "script.py"
    path.write_text(f"RECIPE = {recipe!r}\nOUTPUT = {str(tmp_path / 'run')!r}\n{TRAINS}")
    ended = subprocess.run([sys.executable, path], capture_output=True, text=True, timeout=300, check=False)
    assert ended.stdout.splitlines()[-1:] == ["[0, 0]"], ended.stderr


@pytest.mark.parametrize("script", [RENDERS, CONVERTS, TRAINS], ids=["renders", "converts", "trains"])
def test_no_process_imports_a_librarys_name_from_the_working_directory(
    checkpoints, corpus, make_recipe, tmp_path, script
):
    """Of the modules that every Python imports at its start, each in the working directory says that it was run."""
    here = tmp_path / "here"
    here.mkdir()
    for name in ("json", "runpy", "socket", "pickle", "selectors", "signal", "struct", "torch", "numpy", "yaml"):
        (here / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write('{name} ')\n")
    (here / "own_rows.py").write_text(
        f"import json\ndef rows():\n    yield from map(json.loads, open({str(corpus)!r}, encoding='utf-8'))\n"
    )
    recipe = make_recipe(checkpoints["air"], "own_rows:rows", tmp_path / "run", train={"steps": 1})
    names = {"CORPUS": str(corpus), "MODEL": str(checkpoints["air"]), "OUTPUT": str(tmp_path / "out"), "RECIPE": recipe}
    path = tmp_path / "script.py"
    path.write_text("".join(f"{name} = {value!r}\n" for name, value in names.items()) + script)
    env = os.environ | {"GLM45_TUNE_CACHE": str(tmp_path / "cache")}
    ended = subprocess.run(
        [sys.executable, path], capture_output=True, text=True, timeout=300, env=env, check=False, cwd=here
    )
    assert ended.returncode == 0, ended.stderr
    assert not (tmp_path / "ran").exists(), (tmp_path / "ran").read_text()
    if script is TRAINS:
        assert ended.stdout.splitlines()[-1:] == ["[0, 0]"], ended.stderr
