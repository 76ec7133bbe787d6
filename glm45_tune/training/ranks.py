"""The ranks of a job that nobody else starts: one process each on this machine."""

import os
import signal
import socket
import subprocess
import sys
import time

from glm45_tune.errors import STOPPED


def start_ranks(arguments: list[str], world_size: int) -> int:
    """Run `python -m glm45_tune ARGUMENTS` once a rank; when one fails the others are ended. Returns its exit code, or 0.

    SIGTERM and SIGUSR1 go on to the ranks, which save and end (see `interruption.py`).
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {**os.environ, "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common.setdefault("OMP_NUM_THREADS", "1")
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "glm45_tune", *arguments], env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        )
        for rank in range(world_size)
    ]

    def pass_on(number: int, frame) -> None:
        for rank in ranks:
            rank.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        return _wait(ranks)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for rank in ranks:
            if rank.poll() is None:
                rank.terminate()
        for rank in ranks:
            try:
                rank.wait(timeout=10)
            except subprocess.TimeoutExpired:
                rank.kill()


def _wait(ranks: list[subprocess.Popen]) -> int:
    while True:
        codes = [rank.poll() for rank in ranks]
        failed = [(number, code) for number, code in enumerate(codes) if code not in (None, 0, STOPPED)]
        if failed:
            number, code = failed[0]
            if code != 2:
                how = f"ended with code {code}" if code > 0 else f"was killed by {signal.Signals(-code).name}"
                print(f"rank {number} {how}; the other ranks are stopped.", file=sys.stderr)
            return code if code > 0 else 1
        if None not in codes:
            return max(codes)
        time.sleep(0.1)
