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


def write_rows(path: Path, count: int, words_a_row: float) -> None:
    """Conversations of long-tailed lengths around `words_a_row`, Chinese and English."""
    rng = np.random.default_rng(0)
    vocabulary = "北京 的 天气 怎么样 模型 先 思考 再 回答 the weather function returns a JSON object with city and temperature".split()
    lengths = np.clip(rng.lognormal(np.log(words_a_row), 0.9, count).astype(int), 3, 1200)
    with open(path, "w", encoding="utf-8") as file:
        for number, length in enumerate(lengths):
            said = " ".join(rng.choice(vocabulary, length))
            answer = {"role": "assistant", "content": said, "reasoning_content": said[: length // 2]}
            row = {"messages": [{"role": "user", "content": f"{number}: {said[:60]}?"}, answer]}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def compare_with_bare(path: Path, tokenizer, renderer) -> None:
    """Our samples against the bare tokenizer on the same strings, one process, in turns."""
    rows = [json.loads(line) for line in path.open(encoding="utf-8")]
    texts = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in rows]
    encode = tokenizer.backend_tokenizer.encode
    ours, bare = [], []
    for _ in range(3):
        count, seconds = timed(lambda: sum(len(encode(text, add_special_tokens=False).ids) for text in texts))
        bare.append(seconds)
        ours.append(timed(lambda: [renderer.render(row, "x", 1) for row in rows])[1])
    ratio = sorted(b / o for b, o in zip(bare, ours))[1]
    print(
        f"one process, {count / len(rows):.0f} tokens a row: {count / min(ours):,.0f} tokens/s, {ratio:.2f} of the bare tokenizer's"
    )


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
        renderer = ChatRenderer(tokenizer, DataConfig(train=str(path), seq_length=8192))
        for words in (25, 150):
            write_rows(path, 3000, words)
            compare_with_bare(path, tokenizer, renderer)
        write_rows(path, count, 25)
        corpus, first = timed(lambda: load(str(path), renderer))
        (_, again) = timed(lambda: pack(load(str(path), renderer).lengths.tolist(), 8192))
        total = int(corpus.lengths.sum())
        print(
            f"{count:,} rows, {total:,} tokens: first start {first:.1f} s, with a warm cache {again:.2f} s (packing included)"
        )
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        print(
            f"peak memory of this process {peak:,.0f} MiB; cache {sum(f.stat().st_size for f in Path(holder, 'data').iterdir()) / 2**20:.0f} MiB"
        )


if __name__ == "__main__":
    main()
