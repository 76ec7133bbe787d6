"""How fast data becomes samples, and how full rows become.

Run on a CPU: python scripts/bench_data.py [--rows 100000]

Prints ratios of things timed side by side, and the seconds of this machine beside them.
--memory ROWS: memory that building and reading so many rows takes, instead. --swift PYTHON: side by side with ms-swift, whose
Python that is, on the same file, instead.
"""

import argparse
import contextlib
import json
import os
import subprocess
import tempfile
import threading
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


def anonymous(pid: str = "self") -> float:
    """MiB that belong to the process alone, mapped files left out."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:")) / 1024


class Peak:
    """Largest anonymous memory of this process and of one of its workers, looked at five times a second, above `start`.

    It and the rows so far are printed every ten seconds, so that a long measurement that is broken off has said something.
    """

    def __init__(self):
        self.start, self.own, self.worker, self.rows, self._ended = anonymous(), 0.0, 0.0, 0, False
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def counted(self, rows):
        """The same rows, counted as they are taken."""
        for row in rows:
            self.rows += 1
            yield row

    def _watch(self) -> None:
        begun = said = time.monotonic()
        while not self._ended:
            if time.monotonic() - said > 10:
                said = time.monotonic()
                print(
                    f"  {said - begun:.0f} s: {self.rows:,} rows, {self.own:.0f} MiB, a worker {self.worker:.0f}",
                    flush=True,
                )
            self.own = max(self.own, anonymous() - self.start)
            for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
                with contextlib.suppress(OSError, StopIteration):  # it has just ended
                    self.worker = max(self.worker, anonymous(child))
            time.sleep(0.2)

    def end(self) -> tuple[float, float]:
        self._ended = True
        self._thread.join()
        return self.own, self.worker


def memory(count: int, holder: Path, tokenizer) -> None:
    """Build the cache of `count` short rows, then pack and read all of it as training does."""
    from glm45_tune.data import sources
    from glm45_tune.data.packing import pack
    from glm45_tune.data.stream import Stream
    from glm45_tune.recipe import DataConfig

    path = holder / "rows.jsonl"
    write_rows(path, count, 4)
    peak, read_source = Peak(), sources.read_source
    sources.read_source = lambda *where: peak.counted(read_source(*where))
    (corpus, _), seconds = timed(lambda: sources.load_data(DataConfig(train=str(path), eval_ratio=0.01), tokenizer))
    own, worker = peak.end()
    sources.read_source = read_source
    print(
        f"{count:,} rows built in {seconds:.0f} s: peak {own:.0f} MiB above the {peak.start:.0f} before, a worker {worker:.0f} MiB"
    )
    peak = Peak()
    rows = pack(corpus.lengths, 8192)
    tokens = sum(len(corpus.samples[index].input_ids) for index in peak.counted(index for row in rows for index in row))
    print(f"packed and read {tokens:,} tokens: peak {peak.end()[0]:.0f} MiB above the {peak.start:.0f} before")
    stream = Stream(DataConfig(train=str(path), streaming=True), tokenizer, 0)
    peak = Peak()
    while stream.seen.num_rows < min(count, 50_000):
        stream.rows(16)
        peak.rows = stream.seen.num_rows
    stream.close()
    print(f"streamed {stream.seen.num_rows:,} rows: peak {peak.end()[0]:.0f} MiB above the {peak.start:.0f} before")


CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "北京", "days": 2}}}
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {}}}}]
ASK, SAY = {"role": "user", "content": "北京今天天气怎么样?"}, {"role": "assistant", "content": "晴。"}
THINK, RESULT = {**SAY, "reasoning_content": "查过了。"}, {"role": "tool", "content": "晴，21 度"}
KINDS = {
    "an answer": {"messages": [ASK, SAY]},
    "a thought and an answer": {"messages": [ASK, THINK]},
    "two turns with thoughts": {"messages": [ASK, THINK, ASK, THINK]},
    "a system message": {"messages": [{"role": "system", "content": "简短。"}, ASK, SAY]},
    "a call and its result": {
        "messages": [ASK, {"role": "assistant", "content": "", "tool_calls": [CALL]}, RESULT, SAY], "tools": TOOLS
    },
    "a call with content null": {
        "messages": [ASK, {"role": "assistant", "content": None, "tool_calls": [CALL]}, RESULT, SAY], "tools": TOOLS
    },
    "two calls at once": {
        "messages": [ASK, {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]}, RESULT, RESULT, SAY], "tools": TOOLS
    },
    "a thought before a call": {
        "messages": [ASK, {"role": "assistant", "content": "", "reasoning_content": "要查。", "tool_calls": [CALL]}, RESULT, THINK],
        "tools": TOOLS,
    },
}  # fmt: skip


def beside_swift(python: str, count: int, holder: Path, tokenizer, renderer) -> None:
    """`count` plain rows of long-tailed lengths and 20 rows of each of KINDS, through both, one process each."""
    from glm45_tune.data.packing import pack
    from glm45_tune.data.sources import read_source
    from glm45_tune.data.store import StoredSamples, render_all

    path, out = holder / "rows.jsonl", holder / "swift.json"
    write_rows(path, count, 100)
    rows = [json.loads(line) for line in path.open(encoding="utf-8")]
    names = ["plain, long-tailed"] * count + [name for name in KINDS for _ in range(20)]
    rows += [KINDS[name] for name in names[count:]]
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({**row, "number": n}, ensure_ascii=False) + "\n" for n, row in enumerate(rows))
    (faults, _, _), seconds = timed(lambda: render_all(read_source(str(path)), renderer, holder / "ours.arrow", 0))
    samples = StoredSamples.of_file(holder / "ours.arrow")
    packed, packing = timed(lambda: pack(samples.lengths(), 8192))
    fill = samples.lengths().sum() / len(packed) / 8192
    ours = {sample.line - 1: sample.input_ids.tolist() for sample in samples}
    print(
        f"ours: {len(rows) / seconds:,.0f} rows/s, packing {packing:.3f} s, {fill:.3%} filled, {len(faults)} of {len(rows)} rows lost"
    )
    beside = Path(__file__).with_name("bench_data_swift.py")
    command = [python, str(beside), str(holder / "tiny"), str(path), str(out), "8192"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    ended = subprocess.run(command, cwd=holder, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    said = json.loads(ended.stdout.strip().splitlines()[-1])
    print(
        f"ms-swift: {len(rows) / said['seconds']:,.0f} rows/s, packing {said['packing']:.3f} s, {said['fill']:.3%} filled, "
        f"{len(rows) - said['kept']} of {len(rows)} rows lost"
    )
    theirs = {int(number): ids for number, ids in json.loads(out.read_text()).items()}
    for name in dict.fromkeys(names):
        numbers = [number for number, kind in enumerate(names) if kind == name]
        equal = []
        for made in (ours, theirs):
            # what closes the last turn is not the template's; null is no text, which a template would print as None
            ids = {n: _by_template(rows[n], tokenizer) for n in numbers}
            equal.append(sum(made.get(n, [])[: len(ids[n])] == ids[n] for n in numbers))
        print(f"  {name}: ids as the template's {equal[0]}, ms-swift {equal[1]} of {len(numbers)}")
        number = numbers[0]
        if equal[1] < len(numbers):
            print(
                f"    ours     {tokenizer.decode(ours[number])!r}\n    ms-swift {tokenizer.decode(theirs.get(number, []))!r}"
            )


def _by_template(row: dict, tokenizer) -> list[int]:
    messages = [{**message, "content": message["content"] or ""} for message in row["messages"]]
    return tokenizer.apply_chat_template(messages, tools=row.get("tools"), return_dict=False)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--memory", type=int, metavar="ROWS")
    parser.add_argument("--swift", metavar="PYTHON")
    asked = parser.parse_args()

    from glm45_tune.data.chat import ChatRenderer, load_tokenizer
    from glm45_tune.recipe import DataConfig
    from glm45_tune.tiny import checkpoint

    with tempfile.TemporaryDirectory() as holder:
        holder = Path(holder)
        os.environ["GLM45_TUNE_CACHE"] = str(holder)
        checkpoint.write(holder / "tiny")
        tokenizer = load_tokenizer(holder / "tiny")
        renderer = ChatRenderer(tokenizer, DataConfig(train="rows", seq_length=8192))
        if asked.memory:
            memory(asked.memory, holder, tokenizer)
        elif asked.swift:
            beside_swift(asked.swift, asked.rows, holder, tokenizer, renderer)
        else:
            speed(asked.rows, holder, tokenizer, renderer)


def speed(count: int, holder: Path, tokenizer, renderer) -> None:
    from glm45_tune.data.packing import pack
    from glm45_tune.data.sources import load

    lengths = np.clip(np.random.default_rng(0).lognormal(6, 1, 100_000).astype(int), 8, 8192)
    rows, seconds = timed(lambda: pack(lengths, 8192))
    print(f"packing 100,000 into 8192: {lengths.sum() / len(rows) / 8192:.4%} filled, {seconds:.2f} s")
    path = holder / "rows.jsonl"
    for words in (25, 150):
        write_rows(path, 3000, words)
        compare_with_bare(path, tokenizer, renderer)
    write_rows(path, count, 25)
    corpus, first = timed(lambda: load(str(path), renderer))
    (_, again) = timed(lambda: pack(load(str(path), renderer).lengths, 8192))
    print(
        f"{count:,} rows, {int(corpus.lengths.sum()):,} tokens: first start {first:.1f} s, with a warm cache {again:.2f} s "
        "(packing included)"
    )


if __name__ == "__main__":
    main()
