"""A conversion that takes its time, run by test_crash_safe.py in processes that are killed."""

import json
import os
import sys
import time

from glm45_tune.conversion import blocks, mcore_files, stream

SMALL = 300_000  # bytes a file: some ten files of the tiny checkpoint, so that there is a middle


def convert_small(model, output, to, **how):
    """The command, with small files."""
    source = stream.open_model(model)
    mcore_files.MAX_FILE_BYTES = SMALL
    if to == "mcore":
        stream.to_mcore(source, output, "gpt", **how)
    else:
        stream.to_hf(source, output, max_shard_bytes=SMALL, **how)


def convert_slowly(model, output, to, pause, **how):
    """The same, resting before each read."""
    read_into = blocks.InputFile.read_into

    def rest(*where):
        time.sleep(pause)
        read_into(*where)

    blocks.InputFile.read_into = rest
    convert_small(model, output, to, **how)


def main() -> None:
    """Start conversions as they are asked for, a line of JSON each, in forks of this process; answer with their ids."""
    for line in sys.stdin:
        if not (pid := os.fork()):
            arguments, how = json.loads(line)
            convert_slowly(*arguments, **how)
            os._exit(0)
        print(pid, flush=True)
        os.waitpid(pid, 0)
        print("ended", flush=True)


if __name__ == "__main__":
    main()
