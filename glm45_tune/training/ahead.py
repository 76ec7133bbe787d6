"""Answers that are written while the trainer updates, and answers that outlive the weights they were begun with.

`rl.staleness` and `rl.extra_prompts` say how much of it there is. A step's answers are begun when the last step has the weights it
trains from, and taken when the step begins; what is then still being written is broken off, keeps its tokens with their
log-probabilities and versions, and goes on with the next weights. An answer is as old as its oldest token.
"""

import contextlib
import queue
import threading
import time
from collections import Counter
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch.distributed as dist

from glm45_tune.data.chat import Sample
from glm45_tune.rl.engine import Request
from glm45_tune.training.engines import ServedEngine, on_first
from glm45_tune.training.prepare import Job
from glm45_tune.training.rollout import Answer, Prompts, seed_of

_LONGEST_END = 30.0  # seconds


@dataclass
class Group:
    """The answers to the prompt of a number; an answer without a finish is still to be written, or to be gone on with."""

    number: int
    answers: list[Answer]

    @property
    def is_whole(self) -> bool:
        return all(answer.finish for answer in self.answers)


class Ahead:
    """Used by all ranks together. What is written is the first rank's, until a step takes it."""

    def __init__(self, job: Job, engine: ServedEngine, prompts: Prompts):
        rl = job.recipe.asked_rl
        self._job, self._rl, self._engine, self._prompts = job, rl, engine, prompts
        self._wanted = job.recipe.train.global_batch_size
        self._bound = rl.staleness * rl.updates_per_rollout  # in versions: each update makes one
        self.is_writing = False
        self.pending: list[int] = []
        """Numbers of the prompts that are under way, or answered and not trained yet; the same on every rank."""
        self._groups: list[Group] = []
        self._counts: Counter = Counter()
        self._step, self._attempt = 0, 0
        self._is_wanted, self._is_closed = threading.Event(), False
        self._orders: queue.SimpleQueue[Future | None] = queue.SimpleQueue()
        self._order: Future | None = None
        if dist.get_rank() == 0:
            # one thread for as long as this lives: a server that it has to start anew would end with it
            threading.Thread(target=self._work, daemon=True).start()

    def start(self, step: int, version: int) -> None:
        """Begin to write the answers of `step`, with the engine's weights, which are `version`, and return."""
        new = self._prompts.take_numbers(max(self._wanted + self._rl.extra_prompts - len(self.pending), 0))
        self.pending, self.is_writing = self.pending + new, True
        if dist.get_rank() == 0:
            self._step, self._attempt = step, 0
            for number in new:
                sample = self._prompts.sample(number)
                self._groups.append(Group(number, [_fresh(sample) for _ in range(self._rl.group_size)]))
            self._renew(version + self._rl.updates_per_rollout)
            self._is_wanted.clear()
            self._begin()

    def take(self, version: int) -> tuple[list[Answer], dict[str, float]]:
        """The answers of the step, group by group, to be trained from weights that are `version`; and what there is to say of them.

        Waits until there are as many groups as the step has prompts, the oldest prompts first. No token is older than the bound.
        """
        answers, self.pending, metrics = on_first(partial(self._take, version))
        self.is_writing = False
        return answers, metrics

    def settle(self) -> None:
        """Wait until all that was begun is written; a step still takes it as before."""
        on_first(lambda: self._order.result() and None)

    def close(self) -> None:
        """Break off what is being written, and wait for that, but not for a server that hangs."""
        self._is_closed = True
        if self._order:
            with contextlib.suppress(Exception):  # nobody waits for these answers any more
                self._order.result(_LONGEST_END)
            self._orders.put(None)

    # -- the first rank's ------------------------------------------------------------------------------------------------------

    def _renew(self, version: int) -> None:
        """Begin anew what will be older than the bound when weights of `version` train on it."""
        for group in self._groups:
            for place, answer in enumerate(group.answers):
                if answer.length and version - answer.oldest > self._bound:
                    group.answers[place] = _fresh(answer.sample)
                    self._counts["too_old"] += 1

    def _take(self, version: int) -> tuple[list[Answer], list[int], dict[str, float]]:
        started = time.perf_counter()
        self._is_wanted.set()
        self._order.result()
        self._renew(version)
        while sum(group.is_whole for group in self._groups) < self._wanted:  # some became too old
            self._begin()
            self._order.result()
        whole = sorted((group for group in self._groups if group.is_whole), key=lambda group: group.number)
        taken = {group.number: group.answers for group in whole[: self._wanted]}
        self._groups = [group for group in self._groups if group.number not in taken]
        answers = [answer for own in taken.values() for answer in own]
        for place, answer in enumerate(answers):
            answer.group = place // self._rl.group_size
        metrics = _ages(answers, version) | {
            "rl/broken_off": self._counts.pop("broken_off", 0),
            "rl/too_old": self._counts.pop("too_old", 0),
            "perf/waited_seconds": time.perf_counter() - started,
        }
        return answers, [group.number for group in self._groups], metrics

    def _begin(self) -> None:
        self._order = Future()
        self._orders.put(self._order)

    def _work(self) -> None:
        """The thread: one order after the other."""
        while (order := self._orders.get()) is not None:
            try:
                order.set_result(self._write())
            except Exception as error:  # raised where the main thread waits
                order.set_exception(error)

    def _write(self) -> None:
        """Write every answer that is not there yet; break off the rest when a step wants its own and has enough."""
        requests, answers, missing = [], [], []
        for group in self._groups:
            first = len(requests)
            for answer in group.answers:
                if not answer.finish:
                    requests.append(self._request(answer))
                    answers.append(answer)
            missing.append(range(first, len(requests)))

        def enough(found) -> bool:
            count = sum(all(number in found for number in group) for group in missing)
            return self._is_closed or (self._is_wanted.is_set() and count >= self._wanted)

        seed = seed_of(self._job, self._step, self._attempt) * 17
        self._attempt += 1
        for answer, completion in zip(answers, self._engine.write(requests, seed, enough), strict=True):
            answer.extend(completion)
            if completion.finish == "broken off":
                is_full = answer.length >= self._rl.max_new_tokens or len(answer.token_ids) >= self._limit
                answer.finish = "length" if is_full else ""
                self._counts["broken_off"] += bool(completion.token_ids)

    @property
    def _limit(self) -> int:
        return self._job.recipe.data.seq_length

    def _request(self, answer: Answer) -> Request:
        return Request(
            answer.token_ids, min(self._rl.max_new_tokens - answer.length, self._limit - len(answer.token_ids))
        )


def _fresh(sample: Sample) -> Answer:
    return Answer(sample, 0, sample.input_ids.tolist())


def _ages(answers: list[Answer], version: int) -> dict[str, float]:
    """How many updates lie between the weights that wrote the tokens and those that train on them; answers of several versions."""
    versions = [np.array(answer.versions)[answer.written] for answer in answers]
    ages = version - np.concatenate(versions)
    return {
        "rl/staleness_mean": float(ages.mean()) if len(ages) else 0.0,
        "rl/staleness_max": int(ages.max(initial=0)),
        "rl/partial_answers": sum(len(np.unique(own)) > 1 for own in versions),
    }
