"""The model in training writes: many answers side by side, with the keys and values of what stands before in memory.

The same modules compute as in training, under tensor and expert parallelism (not pipeline or context): a prompt is one document of
a packed row, and then every answer under way is a row of one token.

Shapes: B answers under way, S places for tokens of each, G key/value heads of this tensor rank, D head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region, gather_from_tensor_model_parallel_region

from glm45_tune.mcore import runtime
from glm45_tune.mcore.layers.attention import PackedRow, packed_attention
from glm45_tune.mcore.layers.router import Replay, Router
from glm45_tune.mcore.model import GLM45Model
from glm45_tune.rl.engine import Completion, Request


class Cache:
    """Keys and values of every attention layer, [B, S, G, D] each, and how far each answer is."""

    def __init__(self, num_answers: int, places: int):
        self.places = places
        self.lengths = torch.zeros(num_answers, dtype=torch.int64, device=runtime.device())
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._row: PackedRow | None = None

    def read(self, bounds: list[int]) -> None:
        """What comes next are the prompts, a packed row with these edges; one behind them is tensor ranks' padding."""
        self._row = PackedRow(bounds, self.lengths.device)
        self.lengths = torch.tensor(bounds).diff()[: len(self.lengths)].to(self.lengths.device)

    def write(self) -> None:
        """What comes next is one more token of every answer."""
        self._row = None
        self._answers = torch.arange(len(self.lengths), device=self.lengths.device)
        self._visible = torch.arange(self.places, device=self.lengths.device) <= self.lengths.unsqueeze(1)
        self._used = int(self.lengths.max()) + 1

    def grow(self) -> None:
        self.lengths = (self.lengths + 1).clamp(max=self.places - 1)

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """query [T, H, D], key and value [T, G, D] of new tokens → [T, H, D]."""
        if layer not in self._layers:
            shape = (len(self.lengths), self.places, *key.shape[1:])
            self._layers[layer] = key.new_zeros(shape), value.new_zeros(shape)
        keys, values = self._layers[layer]
        if self._row is not None:
            inside = self._row.document
            held = inside < len(self.lengths)
            keys[inside[held], self._row.place[held]] = key[held]
            values[inside[held], self._row.place[held]] = value[held]
            return packed_attention(query, key, value, self._row)
        keys[self._answers, self.lengths], values[self._answers, self.lengths] = key, value
        k, v = (x[:, : self._used].transpose(1, 2) for x in (keys, values))
        mask = self._visible[:, None, None, : self._used]
        # the heads of a group see the same keys, as queries of one head would
        grouped = query.unflatten(1, (k.shape[1], -1))
        return F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask).flatten(1, 2)

    def take(self, index: torch.Tensor) -> None:
        """Keep these answers, in this order; one may be taken several times."""
        self.lengths = self.lengths[index]
        self._layers = {layer: (k[index], v[index]) for layer, (k, v) in self._layers.items()}


@dataclass
class _Answer:
    """One answer under way. experts: arrays [tokens read, layers, K], where they are recorded."""

    request: Request
    tokens: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    experts: list[np.ndarray] = field(default_factory=list)
    finish: str | None = None

    def add(self, token: int, logp: float, is_stop: bool) -> None:
        self.tokens.append(token)
        self.logps.append(logp)
        if is_stop or len(self.tokens) == self.request.max_new_tokens:
            self.finish = "stop" if is_stop else "length"

    def completion(self, version: int) -> Completion:
        experts = np.concatenate(self.experts) if self.experts else None
        return Completion(self.tokens, self.logps, self.finish, version, experts)


class Writer:
    """Writes with a rank's model. Called by all ranks together; each data-parallel rank brings requests of its own, or none."""

    def __init__(self, model: GLM45Model, stop_ids: Sequence[int], concurrency: int, records_routing: bool = False):
        self._model, self._concurrency, self._records = model, concurrency, records_routing
        self._stops = torch.tensor(sorted(stop_ids), device=runtime.device())
        self._tp = parallel_state.get_tensor_model_parallel_group()
        self._routers = [module for module in model.modules() if isinstance(module, Router)]

    @torch.no_grad()
    def write(self, requests: list[Request], seed: int, version: int) -> list[Completion]:
        """An answer to each request, drawn by the seed; version: of the weights, noted in every answer."""
        was_training = self._model.training
        self._model.eval()
        for router in self._routers:
            router.router_replay = Replay() if self._records else None
        generator = torch.Generator(runtime.device()).manual_seed(seed)
        # those alike are neighbours, so that their prompt is read once
        order = sorted(range(len(requests)), key=lambda number: requests[number].token_ids)
        found: list[Completion | None] = [None] * len(requests)
        size = self._concurrency
        for wave in range(-(-self._most(len(requests)) // size)):
            numbers = order[wave * size : (wave + 1) * size]
            with (
                torch._C.DisableTorchFunction()
            ):  # the CPU mode's turn of every torch call: a forward has none that needs it
                answers = self._wave([requests[number] for number in numbers], generator)
            for number, answer in zip(numbers, answers):
                found[number] = answer.completion(version)
        for router in self._routers:
            router.router_replay = None
        self._model.train(was_training)
        return found

    def _most(self, count: int) -> int:
        """The largest of all ranks' numbers: experts are spread over ranks that must all take part."""
        value = torch.tensor(count, device=runtime.device())
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return int(value)

    def _wave(self, requests: list[Request], generator: torch.Generator) -> list[_Answer]:
        """Answers of requests that are under way together. A rank without any goes along with one row that nobody reads."""
        prompts = list(dict.fromkeys(tuple(request.token_ids) for request in requests)) or [(int(self._stops[0]),)]
        places = max((len(request.token_ids) + request.max_new_tokens for request in requests), default=2)
        cache = Cache(len(prompts), places)
        logits, experts = self._read(prompts, cache)
        answers = [_Answer(request) for request in requests]
        prompt_of = [prompts.index(tuple(request.token_ids)) for request in requests]
        for answer, prompt in zip(answers, prompt_of):
            answer.experts += [experts[prompt]] if self._records else []
        rows: list[_Answer | None] = list(answers) or [None]
        index = self._even(prompt_of or [0])
        cache.take(index)
        logits = logits[index]
        while True:
            tokens, logps = draw(logits, generator)
            values = zip(rows, tokens.tolist(), logps.tolist(), torch.isin(tokens, self._stops).tolist())
            for answer, token, logp, is_stop in values:
                if answer is not None:
                    answer.add(token, logp, is_stop)
            rows = [answer if answer is not None and answer.finish is None else None for answer in rows]
            under_way = [place for place, answer in enumerate(rows) if answer is not None]
            if not self._most(len(under_way)):
                return answers
            if 2 * len(under_way) <= len(rows) and len(rows) > 1:
                rows = [rows[place] for place in under_way] or [None]
                index = self._even(under_way or [0])
                cache.take(index)
                tokens = tokens[index]
            logits, experts = self._step(tokens, cache)
            for answer, chosen in zip(rows, experts):
                if answer is not None:
                    answer.experts.append(chosen[None])

    def _even(self, index: list[int]) -> torch.Tensor:
        """With the first one repeated behind the last, as tensor ranks cut rows evenly."""
        return torch.tensor(index + index[:1] * (-len(index) % self._tp.size()), device=runtime.device())

    def _read(self, prompts: list[tuple[int, ...]], cache: Cache) -> tuple[torch.Tensor, list[np.ndarray]]:
        """Prompts into the cache → logits behind each [prompts, words], and where they are recorded the experts of its tokens."""
        bounds = np.cumsum([0, *map(len, prompts)]).tolist()
        positions = np.concatenate([np.arange(len(prompt)) for prompt in prompts])
        padding = -bounds[-1] % self._tp.size()
        tokens = torch.tensor([token for prompt in prompts for token in prompt] + [0] * padding)
        positions = torch.from_numpy(np.concatenate([positions, np.arange(padding)]))
        edges = [*bounds, bounds[-1] + padding] if padding else bounds
        cache.read(edges)
        logits, experts = self._forward(tokens, positions, edges, cache, torch.tensor(bounds[1:]) - 1)
        return logits, [experts[a:b] for a, b in zip(bounds, bounds[1:])] if self._records else []

    def _step(self, tokens: torch.Tensor, cache: Cache) -> tuple[torch.Tensor, np.ndarray]:
        """One more token of every row → logits behind them [rows, words], and their experts [rows, layers, K]."""
        cache.write()
        logits, experts = self._forward(tokens, cache.lengths, [0, len(tokens)], cache, None)
        cache.grow()
        return logits, experts

    def _forward(self, tokens, positions, bounds, cache: Cache, wanted: torch.Tensor | None):
        device = runtime.device()
        logits = self._model(tokens.to(device), positions.to(device), bounds, cache=cache)
        logits = logits if wanted is None else logits[wanted.to(device)]
        logits = gather_from_tensor_model_parallel_region(logits, group=self._tp).float()
        if not self._records:
            return logits, []
        layers = torch.stack([router.router_replay.history.pop() for router in self._routers], dim=1)
        if self._tp.size() > 1:
            layers = gather_from_sequence_parallel_region(layers, group=self._tp)
        return logits, layers.cpu().numpy().astype(np.int16)


def draw(logits: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """logits fp32 [B, words], at the temperature already → (a token of each row, its log-probability)."""
    logps = logits.log_softmax(1)
    noise = torch.rand(logps.shape, generator=generator, device=logps.device).clamp(min=1e-20).log().neg().log().neg()
    tokens = (logps + noise).argmax(1)  # the largest with Gumbel noise is a draw from the distribution
    return tokens, logps.gather(1, tokens.unsqueeze(1)).squeeze(1)
