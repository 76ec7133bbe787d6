"""chat: what is typed, what is shown, what the model or a server is asked; the server is one on loopback that speaks SSE."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from glm45_tune.chat.model import ChatModel
from glm45_tune.hub.export import export

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
CALL = "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>北京</arg_value>\n</tool_call>"


@pytest.fixture
def typing(monkeypatch, cli):
    """chat with these lines typed at the terminal; returns (exit code, stdout, stderr)."""

    def run(lines, *arguments):
        waiting = iter(lines)
        asked = []

        def read(sign=""):
            asked.append(sign)
            try:
                return next(waiting)
            except StopIteration:
                raise EOFError from None

        monkeypatch.setattr("rich.console.Console.input", lambda self, sign="": read(str(sign)))
        code, out, err = cli("chat", *arguments)
        assert next(waiting, None) is None, "not everything typed was read"
        return code, out, err + "".join(asked)

    return run


def test_a_conversation_with_thoughts_tools_and_modes(checkpoints, tmp_path, typing, monkeypatch):
    """Every turn's prompt is the template's of all before it; answers are fed in pieces of two letters."""
    answers = iter(["\n<think>想一想</think>\n你好。", "\n" + CALL, "\n21 度。", "\n不想。", "\n重新"])
    prompts = []

    def stream(self, prompt, most):
        prompts.append(prompt)
        text = next(answers)
        yield from (text[n : n + 2] for n in range(0, len(text), 2))

    monkeypatch.setattr(ChatModel, "stream", stream)
    (tmp_path / "tools.json").write_text(json.dumps(TOOLS), encoding="utf-8")
    typed = [
        "你是谁?",
        f"/tools {tmp_path / 'tools.json'}",
        "天气?",
        "晴",
        "/no-think",
        "/tools off",
        "想吗?",
        "/new",
        "开始",
    ]
    code, out, err = typing(typed, checkpoints["air"])
    assert code == 0 and "result of get_weather>" in err, err
    for shown in ("想一想", "你好。", 'get_weather({"city": "北京"})', "21 度。", "不想。"):
        assert shown in out
    assert "<think>" not in out and "tool_call" not in out
    first, second, third, fourth, last = prompts
    assert first.endswith("你是谁?<|assistant|>") and "get_weather" not in first
    assert "你好。" in second and "# Tools" in second and second.endswith("天气?<|assistant|>")
    assert CALL in third and "<|observation|>\n<tool_response>\n晴\n</tool_response>" in third
    assert fourth.endswith("想吗?/nothink<|assistant|>\n<think></think>") and "# Tools" not in fourth
    assert "你是谁" not in last and last.endswith("开始/nothink<|assistant|>\n<think></think>")


def test_adapters_are_swapped_on_one_model(checkpoints, lora_run, tmp_path, typing):
    """Base, adapter, base again, a wrong one: the answers are those of each model alone; the wrong one changes nothing."""
    for step in (2, 4):
        export(lora_run, tmp_path / f"adapter{step}", adapter_only=True, step=step)
    air = checkpoints["air"]
    alone = {}
    for name, adapter in ((0, None), (2, tmp_path / "adapter2"), (4, tmp_path / "adapter4")):
        model = ChatModel(air, adapter)
        alone[name] = "".join(model.stream(model.prompt([{"role": "user", "content": "第3个问题。"}]), 12)).strip()
    assert len(set(alone.values())) > 1
    question = ["/new", "第3个问题。"]
    swaps = [*question, f"/adapter {tmp_path / 'adapter4'}", *question, f"/adapter {tmp_path / 'adapter2'}", *question]
    swaps += [f"/adapter {tmp_path}", *question, "/adapter off", *question, "/what"]
    code, out, err = typing(swaps, air, "--max-new-tokens", 12)
    assert code == 0 and "not a PEFT adapter" in err and "/no-think" in err
    said = [alone[name] for name in (0, 4, 2, 2, 0)]
    place = 0
    for text in said:  # in this order
        text = text.replace("<think>", "").replace("</think>", "").strip()
        assert text in out[place:], (text, out[place:])
        place = out.index(text, place) + len(text)


@contextmanager
def serving(answers):
    """A server that gives these answers, each a list of deltas, and keeps what it was asked."""
    asked, waiting = [], iter(answers)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            self._send(json.dumps({"data": [{"id": "tuned"}, {"id": "other"}]}))

        def do_POST(self):
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            deltas = next(waiting)
            if isinstance(deltas, tuple):
                self._send(*deltas)
                return
            lines = [f"data: {json.dumps({'choices': [{'index': 0, 'delta': delta}]})}\n\n" for delta in deltas]
            self._send("".join([*lines, "data: [DONE]\n\n"]))

        def _send(self, text, status=200):
            self.send_response(status)
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


def test_a_server_is_asked_the_same_way(tmp_path, typing):
    (tmp_path / "tools.json").write_text(json.dumps({"tools": TOOLS}), encoding="utf-8")
    parts = [{"index": 0, "id": "x", "function": {"name": "get_weather", "arguments": ""}}]
    parts += [{"index": 0, "function": {"arguments": text}} for text in ('{"ci', 'ty": "北京"}')]
    answers = [
        [
            {"role": "assistant"},
            {"reasoning_content": "想"},
            {"reasoning": "一想"},
            {"content": "你"},
            {"content": "好"},
        ],
        [{"tool_calls": [part]} for part in parts],
        [{"content": "<think>raw</think>晴"}],  # no reasoning parser there
    ]
    with serving(answers) as (url, asked):
        typed = [
            "你是谁?",
            f"/tools {tmp_path / 'tools.json'}",
            "/no-think",
            "/adapter other",
            "天气?",
            "晴",
            "/adapter none",
        ]
        code, out, err = typing(typed, "--server", url + "/v1/", "--max-new-tokens", 9)
    assert code == 0 and "想一想" in out and "你好" in out and 'get_weather({"city": "北京"})' in out, out
    assert "<think>" not in out and "serves no 'none'" in err
    assert [request["model"] for request in asked] == ["tuned", "other", "other"] and asked[0]["max_tokens"] == 9
    assert "chat_template_kwargs" not in asked[0] and asked[1]["chat_template_kwargs"] == {"enable_thinking": False}
    assert asked[1]["tools"] == TOOLS and "tools" not in asked[0]
    roles = [message["role"] for message in asked[2]["messages"]]
    assert roles == ["user", "assistant", "user", "assistant", "tool"]
    call = asked[2]["messages"][3]["tool_calls"][0]
    assert (
        json.loads(call["function"]["arguments"]) == {"city": "北京"}
        and asked[2]["messages"][4]["tool_call_id"] == call["id"]
    )


def test_what_can_be_wrong_with_a_server_or_tools(tmp_path, cli, checkpoints):
    (tmp_path / "tools.json").write_text("{", encoding="utf-8")
    with serving([("<html>", 500), ("data: {}\n\n",), ("data: [1]\n\n",), ("data: {nonsense\n\n",)]) as (url, _):
        for said in ("500: <html>", "no chat completion", "no chat completion", "no chat completion"):
            code, _, err = cli("chat", "--server", url, "--prompt", "q")
            assert code == 2 and said in err and "Traceback" not in err, err
        assert "serves no 'mine', but tuned, other" in cli("chat", "mine", "--server", url, "--prompt", "q")[2]
    for arguments, said in (
        (("--server", "http://127.0.0.1:9", "--prompt", "q"), "no server that speaks"),
        (("--server", "nonsense", "--prompt", "q"), "no server that speaks"),
        (("--prompt", "q"), "give a model's directory"),
        ((checkpoints["air"], "--tools", tmp_path / "tools.json"), "--tools"),
        ((checkpoints["air"], "--tools", tmp_path / "none.json"), "--tools"),
    ):
        code, _, err = cli("chat", *arguments)
        assert code == 2 and said in err and "Traceback" not in err, err


def test_what_looks_like_markup_is_said_as_it_is(checkpoints, typing, monkeypatch):
    answers = iter(["\n<tool_call>[/x]\n</tool_call>", "[b]1[/i] :100:"])
    monkeypatch.setattr(ChatModel, "stream", lambda self, prompt, most: iter([next(answers)]))
    code, out, err = typing(["q", "a result", ""], checkpoints["air"])
    assert code == 0 and "[/x]({})" in out and "[b]1[/i] :100:" in out and "result of [/x]> " in err


@pytest.mark.parametrize("prompt", ["", " \n"])
def test_an_empty_prompt_is_one_sentence(checkpoints, typing, prompt):
    code, out, err = typing([], checkpoints["air"], "--prompt", prompt)
    assert code == 2 and "--prompt is empty" in err and "> " not in err and not out
