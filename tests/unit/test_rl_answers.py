"""What servers of rollouts may answer: checked before a token of it is trained."""

import base64
import io
import json
import random
import sys
import time

import numpy as np
import pytest
from wire import answering, http, without_end

from glm45_tune.errors import ToldToStop, UserError
from glm45_tune.objectives import EngineConfig
from glm45_tune.rl.dialects import BadAnswer, check, read_experts
from glm45_tune.rl.engine import Completion, Request
from glm45_tune.rl.servers import Servers, _filled
from glm45_tune.spec import ModelSpec

ASKED = Request([1, 2, 3], 4)
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.fixture(scope="module")
def spec(checkpoints) -> ModelSpec:
    return ModelSpec.from_config(json.loads((checkpoints["air"] / "config.json").read_text()), "here")


def vllm(tokens=(5, 6, 7, 9), logprobs=(-1.0, -0.5, -2, 0.0), finish="stop", **more) -> dict:
    content = [{"logprob": value} for value in logprobs]
    choice = {"token_ids": list(tokens), "logprobs": {"content": content}, "finish_reason": finish}
    return {"choices": [choice | more]}


def sglang(tokens=(5, 6, 7, 9), logprobs=(-1.0, -0.5, -2, 0.0), finish="stop", **more) -> dict:
    entries = [[value, token, None] for value, token in zip(logprobs, tokens, strict=True)]
    return {"meta_info": {"output_token_logprobs": entries, "finish_reason": {"type": finish}}} | more


def servers_at(url: str, spec: ModelSpec, tmp_path, kind="vllm", **options) -> Servers:
    options = {"retries": 0, "timeout_seconds": 20, "sync": "lora"} | options
    return Servers(EngineConfig(kind=kind, urls=[url], **options), "m", 1.0, [9], tmp_path / "log", spec)


def test_an_answer_as_it_should_be(spec, tmp_path):
    for kind, answer in (("vllm", vllm()), ("sglang", sglang())):
        with answering(http(json.dumps(answer))) as (url, _):
            servers = servers_at(url, spec, tmp_path, kind)
            (found,) = servers.generate([ASKED], 0, 3)
            assert found == Completion([5, 6, 7, 9], [-1.0, -0.5, -2.0, 0.0], "stop", 3) and not servers.faults
            assert [len(answers) for answers in servers.probe(ASKED, 2).values()] == [2]


WRONG = {
    "longer than asked for": vllm([5, 6, 7, 8, 9], [-1.0] * 5),
    "an id beyond the vocabulary": vllm([5, 6, 10**6, 9]),
    "a negative id": vllm([5, -6, 7, 9]),
    "a fraction for an id": vllm([5, 1.5, 7, 9]),
    "a whole float for an id": vllm([5, 6.0, 7, 9]),
    "text for an id": vllm([5, "x", 7, 9]),
    "true for an id": vllm([5, True, 7, 9]),
    "null for an id": vllm([5, None, 7, 9]),
    "ids that are text": vllm() | {"choices": [vllm()["choices"][0] | {"token_ids": "5679"}]},
    "ids that are null": vllm(finish="abort") | {"choices": [vllm()["choices"][0] | {"token_ids": None}]},
    "a log-probability that is text": vllm(logprobs=[-1.0, "-1", -1.0, -1.0]),
    "a log-probability that is true": vllm(logprobs=[-1.0, False, -1.0, -1.0]),
    "a log-probability that is a list": vllm(logprobs=[-1.0, [], -1.0, -1.0]),
    "a log-probability above 0": vllm(logprobs=[-1.0, 0.5, -1.0, -1.0]),
    "a log-probability that is NaN": vllm(logprobs=[-1.0, float("nan"), -1.0, -1.0]),
    "a log-probability that is infinite": vllm(logprobs=[-1.0, float("-inf"), -1.0, -1.0]),
    "one log-probability too few": vllm(logprobs=[-1.0] * 3),
    "two choices": {"choices": vllm()["choices"] * 2},
    "a choice that is text": {"choices": ["x"]},
    "choices that are null": {"choices": None},
    "a list": [1],
    "null": None,
    "text": "x",
    "a reason that is a list": vllm(finish=["stop"], tokens=[5, 6, 7], logprobs=[-1.0] * 2),
    "experts that are no text": vllm(routed_experts=5),
    "experts that are no base64": vllm(routed_experts="%%%"),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_answer_that_cannot_be_is_counted_and_left_out(name, spec, tmp_path):
    with answering(http(json.dumps(WRONG[name]))) as (url, _):
        servers = servers_at(url, spec, tmp_path)
        (found,) = servers.generate([ASKED], 0, 0)
        assert found.finish == "aborted" and servers.faults == {"bad answer": 1, "given up": 1}
        with pytest.raises(UserError, match="rl.engine http"):
            servers.probe(ASKED, 1)


def array(shape, dtype=np.int16, fill=0) -> str:
    file = io.BytesIO()
    np.save(file, np.full(shape, fill, dtype))
    return base64.b64encode(file.getvalue()).decode()


def head(said: str, version: bytes = b"\x01\x00", length: int | None = None) -> str:
    size = (len(said) if length is None else length).to_bytes(2 if version == b"\x01\x00" else 4, "little")
    return base64.b64encode(b"\x93NUMPY" + version + size + said.encode()).decode()


def with_archive() -> str:
    file = io.BytesIO()
    np.savez(file, a=np.zeros(3))
    return base64.b64encode(file.getvalue()).decode()


def pickled() -> str:
    file = io.BytesIO()
    np.save(file, np.array([{}], dtype=object), allow_pickle=True)
    return base64.b64encode(file.getvalue()).decode()


EXPERTS = {
    "a huge shape": head("{'descr': '<i2', 'fortran_order': False, 'shape': (1000000, 1000000, 8), }\n"),
    "a huge header": head(" " * 60_000),
    "a header that is longer than the file": head("{}", b"\x02\x00", 1 << 31),
    "a header that is no dict": head("[1]\n"),
    "a nested header": head("(" * 900),
    "a negative shape": head("{'descr': '<i2', 'fortran_order': False, 'shape': (-1, -1, 0), }\n"),
    "an archive": with_archive(),
    "objects": pickled(),
    "no file": base64.b64encode(b"hello").decode(),
    "nothing": base64.b64encode(b"\x93NUMPY").decode(),
    "floats": array((6, 3, 2), np.float32),
    "two axes": array((6, 3)),
    "Fortran's order": base64.b64encode(
        base64.b64decode(array((6, 3, 2))).replace(b"'fortran_order': False", b"'fortran_order': True ")
    ).decode(),
    "cut": array((6, 3, 2))[:-8],
    "more than it says": base64.b64encode(base64.b64decode(array((6, 3, 2))) + bytes(4)).decode(),
}


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_that_are_no_array_are_a_bad_answer(name, spec, tmp_path):
    with answering(http(json.dumps(vllm(routed_experts=EXPERTS[name])))) as (url, _):
        servers = servers_at(url, spec, tmp_path)
        assert servers.generate([ASKED], 0, 0)[0].finish == "aborted" and servers.faults["bad answer"] == 1


def test_experts_are_those_of_the_model(spec):
    layers, chosen = spec.num_layers - spec.num_dense_layers, spec.moe_router_topk
    answer = Completion([5, 9], [-1.0, -1.0], "stop", 0)

    def taken(shape, fill=0, dtype=np.int32):
        experts = read_experts(array(shape, dtype, fill))
        return check(Completion(answer.token_ids, answer.logprobs, "stop", 0, experts), ASKED, [9], spec).experts

    for rows in (layers, spec.num_layers):
        assert taken((4, rows, chosen), spec.num_moe_experts - 1).dtype == np.int16
    assert (taken((4, layers, chosen), -1) == -1).all() and not taken((0, layers, chosen)).size
    for shape, fill in (((6, layers, chosen), 0), ((4, 99, chosen), 0), ((4, layers, chosen + 1), 0), ((4, layers, chosen), spec.num_moe_experts), ((4, layers, chosen), -2), ((4, layers, chosen), 2**16)):  # fmt: skip
        with pytest.raises(BadAnswer):
            taken(shape, fill)


@pytest.mark.parametrize(
    "answer, kind",
    [
        (without_end(CHUNKED, b"1\r\n \r\n", 0.05), "hung"),
        (lambda connection: connection.recv(1), "hung"),
        (without_end(CHUNKED, b"10000\r\n" + b" " * 0x10000 + b"\r\n"), "bad answer"),
        (http("[" * 100_000), "bad answer"),
        (http(b"\xff"), "bad answer"),
        (http("", "302 Found", "Location: http://elsewhere.example/\r\n"), "bad answer"),
        (http("no", "500 No"), "bad answer"),
    ],
    ids=["dripping", "silence", "endless", "nested", "not UTF-8", "redirect", "500"],
)
def test_an_answer_is_bounded_as_a_whole(answer, kind, spec, tmp_path):
    started = time.monotonic()
    with answering(answer) as (url, _):
        servers = servers_at(url, spec, tmp_path, timeout_seconds=1)
        try:
            assert servers.generate([ASKED] * 3, 0, 0)[0].finish == "aborted"
        except UserError as error:
            assert kind == "hung" and "no server answers after 1 tries" in str(error)
    assert servers.faults[kind] >= 1 and time.monotonic() - started < 15


def test_waiting_for_a_server_ends_with_a_signal(spec, tmp_path):
    """A server that hangs has its ten minutes; who was told to stop does not wait for them."""
    with answering(lambda connection: connection.recv(1)) as (url, _):
        servers = servers_at(url, spec, tmp_path, timeout_seconds=600)
        servers._is_told = iter([False, False, True]).__next__
        started = time.monotonic()
        with pytest.raises(ToldToStop):
            servers.generate([ASKED], 0, 0)
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    "how, sent", [("api_key", b"Bearer topsecret/key"), ("url", b"Basic bWU6dG9wc2VjcmV0L2tleQ==")]
)
def test_servers_are_sent_their_key_and_shown_without_it(how, sent, spec, tmp_path, monkeypatch):
    monkeypatch.setenv("ENGINE_KEY", "topsecret/key")
    with answering(http(json.dumps(vllm())), http("no topsecret/key", "403 No")) as (url, asked):
        options = {"api_key": "${env:ENGINE_KEY}"} if how == "api_key" else {}
        if how == "url":
            url = url.replace("//", "//me:${env:ENGINE_KEY}@")
        servers = servers_at(url, spec, tmp_path, **options)
        assert servers.generate([ASKED], 0, 0)[0].finish == "stop" and sent in asked[0]
        with pytest.raises(UserError, match="403") as error:
            servers.probe(ASKED, 1)
        assert "topsecret" not in str(error.value)


def test_an_order_may_be_answered_with_a_word(spec, tmp_path):
    """As vLLM answers one to load an adapter; what says that it failed did."""
    with answering(http("Success: LoRA adapter 'a' added."), http('{"success": false, "message": "no room"}')) as (
        url,
        _,
    ):
        servers = servers_at(url, spec, tmp_path)
        servers.load_adapter("a", tmp_path)
        with pytest.raises(UserError, match="/v1/load_lora_adapter: .*no room"):
            servers.load_adapter("b", tmp_path)


def test_servers_of_this_machine_are_not_asked_through_a_proxy(spec, tmp_path, monkeypatch):
    """Nor the one that is started, whose health is asked for until it answers."""
    command = [sys.executable, "-m", "http.server", "{port}", "--bind", "127.0.0.1"]
    with answering(http("a page", "503 No"), models=http("a page", "503 No")) as (proxy, asked):
        monkeypatch.setenv("HTTP_PROXY", proxy)
        with answering(http(json.dumps(vllm()))) as (url, _):
            assert servers_at(url, spec, tmp_path).generate([ASKED], 0, 0)[0].finish == "stop"
        config = EngineConfig(kind="sglang", command=command, start_seconds=60)
        ours = Servers(config, "m", 1.0, [9], tmp_path / "log", spec)
        monkeypatch.setattr(ours._dialect, "health", "/")
        try:
            ours.start()
        finally:
            ours.stop()
    assert not asked


@pytest.mark.parametrize(
    "part, filled",
    [
        ("{model}", "/a"),
        ("--port={port}", "--port=8"),
        ('{"method": "mtp", "of": "{model}"}', '{"method": "mtp", "of": "/a"}'),
        ('{{"method": "mtp"}}', '{"method": "mtp"}'),
        ("{", "{"),
        ("{} {0} {model.x}", "{} {0} {model.x}"),
    ],
)
def test_braces_of_a_command_that_are_not_ours_stay(part, filled):
    assert _filled(part, model="/a", port="8") == filled


def mutated(rng: random.Random, value):
    """The document with something else in one place."""
    odd = [None, True, -1, 1.5, "x", [], {}, [[]], 10**30, float("nan"), "9" * 5000, {"a": None}]
    if rng.random() < 0.15 or not isinstance(value, dict | list) or not value:
        return rng.choice(odd)
    if isinstance(value, dict):
        key = rng.choice(sorted(value))
        if rng.random() < 0.2:
            return {name: kept for name, kept in value.items() if name != key}
        return value | {key: mutated(rng, value[key])}
    place = rng.randrange(len(value))
    return [*value[:place], mutated(rng, value[place]), *value[place + rng.randrange(2) :]]


@pytest.mark.parametrize("kind, whole", [("vllm", vllm()), ("sglang", sglang())])
def test_mutated_answers_are_taken_whole_or_left_out(kind, whole, spec, tmp_path):
    rng, count = random.Random(1), 200
    whole = (
        whole | {"choices": [whole["choices"][0] | {"routed_experts": array((6, 3, 2))}]}
        if "choices" in whole
        else whole
    )
    answers = []
    for _ in range(count):
        data = json.dumps(mutated(rng, whole)).encode()
        if rng.random() < 0.3:
            place = rng.randrange(len(data))
            data = data[:place] + bytes([rng.randrange(256)]) + data[place + rng.randrange(2) :]
        answers.append(http(data))
    with answering(*answers) as (url, _):
        servers = servers_at(url, spec, tmp_path, kind)
        found = servers.generate([ASKED] * count, 0, 0)
    assert len(found) == count and any(answer.finish == "aborted" for answer in found)
    for answer in found:
        assert all(type(token) is int and 0 <= token < spec.vocab_size for token in answer.token_ids)
        assert len(answer.token_ids) == len(answer.logprobs) <= 4 and np.isfinite(answer.logprobs).all()
