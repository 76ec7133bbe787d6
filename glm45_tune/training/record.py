"""What a run writes down about itself, for the model card: its data by hash, the machine, the versions. Never content."""

import importlib.metadata
import platform
from pathlib import Path
from typing import TYPE_CHECKING

import glm45_tune
from glm45_tune.data.files import files_of
from glm45_tune.recipe import Sources, sources_of
from glm45_tune.system.files import file_hash

if TYPE_CHECKING:
    from glm45_tune.training.prepare import Job

_LIBRARIES = ("torch", "megatron-core", "transformers", "peft")


def facts(job: "Job") -> dict:
    """`data`, `hardware` and `versions` of a run. Called where its ranks run."""
    return {"data": _data(job), "hardware": _hardware(job), "versions": versions()}


def versions() -> dict[str, str]:
    """What computes: name → version."""
    libraries = {name: importlib.metadata.version(name) for name in _LIBRARIES}
    return {"glm45_tune": glm45_tune.__version__, "python": platform.python_version(), **libraries}


def _data(job: "Job") -> dict:
    options = job.recipe.data
    found: dict = {"train": _files(options.train), "eval": _files(options.eval) if options.eval else []}
    if job.stream:  # counted when it has been read
        return found | {"streamed": True, "held_out": len(job.held_out.samples)}
    return found | {
        "rows": job.train.num_rows,
        "samples": len(job.train.samples),
        "tokens": int(job.train.lengths.sum()),
        "trained_tokens": float(job.train.weights.sum()),
        "held_out": len(job.held_out.samples),
        "left_out": {"bad rows skipped": len(job.train.faults), **job.train.counts},
    }


def _files(sources: Sources) -> list[dict]:
    """Each file by its name and hash; what a hub or a function yields by its name alone."""
    found = []
    for source in sources_of(sources):
        path = Path(source.path)
        whole = path if path.exists() else Path(source.path.rpartition("#")[0])
        if source.path.startswith(("hf:", "ms:")) or not whole.exists():
            found.append({"name": source.path, "weight": source.weight})
            continue
        for file in files_of(str(whole)):
            name = file.name if whole.is_file() else f"{whole.name}/{file.relative_to(whole)}"
            found.append(
                {"name": name, "sha256": file_hash(file), "bytes": file.stat().st_size, "weight": source.weight}
            )
    return found


def _hardware(job: "Job") -> dict:
    import torch

    cards = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cards else f"CPU, {platform.machine()}",
        "ranks": job.layout.world_size,
        "layout": str(job.layout),
    }
