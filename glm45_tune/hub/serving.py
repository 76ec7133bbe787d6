"""How a GLM-4.5 is served: the commands for vLLM and SGLang, and the cards that its makers name. docs/serving.md tells more."""

import json
import shlex
from dataclasses import dataclass

from glm45_tune.quoting import path_argument, shell
from glm45_tune.spec import ModelSpec

PARSERS = "--tool-call-parser glm45 --reasoning-parser glm45"
# vLLM 0.32's glm45 parser otherwise lets the model write calls only as GLM-4.7 does, without line ends, and spoils their arguments
VLLM_ENV = "VLLM_ENFORCE_STRICT_TOOL_CALLING=0"

# (layers, is FP8) → the release and what its makers' README (zai-org/GLM-4.5) says it runs on: H100 and H200, and for 128K
CARDS = {
    (92, False): ("GLM-4.5", "BF16", (16, 8), (32, 16)),
    (92, True): ("GLM-4.5", "FP8", (8, 4), (16, 8)),
    (46, False): ("GLM-4.5-Air", "BF16", (4, 2), (8, 4)),
    (46, True): ("GLM-4.5-Air", "FP8", (2, 1), (4, 2)),
}


@dataclass(frozen=True)
class Serving:
    """What a model card says about serving one model."""

    vllm: str
    sglang: str
    ask: str
    cards: str


def serving(name: str, spec: ModelSpec, is_fp8: bool, speculate: bool) -> Serving:
    """The commands for a model called `name`. speculate: with its MTP layer as the drafter."""
    _, _, (h100, _), _ = CARDS.get((spec.num_layers, is_fp8), ("", "", (1, 1), None))
    served = name.rpartition("/")[2].lower()
    path = path_argument(name)
    as_served = f"--served-model-name{'=' if served.startswith('-') else ' '}{shell(served)}"
    vllm = [
        f"{VLLM_ENV} vllm serve {path} {as_served}",
        *([f"--tensor-parallel-size {h100}"] if h100 > 1 else []),
    ]
    vllm += [f"{PARSERS} --enable-auto-tool-choice"]
    sglang = [f"python -m sglang.launch_server --model-path {path} {as_served}"]
    sglang += [f"--tp-size {h100}"] * (h100 > 1) + [PARSERS, "--port 8000"]
    if speculate:
        vllm += ["""--speculative-config '{"method": "mtp", "num_speculative_tokens": 1}'"""]
        sglang += ["--speculative-algorithm EAGLE --speculative-num-steps 3"]
        sglang += ["--speculative-eagle-topk 1 --speculative-num-draft-tokens 4"]
    question = f'{{\n  "model": {json.dumps(served, ensure_ascii=not served.isprintable())},\n'
    question += '  "messages": [{"role": "user", "content": "你好"}]\n}'
    ask = f"curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' -d {shlex.quote(question)}"
    return Serving(_lines(vllm), _lines(sglang), ask, _cards(spec, is_fp8))


def _lines(parts: list[str]) -> str:
    return " \\\n    ".join(parts)


def _cards(spec: ModelSpec, is_fp8: bool) -> str:
    known = CARDS.get((spec.num_layers, is_fp8))
    if known is None:
        return "It is small enough for any machine that these servers run on."
    release, precision, (h100, h200), (long_h100, long_h200) = known
    return (
        f"Its makers run {release} in {precision} on {h100} × H100 or {h200} × H200, and with its whole context of 128K on "
        f"{long_h100} × H100 or {long_h200} × H200. More than 8 cards are several hosts."
    )
