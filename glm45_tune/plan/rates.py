"""Speeds as data: what was measured, on which card, and where it is written. timing.py derives everything from these.

Only the card named here was measured. Another card is scaled: matrix work by its tflops, traffic by its bandwidth, wires by its
links, each at the share of the maker's figure that the measured card reached.
"""

MEASURED_CARD = "h100"
SOURCE = "docs/numbers.md, a GLM-4.5-Air MoE layer on one H100 80GB HBM3, 2026-11-25"

# TFLOP/s reached in matrix products, bf16: the experts' four and the projections, 8.7 TFLOP in 8.4 + 5.9 ms
MATRIX_TFLOPS = 606.0
# TFLOP/s reached by causal attention: 1.65 in 2.8 ms forward, 4.12 in 8.9 + 0.7 ms backward
ATTENTION_FORWARD_TFLOPS = 589.0
ATTENTION_BACKWARD_TFLOPS = 430.0
# forward + backward of one Air MoE layer, LoRA r 32 on attention, TOKENS in documents of DOCUMENT_TOKENS, nothing recomputed
LAYER_MS = 31.4
DOCUMENT_TOKENS = 8192
TOKENS = 8192
# an assumption: share of what is neither matrices nor attention that a forward takes (it is done again by recompute)
FORWARD_SHARE = 0.4

# wires: share of the link's figure that an all-to-all reached (512 MiB a rank over two cards: 268 MB left each in 1.05 ms)
LINK_SHARE = 0.57
NODE_LINK_SHARE = 0.8
# share of memory bandwidth that the optimizer's passes reach
STREAM_SHARE = 0.8
