"""Who writes the answers of a rollout, as the training ranks see it: every rank asks, every rank gets every answer."""

import shutil
import tempfile
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch.distributed as dist

from glm45_tune.conversion.adapter import Merged, write_peft_of
from glm45_tune.conversion.stream import to_hf
from glm45_tune.conversion.views import InFp32
from glm45_tune.errors import UserError
from glm45_tune.mcore.generate import Writer
from glm45_tune.mcore.live import LiveModel, LiveTensors, on_first_rank
from glm45_tune.mcore.step import Trainer
from glm45_tune.redaction import redacted_text
from glm45_tune.rl.engine import Completion, Request
from glm45_tune.rl.servers import Servers
from glm45_tune.training import signals
from glm45_tune.training.prepare import Job

PROBES, PROBE_TOKENS = 4, 32


class Engine(Protocol):
    def generate(self, requests: list[Request], seed: int) -> list[Completion]:
        """An answer to each request, from the weights last synchronised."""

    def synchronise(self, version: int) -> None:
        """From now on write with the trainer's weights as they stand, which are `version`."""

    def metrics(self) -> dict[str, float]:
        """What there is to say of a step."""

    def close(self) -> None:
        """Called once, at the end."""


class LocalEngine:
    """The training ranks themselves: each data-parallel rank writes its share, with the weights in training."""

    def __init__(self, job: Job, trainer: Trainer):
        rl = job.recipe.asked_rl
        self._trainer, self._version = trainer, 0
        stops = job.source.spec.eos_token_ids
        self._writer = Writer(trainer.module[0], stops, rl.engine.concurrency, rl.router_replay == "engine")

    def generate(self, requests: list[Request], seed: int) -> list[Completion]:
        rank, size = self._trainer.data_parallel_rank, self._trainer.data_parallel_size
        own = self._writer.write(requests[rank::size], seed * size + rank, self._version)
        shares = self._trainer.gather(own)
        found: list = [None] * len(requests)
        for number, share in enumerate(shares):
            found[number::size] = share
        return found

    def synchronise(self, version: int) -> None:
        self._version = version

    def metrics(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        pass


class ServedEngine:
    """Servers that the first rank speaks to, see `rl/servers.py`. Every new set of weights is tried: the trainer scores a few answers."""

    def __init__(self, job: Job, trainer: Trainer):
        recipe, spec = job.recipe, job.source.spec
        self._job, self._trainer, self._config = job, trainer, recipe.asked_rl.engine
        self._version: int | None = None
        self._home = job.run / "engine"
        self._gap = 0.0
        prompt = job.train.samples[0].input_ids.tolist()
        self._probe = Request(
            prompt, min(PROBE_TOKENS, recipe.asked_rl.max_new_tokens, recipe.data.seq_length - len(prompt))
        )
        if dist.get_rank() == 0:
            shutil.rmtree(self._home, ignore_errors=True)
            self._home.mkdir()
            stops, log = list(spec.eos_token_ids), self._home / "server.log"
            is_told = signals.told.is_set
            self._servers = Servers(
                self._config, recipe.model.path, recipe.asked_rl.temperature, stops, log, spec, is_told
            )

    def generate(self, requests: list[Request], seed: int) -> list[Completion]:
        return on_first(lambda: self._servers.generate(requests, seed, self._version))

    def write(self, requests: list[Request], seed: int, enough: Callable[[Collection[int]], bool]) -> list[Completion]:
        """As `generate`, on the first rank alone and from any thread; `enough` as `Servers.generate` has it."""
        return self._servers.generate(requests, seed, self._version, enough)

    def synchronise(self, version: int) -> None:
        if version == self._version:
            return
        directory = self._home / f"weights_{version}"
        on_first_rank(self._trainer.module, partial(self._write, directory))
        for anew in (False, True):
            on_first(partial(self._give, directory, version, anew))
            url, self._gap = self._tried()
            if self._gap <= self._config.probe_tolerance:
                break
            if anew or self._config.urls:
                raise UserError(
                    f"rl.engine {redacted_text(url)}: gives log-probabilities {self._gap:.4f} from the trainer's on the mean of its own answers "
                    f"(rl.engine.probe_tolerance {self._config.probe_tolerance}): it serves another model or older weights, computes "
                    "otherwise, or leaves the temperature out."
                )
        self._version = version

    def metrics(self) -> dict[str, float]:
        faults = on_first(lambda: dict(self._servers.faults))
        return {"rl/sync_gap": self._gap} | {f"rl/engine_faults/{kind}": count for kind, count in faults.items()}

    def close(self) -> None:
        on_first(self._stop)

    def _stop(self) -> None:
        self._servers.stop()
        for directory in self._home.glob("weights_*"):
            shutil.rmtree(directory)

    def _write(self, directory: Path, live: LiveTensors) -> None:
        """The weights in training as a directory: the adapter alone, or a whole model."""
        recipe, source = self._job.recipe, self._job.source
        base = InFp32(source) if recipe.model.params_dtype == "fp32" else source  # served as it is trained
        if recipe.lora is None:
            to_hf(LiveModel(base, live), directory, verify=False, workers=1, kept=True)
        elif self._config.sync == "lora":
            write_peft_of(live, recipe.lora, source, directory)
        else:
            with tempfile.TemporaryDirectory(prefix="glm45_tune_") as holder:
                write_peft_of(live, recipe.lora, source, Path(holder) / "adapter")
                to_hf(Merged(base, Path(holder) / "adapter"), directory, verify=False, kept=True)

    def _give(self, directory: Path, version: int, anew: bool) -> None:
        """Give the servers the weights; anew: by starting the server of ours again."""
        if anew:
            self._servers.faults["weights not taken"] += 1
        if self._config.sync == "lora":
            if anew:
                self._servers.stop()
            self._servers.load_adapter(f"weights_{version}", directory)
        else:
            self._servers.load_directory(directory, anew)
        for old in self._home.glob("weights_*"):
            if old != directory:
                shutil.rmtree(old)

    def _tried(self) -> tuple[str, float]:
        """(URL, mean difference of log-probabilities) of the server that is furthest from the trainer, on answers of its own."""
        prompt = self._probe.token_ids
        gaps = {}
        for url, answers in on_first(lambda: self._servers.probe(self._probe, PROBES)).items():
            scored = [self._trainer.score(prompt + answer.token_ids)[len(prompt) - 1 :] for answer in answers]
            found = [np.abs(np.array(ours) - answer.logprobs) for ours, answer in zip(scored, answers)]
            gaps[url] = float(np.concatenate(found).mean())
        return max(gaps.items(), key=lambda item: item[1])


def on_first(work: Callable[[], object]) -> object:
    """What the first rank makes of `work()`, on every rank. What it raises is raised on every rank."""
    box: list = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = work()
        except Exception as error:  # raised on every rank, once all have it
            box[1] = error
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    return box[0]
