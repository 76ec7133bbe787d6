"""Speeds as data: what was measured, on which card, and where it is written. timing.py derives everything from these.

Only the card named here was measured. Another card is scaled: matrix work by its tflops, traffic by its bandwidth, wires by its
links, each at the share of the maker's figure that the measured card reached.
"""

MEASURED_CARD = "h100"
SOURCE = "docs/numbers.md, a GLM-4.5-Air MoE layer on one H100 80GB HBM3, 2026-11-24"

# TFLOP/s reached in matrix products: dense projections and grouped experts, bf16
MATRIX_TFLOPS = 590.0
# TFLOP/s reached by causal attention over packed rows, forward and backward
ATTENTION_FORWARD_TFLOPS = 590.0
ATTENTION_BACKWARD_TFLOPS = 460.0
# forward + backward of one Air MoE layer, LoRA r 32 on attention, 8192 tokens in documents of DOCUMENT_TOKENS, nothing recomputed
LAYER_MS = 45.1
DOCUMENT_TOKENS = 8192
TOKENS = 8192
# the same with the whole layer computed again: what it costs more is a forward
LAYER_RECOMPUTED_MS = 63.9

# wires: share of the link's figure that an all-to-all reached (512 MiB a rank over two cards: 268 MB left each in 1.05 ms)
LINK_SHARE = 0.57
NODE_LINK_SHARE = 0.8
# share of memory bandwidth that the optimizer's passes reach
STREAM_SHARE = 0.8
