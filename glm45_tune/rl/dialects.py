"""What is said to a vLLM or an SGLang server, and what is heard: token ids in and out, log-probabilities of every token.

Each dialect turns a wish into (path, body) and an answer's JSON into what was wished. A malformed answer raises BadAnswer.
"""

import base64
import io

import numpy as np

from glm45_tune.rl.engine import Completion, Request


class BadAnswer(Exception):
    """A server answered, but not what was asked for."""


# a server would take these from the checkpoint's generation_config.json
_ALL_WORDS = {"top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}


class Vllm:
    """vLLM's token-in-token-out endpoint, which wants --enable-scale-out. Log-probabilities are at the sampling temperature with

    --logprobs-mode processed_logprobs.
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
        experts = None
        if choice.get("routed_experts"):
            experts = np.load(io.BytesIO(base64.b64decode(choice["routed_experts"])), allow_pickle=False).astype(
                np.int16
            )
        finish = {"stop": "stop", "length": "length"}.get(choice["finish_reason"], "aborted")
        return Completion(choice["token_ids"], logprobs, finish, version, experts)

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
        finish = {"stop": "stop", "length": "length"}.get(facts["finish_reason"]["type"], "aborted")
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


def check(completion: Completion, request: Request, stop_ids: list[int]) -> None:
    """Raise BadAnswer where an answer cannot be what the engine was asked for."""
    count = len(completion.token_ids)
    if count != len(completion.logprobs):
        raise BadAnswer(f"{count} tokens came with {len(completion.logprobs)} log-probabilities")
    if completion.finish == "length" and count != request.max_new_tokens:
        raise BadAnswer(f"{count} tokens of {request.max_new_tokens}, though it says the limit ended them")
    if completion.finish == "stop" and (not count or completion.token_ids[-1] not in stop_ids):
        raise BadAnswer("it says a stop token ended the answer, and the answer's last token is none")
    if not all(-1000 < logprob <= 1e-4 for logprob in completion.logprobs):  # vLLM says −9999 where it has none
        raise BadAnswer("a log-probability is above 0, below −1000 or no number")


DIALECTS = {"vllm": Vllm(), "sglang": Sglang()}
