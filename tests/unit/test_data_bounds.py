"""What sources may cost, and what of them is left out: bounded, counted, listed."""

import gzip
import json
import os
import resource
import subprocess
import sys

import pytest
import zstandard

from glm45_tune.data.files import files_of, left_out_of, read_rows
from glm45_tune.data.sources import read_source
from glm45_tune.errors import DataError

ROW = json.dumps({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}) + "\n"
PACK = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}
_CHILD = (
    "import resource, sys\nfrom pathlib import Path\nfrom glm45_tune.data.files import read_rows\n"
    "from glm45_tune.errors import DataError\n"
    "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
    "try:\n    for row in read_rows(Path(sys.argv[1])): pass\n"
    "except DataError as error: print(error)\n"
    "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)\n"
)


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".txt", ".csv"])
def test_a_small_file_that_unpacks_to_a_huge_one_is_a_sentence(tmp_path, kind, suffix):
    path = tmp_path / f"bomb{kind}{suffix}"
    path.write_bytes(PACK[suffix](bytes(600 * 2**20)))
    made = subprocess.run([sys.executable, "-c", _CHILD, str(path)], capture_output=True, text=True, check=True)
    *said, mebibytes = made.stdout.strip().splitlines()
    assert "cannot be read on" in "".join(said) and int(mebibytes) < 400


def test_the_longest_row_is_yours_to_say(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_text(ROW + json.dumps({"text": "x" * 2**20}) + "\n")
    assert len(list(read_rows(path))) == 2
    monkeypatch.setenv("GLM45_TUNE_MAX_ROW_MIB", "0.5")
    with pytest.raises(DataError, match="longer than 0.5 MiB. Raise GLM45_TUNE_MAX_ROW_MIB"):
        list(read_rows(path))


def test_a_folder_gives_its_rows_and_names_what_is_left_out(checkpoints, cli, tmp_path):
    for name in (
        "a.jsonl", "deep/b.jsonl", ".ipynb_checkpoints/a-checkpoint.jsonl", "._a.jsonl", "__MACOSX/a.jsonl",
        "LICENSE.txt", "requirements.txt", "README.txt", "notes.txt", "dataset_infos.json",
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(ROW if name.endswith("jsonl") else "{}")
    assert [file.name for file in files_of(str(tmp_path))] == ["a.jsonl", "b.jsonl"]
    assert len(left_out_of(str(tmp_path))) == 8
    code, out, _ = cli("data", tmp_path, "--model", checkpoints["air"], "--json")
    made = json.loads(out)
    assert code == 0 and made["summary"]["rows"] == 2 and len(made["left_out"]) == 8


def test_a_folder_of_texts_is_read(tmp_path):
    (tmp_path / "one.txt").write_text("one")
    (tmp_path / "LICENSE.txt").write_text("not one")
    assert [file.name for file in files_of(str(tmp_path))] == ["one.txt"]


def test_a_sample_of_a_file_takes_no_more_memory_than_its_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"{number} " + "x" * 200_000}) + "\n" for number in range(1000)))
    list(read_source(f"{path}#1"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert len(list(read_source(f"{path}#2"))) == 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


@pytest.mark.parametrize("policy", ["truncate", "drop"])
def test_what_is_too_long_is_listed_with_its_line_and_reason(checkpoints, cli, tmp_path, policy):
    long = {"messages": [{"role": "system", "content": "s " * 300}, *json.loads(ROW)["messages"]]}
    path = tmp_path / "rows.jsonl"
    path.write_text(ROW + json.dumps(long) + "\n" + ROW)
    arguments = ("data", path, f"overlong={policy}", "seq_length=100", "--model", checkpoints["air"])
    code, out, _ = cli(*arguments, "--json")
    ((fault,),) = [json.loads(out)["left_out"]]
    assert code == 0 and fault["line"] == 2 and "left out: " in fault["message"]
    if policy == "truncate":
        assert "tools and system message alone" in fault["message"]
    code, out, _ = cli(*arguments)
    assert f"{path}:2:leftout" in "".join(out.split())


def test_many_faults_are_summed_by_kind(checkpoints, cli, tmp_path):
    path = tmp_path / "rows.jsonl"
    bad = json.dumps({"messages": [{"role": "bot", "content": "x"}]}) + "\n"
    path.write_text(50 * bad + 30 * "{\n" + ROW)
    code, out, _ = cli("data", path, "--model", checkpoints["air"])
    assert code == 2 and "… and 60 more" in out and "50 ×" in out and out.count("rows.jsonl:") < 30


def test_no_row_held_out_is_named(checkpoints, tmp_path, cli, make_recipe):
    import yaml

    (tmp_path / "rows.jsonl").write_text(ROW)
    (tmp_path / "empty.jsonl").write_text("\n")
    recipe = make_recipe(
        checkpoints["air"], tmp_path / "rows.jsonl", tmp_path / "out", data={"eval": str(tmp_path / "empty.jsonl")}
    )
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    code, _, err = cli("train", tmp_path / "recipe.yaml")
    assert code == 2 and "data.eval holds no rows" in err


def test_a_cache_that_cannot_be_written_is_named_with_the_way_out(checkpoints, cli, tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text(ROW)
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("GLM45_TUNE_CACHE", str(tmp_path / "a file" / "below"))
    code, _, err = cli("data", tmp_path / "rows.jsonl", "--model", checkpoints["air"])
    assert code == 2 and "GLM45_TUNE_CACHE" in err and err.count("\n") == 1


def test_the_cache_lies_where_the_desktop_says(monkeypatch, tmp_path):
    from glm45_tune.data.store import cache_directory

    monkeypatch.delenv("GLM45_TUNE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "glm45_tune" / "data"


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read_is_named(checkpoints, cli, tmp_path):
    (tmp_path / "rows.jsonl").write_text(ROW)
    (tmp_path / "rows.jsonl").chmod(0)
    code, _, err = cli("data", tmp_path / "rows.jsonl", "--model", checkpoints["air"])
    assert code == 2 and "Permission denied" in err
