"""What one rank holds of the model: one run of layers, or under interleaved pipeline stages several, seen as one module."""

import torch

from glm45_tune.layout import Layout
from glm45_tune.mcore.model import GLM45Model, ModelOptions
from glm45_tune.spec import ModelSpec


class Chunks(torch.nn.ModuleList):
    """The rank's stages of the model, first to last."""

    @property
    def spec(self) -> ModelSpec:
        return self[0].spec

    @property
    def config(self):
        """megatron's configuration; the schedule reads the first one's."""
        return self[0].config

    def sharded_state_dict(self, *arguments, **settings) -> dict:
        """Of all chunks. Keys are of this rank alone; global names are inside, in each ShardedTensor."""
        return {
            f"{number}.{name}": value
            for number, chunk in enumerate(self)
            for name, value in chunk.sharded_state_dict(*arguments, **settings).items()
        }


def build(spec: ModelSpec, layout: Layout, options: ModelOptions) -> Chunks:
    """This rank's chunks, on the CPU or GPU that megatron puts them on, weights not yet loaded."""
    count = layout.virtual_pipeline_model_parallel_size
    return Chunks(GLM45Model(spec, layout, options, number if count > 1 else None) for number in range(count))
