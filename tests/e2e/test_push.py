"""Pushes by the hubs' real clients to hubs on loopback: what arrives, what is sent again, and what a person reads when it fails."""

import hashlib
import json
import os
import random
import sys
import threading
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from hubs import CUT, TOKEN, HuggingFaceHub, LoopbackHub, ModelScopeHub

from glm45_tune.hub.contents import is_loaded
from glm45_tune.hub.hub import LocalFile
from glm45_tune.hub.modelscope import _batches, _Removed

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
    (root / "model.safetensors").write_bytes(draw.randbytes(4 << 20))
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


def sentences(err: str) -> list[str]:
    """What a person reads in the end, without the lines that came while one waited."""
    return [line for line in err.strip().splitlines() if not line.endswith("…")]


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
    (directory / "model.safetensors").write_bytes(b"y" * (4 << 20))  # of the same size
    code, out, _ = cli("push", directory, "--to", hub.to, "--json", "--no-verify")
    assert code == 0 and '"sent": ["config.json", "model.safetensors"]' in out
    assert repo.commits[-1][2] == ["config.json", "model.safetensors"] and held(hub) == hashes(directory)

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
    assert len(sentences(err)) == 1 and TOKEN not in out + err
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
    "broken for ever": ({"hf": (502, HTML), "ms": (502, HTML)}, "", ["kept answering 502", "the same command", "answered 502; trying again"]),
    "too many requests": ({"hf": (429, {"error": "slow"}), "ms": (429, {"Message": "slow"})}, "commit", ["kept answering 429: slow"]),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_each_refusal_is_one_sentence(hub, tmp_path, cli, name):
    answers, where, said = REFUSALS[name]
    directory = a_directory(tmp_path / "model", 3, seed=5)
    before = hashes(directory)
    hub.faults = lambda request: answers[hub.to[:2]] if where in request.path else None
    code, out, err = cli("push", directory, "--to", hub.to)
    assert code == 2 and all(word in err for word in said), err
    assert len(sentences(err)) == 1 and sentences(err)[0].startswith("error: ") and TOKEN not in out + err
    assert hashes(directory) == before
    hub.faults = lambda request: None
    assert cli("push", directory, "--to", hub.to)[0] == 0 and held(hub) == before


def test_a_name_that_somebody_else_has(hub, tmp_path, cli):
    """The repository exists, and cannot be seen or written to."""
    directory = a_directory(tmp_path / "model", 1, seed=6)
    assert cli("push", directory, "--to", hub.to)[0] == 0
    (directory / "config.json").write_text('{"a": 2}', encoding="utf-8")
    hidden = {"hf": (404, {"error": "Repository not found"}), "ms": (404, {"Message": "no such model"})}[hub.to[:2]]
    hub.faults = lambda r: (
        hidden if r.method == "GET" or "commit" in r.path or "batch" in r.path or "preupload" in r.path else None
    )
    code, _, err = cli("push", directory, "--to", hub.to)
    assert code == 2 and "the name is taken" in err and len(sentences(err)) == 1, err
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


def an_adapter(root: Path) -> Path:
    root.mkdir()
    (root / "adapter_config.json").write_text('{"peft_type": "LORA"}', encoding="utf-8")
    (root / "adapter_model.safetensors").write_bytes(b"weights of an adapter")
    return root


STALE = (
    "adapter_config.json", "adapter_model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json",
    "pytorch_model.bin", "tokenizer.model", "merges.txt", "additional_chat_templates/tools.jinja", "modeling_other.py",
    "generation_config.json", "q4/MODEL.GGUF", "a b 文.json",
)  # fmt: skip
KEPT = ("LICENSE", ".gitattributes", "README.md", "pictures/logo.png", "notes.txt", "configuration.json", "data.jsonl")


def test_a_push_makes_the_repository_what_was_pushed(hub, tmp_path, cli):
    """Whatever a loader reads of an earlier push goes in the same commit and is named; what cannot change the model stays."""
    directory = a_directory(tmp_path / "model", 3, seed=11)
    assert cli("push", an_adapter(tmp_path / "adapter"), "--to", hub.to)[0] == 0
    repo = hub.repos["me/tuned"]
    files = repo.files[hub.main]
    files |= {name: b"left by somebody" for name in (*STALE, *KEPT)}
    files["README.md"] = b"written by hand"
    (directory / "README.md").unlink()
    commits = len(repo.commits)
    code, out, err = cli("push", directory, "--to", hub.to, "--json")
    found = json.loads(out)
    assert code == 0 and found["removed"] == sorted(STALE) and set(found["kept"]) == set(KEPT), err
    assert f"removing {len(STALE)} files" in err and f"{len(STALE)} removed" in err and "kept that are not here" in err
    assert files.keys() == hashes(directory).keys() | set(KEPT) and len(repo.commits) == commits + 1
    assert files["README.md"] == b"written by hand"

    hub.requests.clear()
    code, out, err = cli("push", directory, "--to", hub.to, "--json")
    assert code == 0 and json.loads(out)["removed"] == [] and json.loads(out)["sent"] == [] and not writes(hub)
    assert cli("push", tmp_path / "adapter", "--to", hub.to)[0] == 0
    assert "config.json" not in files and "model.safetensors" not in files and "LICENSE" in files


def test_pushes_of_any_sets_leave_what_was_pushed_last(hub, tmp_path, cli):
    draw = random.Random(12)
    for number in range(6):
        directory = a_directory(tmp_path / str(number), draw.randrange(5), seed=number, largest=50)
        for name in draw.sample([*STALE[2:], *KEPT[2:]], 6):
            if name != "model.safetensors.index.json":
                (directory / name).parent.mkdir(exist_ok=True)
                (directory / name).write_text(f'{{"a": {number}}}', encoding="utf-8")
        assert cli("push", directory, "--to", hub.to, "--no-verify")[0] == 0
        found, here = held(hub), hashes(directory)
        assert {name: digest for name, digest in found.items() if name in here} == here
        assert not [name for name in found.keys() - here.keys() if is_loaded(name)]


def test_a_removal_whose_answer_was_lost_is_tried_again(hub, tmp_path, cli):
    """The hub has done it and the connection breaks before it says so; nothing is asked to be removed twice."""
    assert cli("push", an_adapter(tmp_path / "adapter"), "--to", hub.to)[0] == 0
    directory = a_directory(tmp_path / "model", 2, seed=13)
    name = "commit" if hub.to.startswith("hf") else "write"
    store, lost = getattr(hub, name), []

    def losing(*arguments):
        answer = store(*arguments)
        if not lost and ("commit" in getattr(arguments[0], "path", "commit")):
            lost.append(answer)
            return CUT
        return answer

    setattr(hub, name, losing)
    code, _, err = cli("push", directory, "--to", hub.to)
    assert code == 0 and lost and held(hub) == hashes(directory), err
    assert "trying again (1 of 5)" in err


def test_a_file_that_does_not_go_is_found_out(hub, tmp_path, cli):
    assert cli("push", an_adapter(tmp_path / "adapter"), "--to", hub.to)[0] == 0
    name = "commit" if hub.to.startswith("hf") else "write"
    store = getattr(hub, name)

    def keeping(*arguments):
        answer = store(*arguments)
        hub.repos["me/tuned"].files[hub.main]["adapter_config.json"] = b"{}"
        return answer

    setattr(hub, name, keeping)
    code, _, err = cli("push", a_directory(tmp_path / "model", 2, seed=14), "--to", hub.to)
    assert code == 3 and "should be gone" in err and "adapter_config.json" in err


def not_models(root: Path) -> dict[str, Path]:
    """name → a directory that is neither a model nor an adapter."""

    def make(name: str, **files: str) -> Path:
        (root / name).mkdir()
        for file, text in files.items():
            (root / name / file.replace("__", ".")).write_text(text, encoding="utf-8")
        return root / name

    index = json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "gone.safetensors"}})
    made = {
        "photos": make("photos", holiday__png="x"),
        "a home": make("home", __bashrc="x"),
        "no weights": make("no weights", config__json="{}", tokenizer__json="{}"),
        "no config": make("no config", model__safetensors="x"),
        "half an adapter": make("half", adapter_config__json="{}"),
        "an index alone": make("index alone", config__json="{}"),
        "shards missing": make("shards", config__json="{}"),
        "a model and an adapter": make("both", config__json="{}", model__safetensors="x", adapter_config__json="{}"),
        "a list for a config": make("list", config__json="[]", model__safetensors="x"),
        "a climbing index": make("climbing", config__json="{}"),
    }
    (made["shards missing"] / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    climbing = json.dumps({"weight_map": {"a": "../both/model.safetensors"}})
    (made["a climbing index"] / "model.safetensors.index.json").write_text(climbing, encoding="utf-8")
    linked = make("linked", config__json="{}")
    (linked / "model.safetensors").symlink_to(made["no config"] / "model.safetensors")
    return made | {"weights by a link": linked}


def test_a_directory_that_is_not_a_model_is_refused(hub, tmp_path, cli):
    said = {
        "a model and an adapter": "Move adapter_config.json away",
        "a list for a config": "JSON object is expected",
        "shards missing": "names 2 files that are not beside it, such as gone.safetensors",
        "a climbing index": "names 1 files that are not beside it, such as ../both/model.safetensors",
        "weights by a link": "Links are not sent: model.safetensors",
    }
    for name, directory in not_models(tmp_path).items():
        code, out, err = cli("push", directory, "--to", hub.to)
        assert code == 2 and "Traceback" not in err and not hub.requests and not out, (name, err)
        assert said.get(name, "is not a model: a Hugging Face model (config.json beside") in err, (name, err)


def test_dot_entries_and_links_are_never_sent(hub, tmp_path, cli):
    directory = a_directory(tmp_path / "model", 2, seed=15)
    wanted = hashes(directory)
    (tmp_path / "secret").write_text("SECRET", encoding="utf-8")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "key.json").write_text("SECRET", encoding="utf-8")
    for name in (".env", ".ssh/id", "sub dir/.netrc", "__pycache__/x.py"):
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text("SECRET", encoding="utf-8")
    (directory / "LICENSE").symlink_to(tmp_path / "secret")
    (directory / "linked").symlink_to(tmp_path / "folder")
    (directory / "inside.json").symlink_to("config.json")
    (directory / "nowhere").symlink_to("gone")
    os.mkfifo(directory / "pipe.json")
    code, out, err = cli("push", directory, "--to", hub.to, "--json")
    assert code == 0 and held(hub) == wanted, err
    left_out = [
        ".env",
        ".ssh/",
        "LICENSE",
        "__pycache__/",
        "inside.json",
        "linked",
        "nowhere",
        "pipe.json",
        "sub dir/.netrc",
    ]
    assert sorted(json.loads(out)["left_out"]) == sorted(left_out) and "not sent" in err and "6 more" in err


def test_what_cannot_be_read_or_named_is_one_sentence(hub, tmp_path, cli, monkeypatch):
    directory = a_directory(tmp_path / "model", 1, seed=16)
    (directory / "a\x1b[31m.json").write_text("{}", encoding="utf-8")
    code, _, err = cli("push", directory, "--to", hub.to)
    assert code == 2 and "Rename the file" in err and "\x1b" not in err
    (directory / "a\x1b[31m.json").unlink()
    opened = open

    def denied(path, *arguments, **named):
        if str(path).endswith("model.safetensors"):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *arguments, **named)

    monkeypatch.setattr("builtins.open", denied)
    code, _, err = cli("push", directory, "--to", hub.to)
    assert code == 2 and "model.safetensors" in err and "Permission denied" in err and "Traceback" not in err


def test_of_several_commits_the_first_ones_remove(tmp_path):
    """ModelScope limits a commit: no order leaves parts of two models side by side."""
    files = [LocalFile(f"{number}.txt", tmp_path / "x") for number in range(300)]
    (tmp_path / "x").write_text("x", encoding="utf-8")
    batches = list(_batches([*map(_Removed, map(str, range(300))), *files]))
    kinds = ["".join("r" if isinstance(entry, _Removed) else "f" for entry in batch) for batch in batches]
    assert "".join(kinds) == "r" * 300 + "f" * 300 and max(map(len, kinds)) == 256
