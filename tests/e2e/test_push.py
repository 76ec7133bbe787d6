"""Pushes by the hubs' real clients to hubs on loopback: what arrives, what is sent again, and what a person reads when it fails."""

import hashlib
import os
import random
import sys
import threading
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from hubs import CUT, TOKEN, HuggingFaceHub, LoopbackHub, ModelScopeHub

KINDS = {
    "hf": (HuggingFaceHub, "HF_ENDPOINT", "HF_TOKEN"),
    "ms": (ModelScopeHub, "MODELSCOPE_ENDPOINT", "MODELSCOPE_API_TOKEN"),
}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Waits of ours and of the clients are cut short."""
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.005)))


@pytest.fixture(params=KINDS)
def hub(request, monkeypatch, tmp_path):
    kind, endpoint, token = KINDS[request.param]
    with kind().running() as running:
        running.to = f"{request.param}:me/tuned"
        monkeypatch.setenv(endpoint, running.url)
        monkeypatch.setenv(token, TOKEN)
        monkeypatch.setenv("MODELSCOPE_HOME", str(tmp_path / "modelscope"))
        monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "modelscope_cache"))
        yield running


def a_directory(root: Path, count: int, seed: int, largest: int = 3000) -> Path:
    """Files of random sizes (some empty, some of several parts), half of them weights, some in folders, odd names."""
    draw = random.Random(seed)
    (root / "sub dir").mkdir(parents=True)
    for number in range(count):
        name = f"{draw.choice(['', 'sub dir/'])}file [{number}] 文.{draw.choice(['safetensors', 'txt'])}"
        (root / name).write_bytes(draw.randbytes(draw.choice([0, 1, draw.randrange(largest)])))
    (root / "model-00001-of-00001.safetensors").write_bytes(draw.randbytes(4 << 20))
    (root / "README.md").write_text("---\nlicense: mit\n---\n# A model\n", encoding="utf-8")
    (root / "config.json").write_text("{}", encoding="utf-8")
    return root


def hashes(root: Path) -> dict[str, str]:
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob("*")
        if path.is_file()
    }


def held(hub: LoopbackHub, revision: str | None = None) -> dict[str, str]:
    files = hub.repos["me/tuned"].files.get(revision or hub.main, {})
    return {name: hashlib.sha256(content).hexdigest() for name, content in files.items() if name != ".gitattributes"}


def writes(hub: LoopbackHub) -> list[tuple[str, str]]:
    return [(method, path) for method, path in hub.requests if method == "PUT" or "/commit" in path]


def test_what_changed_is_sent_and_read_back(hub, tmp_path, cli):
    directory = a_directory(tmp_path / "model", 12, seed=1)
    code, out, err = cli("push", directory, "--to", hub.to, "--message", "first of all")
    assert code == 0 and "15 files" in err and "every hash is right" in err and not out, err
    repo = hub.repos["me/tuned"]
    assert held(hub) == hashes(directory) and repo.private
    assert all(message.startswith("first of all") for _, message, _ in repo.commits)
    assert len(hub.uploads) == len(set(hub.uploads)) > 0

    hub.requests.clear()
    code, _, err = cli("push", directory, "--to", hub.to)
    assert code == 0 and "0 files" in err and "15 unchanged" in err and not writes(hub)

    (directory / "config.json").write_text('{"a": 1}', encoding="utf-8")
    (directory / "model-00001-of-00001.safetensors").write_bytes(b"y" * (4 << 20))  # of the same size
    code, out, _ = cli("push", directory, "--to", hub.to, "--json", "--no-verify")
    assert code == 0 and '"sent": ["config.json", "model-00001-of-00001.safetensors"]' in out
    assert repo.commits[-1][2] == ["config.json", "model-00001-of-00001.safetensors"] and held(hub) == hashes(directory)

    assert cli("push", directory, "--to", hub.to, "--revision", "v2", "--message", "another branch")[0] == 0
    assert held(hub, "v2") == hashes(directory) and held(hub) == hashes(directory)
    assert TOKEN not in out + err


def test_a_thousand_files_with_a_tenth_of_the_requests_failing(hub, tmp_path, cli):
    directory = a_directory(tmp_path / "model", 997, seed=2, largest=400)
    draw = random.Random(3)
    answers = [(500, {"error": "oops"}), (503, b"<html>busy</html>"), (429, {"Message": "slower"}), CUT]
    hub.faults = lambda request: draw.choice(answers) if draw.random() < 0.1 else None
    started = time.monotonic()
    code, _, err = cli("push", directory, "--to", hub.to)
    assert code == 0 and "1000 files" in err, err
    assert held(hub) == hashes(directory)
    assert len(hub.uploads) <= 1.2 * len(set(hub.uploads))  # a blob whose answer was lost may come twice
    hub.faults = lambda request: None
    hub.requests.clear()
    assert cli("push", directory, "--to", hub.to)[0] == 0 and not writes(hub)
    assert time.monotonic() - started < 120


def test_a_cut_connection_is_one_sentence_and_the_same_command_goes_on(hub, tmp_path, cli):
    """The hub is gone after some content has come; nothing that arrived is sent again, nothing here changes."""
    directory = a_directory(tmp_path / "model", 40, seed=4)
    before = hashes(directory)
    gone = threading.Event()

    def faults(request):
        if len(hub.uploads) >= 6:
            gone.set()
        return CUT if gone.is_set() else None

    hub.faults = faults
    code, out, err = cli("push", directory, "--to", hub.to)
    assert code == 2 and "kept breaking" in err and "goes on" in err, err
    assert len(err.strip().splitlines()) == 1 and TOKEN not in out + err
    assert hashes(directory) == before and not hub.repos["me/tuned"].commits
    arrived = set(hub.uploads)
    hub.faults = lambda request: None
    hub.uploads.clear()
    assert cli("push", directory, "--to", hub.to)[0] == 0
    assert held(hub) == before and not arrived & set(hub.uploads)


HTML = b"<!doctype html><title>Welcome to the hotel's wireless network</title>"
REFUSALS = {
    "expired token": ({"hf": (401, {"error": "Invalid credentials"}), "ms": (401, {"Message": "token expired"})}, "", ["does not accept the token", "401"]),
    "no right": ({"hf": (403, {"error": "read-only token"}), "ms": (403, {"Message": "read-only token"})}, "commit", ["403" , "read-only token"]),
    "quota at the commit": ({"hf": (403, {"error": "Private repository storage limit reached"}), "ms": (403, {"Message": "storage quota exceeded"})}, "commit", ["has no room"]),
    "quota at the content": ({"hf": (413, {"error": "too large"}), "ms": (507, {"Message": "full"})}, "lfs-storage", ["has no room"]),
    "a page instead of an answer": ({"hf": (200, HTML), "ms": (200, HTML)}, "", ["does not speak"]),
    "the wrong answer": ({"hf": (200, [1, 2]), "ms": (200, [1, 2])}, "", ["does not speak"]),
    "nonsense at the batch": ({"hf": (200, {"objects": "many"}), "ms": (200, {"Data": {"objects": [7]}})}, "objects/batch", ["does not speak"]),
    "broken for ever": ({"hf": (502, HTML), "ms": (502, HTML)}, "", ["kept breaking", "the same command"]),
    "too many requests": ({"hf": (429, {"error": "slow"}), "ms": (429, {"Message": "slow"})}, "commit", ["kept breaking"]),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_each_refusal_is_one_sentence(hub, tmp_path, cli, name):
    answers, where, said = REFUSALS[name]
    directory = a_directory(tmp_path / "model", 3, seed=5)
    before = hashes(directory)
    hub.faults = lambda request: answers[hub.to[:2]] if where in request.path else None
    code, out, err = cli("push", directory, "--to", hub.to)
    assert code == 2 and all(word in err for word in said), err
    assert len(err.strip().splitlines()) == 1 and err.startswith("error: ") and TOKEN not in out + err
    assert hashes(directory) == before
    hub.faults = lambda request: None
    assert cli("push", directory, "--to", hub.to)[0] == 0 and held(hub) == before


def test_a_name_that_somebody_else_has(hub, tmp_path, cli):
    """The repository exists, and cannot be seen or written to."""
    directory = a_directory(tmp_path / "model", 1, seed=6)
    assert cli("push", directory, "--to", hub.to)[0] == 0
    (directory / "config.json").write_text("[]", encoding="utf-8")
    hidden = {"hf": (404, {"error": "Repository not found"}), "ms": (404, {"Message": "no such model"})}[hub.to[:2]]
    hub.faults = lambda r: (
        hidden if r.method == "GET" or "commit" in r.path or "batch" in r.path or "preupload" in r.path else None
    )
    code, _, err = cli("push", directory, "--to", hub.to)
    assert code == 2 and "the name is taken" in err and len(err.strip().splitlines()) == 1, err
    hub.faults = lambda request: None
    code, _, err = cli("push", directory, "--to", f"{hub.to[:2]}:strangers/tuned")
    assert code == 2 and "may not write there" in err and "strangers" in err, err


def test_a_hub_that_keeps_something_else_is_found_out(hub, tmp_path, cli):
    """Exit 3: one file's bytes are turned while they are read back; then a listing that lies."""
    directory = a_directory(tmp_path / "model", 5, seed=7)

    def turned(request):
        name = request.query.get("FilePath") or request.path.rpartition("resolve/main/")[2]
        reads = "resolve" in request.path or request.path.endswith("/repo")
        return (200, b"{]") if reads and name == "config.json" else None

    hub.faults = turned
    code, _, err = cli("push", directory, "--to", hub.to)
    assert code == 3 and "1 of 8 files came back different, such as config.json" in err, err
    hub.faults = lambda request: None
    (directory / "config.json").write_text("{\n}", encoding="utf-8")
    store = hub.commit if hub.to.startswith("hf") else hub.write

    def losing(*arguments):
        answer = store(*arguments)
        hub.repos["me/tuned"].files[hub.main]["config.json"] = b"{ }"
        return answer

    setattr(hub, "commit" if hub.to.startswith("hf") else "write", losing)
    code, _, err = cli("push", directory, "--to", hub.to)
    assert code == 3 and "1 of 8 files are listed with another hash" in err, err


def test_a_public_repository_is_asked_for(hub, tmp_path, cli):
    directory = a_directory(tmp_path / "model", 1, seed=8)
    assert cli("push", directory, "--to", hub.to, "--public")[0] == 0 and not hub.repos["me/tuned"].private
    hub.requests.clear()
    code, _, err = cli("push", directory, "--to", hub.to)
    assert code == 2 and "Say --public" in err and not writes(hub)
    assert cli("push", directory, "--to", hub.to, "--public")[0] == 0


BAD_NAMES = ("hf:tuned", "tuned", "hf:", "ms:/tuned", "hf:me/", "hf:me/a/b", "gh:me/tuned", "hf:me/tu ned", "hf:../etc")


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_is_an_organisation_and_a_name(tmp_path, cli, name):
    code, _, err = cli("push", a_directory(tmp_path / "model", 0, seed=9), "--to", name)
    assert code == 2 and "ORG/NAME" in err and "Traceback" not in err


def test_what_is_no_finished_model_is_not_pushed(hub, tmp_path, cli, lora_run, monkeypatch):
    (tmp_path / "empty").mkdir()
    a_directory(tmp_path / "model.partial", 1, seed=1)
    for directory, said in (
        (tmp_path / "nowhere", "no such directory"),
        (tmp_path / "empty", "holds no files"),
        (tmp_path / "model.partial", "unfinished"),
        (lora_run, "is a run, not a model"),
    ):
        code, _, err = cli("push", directory, "--to", hub.to)
        assert code == 2 and said in err and not hub.requests
    assert cli("export", lora_run, "--output", tmp_path / "tuned")[0] == 0
    (shard,) = (tmp_path / "tuned").glob("*.safetensors")
    os.truncate(shard, 1000)
    code, _, err = cli("push", tmp_path / "tuned", "--to", hub.to)
    assert code == 2 and f"{shard}: has 1,000 bytes; glm45_tune.json says" in err and not hub.requests
    shard.unlink()
    code, _, err = cli("push", tmp_path / "tuned", "--to", hub.to)
    assert code == 2 and f"{shard}: is missing" in err and not hub.requests
    for name in ("HF_TOKEN", "MODELSCOPE_API_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    code, _, err = cli("push", a_directory(tmp_path / "model", 1, seed=1), "--to", hub.to)
    assert code == 2 and "no token" in err and "log in" in err and not hub.requests


def test_an_export_pushed_names_no_directory_of_this_machine(hub, lora_run, tmp_path, cli):
    assert cli("export", lora_run, "--output", tmp_path / "tuned")[0] == 0
    assert cli("push", tmp_path / "tuned", "--to", hub.to)[0] == 0
    files = hub.repos["me/tuned"].files[hub.main]
    assert "(step 4)" in hub.repos["me/tuned"].commits[0][1]
    assert not [name for name, content in files.items() if str(tmp_path.parent).encode() in content]


def test_a_data_set_of_modelscope_is_read(monkeypatch, tmp_path, cli, checkpoints):
    """ms:ORG/NAME[:CONFIG][@SPLIT]: fetched by its client, private ones by its login, read like any other source."""
    row = '{"messages": [{"role": "user", "content": "q%d"}, {"role": "assistant", "content": "a"}]}\n'
    monkeypatch.setenv("MODELSCOPE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    with ModelScopeHub().running() as hub:
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", hub.url)
        monkeypatch.setenv("MODELSCOPE_API_TOKEN", TOKEN)
        hub.datasets["me/rows"] = {
            "train.jsonl": "".join(row % n for n in range(7)).encode(),
            "test.jsonl": "".join(row % n for n in range(3)).encode(),
        }
        for source, count in (("ms:me/rows", 7), ("ms:me/rows@test", 3)):
            code, out, err = cli("data", source, "--model", checkpoints["air"], "--json")
            assert code == 0 and f'"rows": {count},' in out, err
        assert any("/datasets/me/rows/repo" in path for _, path in hub.requests)
        for source, said in (
            ("ms:me/nothing", "no such data set"),
            ("ms:me/rows@valid", "valid"),
            ("ms:", "names no data set"),
        ):
            code, _, err = cli("data", source, "--model", checkpoints["air"])
            assert code == 2 and said in err and source in err and "Traceback" not in err, err
        monkeypatch.setitem(sys.modules, "modelscope_hub", None)
        code, _, err = cli("data", "ms:me/rows", "--model", checkpoints["air"])
        assert code == 2 and "pip install modelscope" in err
