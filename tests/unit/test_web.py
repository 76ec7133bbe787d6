"""Servers that are broken, hostile or far away: an answer or one sentence, within bounds."""

import json
import random
import resource
import time

import pytest
from wire import MODELS, answering, delta, events, http, stream, without_end

from glm45_tune.chat import server as chat_server
from glm45_tune.chat.server import Server
from glm45_tune.errors import StoppedError, UserError

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


HELLO = events(delta(content="你"), delta(content="好"))


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


def ask(url: str) -> tuple[str, str, list]:
    """(thought, content, calls) of one question."""
    said = {"thought": "", "content": ""}

    def hear(kind, text):
        said[kind] += text

    calls = Server(url).answer([{"role": "user", "content": "?"}], None, None, 8, hear)
    return said["thought"], said["content"], calls


STREAMS = {
    "as vLLM writes it": HELLO,
    "without the blank behind data:": HELLO.replace("data: ", "data:"),
    "lines that end with CR LF": HELLO.replace("\n", "\r\n"),
    "lines that end with CR": HELLO.replace("\n", "\r"),
    "comments and keep-alives": ": ping\n\n" + HELLO.replace("data: {", ": keep-alive\n\ndata: {"),
    "other fields": HELLO.replace("data: {", "event: message\nid: 1\nretry: 10\ndata: {"),
    "one line end alone": HELLO.replace("\n\n", "\n"),
    "a byte order mark": "\ufeff" + HELLO,
    "a document over several lines": events(end="")
    + "".join("data: " + line + "\n" for line in json.dumps(delta(content="你好"), indent=1).splitlines())
    + "\ndata: [DONE]\n\n",
    "nulls where nothing is said": events(
        {"choices": [{"index": 0, "delta": {"content": None, "tool_calls": None, "reasoning_content": None}}]},
        {"choices": [{"delta": None}]},
        delta(content="你好"),
        {"choices": [], "usage": {}},
    ),
    "no end of the last line": HELLO.rstrip("\n"),
    "more behind the end": HELLO + "data: nonsense\n\n",
}


@pytest.mark.parametrize("name", STREAMS)
def test_every_form_of_a_stream_is_read(name):
    with answering(stream(STREAMS[name])) as (url, _):
        assert ask(url) == ("", "你好", [])


def test_a_stream_may_be_cut_anywhere_into_pieces():
    """Between the bytes of a letter, between CR and LF."""
    text = HELLO.replace("\n", "\r\n").encode()

    def send(connection):
        connection.sendall(CHUNKED)
        for byte in text:
            connection.sendall(chunk(bytes([byte])))
        connection.sendall(b"0\r\n\r\n")

    with answering(send) as (url, _):
        assert ask(url) == ("", "你好", [])


BAD = {
    "content is a list": events(delta(content=[{"type": "text", "text": "x"}])),
    "content is a number": events(delta(content=5)),
    "a thought is an object": events(delta(reasoning_content={"a": 1})),
    "a chunk is a list": "data: [1]\n\n",
    "a chunk is a number": "data: 5\n\n",
    "no choices": "data: {}\n\n",
    "choices are an object": events({"choices": {"0": {}}}),
    "choices are null": events({"choices": None}),
    "a choice is text": events({"choices": ["x"]}),
    "choices that were not asked for": events({"choices": [{"index": 0, "delta": {}}, {"index": 1, "delta": {}}]}),
    "an index that is text": events({"choices": [{"index": "0", "delta": {}}]}),
    "a delta is a list": events({"choices": [{"index": 0, "delta": ["x"]}]}),
    "calls are an object": events(delta(tool_calls={"index": 0})),
    "a call is null": events(delta(tool_calls=[None])),
    "indices of two types": events(delta(tool_calls=[{"index": 0}, {"index": "a"}])),
    "a call without an index": events(delta(tool_calls=[{"function": {"name": "f"}}])),
    "an index without bound": events(delta(tool_calls=[{"index": 10**12}])),
    "a function is text": events(delta(tool_calls=[{"index": 0, "function": "f"}])),
    "arguments are an object": events(delta(tool_calls=[{"index": 0, "function": {"name": "f", "arguments": {}}}])),
    "nested without end": "data: " + "[" * 200_000 + "\n\n",
    "nested deeply": "data: " + "[" * 200_000 + "]" * 200_000 + "\n\n",
    "not UTF-8": b'data: {"choices": [{"delta": {"content": "\xff\xfe"}}]}\n\n',
    "a number of many digits": "data: " + "9" * 10_000 + "\n\n",
    "half a document": 'data: {"choices": [{"del\n\n',
    "an error in the stream": events({"error": {"message": "out of memory", "code": 500}}),
    "no stream at all": "<html>It works!</html>",
    "JSON instead of a stream": json.dumps({"choices": [{"message": {"content": "x"}}]}),
    "a line without end": "data: " + "x" * (3 << 20),
    "an event of endless lines": "data: x\n" * 5000,
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_chat_completion_is_one_sentence(name):
    with answering(stream(BAD[name])) as (url, _), pytest.raises(UserError, match="no chat completion: ") as error:
        ask(url)
    assert "\n" not in str(error.value) and len(str(error.value)) < 800


CUT = {
    "nothing": stream(""),
    "no end": stream(events(delta(content="x"), end="")),
    "within a line": stream(events(delta(content="x"), end="data: {")),
    "with its reason but no end": stream(events({"choices": [{"delta": {}, "finish_reason": "stop"}]}, end="")),
    "fewer bytes than it says": b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n" + HELLO.encode()[:20],
    "within a chunk": CHUNKED + b"50\r\ndata: ",
    "no answer": b"",
    "no HTTP": b"SSH-2.0-OpenSSH_9.6\r\n",
    "half a head": b"HTTP/1.1 200 OK\r\nContent-",
    "a head without end": without_end(b"HTTP/1.1 200 OK\r\n", b"X: " + b"x" * 1000 + b"\r\n"),
}


@pytest.mark.parametrize("name", CUT)
def test_an_answer_that_breaks_off_ends_with_code_1(name, cli):
    with answering(CUT[name]) as (url, _):
        code, _, err = cli("chat", "--server", url, "--prompt", "q")
    assert code == 1 and "the answer broke off" in err and "Traceback" not in err, err


@pytest.mark.parametrize(
    "answer",
    [
        without_end(CHUNKED, b"1\r\n:\r\n", 0.05),
        without_end(CHUNKED, b"3\r\n:\n\n\r\n", 0.05),
        without_end(b"HTTP/1.1 200 OK\r\nX: ", b"y", 0.05),
        without_end(b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.001),
        without_end(b"HTTP/1.1 500 No\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n", 0.05),
        lambda connection: connection.recv(1),
    ],
    ids=[
        "dripping bytes",
        "keep-alives for ever",
        "a dripping head",
        "100 Continue for ever",
        "a dripping error",
        "silence",
    ],
)
def test_a_deadline_is_of_the_whole_answer(answer, monkeypatch):
    monkeypatch.setattr(chat_server, "_ANSWER_SECONDS", -7.0)  # and 8 for the tokens: one second
    started = time.monotonic()
    with answering(answer) as (url, _), pytest.raises(StoppedError, match="did not answer whole within 1 s"):
        ask(url)
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    "answer",
    [
        without_end(CHUNKED, chunk(b"x" * 65536)),
        without_end(CHUNKED, chunk(b":" * 65536 + b"\n")),
        without_end(CHUNKED, chunk(events(delta(content="x" * 5000), end="").encode() * 8)),
        without_end(b"HTTP/1.1 500 No\r\nTransfer-Encoding: chunked\r\n\r\n", chunk(b"x" * 65536)),
    ],
    ids=["a line", "comments", "chunks", "an error"],
)
def test_an_answer_without_end_takes_bounded_memory(answer, monkeypatch):
    monkeypatch.setattr(chat_server, "_ANSWER_BYTES", 8 << 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with answering(answer) as (url, _), pytest.raises(UserError):
        ask(url)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10


@pytest.mark.parametrize(
    "models",
    [
        http("[]"),
        http('{"data": {}}'),
        http('{"data": [5]}'),
        http('{"data": [{"id": null}]}'),
        http("[" * 100_000),
        http(b"\xff"),
        http(""),
        http(json.dumps({"data": [{"id": "x" * 1000}] * 5000})),
        http("<html>", "404 Not Found"),
        http("", "302 Found", "Location: http://elsewhere.example/v1/models\r\n"),
        http(b"\x1f\x8b\x08", headers="Content-Encoding: gzip\r\n"),
        without_end(CHUNKED, chunk(b"x" * 65536)),
        without_end(b"HTTP/1.1 500 No\r\n\r\n", b"x" * 0x10000),
    ],
)
def test_a_list_of_models_that_is_none_is_one_sentence(models):
    with (
        answering(models=models) as (url, _),
        pytest.raises(UserError, match="no server that speaks OpenAI's API") as error,
    ):
        Server(url)
    assert "\n" not in str(error.value) and len(str(error.value)) < 800


def test_a_redirect_is_named_and_not_followed():
    with answering(stream(HELLO)) as (other, asked):
        moved = http("", "307 Temporary Redirect", f"Location: {other}/v1/chat/completions\r\n")
        with (
            answering(moved) as (url, _),
            pytest.raises(UserError, match=f"307: redirects to {other}/v1/chat/completions"),
        ):
            ask(url)
    assert not asked


def test_what_a_server_says_is_shown_and_not_obeyed(cli):
    esc, osc = "\x1b[2J", "\x1b]0;mine\x07"
    said = events(delta(reasoning_content=esc), delta(content=f"a{osc}b\x9b1m"), delta(tool_calls=[{"index": 0, "function": {"name": esc, "arguments": "{"}}]))  # fmt: skip
    with answering(stream(said), http(esc, "500 No")) as (url, _):
        code, out, err = cli("chat", "--server", url, "--prompt", "q")
        assert (
            code == 0
            and "\x1b" not in out + err
            and "\x9b" not in out
            and "\\x1b[2J" in out
            and "\\x1b]0;mine\\x07" in out
        )
        code, out, err = cli("chat", "--server", url, "--prompt", "q")
        assert code == 2 and "\x1b" not in err and "\\x1b[2J" in err
    with answering(models=http(json.dumps({"data": [{"id": esc}]}))) as (url, _):
        assert "\x1b" not in cli("chat", "other", "--server", url, "--prompt", "q")[2]


# -- proxies and keys ------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::ffff:127.0.0.1]", "0.0.0.0", "127.9.9.9"])
@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"])
def test_this_machine_is_never_asked_through_a_proxy(host, variable, monkeypatch):
    """A proxy cannot see it: what it then says has nothing to do with the server."""
    from httpx import URL

    from glm45_tune.web import proxy_of

    for proxy in ("http://127.0.0.1:9", "socks5://127.0.0.1:9"):
        monkeypatch.setenv(variable, proxy)
        assert proxy_of(URL(f"http://{host}:8000/v1")) == (None, "")
        assert proxy_of(URL("http://10.0.0.7:8000"))[0] == proxy


def test_chat_with_a_server_of_this_machine_beside_a_proxy(monkeypatch):
    with answering(http("the proxy's own page", "503 No")) as (proxy, asked), answering(stream(HELLO)) as (url, _):
        monkeypatch.setenv("HTTP_PROXY", proxy)
        monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
        assert ask(url)[1] == "你好"
    assert not asked


@pytest.mark.parametrize("spared", ["10.0.0.7", "10.0.0.7:8000", "10.0.0.0/8", "*", "localhost, 10.0.0.7"])
def test_no_proxy_spares_hosts_and_networks(spared, monkeypatch):
    from httpx import URL

    from glm45_tune.web import proxy_of

    monkeypatch.setenv("HTTP_PROXY", "proxy:3128")
    monkeypatch.setenv("NO_PROXY", spared)
    assert proxy_of(URL("http://10.0.0.7:8000")) == (None, "")
    assert spared == "*" or proxy_of(URL("http://11.0.0.7:8000"))[0] == "http://proxy:3128"


def test_a_proxy_that_fails_is_named(monkeypatch):
    with answering(models=http("<h1>no such host</h1>", "502 Bad Gateway")) as (proxy, asked):
        monkeypatch.setenv("HTTP_PROXY", proxy.replace("//", "//me:hunter2@"))
        with pytest.raises(
            UserError, match=rf"502: .*through the proxy {proxy.replace('//', '//.*@')} of HTTP_PROXY"
        ) as error:
            Server("http://model.example:8000")
    assert asked and "hunter2" not in str(error.value)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="through the proxy http://127.0.0.1:9 of HTTP_PROXY"):
        Server("http://model.example:8000")


@pytest.mark.parametrize("proxy, said", [("socks5://127.0.0.1:9", "pip install 'httpx"), ("ftp://127.0.0.1:9", "ftp")])
def test_a_proxy_of_another_kind_is_one_sentence(proxy, said, monkeypatch, cli):
    monkeypatch.setenv("ALL_PROXY", proxy)
    code, _, err = cli("chat", "--server", "http://model.example:8000", "--prompt", "q")
    assert code == 2 and said in err and "of ALL_PROXY" in err and "Traceback" not in err


def test_the_key_of_openai_goes_to_the_server_that_the_user_names_alone(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test-0123456789")
    with answering(stream(HELLO)) as (url, asked):
        ask(url)
        assert asked and not any(b"sk-test" in head for head in asked)
        asked.clear()
        monkeypatch.setenv("OPENAI_BASE_URL", url + "/v1")
        ask(url)
        assert len(asked) == 2 and all(b"Bearer sk-test-0123456789" in head for head in asked)
    with answering(models=http("no key", "401 Unauthorized")) as (url, asked), pytest.raises(UserError) as error:
        Server(url)
    assert f"OPENAI_BASE_URL={url}" in str(error.value)
    assert not any(b"sk-test" in head for head in asked)


@pytest.mark.parametrize(
    "url", ["", "nonsense", "http://", "ftp://a", "http://[::1", "http://a:99999999", "http://\ud800", "file:///etc"]
)
def test_an_address_that_is_none_is_one_sentence(url):
    with pytest.raises(UserError, match="no server that speaks"):
        Server(url)


# -- fuzz ------------------------------------------------------------------------------------------


def mutated(rng: random.Random, data: bytes) -> bytes:
    """Some bytes of it changed, left out, doubled or put elsewhere."""
    pieces = [
        b"\x00",
        b"\xff",
        b"\r\n",
        b"\n\n",
        b"{",
        b"]",
        b'"',
        b"null",
        b"1e999",
        b"-1",
        b"data:",
        b"9" * 5000,
        b"[" * 3000,
    ]
    for _ in range(rng.randint(1, 6)):
        a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        match rng.randrange(4):
            case 0:
                data = data[:a] + rng.choice(pieces) + data[a:]
            case 1:
                data = data[:a] + data[min(b, a + 20) :]
            case 2:
                data = data[:a] + data[a:b][:200] * 2 + data[b:]
            case 3:
                data = data[:a] + bytes([rng.randrange(256)]) + data[a + 1 :]
    return data


def test_mutated_answers_are_answers_or_one_sentence(monkeypatch):
    monkeypatch.setattr(chat_server, "_ANSWER_SECONDS", -3.0)
    rng = random.Random(0)
    calls = [{"index": 0, "function": {"name": "f", "arguments": '{"a": 1}'}}]
    whole = [
        stream(events(delta(reasoning_content="想"), delta(content="<think>a</think>b"), delta(tool_calls=calls))),
        CHUNKED + b"".join(chunk(line.encode() + b"\n") for line in HELLO.split("\n")) + b"0\r\n\r\n",
    ]
    answers = [mutated(rng, rng.choice(whole)) for _ in range(150)]
    kinds = set()
    with answering(*answers) as (url, _):
        server = Server(url)
        for _ in answers:
            started = time.monotonic()
            try:
                server.answer([], None, None, 8, lambda kind, text: None)
                kinds.add("answer")
            except (UserError, StoppedError) as error:
                kinds.add(type(error))
            assert time.monotonic() - started < 20
    assert kinds == {"answer", UserError, StoppedError}
    with answering(models=MODELS) as (url, _):
        assert Server(url).models == ["tuned"]
