"""Does our model compute what transformers' does? Layer by layer, one in memory at a time, on the same tokens.

Each layer of both is given what transformers' layers before it made: so a fault shows at its own layer, and a rounding does not
grow through the others. The MTP layer, which transformers does not have, is not compared.
"""

import dataclasses
from dataclasses import asdict, dataclass, field

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection

from glm45_tune.conversion.hf_files import HfDir
from glm45_tune.conversion.tensors import ALL, HfReader, pieces
from glm45_tune.layout import Layout
from glm45_tune.mcore import runtime
from glm45_tune.mcore.layers.attention import PackedRow, rotary_table
from glm45_tune.mcore.layers.norm import RMSNorm
from glm45_tune.mcore.load import load_weights
from glm45_tune.mcore.model import ModelOptions, Stack, layer_specs, transformer_config
from glm45_tune.spec import ModelSpec

# fp32 sums in another order: some 1e-7 of the range; a wrong weight, rope or router shows up at 1e-2 and more
TOLERANCE = 1e-4
# two experts whose scores are closer than such a rounding may change places: a token in many thousands; a wrong router moves most
ROUTER_TOLERANCE = 0.02


@dataclass(frozen=True)
class ForwardReport:
    """What each place computes, over the tokens that both send to the same experts."""

    num_tokens: int
    differences: dict[str, float] = field(default_factory=dict)
    """Place → largest absolute difference over the range of transformers' values there."""
    router: dict[str, float] = field(default_factory=dict)
    """Layer with experts → share of tokens that are sent to other experts."""

    @property
    def equal(self) -> bool:
        same = all(difference <= TOLERANCE for difference in self.differences.values())  # NaN is not
        return same and all(share <= ROUTER_TOLERANCE for share in self.router.values())

    def document(self) -> dict:
        return {"equal": self.equal, "tolerance": TOLERANCE, "router_tolerance": ROUTER_TOLERANCE, **asdict(self)}

    def add(self, place: str, ours: torch.Tensor, theirs: torch.Tensor, agreed: torch.Tensor | None = None) -> None:
        """[T, …] of both; agreed: bool [T], whose experts are the same."""
        apart = (ours - theirs).abs()
        if agreed is not None:
            self.router[place] = 1 - agreed.float().mean().item()
            apart = apart[agreed] if agreed.any() else apart
        self.differences[place] = (apart.max() / (theirs.max() - theirs.min())).item()


@torch.no_grad()
def compare_forward(reference: HfDir, model: HfReader, num_tokens: int = 96, seed: int = 0) -> ForwardReport:
    """`reference` in transformers' modules and `model` in ours, in fp32, on two random documents in one packed row."""
    with runtime.borrowed():
        runtime.start(Layout())
        return _compared(reference, model, num_tokens, seed)


def _compared(reference: HfDir, model: HfReader, num_tokens: int, seed: int) -> ForwardReport:
    import transformers

    transformers.utils.logging.set_verbosity_error()
    device = runtime.device()
    config = transformers.AutoConfig.from_pretrained(
        str(reference.path), attn_implementation="eager", experts_implementation="eager", trust_remote_code=False
    )
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, reference.spec.vocab_size, (num_tokens,), generator=generator).tolist()
    bounds = [0, num_tokens // 3, num_tokens]
    report = ForwardReport(num_tokens)
    hidden = _embedding(reference, tokens, device)
    report.add("embedding", _embedding(model, tokens, device), hidden)
    for layer in range(reference.spec.num_layers):
        after, chosen = _their_layer(config, _OneLayer(reference, layer), layer, hidden, bounds)
        ours, we_chose = _our_layer(_OneLayer(model, layer), hidden, bounds)
        agreed = None if chosen is None else (chosen.sort(1)[0] == we_chose.sort(1)[0]).all(1)
        report.add(f"layer {layer}", ours, after, agreed)
        hidden = after
    report.add("logits", _our_logits(model, hidden), _their_logits(config, reference, hidden))
    return report


class _OneLayer:
    """An HfReader: one layer of `base` as layer 0 of a model of one layer."""

    def __init__(self, base: HfReader, layer: int):
        self.base, self.path, self._layer = base, base.path, layer
        dense = not base.spec.is_moe(layer)
        self.spec = dataclasses.replace(base.spec, num_layers=1, num_dense_layers=int(dense), mtp_num_layers=0)

    def dtype(self, name: str) -> torch.dtype:
        return self.base.dtype(self._there(name))

    def read(self, name: str, first: int = 0, last: int | None = None, columns: slice = ALL) -> torch.Tensor:
        return self.base.read(self._there(name), first, last, columns)

    def _there(self, name: str) -> str:
        return name.replace("model.layers.0.", f"model.layers.{self._layer}.", 1)


def _embedding(model: HfReader, tokens: list[int], device: torch.device) -> torch.Tensor:
    return torch.cat([model.read("model.embed_tokens.weight", token, token + 1) for token in tokens]).float().to(device)


def _positions(bounds: list[int], device: torch.device) -> torch.Tensor:
    return torch.cat([torch.arange(last - first) for first, last in zip(bounds, bounds[1:])]).to(device)


class _Decoder(torch.nn.Module):
    """Our decoder of one layer, without embedding, final norm and head."""

    def __init__(self, spec: ModelSpec):
        super().__init__()
        options = ModelOptions()
        self.decoder = Stack(
            transformer_config(spec, Layout(), options),
            layer_specs(options).submodules,
            layer_type_list=["*", "-" if spec.num_dense_layers else "E"],
            post_process=False,
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        )

    def sharded_state_dict(self) -> dict:
        return self.decoder.sharded_state_dict(prefix="decoder.")


def _our_layer(source: _OneLayer, hidden: torch.Tensor, bounds: list[int]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Hidden states [T, H] after the layer and each token's experts [T, K], if it has any."""
    spec = source.spec
    layer = _Decoder(spec).eval()
    load_weights(layer, source)
    layer.to(hidden.device)
    chosen = []
    if not spec.num_dense_layers:
        router = layer.decoder.layers[1].mlp.router
        router.register_forward_hook(lambda module, inputs, output: chosen.append(output[1]))
    rotary = rotary_table(_positions(bounds, hidden.device), spec.kv_channels, spec.rotary_percent, spec.rotary_base)
    row = PackedRow(bounds, hidden.device)
    after = layer.decoder(hidden[:, None], attention_mask=None, rotary_pos_emb=rotary, packed_seq_params=row)
    return after[:, 0], chosen[0] if chosen else None


def _their_layer(
    config, source: _OneLayer, number: int, hidden: torch.Tensor, bounds: list[int]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The same in transformers' module, each document by itself."""
    from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeDecoderLayer, Glm4MoeRotaryEmbedding

    with torch.device("meta"):
        layer = Glm4MoeDecoderLayer(config, number)
    layer = layer.to_empty(device=hidden.device).float().eval()
    for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
        if name.startswith("mlp.experts."):
            for expert in range(source.spec.num_moe_experts):
                _fill_expert(tensor[expert], source, expert, name.removeprefix("mlp.experts."))
        else:
            tensor.copy_(source.read(f"model.layers.0.{name}"))
    chosen, rotary, documents = [], Glm4MoeRotaryEmbedding(config).to(hidden.device), []
    if source.spec.is_moe(0):
        layer.mlp.gate.register_forward_hook(lambda module, inputs, output: chosen.append(output[2]))
    for first, last in zip(bounds, bounds[1:]):
        document = hidden[None, first:last]
        place = torch.arange(last - first, device=hidden.device)[None]
        mask = torch.full((1, 1, last - first, last - first), float("-inf"), device=hidden.device).triu(1)
        after = layer(document, attention_mask=mask, position_ids=place, position_embeddings=rotary(document, place))
        documents.append(after[0])
    return torch.cat(documents), torch.cat(chosen) if chosen else None


def _fill_expert(target: torch.Tensor, source: _OneLayer, expert: int, stack: str) -> None:
    front, names = f"model.layers.0.mlp.experts.{expert}.", stack.removesuffix("_proj").split("_")
    for part, name in zip(target.chunk(len(names)), names):
        part.copy_(source.read(f"{front}{name}_proj.weight"))


def _our_logits(model: HfReader, hidden: torch.Tensor) -> torch.Tensor:
    norm = RMSNorm(
        transformer_config(model.spec, Layout(), ModelOptions()), model.spec.hidden_size, model.spec.layernorm_epsilon
    )
    norm.weight.copy_(model.read("model.norm.weight"))
    return _head(model, norm.to(hidden.device)(hidden))


def _their_logits(config, reference: HfReader, hidden: torch.Tensor) -> torch.Tensor:
    from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeRMSNorm

    norm = Glm4MoeRMSNorm(config.hidden_size, config.rms_norm_eps)
    norm.weight.copy_(reference.read("model.norm.weight"))
    return _head(reference, norm.to(hidden.device)(hidden))


def _head(model: HfReader, hidden: torch.Tensor) -> torch.Tensor:
    """Logits, some rows of the head at a time."""
    rows = (model.read("lm_head.weight", first, last) for first, last in pieces(model, "lm_head.weight"))
    return torch.cat([F.linear(hidden, weight.float().to(hidden.device)) for weight in rows], dim=1)
