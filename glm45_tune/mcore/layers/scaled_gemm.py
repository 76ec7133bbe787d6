"""QuACK's grouped product of FP8 rows and weights, with their scales in its epilogue. Imported only where QuACK is installed."""

import torch
from quack.epilogue.frontend import gemm_epilogue
from quack.epilogue.ops import ColVecLoad, RowVecLoad

# Hopper's tensor cores sum FP8 products with 14 bits; by default QuACK adds every few of them up in fp32 registers, which
# spill: 5 to 20 times slower. The error of this beside that of the operands is in docs/numbers.md.
_FAST_ACCUMULATION = (("fp8_slow_accum", False),)
TILE = dict(tile_M=128, tile_N=192, pingpong=True, cluster_M=1, cluster_N=2)


@gemm_epilogue(ops={"row": ColVecLoad("row"), "column": RowVecLoad("column")})
def _scaled(acc, row, column):
    return {"D": acc * row * column}


@gemm_epilogue(ops={"row": ColVecLoad("row")})
def _row_scaled(acc, row):
    return {"D": acc * row}


def grouped_product(q, scale, weight, columns, edges, dtype, tile: dict = TILE) -> torch.Tensor:
    """See `fast.fp8_grouped_product`."""
    out = torch.empty(q.shape[0], weight.shape[1], dtype=dtype, device=q.device)
    epilogue, operands = (
        (_row_scaled, {"row": scale}) if columns is None else (_scaled, {"row": scale, "column": columns})
    )
    epilogue.gemm(q, weight, out, epi_args=operands, cu_seqlens_m=edges, post_init_attrs=_FAST_ACCUMULATION, **tile)
    return out
