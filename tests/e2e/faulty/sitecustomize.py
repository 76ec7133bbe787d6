"""With this folder on PYTHONPATH, one rank fails in one step as FAULT says: RANK:STEP:KIND, STEP counted from 1.

Kinds: raise, sleep, and the signals stop and kill, which the rank sends itself. ONCE names a file that is made at the first
failure, after which there are no more.
"""

import os
import signal
import sys
import time
from pathlib import Path


def _arm() -> None:
    from glm45_tune.training.sft import Supervised

    rank, when, kind = os.environ["FAULT"].split(":")
    once = Path(os.environ["ONCE"]) if "ONCE" in os.environ else None
    train_step = Supervised.train_step

    def faulty(self, step: int):
        if os.environ["RANK"] == rank and step + 1 == int(when) and not (once and once.exists()):
            if once:
                once.touch()
            if kind == "raise":
                raise ValueError("the data of this rank is cursed")
            if kind == "sleep":
                time.sleep(1000)
            os.kill(os.getpid(), {"stop": signal.SIGSTOP, "kill": signal.SIGKILL}[kind])
        return train_step(self, step)

    Supervised.train_step = faulty


# a rank, or the process that ranks are forks of; not the command and not torchrun
if "FAULT" in os.environ and (
    "RANK" in os.environ or any("glm45_tune.training.ranks" in word for word in sys.orig_argv)
):
    _arm()
