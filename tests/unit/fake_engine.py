"""A server that speaks as vLLM or SGLang does over a tiny model, and misbehaves when it is told to.

The model is in the test's own process (`Backend`), which has torch and transformers already; the server that is started, dies and
hangs is this file, run as a script: it passes requests on. Arguments: the backend's URL, dialect, model directory, port, and a file
of orders, read at every request: one word, or nothing. An answer with a name is written token by token, and can be broken off; under
the order "slow PLACE TOKEN" one to a prompt with that token at that place takes long over each of its own.
"""

import json
import os
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Handler(BaseHTTPRequestHandler):
    """A POST of JSON is given to `server.reply(path, body)`, which returns what is to be answered."""

    def do_GET(self):
        self._answer(200, {})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self._answer(200, self.server.reply(self.path, body))

    def _answer(self, status: int, document: dict) -> None:
        data = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


class Backend:
    """Models by directory, asked one at a time. Used as a context manager; `url` is where it listens."""

    def __init__(self):
        self._models, self._lock = {}, threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.reply = self._reply
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def _reply(self, path: str, body: dict) -> dict:
        import torch
        import transformers

        with self._lock, torch.no_grad():
            if path == "/load":  # the files are gone when the next ones come
                load = transformers.Glm4MoeForCausalLM.from_pretrained
                self._models[body["model"]] = load(body["model"], dtype=torch.float32).eval()
                return {}
            model, ids, temperature = self._models[body["model"]], body["ids"], body["temperature"]
            generator = torch.Generator().manual_seed(body["seed"])
            tokens, logprobs = [], []
            while len(tokens) < body["count"]:
                logps = (model(torch.tensor([ids + tokens])).logits[0, -1] / temperature).log_softmax(0)
                tokens.append(int(torch.multinomial(logps.exp(), 1, generator=generator)))
                logprobs.append(logps[tokens[-1]].item())
                if tokens[-1] in body["stops"]:
                    return {"tokens": tokens, "logprobs": logprobs, "finish": "stop"}
            return {"tokens": tokens, "logprobs": logprobs, "finish": "length"}


def main(backend: str, dialect: str, model: str, port: int, orders: Path) -> None:
    state = {"model": model}
    broken_off: set[str] = set()

    def ask(path: str, body: dict) -> dict:
        request = urllib.request.Request(
            backend + path, json.dumps(body | state).encode(), {"Content-Type": "application/json"}
        )
        return json.loads(urllib.request.urlopen(request).read())

    def reply(path: str, body: dict) -> dict:
        try:
            order = orders.read_text().strip()
            if order in ("die", "hang"):
                orders.unlink()
        except FileNotFoundError:  # none, or another request's
            order = ""
        if order == "die":
            os._exit(9)
        if order == "hang":
            time.sleep(3600)
        return (vllm if dialect == "vllm" else sglang)(path, body, order)

    def write(ids: list[int], count: int, stops: list[int], draw: dict, name: str | None, order: str) -> dict:
        if name is None:
            return ask("/write", {"ids": ids, "count": count, "stops": stops, **draw})
        written = {"tokens": [], "logprobs": [], "finish": "length"}
        place, token = map(int, order.split()[1:]) if order.startswith("slow") else (0, -1)
        while len(written["tokens"]) < count:
            if name in broken_off:
                return written | {"finish": "abort"}
            time.sleep(0.5 * (ids[place] == token))
            wish = {
                "ids": ids + written["tokens"],
                "count": 1,
                "stops": stops,
                "seed": draw["seed"] + len(written["tokens"]),
            }
            one = ask("/write", draw | wish)
            written["tokens"] += one["tokens"]
            written["logprobs"] += one["logprobs"]
            if one["finish"] == "stop":
                return written | {"finish": "stop"}
        return written

    def vllm(path: str, body: dict, order: str) -> dict:
        if path == "/inference/v1/abort_requests":
            broken_off.update(name.removeprefix("generate-tokens-") for name in body["request_ids"])
            return {}
        wish, ids = body["sampling_params"], body["token_ids"]
        draw = _draw(wish, "seed")
        written = write(ids, wish["max_tokens"], wish["stop_token_ids"], draw, body.get("request_id"), order)
        tokens = written["tokens"][: -1 if order == "short" else None]
        content = [
            {"token_id": token, "logprob": value} for token, value in zip(written["tokens"], written["logprobs"])
        ]
        return {
            "choices": [{"token_ids": tokens, "logprobs": {"content": content}, "finish_reason": written["finish"]}]
        }

    def sglang(path: str, body: dict, order: str) -> dict:
        if path == "/update_weights_from_disk":
            if order != "stale":
                state["model"] = body["model_path"]
                ask("/load", {})
            return {"success": True}
        if path == "/abort_request":
            broken_off.add(body["rid"])
            return {}
        wish, ids = body["sampling_params"], body["input_ids"]
        count, stops = wish["max_new_tokens"], wish["stop_token_ids"]
        written = write(ids, count, stops, _draw(wish, "sampling_seed"), body.get("rid"), order)
        entries = [[value, token, None] for token, value in zip(written["tokens"], written["logprobs"])]
        facts = {"output_token_logprobs": entries, "finish_reason": {"type": written["finish"]}}
        return {"output_ids": written["tokens"], "meta_info": facts}

    ask("/load", {})
    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.reply = reply
    server.serve_forever()


def _draw(wish: dict, seed: str) -> dict:
    return {"temperature": wish["temperature"], "seed": wish[seed]}


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), Path(sys.argv[5]))
