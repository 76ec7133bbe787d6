"""Run by every rank of test_direct_load.py: under each layout, the bytes that loading asked of the files and the bytes held."""

import json
import math
import os
from pathlib import Path

import torch.distributed as dist

from glm45_tune.conversion.names import rows
from glm45_tune.conversion.stream import open_model
from glm45_tune.layout import Layout
from glm45_tune.mcore import chunks, runtime
from glm45_tune.mcore.load import load_weights, sharded_tensors
from glm45_tune.mcore.model import ModelOptions

asked = [0]
_preadv = os.preadv


def _counted(*arguments) -> int:
    count = _preadv(*arguments)
    asked[0] += count
    return count


def main(model: str, layouts: str, output: str) -> None:
    """Leaves a RANK.json: for each layout [bytes read, bytes held, as the checkpoint stores them]."""
    os.preadv = _counted
    source, found = open_model(model), []
    table = {row.hybrid: row for row in rows(source.spec)}
    for sizes in json.loads(layouts):
        layout = Layout(**sizes, world_size=int(os.environ["WORLD_SIZE"]))
        runtime.start(layout)
        module = chunks.build(source.spec, layout, ModelOptions())
        asked[0] = 0
        load_weights(module, source)
        read = asked[0]
        held = sum(
            math.prod(shard.local_shape) * source.dtype(table[shard.key].hf_names(0)[0]).itemsize
            for shard in sharded_tensors(module)
        )
        found.append([read, held])
    (Path(output) / f"{dist.get_rank()}.json").write_text(json.dumps(found))
    runtime.stop()
