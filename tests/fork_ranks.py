"""Runs a script once a rank, its imports paid once: `python fork_ranks.py COUNT SCRIPT ARGUMENTS...`.

The script is imported (what it imports is most of a small test's time), then each rank is a fork that calls its `main(*ARGUMENTS)`.
With cards each rank is a Python of its own: megatron imports FlashAttention-4 where it is installed, and no fork can open a card then.
A rank that fails ends the others, and the end of its output is printed; the exit code is 1.
"""

import gc
import importlib.util
import os
import signal
import sys
import tempfile
import traceback
from pathlib import Path

import torch


def _load(script: str):
    sys.path.insert(0, str(Path(script).parent))
    spec = importlib.util.spec_from_file_location("worker", script)
    worker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(worker)
    return worker


def _become(rank: int, worker, script: str, arguments: list[str], output: Path) -> None:
    log = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(rank)
    code = 1
    try:
        if worker is None:
            os.execv(sys.executable, [sys.executable, __file__, "0", script, *arguments])
        worker.main(*arguments)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main(count: int, script: str, arguments: list[str]) -> int:
    """count 0: this is a rank."""
    if count == 0:
        return _load(script).main(*arguments)
    worker = None if torch.cuda.device_count() else _load(script)
    gc.collect()
    gc.freeze()  # megatron collects garbage at every start; without this each collection walks all of torch
    os.environ["WORLD_SIZE"] = str(count)
    with tempfile.TemporaryDirectory() as logs:
        outputs = [Path(logs) / f"rank{rank}" for rank in range(count)]
        ranks = {}
        for rank, output in enumerate(outputs):
            process = os.fork()
            if process == 0:
                _become(rank, worker, script, arguments, output)
            ranks[process] = rank
        signal.signal(signal.SIGTERM, lambda *_: [os.kill(process, signal.SIGKILL) for process in ranks])
        failed = False
        while ranks:
            process, status = os.wait()
            rank = ranks.pop(process)
            if status and not failed:
                failed = True
                print(f"rank {rank} of {count} ended with {status}:\n{outputs[rank].read_text()[-4000:]}", flush=True)
                for process in ranks:
                    os.kill(process, signal.SIGKILL)
        if not failed:
            print(outputs[0].read_text(), end="")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2], sys.argv[3:]))
