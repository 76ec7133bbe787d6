"""All parallel layouts of a number of ranks, and few of them that cover every pair of choices."""

from itertools import combinations, product

from glm45_tune.errors import LayoutError
from glm45_tune.layout import Layout
from glm45_tune.spec import ModelSpec

SIZES = {
    "tensor_model_parallel_size": (1, 2),
    "context_parallel_size": (1, 2, 4, 8),
    "pipeline_model_parallel_size": (1, 2, 4),
    "virtual_pipeline_model_parallel_size": (1, 2),
    "expert_model_parallel_size": (1, 2, 4, 8),
    "expert_tensor_parallel_size": (1, 2, 4),
}


def every(world_size: int, spec: ModelSpec) -> list[dict[str, int]]:
    """Every choice of sizes that this model and these ranks allow."""
    found = []
    for sizes in product(*SIZES.values()):
        chosen = dict(zip(SIZES, sizes))
        try:
            Layout(**chosen, world_size=world_size).check(spec)
        except LayoutError:
            continue
        found.append(chosen)
    return found


def covering(world_size: int, spec: ModelSpec) -> list[dict[str, int]]:
    """Few layouts in which every two sizes that occur together in one of `every` occur together in one of these (greedy)."""
    candidates = every(world_size, spec)
    wanted = set().union(*(_pairs(layout) for layout in candidates))
    chosen = []
    while wanted:
        best = max(candidates, key=lambda layout: (len(_pairs(layout) & wanted), sum(layout.values())))
        chosen.append(best)
        wanted -= _pairs(best)
    return chosen


def name(sizes: dict[str, int]) -> str:
    """`tp2-cp1-pp2-vpp2-ep4-etp1`."""
    short = ("tp", "cp", "pp", "vpp", "ep", "etp")
    return "-".join(f"{key}{size}" for key, size in zip(short, sizes.values()))


def _pairs(layout: dict[str, int]) -> set:
    return set(combinations(layout.items(), 2))
