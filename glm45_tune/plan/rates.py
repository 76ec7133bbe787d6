"""Speeds as data: what was measured, on which card, and where it is written. timing.py derives everything from these.

Only the card named here was measured. Another card is scaled: matrix work by its tflops, traffic by its bandwidth, wires by its
links, each at the share of the maker's figure that the measured card reached.
"""

MEASURED_CARD = "h200"
SOURCE = "docs/numbers.md, a GLM-4.5-Air MoE layer on one H200, 2026-11-30"

# All of a card that has run for seconds on end and is held back by its power limit.
# TFLOP/s reached in matrix products, bf16: the experts' four and the projections, 8.7 TFLOP in 7.5 + 6.0 ms
MATRIX_TFLOPS = 644.0
# the same in FP8, row and column scales in the epilogue: 8.7 TFLOP in 3.9 + 3.0 ms
FP8_TFLOPS = 1270.0
# causal attention: TFLOP/s, and ms for every TOKENS tokens of 96 heads besides. Of one document 1.65 TFLOP in 2.8 ms forward, 4.12
# in 8.5 backward; of documents of 690 tokens (mean over tokens) 0.14 in 0.52, 0.35 in 1.53
ATTENTION_FORWARD_TFLOPS = 662.0
ATTENTION_BACKWARD_TFLOPS = 541.0
ATTENTION_FORWARD_MS = 0.31
ATTENTION_BACKWARD_MS = 0.89
ATTENTION_QUERY_SIZE = 12288
# forward + backward of one Air MoE layer, LoRA r 32 on attention, TOKENS in documents of DOCUMENT_TOKENS, nothing recomputed
LAYER_MS = 27.9
DOCUMENT_TOKENS = 8192
TOKENS = 8192
# an assumption: share of what is neither matrices nor attention that a forward takes (it is done again by recompute)
FORWARD_SHARE = 0.4

# wires: share of the link's figure that an all-to-all reached (512 MiB a rank over two cards: 268 MB left each in 1.05 ms)
LINK_SHARE = 0.57
# besides its bytes, seconds an exchange between expert ranks costs a step: they wait for each other, and for the host to learn how many
# rows come. What the whole Air's packed steps on two cards took longer than all else that is counted, by its exchanges
EXCHANGE_SECONDS = 0.6e-3
NODE_LINK_SHARE = 0.8
# share of memory bandwidth that what only streams reaches: the optimizer's passes, LoRA's narrow products
STREAM_SHARE = 0.8
