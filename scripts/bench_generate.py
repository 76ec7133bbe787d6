"""How fast the model in training writes: `python scripts/bench_generate.py MODEL [answers] [tokens]`.

Prints tokens a second by the clock and by this process's CPU time, of answers that all run to their limit. The first pass warms up.
"""

import sys
import time

import torch

from glm45_tune.conversion.stream import open_model
from glm45_tune.layout import Layout
from glm45_tune.mcore import runtime
from glm45_tune.mcore.generate import Writer
from glm45_tune.mcore.load import load_weights
from glm45_tune.mcore.model import GLM45Model
from glm45_tune.rl.engine import Request


def main(path: str, answers: int = 64, tokens: int = 128) -> None:
    source = open_model(path)
    runtime.start(Layout())
    model = GLM45Model(source.spec, Layout())
    load_weights(model, source)
    model.to(runtime.device())
    writer = Writer(model, [source.spec.vocab_size], answers)  # a stop token that no model writes
    prompts = torch.randint(0, 600, (max(answers // 8, 1), 20), generator=torch.Generator().manual_seed(0)).tolist()
    requests = [Request(prompts[number * len(prompts) // answers], tokens) for number in range(answers)]
    for seed in range(4):
        started, cpu = time.perf_counter(), time.process_time()
        count = sum(len(answer.token_ids) for answer in writer.write(requests, seed, 0))
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
        print(f"{count} tokens: {count / seconds:,.0f} a second, {count / cpu:,.0f} a second of CPU time")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
