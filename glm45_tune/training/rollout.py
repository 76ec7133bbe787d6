"""A rollout: the next prompts, a group of answers to each, what each answer is worth, and what it was worth beside its group."""

import json
import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from glm45_tune.data.chat import Sample, check_messages
from glm45_tune.errors import DataError, UserError
from glm45_tune.rl.advantages import advantages, equal_groups, overlong_penalties
from glm45_tune.rl.engine import Completion, Request
from glm45_tune.rl.rewards import Scores, score
from glm45_tune.rl.sandbox import Gone, ToolWorker, Worker
from glm45_tune.training import signals
from glm45_tune.training.engines import Engine, on_first
from glm45_tune.training.prepare import Job


@dataclass
class Answer:
    """An answer with its prompt: token ids, which of them the model wrote, and what the engine thought of each."""

    sample: Sample
    group: int
    token_ids: list[int]
    written: list[bool] = field(init=False)
    logprobs: list[float] = field(init=False)
    versions: list[int] = field(init=False)
    """Of the weights that wrote each token; −1 where the model did not."""
    experts: np.ndarray | None = None
    finish: str = ""
    version: int = 0
    reward: float = np.nan
    advantage: float = 0.0

    def __post_init__(self):
        self.written = [False] * len(self.token_ids)
        self.logprobs = [0.0] * len(self.token_ids)
        self.versions = [-1] * len(self.token_ids)

    @property
    def length(self) -> int:
        """Tokens that the model wrote."""
        return sum(self.written)

    @property
    def oldest(self) -> int:
        """The oldest version that wrote one of its tokens; its own where none is written."""
        return min((version for version in self.versions if version >= 0), default=self.version)

    def extend(self, completion: Completion) -> None:
        self._add(completion.token_ids, True, completion.logprobs, completion.version)
        self.finish, self.version = completion.finish, completion.version
        self.experts = completion.experts  # of everything so far: the engine read it all

    def hear(self, token_ids: list[int]) -> None:
        """Tokens that are not the model's: a tool's answer."""
        self._add(token_ids, False, [0.0] * len(token_ids), -1)

    def _add(self, token_ids: list[int], is_written: bool, logprobs: list[float], version: int) -> None:
        self.token_ids = self.token_ids + token_ids
        self.written += [is_written] * len(token_ids)
        self.logprobs += logprobs
        self.versions += [version] * len(token_ids)


@dataclass
class Rollout:
    """The answers of a step, the same on every rank; metrics: means and counts to be reported."""

    answers: list[Answer]
    metrics: dict[str, float]


class Prompts:
    """The order of prompts over a whole run, a function of the seed: each epoch is shuffled anew.

    `taken`, and `again`, the numbers of those that were taken and are to be taken once more, are
    all that resume needs.
    """

    def __init__(self, job: Job):
        self._samples, self._seed, self.taken = job.train.samples, job.recipe.train.seed, 0
        self.again: list[int] = []
        self._epoch, self._order = -1, np.empty(0, int)

    def take_numbers(self, count: int) -> list[int]:
        found, self.again = self.again[:count], self.again[count:]
        first, self.taken = self.taken, self.taken + count - len(found)
        return [*found, *range(first, self.taken)]

    def take(self, count: int) -> list[Sample]:
        return [self.sample(number) for number in self.take_numbers(count)]

    def sample(self, number: int) -> Sample:
        epoch, place = divmod(number, len(self._samples))
        if epoch != self._epoch:
            order = np.random.default_rng((self._seed, epoch)).permutation(len(self._samples))
            self._epoch, self._order = epoch, order
        return self._samples[int(self._order[place])]


class Roller:
    """Makes rollouts with an engine. Every method is called by all ranks together."""

    def __init__(self, job: Job, engine: Engine):
        self._job, self._rl, self._engine = job, job.recipe.asked_rl, engine
        self.prompts = Prompts(job)
        is_told, rl = signals.told.is_set, self._rl
        self._workers = [Worker(reward, rl.reward_timeout_seconds, is_told) for reward in rl.rewards]
        self._tools = ToolWorker(rl.tools, rl.tool_timeout_seconds, is_told) if rl.tools else None

    def roll(self, step: int, written: list[Answer] | None = None) -> Rollout:
        """The step's answers with their rewards and advantages; `written`: its first ones, where they are written already."""
        rl, wanted = self._rl, self._job.recipe.train.global_batch_size
        kept: list[Answer] = []
        seen, counts, parts = [], Counter(), {}
        for attempt in range(rl.max_refills + 1 if rl.dynamic_sampling else 1):
            missing = wanted - len(kept) // rl.group_size
            if not missing:
                break
            number = seed_of(self._job, step, attempt)
            answers = (
                written if written and not attempt else self._ask(self.prompts.take(missing), number, rl.group_size)
            )
            self._judge(answers, counts, parts)
            equal = equal_groups(np.array([a.reward for a in answers]), np.array([a.group for a in answers]))
            counts["equal"] += int(equal.sum())
            seen += answers
            kept += [a for a, same in zip(answers, equal) if not (rl.dynamic_sampling and same)]
        for number, answer in enumerate(kept):
            answer.group = number // rl.group_size
        worth = advantages(np.array([a.reward for a in kept]), np.array([a.group for a in kept]), rl.advantage)
        for answer, value in zip(kept, worth):
            answer.advantage = float(value)
        return Rollout(kept, self._metrics(seen, kept, counts, parts))

    def evaluate(self, samples: Sequence[Sample]) -> dict[str, float]:
        """What one answer to each of these prompts is worth; the same draw every time."""
        counts, parts = Counter(), {}
        answers = self._ask(samples, seed_of(self._job, 0, 0) - 1, 1)
        self._judge(answers, counts, parts)
        values = self._metrics(answers, answers, counts, parts)
        kept = ("reward_mean", "reward/", "reward_errors/", "without_reward", "response_tokens_mean", "truncated_share")
        return {f"eval/{name[3:]}": value for name, value in values.items() if name[3:].startswith(kept)}

    def _ask(self, samples: Sequence[Sample], seed: int, group_size: int) -> list[Answer]:
        """A group of answers to each prompt, turn by turn."""
        rl, limit = self._rl, self._job.recipe.data.seq_length
        answers = [
            Answer(sample, group, sample.input_ids.tolist())
            for group, sample in enumerate(samples)
            for _ in range(group_size)
        ]
        under_way = answers
        for turn in range(rl.max_turns):
            room = [(a, min(rl.max_new_tokens - a.length, limit - len(a.token_ids))) for a in under_way]
            requests = [Request(answer.token_ids, left) for answer, left in room if left > 0]
            under_way = [answer for answer, left in room if left > 0]
            if not requests:
                break
            for answer, completion in zip(under_way, self._engine.generate(requests, seed * 17 + turn), strict=True):
                answer.extend(completion)
            under_way = [answer for answer in under_way if answer.finish == "stop"]
            if turn + 1 < rl.max_turns:
                heard = on_first(lambda asked=under_way: [self._hear(answer) for answer in asked])
                heard = [ids if len(a.token_ids) + len(ids) < limit else [] for a, ids in zip(under_way, heard)]
                for answer, token_ids in zip(under_way, heard):
                    answer.hear(token_ids)
                under_way = [answer for answer, token_ids in zip(under_way, heard) if token_ids]
        return answers

    def _hear(self, answer: Answer) -> list[int]:
        """What the tools say to an answer's last turn, as the tokens that follow it in the conversation; nothing ends it."""
        messages, mark = self._messages(answer)
        if not messages:
            return []
        tokenizer = self._job.tokenizer
        thinking = answer.sample.row.get("enable_thinking", self._job.recipe.data.enable_thinking)
        options = {"tokenize": False} if thinking is None else {"tokenize": False, "enable_thinking": thinking}
        before = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
        try:
            start = tokenizer.apply_chat_template(before, **options)
            whole = tokenizer.apply_chat_template(before + messages, add_generation_prompt=True, **options)
        except Exception as error:  # a template is a program: it may raise anything
            raise UserError(
                f"{self._rl.tools}: the checkpoint's template refuses {str(messages)[:200]}: {error!r}"
            ) from error
        if not whole.startswith(start):
            raise UserError(f"{self._rl.tools}: the template cannot render {str(messages)[:200]} behind an answer.")
        token_ids = _encoded(tokenizer, whole[len(start) :], mark)
        # the model wrote the role token itself
        return token_ids[1:] if token_ids[:1] == answer.token_ids[-1:] else token_ids

    def _messages(self, answer: Answer) -> tuple[list[dict], str]:
        """What the tools say, checked, and the mark in whatever there would be a token of its own.

        Nothing ends the answer. Raises UserError where the function raises or gives something else.
        """
        name, sample = f"rl.tools {self._rl.tools}", answer.sample
        try:
            messages = self._tools.ask(self.text(answer, whole=True), sample.row)
        except Gone as gone:
            raise UserError(
                f"{name}: {gone}, asked about {sample.source}:{sample.line}. Catch it, or mend it."
            ) from gone
        wanted = 'a list of messages, such as [{"role": "tool", "content": "text"}], or None is expected'
        if not messages:
            return [], ""
        if not isinstance(messages, list):
            raise UserError(f"{name}: returned {type(messages).__name__} {str(messages)[:80]!r}; {wanted}.")
        try:
            mark = _mark_for(messages)
            checked = check_messages({"messages": _marked(messages, self._job.tokenizer, mark)})
        except DataError as error:
            raise UserError(f"{name}: returned what is no list of messages: {error}; {wanted}.") from None
        return [{key: value for key, value in message.items() if key != "weight"} for message in checked], mark

    def text(self, answer: Answer, whole: bool = False) -> str:
        """What the model wrote (whole: and what it heard), without the token that ended it."""
        first = len(answer.sample.input_ids)
        token_ids = answer.token_ids[first : -1 if answer.finish == "stop" else None]
        written = answer.written[first:]
        kept = token_ids if whole else [token for token, mine in zip(token_ids, written) if mine]
        return self._job.tokenizer.decode(kept, skip_special_tokens=False)

    def _judge(self, answers: list[Answer], counts: Counter, parts: dict[str, list]) -> None:
        """Give every answer its reward, or none where it was aborted or a reward failed."""
        rl = self._rl
        scores: Scores = on_first(lambda: self._score(answers))
        lengths = np.array([answer.length for answer in answers])
        rewards = scores.rewards + overlong_penalties(
            lengths, rl.max_new_tokens, rl.overlong_buffer, rl.overlong_penalty
        )
        for answer, reward in zip(answers, rewards):
            answer.reward = float("nan") if answer.finish in ("aborted", "") else float(reward)
        for name, values in scores.parts.items():
            parts.setdefault(name, []).extend(values)
        counts.update({f"error {kind}": number for kind, number in scores.errors.items()})
        if scores.errors and rl.on_reward_error == "stop":
            kind, message = next(iter(scores.messages.items()))
            raise UserError(f"rl.rewards: {kind} for {scores.errors[kind]} of {len(answers)} answers: {message}")
        if scores.errors and self._is_first:
            for kind, message in scores.messages.items():
                print(f"reward {kind} ({scores.errors[kind]} of {len(answers)} answers): {message}", file=sys.stderr)

    def _score(self, answers: list[Answer]) -> Scores:
        tokenizer = self._job.tokenizer
        prompts = [tokenizer.decode(answer.sample.input_ids, skip_special_tokens=False) for answer in answers]
        columns = [answer.sample.row for answer in answers]
        return score(self._rl.rewards, self._workers, prompts, [self.text(answer) for answer in answers], columns)

    @property
    def _is_first(self) -> bool:
        return os.environ.get("RANK", "0") == "0"

    def _metrics(
        self, seen: list[Answer], kept: list[Answer], counts: Counter, parts: dict[str, list]
    ) -> dict[str, float]:
        lengths = np.array([answer.length for answer in seen])
        rewards = np.array([answer.reward for answer in seen])
        finishes = Counter(answer.finish for answer in seen)
        means = {f"rl/reward/{name}": np.array(values, float) for name, values in parts.items()}
        values = {
            "rl/reward_mean": _mean(rewards),
            **{name: _mean(values) for name, values in means.items()},
            "rl/answers": len(seen),
            "rl/response_tokens_mean": float(lengths.mean()),
            "rl/response_tokens_max": float(lengths.max()),
            "rl/truncated_share": finishes["length"] / len(seen),
            "rl/aborted": finishes["aborted"],
            "rl/without_reward": int(np.isnan(rewards).sum()),
            "rl/equal_groups_share": counts["equal"] / len(seen),
        }
        values |= {
            f"rl/reward_errors/{kind.removeprefix('error ')}": n for kind, n in counts.items() if kind != "equal"
        }
        if self._rl.dynamic_sampling:
            values["rl/kept_share"] = len(kept) / len(seen)
        return values

    def close(self) -> None:
        for worker in [*self._workers, *([self._tools] if self._tools else [])]:
            worker.close()


def _mark_for(messages: list) -> str:
    """A letter of the private use area that the messages do not hold."""
    text = json.dumps(messages, ensure_ascii=False)
    return next(letter for letter in map(chr, range(0xE000, 0xF900)) if letter not in text)


def _marked(messages: list, tokenizer, mark: str) -> list:
    """The messages with a mark inside what would be a token of its own, such as <|user|>."""
    tokens = sorted(filter(None, tokenizer.get_added_vocab()), key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, tokens)))

    def without(value):
        if isinstance(value, str):
            return pattern.sub(lambda found: found[0][0] + mark + found[0][1:], value)
        if isinstance(value, dict):
            return {without(key): without(inner) for key, inner in value.items()}  # arguments of calls too
        return [without(inner) for inner in value] if isinstance(value, list) else value

    return without(messages)


def _encoded(tokenizer, text: str, mark: str) -> list[int]:
    """Token ids; what is marked is plain text, as neither side of a mark is a token of its own."""
    return [token for part in text.split(mark) for token in tokenizer.encode(part, add_special_tokens=False)]


def seed_of(job: Job, step: int, attempt: int) -> int:
    """Of a step's draw from the engine, from its first one on and through its refills."""
    return job.recipe.train.seed * 1_000_003 + step * 101 + attempt


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def as_line(step: int, answer: Answer, text: str, prompt: str) -> str:
    """An answer for samples.jsonl."""
    facts = {"step": step, "prompt": prompt, "completion": text, "reward": answer.reward, "advantage": answer.advantage}
    facts["reward"] = None if np.isnan(answer.reward) else answer.reward
    facts |= {"finish": answer.finish, "version": answer.version}
    facts |= {"oldest_version": answer.oldest} if answer.oldest != answer.version else {}
    return json.dumps(facts, ensure_ascii=False) + "\n"
