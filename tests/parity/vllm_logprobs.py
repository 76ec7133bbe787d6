"""Run in .venv-vllm: log-probabilities of given tokens by a real vLLM. Arguments: model directory, input JSON, output JSON."""

import json
import os
import sys
from pathlib import Path


def main(directory: str, asked: str, output: str) -> None:
    from vllm import LLM, SamplingParams, TokensPrompt

    llm = LLM(model=directory, enforce_eager=True, dtype="float32", max_model_len=256, seed=0)
    prompts = json.loads(Path(asked).read_text())
    results = llm.generate(
        [TokensPrompt(prompt_token_ids=ids) for ids in prompts],
        SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0),
    )
    found = [
        [position[token].logprob for token, position in zip(ids[1:], result.prompt_logprobs[1:])]
        for ids, result in zip(prompts, results)
    ]
    with open(output, "w") as file:
        json.dump(found, file)
        file.flush()
    os._exit(0)  # this build aborts while it tears its threads down; whoever started us ends its helpers


if __name__ == "__main__":
    main(*sys.argv[1:])
