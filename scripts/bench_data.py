"""How fast data becomes samples, and how full rows become. Run on a CPU: python scripts/bench_data.py [--rows 100000]

Prints ratios of things timed side by side, and the seconds of this machine beside them.
"""

import argparse
import json
import os
import resource
import tempfile
import time
from pathlib import Path

import numpy as np


def timed(function):
    started = time.perf_counter()
    result = function()
    return result, time.perf_counter() - started


def write_rows(path: Path, count: int) -> None:
    """Conversations of long-tailed lengths, Chinese and English."""
    rng = np.random.default_rng(0)
    words = "北京 的 天气 怎么样 模型 先 思考 再 回答 the weather function returns a JSON object with city and temperature".split()
    lengths = np.clip(rng.lognormal(3.2, 0.9, count).astype(int), 3, 900)
    with open(path, "w", encoding="utf-8") as file:
        for number, length in enumerate(lengths):
            said = " ".join(rng.choice(words, length))
            answer = {"role": "assistant", "content": said, "reasoning_content": said[: length // 2]}
            row = {"messages": [{"role": "user", "content": f"{number}: {said[:60]}?"}, answer]}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=100_000)
    count = parser.parse_args().rows

    from glm45_tune.data.chat import ChatRenderer, load_tokenizer
    from glm45_tune.data.packing import pack
    from glm45_tune.data.sources import load
    from glm45_tune.recipe import DataConfig
    from glm45_tune.tiny import checkpoint

    lengths = np.clip(np.random.default_rng(0).lognormal(6, 1, 100_000).astype(int), 8, 8192).tolist()
    rows, seconds = timed(lambda: pack(lengths, 8192))
    print(f"packing 100,000 into 8192: {sum(lengths) / len(rows) / 8192:.4%} filled, {seconds:.2f} s")

    with tempfile.TemporaryDirectory() as holder:
        os.environ["GLM45_TUNE_CACHE"] = holder
        path = Path(holder) / "rows.jsonl"
        checkpoint.write(Path(holder) / "tiny")
        tokenizer = load_tokenizer(Path(holder) / "tiny")
        write_rows(path, count)
        renderer = ChatRenderer(tokenizer, DataConfig(train=str(path), seq_length=8192))

        some = [json.loads(line) for line in path.open(encoding="utf-8")][: min(count, 5000)]
        texts = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in some]
        encode = tokenizer.backend_tokenizer.encode
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        for _ in range(2):  # the second time is warm
            ids, bare = timed(lambda: sum(len(encode(text, add_special_tokens=False).ids) for text in texts))
            done, whole = timed(lambda: [renderer.render(row, "x", 1) for row in some])
        tokens = sum(len(sample.input_ids) for rendering in done for sample in rendering.samples)
        print(f"one process: {tokens / whole:,.0f} tokens/s, {(tokens / whole) / (ids / bare):.2f} of the bare tokenizer's")

        corpus, first = timed(lambda: load(str(path), renderer))
        (_, again) = timed(lambda: pack(load(str(path), renderer).lengths.tolist(), 8192))
        total = int(corpus.lengths.sum())
        print(f"{count:,} rows, {total:,} tokens: first start {first:.1f} s, with a warm cache {again:.2f} s (packing included)")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        print(f"peak memory of this process {peak:,.0f} MiB; cache {sum(f.stat().st_size for f in Path(holder, 'data').iterdir()) / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
