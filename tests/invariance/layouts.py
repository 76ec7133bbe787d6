"""All parallel layouts of a number of ranks, and few of them that cover every pair of choices."""

from itertools import combinations, product

from glm45_tune.checks import check_layout
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
            check_layout(Layout(**chosen, world_size=world_size), spec)
        except LayoutError:
            continue
        found.append(chosen)
    return found


def covering(world_size: int, spec: ModelSpec, kinds: tuple[str, ...]) -> list[tuple[str, dict[str, int]]]:
    """Few kinds of training under layouts in which every two sizes, and every size and kind, that can occur together do (greedy)."""
    candidates = list(product(kinds, every(world_size, spec)))
    wanted = set().union(*(pairs(*candidate) for candidate in candidates))
    chosen = []
    while wanted:
        best = max(candidates, key=lambda candidate: (len(pairs(*candidate) & wanted), sum(candidate[1].values())))
        chosen.append(best)
        wanted -= pairs(*best)
    return chosen


def name(sizes: dict[str, int]) -> str:
    """`tp2-cp1-pp2-vpp2-ep4-etp1`."""
    short = ("tp", "cp", "pp", "vpp", "ep", "etp")
    return "-".join(f"{key}{size}" for key, size in zip(short, sizes.values()))


def pairs(kind: str, sizes: dict[str, int]) -> set:
    return set(combinations([("kind", kind), *sizes.items()], 2))
