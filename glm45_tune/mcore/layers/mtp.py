"""The MTP layer, told the tokens ahead instead of shifting the row by itself.

megatron's own shifts every document by one in a loop on the device, and under context parallelism asks its neighbours for each
document's edge. Here every position's next tokens come with the batch, whatever part of the row this rank holds.
"""

from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer
from megatron.core.utils import make_viewless_tensor

from glm45_tune.mcore.layers.attention import PackedRow
from glm45_tune.mcore.layers.recompute import never_again


class MTPLayer(MultiTokenPredictionLayer):
    """Depth d (from 1) joins a position's hidden state with the embedding of the token d places on.

    Nothing in it is recomputed: megatron runs it inside a fork of the random state, which its recompute does not know of, so that
    other elements would be dropped the second time.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        never_again(self)

    def _get_embeddings(
        self, input_ids, position_ids, embedding, hidden_states, packed_seq_params: PackedRow, padding_mask=None
    ):
        ahead = packed_seq_params.ahead[self.layer_number - 1 : self.layer_number]
        embedded = embedding(input_ids=ahead, position_ids=position_ids)
        hidden_states = make_viewless_tensor(inp=hidden_states, requires_grad=True, keep_graph=True)
        if not hidden_states.requires_grad:
            hidden_states.requires_grad_()
        return input_ids, position_ids, padding_mask, embedded, hidden_states
