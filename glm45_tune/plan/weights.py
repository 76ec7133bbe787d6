"""How many weights one rank of a stage holds: matrices, their adapters, and the rest. Counts, no bytes."""

from dataclasses import astuple, dataclass

from glm45_tune.layout import Layout
from glm45_tune.recipe import LoraConfig
from glm45_tune.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Matrix:
    """A linear as one rank holds it. name: megatron's, inside its layer; count: experts of this rank, else 1."""

    name: str
    inputs: int
    outputs: int
    count: int = 1
    is_expert: bool = False

    @property
    def size(self) -> int:
        return self.inputs * self.outputs * self.count


def attention(spec: ModelSpec, layout: Layout) -> list[Matrix]:
    tp = layout.tensor_model_parallel_size
    return [
        Matrix("self_attention.linear_qkv", spec.hidden_size, (spec.query_size + 2 * spec.kv_size) // tp),
        Matrix("self_attention.linear_proj", spec.query_size // tp, spec.hidden_size),
    ]


def _mlp(front: str, hidden: int, width: int, count: int = 1, is_expert: bool = False) -> list[Matrix]:
    return [
        Matrix(f"{front}.linear_fc1", hidden, 2 * width, count, is_expert),
        Matrix(f"{front}.linear_fc2", width, hidden, count, is_expert),
    ]


def mlp(spec: ModelSpec, layout: Layout, is_moe: bool) -> list[Matrix]:
    tp = layout.tensor_model_parallel_size
    if not is_moe:
        return _mlp("mlp", spec.hidden_size, spec.ffn_hidden_size // tp)
    here = spec.num_moe_experts // layout.expert_model_parallel_size
    width = spec.moe_ffn_hidden_size // layout.expert_tensor_parallel_size
    return [
        *_mlp("mlp.shared_experts", spec.hidden_size, spec.shared_ffn_hidden_size // tp),
        *_mlp("mlp.experts", spec.hidden_size, width, here, True),
    ]


def adapter_size(matrix: Matrix, lora: LoraConfig | None, spec: ModelSpec) -> int:
    """Weights of the low-rank pairs beside a matrix."""
    if lora is None:
        return 0
    kind = matrix.name.rpartition(".")[2]
    shares = {kind: 1.0, "o_proj": 1.0, "down_proj": 1.0, "gate_proj": 0.5, "up_proj": 0.5}
    whole = spec.query_size + 2 * spec.kv_size
    shares |= {"q_proj": spec.query_size / whole, "k_proj": spec.kv_size / whole, "v_proj": spec.kv_size / whole}
    outputs = [round(matrix.outputs * shares[target]) for target in lora.targets_of(matrix.name)]
    return sum(lora.r * (matrix.inputs + size) for size in outputs) * matrix.count


@dataclass(frozen=True, slots=True)
class Weights:
    """Counts of one rank: base weights and adapters, each outside (dense) and inside the routed experts.

    Of the base also those in the layers' matrices, and these matrices' output channels.
    """

    dense: int = 0
    expert: int = 0
    lora_dense: int = 0
    lora_expert: int = 0
    matrices: int = 0
    channels: int = 0

    def __add__(self, other: "Weights") -> "Weights":
        return Weights(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other))))

    def __mul__(self, times: int) -> "Weights":
        return Weights(*(mine * times for mine in astuple(self)))


def layer_weights(spec: ModelSpec, layout: Layout, lora: LoraConfig | None, is_moe: bool) -> Weights:
    """One layer on one rank: attention, MLP or experts, norms, router."""
    small = 2 * spec.hidden_size  # the two norms
    if spec.qk_layernorm:
        small += 2 * spec.kv_channels
    if spec.add_qkv_bias:
        small += (spec.query_size + 2 * spec.kv_size) // layout.tensor_model_parallel_size
    if is_moe:
        small += spec.num_moe_experts * spec.hidden_size
    total = Weights(small)
    for matrix in (*attention(spec, layout), *mlp(spec, layout, is_moe)):
        adapter = adapter_size(matrix, lora, spec)
        total += Weights(0, matrix.size, 0, adapter) if matrix.is_expert else Weights(matrix.size, 0, adapter, 0)
        total += Weights(matrices=matrix.size, channels=matrix.outputs * matrix.count)
    return total


def ends_weights(spec: ModelSpec, layout: Layout, is_first: bool, is_last: bool, with_mtp: bool) -> Weights:
    """What a stage holds beside its layers: embedding, final norm, head, and of MTP what is no layer."""
    words = spec.vocab_size * spec.hidden_size // layout.tensor_model_parallel_size
    mtp = spec.mtp_num_layers if with_mtp and is_last else 0
    size = words if is_first or mtp else 0  # MTP embeds on the last stage: a copy there unless it is the first as well
    if is_last:
        size += words + spec.hidden_size
    # enorm, hnorm, its final norm, and eh_proj, which tensor ranks share
    size += mtp * (3 * spec.hidden_size + 2 * spec.hidden_size**2 // layout.tensor_model_parallel_size)
    return Weights(size)
