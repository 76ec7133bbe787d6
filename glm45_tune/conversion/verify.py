"""Are two models the same, byte for byte? Either may be an HF or a megatron directory."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch

from glm45_tune.conversion.tensors import HfReader


@dataclass
class Report:
    """What `compare` found: tensors looked at and every difference, by HF name."""

    tensors: int = 0
    bytes: int = 0
    differences: list[dict] = field(default_factory=list)

    def summary(self) -> str:
        """One line for a person; names the first differences."""
        if not self.differences:
            return f"{self.tensors} tensors, {self.bytes / 2**20:.1f} MiB: every byte is equal."
        first = "; ".join(f"{d['name']}: {d['what']}" for d in self.differences[:3])
        return f"{len(self.differences)} of {self.tensors} tensors differ. First: {first}."

    def document(self) -> dict:
        return {"equal": not self.differences, **asdict(self)}


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal as bytes: −0.0 is not 0.0, and a NaN equals itself."""
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def compare(a: HfReader, b: HfReader, tick: Callable[[int], None] = lambda size: None) -> Report:
    """Names, shapes, dtypes, bytes of every tensor. Reads one tensor of each at a time; `tick` hears bytes compared."""
    report = Report()
    for key in a.spec.__dataclass_fields__:
        if (x := getattr(a.spec, key)) != (y := getattr(b.spec, key)):
            report.differences.append({"name": f"config.json {key}", "what": f"{x} against {y}"})
    in_b = set(b.names)
    for name in a.names:
        report.tensors += 1
        what = f"only in {a.path}" if name not in in_b else _difference(a, b, name)
        if what:
            report.differences.append({"name": name, "what": what})
        size = torch.Size(a.shape(name)).numel() * a.dtype(name).itemsize
        report.bytes += size
        tick(size)
    for name in sorted(in_b - set(a.names)):
        report.tensors += 1
        report.differences.append({"name": name, "what": f"only in {b.path}"})
    return report


def _difference(a: HfReader, b: HfReader, name: str) -> str | None:
    if a.shape(name) != b.shape(name):
        return f"shape {a.shape(name)} against {b.shape(name)}"
    if a.dtype(name) != b.dtype(name):
        return f"dtype {a.dtype(name)} against {b.dtype(name)}"
    x, y = a.read(name), b.read(name)
    if same_bytes(x, y):
        return None
    differing = (x != y).sum().item()
    largest = (x.double() - y.double()).abs().max().item()
    return f"{differing} of {x.numel()} values, by up to {largest:.3g}"
