"""What is said to a vLLM or an SGLang server, and what is heard: token ids in and out, log-probabilities of every token.

Each dialect turns a wish into (path, body) and an answer's JSON into what was wished. A malformed answer raises BadAnswer.
"""

import base64
import math
import re
from dataclasses import replace

import numpy as np

from glm45_tune.rl.engine import Completion, Finish, Request
from glm45_tune.spec import ModelSpec


class BadAnswer(Exception):
    """A server answered, but not what was asked for."""


# a server would take these from the checkpoint's generation_config.json
_ALL_WORDS = {"top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}


class Vllm:
    """vLLM's token-in-token-out endpoint, which wants --enable-scale-out.

    Log-probabilities are at the sampling temperature with --logprobs-mode processed_logprobs.
    """

    health = "/health"

    def generate(self, request: Request, temperature: float, stop_ids: list[int], seed: int, adapter: str | None):
        sampling = {
            "max_tokens": request.max_new_tokens,
            "temperature": temperature,
            **_ALL_WORDS,
            "top_k": 0,
            "stop_token_ids": stop_ids,
            "seed": seed,
            "logprobs": 0,
            "detokenize": False,
        }
        return "/inference/v1/generate", {"token_ids": request.token_ids, "sampling_params": sampling} | _model(adapter)

    def named(self, body: dict, name: str) -> dict:
        """A wish of `generate` under a name by which it can be broken off."""
        return body | {"request_id": name}

    def break_off(self, names: list[str]) -> list[tuple[str, dict]]:
        """What makes the answers under these names come back as they are."""
        return [("/inference/v1/abort_requests", {"request_ids": [f"generate-tokens-{name}" for name in names]})]

    def completion(self, answer: dict, version: int) -> Completion:
        (choice,) = answer["choices"]
        logprobs = [token["logprob"] for token in choice["logprobs"]["content"]]
        experts = read_experts(choice["routed_experts"]) if choice.get("routed_experts") else None
        return Completion(choice["token_ids"], logprobs, _finish(choice["finish_reason"]), version, experts)

    def load_adapter(self, name: str, path: str):
        return "/v1/load_lora_adapter", {"lora_name": name, "lora_path": path}

    def drop_adapter(self, name: str):
        return "/v1/unload_lora_adapter", {"lora_name": name}

    reload = None
    """Reading weights again in place gives wrong log-probabilities on the builds seen, so a server of ours is started anew."""


class Sglang:
    health = "/health"

    def generate(self, request: Request, temperature: float, stop_ids: list[int], seed: int, adapter: str | None):
        sampling = {
            "max_new_tokens": request.max_new_tokens,
            "temperature": temperature,
            **_ALL_WORDS,
            "top_k": -1,
            "stop_token_ids": stop_ids,
            "sampling_seed": seed,
        }
        body = {"input_ids": request.token_ids, "sampling_params": sampling, "return_logprob": True}
        return "/generate", body | ({"lora_path": adapter} if adapter else {})

    def named(self, body: dict, name: str) -> dict:
        return body | {"rid": name}

    def break_off(self, names: list[str]) -> list[tuple[str, dict]]:
        return [("/abort_request", {"rid": name}) for name in names]

    def completion(self, answer: dict, version: int) -> Completion:
        facts = answer["meta_info"]
        finish = _finish(facts["finish_reason"]["type"])
        tokens = [entry[1] for entry in facts["output_token_logprobs"]]
        if "output_ids" in answer and answer["output_ids"] != tokens:
            raise BadAnswer("its token ids and its log-probabilities are of different tokens")
        return Completion(tokens, [entry[0] for entry in facts["output_token_logprobs"]], finish, version)

    def load_adapter(self, name: str, path: str):
        return "/load_lora_adapter", {"lora_name": name, "lora_path": path}

    def drop_adapter(self, name: str):
        return "/unload_lora_adapter", {"lora_name": name}

    @staticmethod
    def reload(directory: str):
        return "/update_weights_from_disk", {"model_path": directory}


def _model(adapter: str | None) -> dict:
    return {"model": adapter} if adapter else {}


def _finish(reason: object) -> Finish:
    return "stop" if reason == "stop" else "length" if reason == "length" else "aborted"


# of a NumPy file: integers, in C's order, with three axes
_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '([<>|][iu][1248])', 'fortran_order': False, "
    rb"'shape': \((\d{1,9}), (\d{1,9}), (\d{1,9})\), ?\} *\n",
    re.DOTALL,
)


def read_experts(text: str) -> np.ndarray:
    """The array in a NumPy file in base64, [tokens, layers, K].

    NumPy's own reader takes a header for Python, and allocates first.
    """
    data = base64.b64decode(text, validate=True)
    header = _HEADER.match(data[:1000])
    if header is None:
        raise BadAnswer(f"its experts are not a NumPy file of integers [tokens, layers, K]: {data[:80]!r}")
    kind, shape = np.dtype(header[1].decode()), tuple(map(int, header.groups()[1:]))
    if math.prod(shape) * kind.itemsize != len(data) - header.end():
        raise BadAnswer(f"its experts are {len(data) - header.end()} bytes, and {kind} {shape} is said")
    return np.frombuffer(data, kind, offset=header.end()).reshape(shape)


def check(completion: Completion, request: Request, stop_ids: list[int], spec: ModelSpec | None = None) -> Completion:
    """The answer, with numbers of the right types.

    Raises BadAnswer where it cannot be what the engine was asked for.

    spec: of the model, where it is known: what token ids and experts there are.
    """
    tokens, logprobs = completion.token_ids, completion.logprobs
    if not isinstance(tokens, list) or len(tokens) != len(logprobs):
        count = len(tokens) if isinstance(tokens, list) else "no"
        raise BadAnswer(f"{count} tokens came with {len(logprobs)} log-probabilities")
    most = spec.vocab_size if spec else math.inf
    if wrong := [token for token in tokens if type(token) is not int or not 0 <= token < most]:
        raise BadAnswer(f"{_short(wrong[0])} is not a token id; those are whole numbers from 0 to below {most}")
    if len(tokens) > request.max_new_tokens:
        raise BadAnswer(f"{len(tokens)} tokens came, and {request.max_new_tokens} were asked for")
    if completion.finish == "length" and len(tokens) != request.max_new_tokens:
        raise BadAnswer(f"{len(tokens)} tokens of {request.max_new_tokens}, though it says the limit ended them")
    if completion.finish == "stop" and (not tokens or tokens[-1] not in stop_ids):
        raise BadAnswer("it says a stop token ended the answer, and the answer's last token is none")
    # vLLM says −9999 where it has none
    if wrong := [value for value in logprobs if type(value) not in (int, float) or not -1000 < value <= 1e-4]:
        raise BadAnswer(f"the log-probability {_short(wrong[0])} is above 0, below −1000 or no number")
    experts = completion.experts
    if experts is not None and spec is not None:
        _check_experts(experts, len(request.token_ids) + len(tokens), spec)
    return replace(
        completion,
        logprobs=[float(value) for value in logprobs],
        experts=None if experts is None else experts.astype(np.int16),
    )


def _check_experts(experts: np.ndarray, num_tokens: int, spec: ModelSpec) -> None:
    """vLLM counts dense layers too."""
    layers = (spec.num_layers - spec.num_dense_layers, spec.num_layers)
    tokens, rows, chosen = experts.shape
    if tokens > num_tokens or rows not in range(layers[0], layers[1] + 1) or chosen != spec.moe_router_topk:
        raise BadAnswer(
            f"its experts are {list(experts.shape)}; at most {num_tokens} tokens, {layers[0]} to {layers[1]} layers and "
            f"{spec.moe_router_topk} experts are expected"
        )
    if experts.size and not (experts.min() >= -1 and experts.max() < spec.num_moe_experts):
        raise BadAnswer(f"an expert is none of the {spec.num_moe_experts}")


def _short(value: object) -> str:
    return repr(value)[:60]


DIALECTS = {"vllm": Vllm(), "sglang": Sglang()}
