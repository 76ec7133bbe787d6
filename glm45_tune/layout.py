"""Which rank holds what: pure arithmetic over a model and a parallel layout. No torch, no megatron."""

from dataclasses import dataclass
from math import lcm

from glm45_tune.errors import LayoutError
from glm45_tune.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Layout:
    """Sizes of the parallel axes, in megatron's order (tensor fastest). data_parallel_size follows from world_size."""

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int = 1
    world_size: int = 1

    @property
    def dense_ranks(self) -> int:
        """Ranks that one replica of the dense weights takes."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size

    @property
    def expert_ranks(self) -> int:
        """Ranks that one replica of the experts takes."""
        return self.expert_tensor_parallel_size * self.expert_model_parallel_size * self.pipeline_model_parallel_size

    @property
    def smallest_world_size(self) -> int:
        """The fewest ranks that satisfy both the dense and the expert grid."""
        return lcm(self.dense_ranks, self.expert_ranks)

    @property
    def data_parallel_size(self) -> int:
        return self.world_size // self.dense_ranks

    def check(self, spec: ModelSpec) -> None:
        """Raise LayoutError unless the model and the ranks divide as this layout asks."""
        tp, pp, ep = self.tensor_model_parallel_size, self.pipeline_model_parallel_size, self.expert_model_parallel_size
        etp = self.expert_tensor_parallel_size
        if self.world_size % self.dense_ranks:
            raise LayoutError(
                f"tensor {tp} × pipeline {pp} = {self.dense_ranks} does not divide the {self.world_size} ranks of this "
                f"job. Use a multiple of {self.smallest_world_size} ranks."
            )
        if self.world_size % self.expert_ranks:
            raise LayoutError(
                f"expert tensor {etp} × expert {ep} × pipeline {pp} = {self.expert_ranks} does not divide the "
                f"{self.world_size} ranks of this job. Use a multiple of {self.smallest_world_size} ranks."
            )
        _must_divide("expert_model_parallel_size", ep, "experts", spec.num_moe_experts)
        _must_divide("tensor_model_parallel_size", tp, "attention heads", spec.num_attention_heads)
        _must_divide("tensor_model_parallel_size", tp, "query groups", spec.num_query_groups)
        _must_divide("tensor_model_parallel_size", tp, "words of the vocabulary", spec.vocab_size)
        _must_divide("tensor_model_parallel_size", tp, "columns of the dense MLP", spec.ffn_hidden_size)
        _must_divide("tensor_model_parallel_size", tp, "columns of the shared expert", spec.shared_ffn_hidden_size)
        _must_divide("expert_tensor_parallel_size", etp, "columns of an expert", spec.moe_ffn_hidden_size)
        if pp > spec.num_layers:
            raise LayoutError(f"pipeline_model_parallel_size {pp} exceeds the {spec.num_layers} layers of the model.")

    def stage_layers(self, spec: ModelSpec, with_mtp: bool) -> list[int]:
        """How many decoder layers each pipeline stage holds; sizes differ by at most one.

        The MTP layer runs on the last stage and counts as one layer there, so that uneven depths (Air's 46 + 1) balance.
        """
        pp = self.pipeline_model_parallel_size
        total = spec.num_layers + (spec.mtp_num_layers if with_mtp else 0)
        base, extra = divmod(total, pp)
        # larger stages come first: the last one also carries the head
        sizes = [base + (stage < extra) for stage in range(pp)]
        sizes[-1] -= spec.mtp_num_layers if with_mtp else 0
        if sizes[-1] < 1:  # a model so shallow that MTP filled the last stage
            sizes[-1] += 1
            sizes[sizes.index(max(sizes))] -= 1
        return sizes

    def hybrid_pattern(self, spec: ModelSpec, with_mtp: bool) -> str:
        """HybridModel's layer pattern: `*-` a dense layer, `*E` a MoE layer, `|` a stage cut, `/*E` an MTP layer."""
        layers = ["*E" if spec.is_moe(i) else "*-" for i in range(spec.num_layers)]
        stages, first = [], 0
        for size in self.stage_layers(spec, with_mtp):
            stages.append("".join(layers[first : first + size]))
            first += size
        return "|".join(stages) + "/*E" * (spec.mtp_num_layers if with_mtp else 0)


def _must_divide(key: str, size: int, what: str, count: int) -> None:
    if count % size:
        valid = [n for n in range(1, min(count, 256) + 1) if count % n == 0]
        raise LayoutError(f"{key} {size} does not divide the {count} {what}; allowed: {', '.join(map(str, valid))}.")
