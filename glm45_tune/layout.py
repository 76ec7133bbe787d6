"""Which rank holds what: pure arithmetic over a model and a parallel layout. No torch, no megatron."""

import os
from dataclasses import dataclass
from math import lcm

from glm45_tune.spec import ModelSpec


def ranks_here() -> int:
    """Ranks of this job on this host, as torchrun tells each of them."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE") or 1)


@dataclass(frozen=True, slots=True)
class Layout:
    """Sizes of the parallel axes, in megatron's order (tensor fastest). data_parallel_size follows from world_size."""

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int = 1
    context_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int = 1
    world_size: int = 1

    def __str__(self) -> str:
        """`tensor 2 × context 1 × pipeline 4 (2 virtual) × data 1, expert 8`, what is 1 and seldom used left out."""
        vpp, cp, etp = (
            self.virtual_pipeline_model_parallel_size,
            self.context_parallel_size,
            self.expert_tensor_parallel_size,
        )
        dense = [f"tensor {self.tensor_model_parallel_size}", f"context {cp}" if cp > 1 else ""]
        dense += [f"pipeline {self.pipeline_model_parallel_size}" + (f" ({vpp} virtual)" if vpp > 1 else "")]
        dense += [f"data {self.data_parallel_size}"]
        experts = f"expert {self.expert_model_parallel_size}" + (f" × expert tensor {etp}" if etp > 1 else "")
        return f"{' × '.join(filter(None, dense))}, {experts}"

    @property
    def dense_ranks(self) -> int:
        """Ranks that share one micro batch: one replica of the dense weights, once for each part of its tokens."""
        return self.tensor_model_parallel_size * self.context_parallel_size * self.pipeline_model_parallel_size

    @property
    def expert_ranks(self) -> int:
        """Ranks that one replica of the experts takes."""
        return self.expert_tensor_parallel_size * self.expert_model_parallel_size * self.pipeline_model_parallel_size

    @property
    def smallest_world_size(self) -> int:
        """The fewest ranks that satisfy both the dense and the expert grid; every multiple of them does too."""
        return lcm(self.dense_ranks, self.expert_ranks)

    @property
    def num_segments(self) -> int:
        """Runs of layers the decoder is cut into; pipeline rank p holds p, p + pipeline size, …: its virtual stages."""
        return self.pipeline_model_parallel_size * self.virtual_pipeline_model_parallel_size

    @property
    def microbatch_multiple(self) -> int:
        """What the number of micro batches a step must divide by: the interleaved schedule moves them in groups."""
        return self.pipeline_model_parallel_size if self.virtual_pipeline_model_parallel_size > 1 else 1

    @property
    def data_parallel_size(self) -> int:
        return self.world_size // self.dense_ranks

    def stage_layers(self, spec: ModelSpec, with_mtp: bool) -> list[int]:
        """How many decoder layers each segment holds (a pipeline stage, or a virtual one); sizes differ by at most one.

        The MTP layer runs on the last one and counts as one layer there, so that uneven depths (Air's 46 + 1) balance.
        """
        total = spec.num_layers + (spec.mtp_num_layers if with_mtp else 0)
        base, extra = divmod(total, self.num_segments)
        # larger ones come first: the last one also carries the head
        sizes = [base + (segment < extra) for segment in range(self.num_segments)]
        sizes[-1] -= spec.mtp_num_layers if with_mtp else 0
        while sizes[-1] < 1:  # a model so shallow that MTP filled the last stage
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
