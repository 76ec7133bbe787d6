"""What a push lets out and what it says of the network: tokens stay with the hub, statuses are named, and who waits is told."""

# ruff: noqa: F811  (fixtures of another file)
import socket
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from hubs import CUT, TOKEN
from test_push import a_directory, hashes, held, hub, quick, sentences  # noqa: F401  (fixtures)

from glm45_tune.hub.hub import BROKEN, Fault, Patience
from glm45_tune.hub.modelscope import _homes
from glm45_tune.hub.push import without_secrets


@contextmanager
def stranger(hub, status: int = 200):
    """A server that is not the hub: it keeps what it is sent, and answers as the hub would without asking who came."""
    seen: list[tuple[str, str, dict, bytes]] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def handle_any(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            seen.append((self.command, self.path, dict(self.headers), body))
            content = b"{}"
            if "/lfs-storage/" in self.path and status == 200:
                hub.store(self.path.split("/")[2].partition("?")[0], body)
            if self.command == "GET":
                files = hub.repos["me/tuned"].files.get(hub.main, {})
                content = next((data for name, data in files.items() if self.path.endswith(name)), b"{}")
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_HEAD = handle_any

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", seen
    finally:
        server.shutdown()
        server.server_close()


def test_content_that_goes_to_another_host_goes_without_the_token(hub, tmp_path, cli):
    """Uploads, and Hugging Face's question whether one arrived, go where the hub's answer says: without bearer and cookie."""
    directory = a_directory(tmp_path / "model", 4, seed=1)
    with stranger(hub) as (address, seen):
        hub.storage_url = hub.verify_url = address
        hub.part = 1 << 30
        code, _, err = cli("push", directory, "--to", hub.to)
        assert code == 0 and held(hub) == hashes(directory), err
        assert seen and TOKEN not in str(seen) and not [1 for *_, headers, _ in seen if "Cookie" in headers]
    assert any(TOKEN in str(headers) for headers in hub.logins)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_to_another_host_takes_no_login_along(hub, tmp_path, cli, status):
    """Of every request that the hub may answer so, in turn."""
    directory = a_directory(tmp_path / "model", 1, seed=2)
    assert cli("push", directory, "--to", hub.to)[0] == 0
    with stranger(hub) as (address, seen):
        for part in ("api/models/me", "tree", "preupload", "resolve", "models/me", "repo", "files", "batch", "commit"):
            (directory / "config.json").write_text(f'{{"of": "{part}"}}', encoding="utf-8")
            (directory / "model.safetensors").write_bytes(part.encode())
            where = lambda request, part=part: (status, b"", {"Location": address + request.path + "?signed=1"}) if part in request.path else None  # fmt: skip  # noqa: E731
            hub.faults = where
            code, _, err = cli("push", directory, "--to", hub.to)
            assert code in (0, 2, 3) and "Traceback" not in err and TOKEN not in err
        assert seen and TOKEN not in str(seen) and not [1 for *_, headers, _ in seen if "Cookie" in headers]


def test_storage_that_wants_a_login_of_its_own_is_told(hub, tmp_path, cli):
    with stranger(hub, status=403) as (address, seen):
        hub.storage_url = address
        code, _, err = cli("push", a_directory(tmp_path / "model", 1, seed=3), "--to", hub.to)
        assert code == 2 and "403" in err and TOKEN not in str(seen) + err and "does not accept the token" not in err


def test_a_signed_address_is_never_shown(hub, tmp_path, cli):
    """Nothing listens there, so the client's own words hold the whole address."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        hub.storage_url = f"http://user:PASSWORD@127.0.0.1:{taken.getsockname()[1]}"
        hub.signature = "?X-Amz-Signature=SIGNATURE&x=1"
        code, out, err = cli("push", a_directory(tmp_path / "model", 1, seed=4), "--to", hub.to)
    assert code == 2 and "kept breaking" in err and "SIGNATURE" not in out + err and "PASSWORD" not in out + err, err


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        (f"bad token {TOKEN}", "bad token ***"),
        ("PUT https://a.b/c?X-Amz-Signature=s&y=1 failed", "PUT https://a.b/c?*** failed"),
        ("(url: /c?sig=s (Caused by x))", "(url: /c?*** (Caused by x))"),
        ("proxy http://me:pw@host:1 is gone", "proxy http://***@host:1 is gone"),
        ("a\n\tb", "a b"),
    ],
)
def test_what_a_client_says_is_shown_without_secrets(said, shown):
    assert without_secrets(said, TOKEN) == shown
    assert "\x1b" not in without_secrets("a\x1b[31m", None)


STATUSES = {
    400: "refuses: 400", 401: "does not accept the token (401", 403: "403", 404: "404", 405: "refuses: 405", 409: "409", 413: "no room for it (413",
    418: "refuses: 418", 422: "refuses: 422", 429: "kept answering 429", 500: "kept answering 500", 503: "kept answering 503", 504: "kept answering 504",
    507: "no room for it (507", 599: "kept answering 599",
}  # fmt: skip


@pytest.mark.parametrize("where", ["", "commit", "batch"])
def test_every_status_is_named(hub, tmp_path, cli, where):
    """At the first question and at the last, with words and without; what is tried again says so."""
    directory = a_directory(tmp_path / "model", 1, seed=5)
    for number, (status, said) in enumerate(STATUSES.items()):
        body = [{"error": "because", "Message": "because"}, b""][number % 2]
        hub.faults = lambda request, answer=(status, body): answer if where in request.path else None
        code, _, err = cli("push", directory, "--to", hub.to)
        if status == 404 and not where and hub.to.startswith("hf"):
            assert code == 2  # no such repository, and then no right to make one
            continue
        assert code == 2 and said in err and len(sentences(err)) == 1, (status, err)
        assert ("trying again" in err) == ("kept" in said), (status, err)


def test_without_a_network_something_is_said_at_once_and_the_end_is_near(hub, tmp_path, cli, monkeypatch):
    """Nothing listens: the retries are told, and there are few of them, whatever the client would do by itself."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        for name in ("HF_ENDPOINT", "MODELSCOPE_ENDPOINT"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{taken.getsockname()[1]}")
        waited = []
        monkeypatch.setattr(time, "sleep", waited.append)
        code, _, err = cli("push", a_directory(tmp_path / "model", 1, seed=6), "--to", hub.to)
    assert code == 2 and "did not answer as it should; trying again (1 of 5) …" in err and "kept breaking" in err, err
    assert waited == [0.5, 1, 2, 4, 8]


def test_who_waits_for_the_first_answer_is_told():
    """The call comes back only when the line was said."""
    said, told = [], threading.Event()

    def say(text: str) -> None:
        said.append(text)
        told.set()

    assert Patience("the hub", say)(lambda: told.wait(20)) and said == ["waiting for an answer of the hub …"]


def test_a_hub_that_never_answered_is_given_up_sooner(monkeypatch):
    """A first call that takes 40 s each time is made twice; one behind an answer, six times."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    for answered, calls in ((False, 2), (True, 6)):
        patiently, made = Patience("the hub", lambda text: None), []
        if answered:
            patiently(lambda: True)

        def slow(made=made):
            made.append(1)
            now[0] += 40
            raise Fault(BROKEN)

        with pytest.raises(Fault):
            patiently(slow)
        assert len(made) == calls


def test_retries_of_many_threads_are_few_lines(monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    said = []
    patiently = Patience("the hub", said.append)

    def failing():
        raise Fault(BROKEN, "", 503)

    for _ in range(50):
        with pytest.raises(Fault):
            patiently(failing)
    assert 1 <= len(said) <= 5 and said[0] == "the hub answered 503; trying again (1 of 5) …"


@pytest.mark.parametrize("scheme", ["socks5", "socks5h", "socks4"])
def test_a_socks_proxy_is_one_sentence(hub, tmp_path, cli, monkeypatch, scheme):
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ALL_PROXY", f"{scheme}://me:PASSWORD@127.0.0.1:1080")
    reset_session()
    code, _, err = cli("push", a_directory(tmp_path / "model", 1, seed=7), "--to", hub.to)
    reset_session()
    assert code == 2 and "proxy" in err and len(sentences(err)) == 1 and "PASSWORD" not in err, err
    assert "pip install" in err or scheme == "socks4"


@pytest.mark.parametrize(
    "address", ["my.mirror", "ftp://a", "http://", "http://a:b", "https://me:PASSWORD@a:99999999", "file:///etc"]
)
def test_an_endpoint_that_is_not_an_address_is_one_sentence(hub, tmp_path, cli, monkeypatch, address):
    for name in ("HF_ENDPOINT", "MODELSCOPE_ENDPOINT"):
        monkeypatch.setenv(name, address)
    code, _, err = cli("push", a_directory(tmp_path / "model", 1, seed=9), "--to", hub.to)
    assert code == 2 and len(sentences(err)) == 1 and "PASSWORD" not in err and "Traceback" not in err, err


def reset_session() -> None:
    """Hugging Face's client keeps one for the process; its proxies are those of when it began."""
    from huggingface_hub import close_session

    close_session()


def test_homes_of_a_hub():
    assert _homes("http://127.0.0.1:81") == {("http", "127.0.0.1", 81)}
    home = ("https", "www.modelscope.cn", 443)
    assert _homes("https://www.modelscope.cn/") == {home, ("https", "lfs.modelscope.cn", 443), ("https", "pre-lfs.modelscope.cn", 443)}  # fmt: skip


def test_a_cut_is_told_as_one(hub, tmp_path, cli):
    hub.faults = lambda request: CUT
    code, _, err = cli("push", a_directory(tmp_path / "model", 1, seed=8), "--to", hub.to)
    assert code == 2 and "kept breaking" in err and "trying again" in err
