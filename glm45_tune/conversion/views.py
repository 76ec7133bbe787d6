"""Readers that show another reader's model changed."""

import dataclasses

import torch

from glm45_tune.conversion.tensors import ALL, HfReader


class WithoutMtp:
    """An HfReader: `base` without its MTP layers, and a config.json that promises none."""

    def __init__(self, base: HfReader):
        self.base, self.path = base, base.path
        self.spec = dataclasses.replace(base.spec, mtp_num_layers=0, mtp_copies=())
        self.config = base.config | {"num_nextn_predict_layers": 0}
        left = tuple(f"model.layers.{base.spec.num_layers + depth}." for depth in range(base.spec.mtp_num_layers))
        self.names = [name for name in base.names if not name.startswith(left)] if left else base.names

    def __reduce__(self):
        return WithoutMtp, (self.base,)

    def stamp(self) -> object:
        return [self.base.stamp(), "without MTP"]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.base.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self.base.dtype(name)

    def read(self, name: str, first: int = 0, last: int | None = None, columns: slice = ALL) -> torch.Tensor:
        return self.base.read(name, first, last, columns)


class InFp32:
    """An HfReader: `base` in fp32 whatever it is stored in, so that what is added to its weights is not rounded to bf16."""

    def __init__(self, base: HfReader):
        self.base, self.spec, self.path, self.names, self.config = base, base.spec, base.path, base.names, base.config

    def __reduce__(self):
        return InFp32, (self.base,)

    def stamp(self) -> object:
        return [self.base.stamp(), "in fp32"]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.base.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32

    def read(self, name: str, first: int = 0, last: int | None = None, columns: slice = ALL) -> torch.Tensor:
        return self.base.read(name, first, last, columns).float()
