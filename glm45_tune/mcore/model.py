"""GLM-4.5 as megatron's HybridModel: its configuration, its layers, and a forward that ends in per-token losses."""

import copy
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel import ColumnParallelLinear, checkpoint, gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from glm45_tune.data.context import Share
from glm45_tune.layout import Layout
from glm45_tune.mcore.layers.attention import Attention, PackedRow, rotary_table
from glm45_tune.mcore.layers.linear import ColumnLinear, RowLinear
from glm45_tune.mcore.layers.loss import linear_cross_entropy
from glm45_tune.mcore.layers.moe import MoE
from glm45_tune.mcore.layers.mtp import MTPLayer
from glm45_tune.mcore.layers.norm import LayerNorm, RMSNorm
from glm45_tune.mcore.layers.recompute import never_again
from glm45_tune.mcore.layers.swiglu import GatedMLP
from glm45_tune.spec import ModelSpec

# without Transformer Engine the norm is a module of its own; checkpoints keep the names its fused linears give it
NORM_NAMES = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


@dataclass(frozen=True)
class ModelOptions:
    """What a run chooses about the model; sizes come from the checkpoint. Names are megatron's."""

    params_dtype: torch.dtype = torch.float32
    frozen_dtype: str = "bf16"
    """fp8: the linears' weights are frozen and in FP8 (`layers/weight.py`); bf16: in params_dtype."""
    frozen_products: str = "fp8"
    """What FP8 weights are multiplied in: fp8, or bf16 for params_dtype."""
    with_mtp: bool = False
    recompute_granularity: str | None = None
    recompute_method: str | None = None
    recompute_num_layers: int | None = None
    recompute_modules: list[str] = field(default_factory=list)
    moe_aux_loss_coeff: float = 0.0
    moe_z_loss_coeff: float = 0.0
    moe_router_bias_update_rate: float = 0.0
    deterministic: bool = False
    temperature: float = 1.0
    """Log-probabilities are those of logits / temperature."""


def transformer_config(spec: ModelSpec, layout: Layout, options: ModelOptions) -> TransformerConfig:
    """megatron's configuration of this model under this layout. One GPT layer is two hybrid layers."""
    selective = bool(options.recompute_modules)
    grouped = spec.moe_router_num_groups > 1
    config = TransformerConfig(
        num_layers=2 * spec.num_layers,
        hidden_size=spec.hidden_size,
        ffn_hidden_size=spec.ffn_hidden_size,
        num_attention_heads=spec.num_attention_heads,
        num_query_groups=spec.num_query_groups,
        kv_channels=spec.kv_channels,
        qk_layernorm=spec.qk_layernorm,
        add_bias_linear=False,
        add_qkv_bias=spec.add_qkv_bias,
        normalization="RMSNorm",
        layernorm_epsilon=spec.layernorm_epsilon,
        gated_linear_unit=True,
        activation_func=F.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        num_moe_experts=spec.num_moe_experts,
        moe_ffn_hidden_size=spec.moe_ffn_hidden_size,
        moe_shared_expert_intermediate_size=spec.shared_ffn_hidden_size,
        moe_router_topk=spec.moe_router_topk,
        moe_router_num_groups=spec.moe_router_num_groups if grouped else None,
        moe_router_group_topk=spec.moe_router_group_topk if grouped else None,
        moe_router_topk_scaling_factor=spec.moe_router_topk_scaling_factor,
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        moe_router_bias_update_rate=options.moe_router_bias_update_rate,
        moe_router_dtype="fp32",
        moe_router_load_balancing_type="aux_loss" if options.moe_aux_loss_coeff else "none",
        moe_aux_loss_coeff=options.moe_aux_loss_coeff,
        moe_z_loss_coeff=options.moe_z_loss_coeff or None,
        moe_token_dispatcher_type="alltoall",
        moe_grouped_gemm=True,
        mtp_num_layers=spec.mtp_num_layers if options.with_mtp and spec.mtp_num_layers else None,
        params_dtype=options.params_dtype,
        bf16=options.params_dtype == torch.bfloat16,
        pipeline_dtype=options.params_dtype,
        tensor_model_parallel_size=layout.tensor_model_parallel_size,
        sequence_parallel=layout.tensor_model_parallel_size > 1,
        pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=_more_than_one(layout.virtual_pipeline_model_parallel_size),
        context_parallel_size=layout.context_parallel_size,
        expert_model_parallel_size=layout.expert_model_parallel_size,
        expert_tensor_parallel_size=layout.expert_tensor_parallel_size,
        variable_seq_lengths=True,
        recompute_granularity="selective" if selective else None,
        recompute_modules=[name for name in options.recompute_modules if name != "attention"] if selective else None,
        perform_initialization=False,  # every weight comes from a checkpoint
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        deterministic_mode=options.deterministic,
    )
    config.recompute_modules = options.recompute_modules  # megatron knows no `attention`
    config.frozen_dtype, config.frozen_products = options.frozen_dtype, options.frozen_products  # read by our layers
    return config


class AttentionLayer(TransformerLayer):
    """The attention half of a layer: norm, attention, residual. Computed again as a whole where `recompute_modules` has it."""

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        self.recompute = "attention" in (config.recompute_modules or [])

    def forward(self, hidden_states, **others):
        if not (self.recompute and self.training):
            return super().forward(hidden_states=hidden_states, **others)
        half = super().forward
        return checkpoint(lambda hidden: half(hidden_states=hidden, **others)[0], False, hidden_states), None


def _more_than_one(size: int) -> int | None:
    return size if size > 1 else None


class Stack(HybridStack):
    """The decoder: HybridStack with our final norm, and full recompute counted in whole (attention + MLP) layers."""

    def __init__(self, config, *args, recompute_method=None, recompute_num_layers=None, **kwargs):
        super().__init__(config, *args, post_layer_norm=False, **kwargs)
        if self.post_process:
            self.post_layer_norm = True  # HybridStack's own needs Transformer Engine
            self.final_norm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)
        if recompute_method is not None:
            self.config = copy.copy(config)
            self.config.recompute_granularity = "full"
            self.config.recompute_method = recompute_method
            self.config.recompute_num_layers = 2 * recompute_num_layers
            whole = len(self.layers) if recompute_method == "uniform" else 2 * recompute_num_layers
            run = 1 if recompute_method == "block" else 2 * recompute_num_layers  # halves that are run again together
            for number, half in enumerate(list(self.layers)[:whole], 1):
                never_again(half)  # once with the whole layer is enough
                last = half.self_attention if isinstance(half, AttentionLayer) else half.mlp
                last.ends_recompute = number % run == 0 or number == len(self.layers)


def layer_specs(options: ModelOptions) -> ModuleSpec:
    """Which module stands in which place of HybridModel."""
    mlp = MLPSubmodules(linear_fc1=ColumnLinear, linear_fc2=RowLinear)
    attention_layer = TransformerLayerSubmodules(
        input_layernorm=LayerNorm,
        self_attention=ModuleSpec(module=Attention),
        self_attn_bda=get_bias_dropout_add,
        sharded_state_dict_keys_map=NORM_NAMES,
    )
    mlp_layer = TransformerLayerSubmodules(
        pre_mlp_layernorm=LayerNorm,
        mlp=partial(GatedMLP.as_mlp_submodule, submodules=mlp),
        mlp_bda=get_bias_dropout_add,
        sharded_state_dict_keys_map=NORM_NAMES,
    )
    moe_layer = TransformerLayerSubmodules(
        pre_mlp_layernorm=LayerNorm, mlp=partial(MoE, submodules=mlp), mlp_bda=get_bias_dropout_add
    )
    mtp_layer = MultiTokenPredictionLayerSubmodules(
        enorm=RMSNorm, hnorm=RMSNorm, layer_norm=RMSNorm, eh_proj=ColumnParallelLinear
    )
    return ModuleSpec(
        module=Stack,
        params=dict(recompute_method=options.recompute_method, recompute_num_layers=options.recompute_num_layers)
        if options.recompute_granularity == "full"
        else {},
        submodules=HybridStackSubmodules(
            attention_layer=ModuleSpec(module=AttentionLayer, submodules=attention_layer),
            mlp_layer=ModuleSpec(module=MLPLayer, submodules=mlp_layer),
            moe_layer=ModuleSpec(module=TransformerLayer, submodules=moe_layer),
            mtp_block_spec=ModuleSpec(
                module=MultiTokenPredictionBlock,
                submodules=MultiTokenPredictionBlockSubmodules(
                    layer_specs=[ModuleSpec(module=MTPLayer, submodules=mtp_layer)]
                ),
            ),
        ),
    )


class GLM45Model(HybridModel):
    """One pipeline stage of the model, or with vp_stage one of its virtual stages.

    Input is one packed row, or this context rank's part of it; the last stage returns losses or
    logits.
    """

    def __init__(
        self, spec: ModelSpec, layout: Layout, options: ModelOptions = ModelOptions(), vp_stage: int | None = None
    ):
        config = transformer_config(spec, layout, options)
        super().__init__(
            config,
            layer_specs(options),
            vocab_size=spec.vocab_size,
            max_sequence_length=0,
            hybrid_layer_pattern=layout.hybrid_pattern(spec, config.mtp_num_layers is not None),
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
            vp_stage=vp_stage,
        )
        self.spec = spec
        self.recomputes = options.recompute_granularity is not None
        self.temperature = options.temperature

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        bounds: list[int],
        labels: torch.Tensor | None = None,
        num_padding: int = 0,
        share: Share | None = None,
        cache=None,
        counted: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Run a packed row: tokens, positions int64 [T]; bounds: document edges.

        labels: int64 [1 + MTP layers, T], what each should predict; num_padding: tokens at the end
        that are no data; share: this context rank's part of the row (see `data/batch.py`); cache:
        of a model that writes, what stands before the tokens (`mcore/generate.py`); counted: see
        `Batch.counted`. Last stage with labels: fp32 cross entropy of every prediction, [1 + MTP
        layers, T], 0 where none is counted. Without labels: the logits [T, words of this tensor
        rank]. Other stages: hidden states for the next one.
        """
        rotary = rotary_table(positions, self.spec.kv_channels, self.spec.rotary_percent, self.spec.rotary_base)
        row = PackedRow(bounds, tokens.device, share, labels, cache)
        padding = self._padding_mask(tokens, num_padding)
        hidden = None
        if self.pre_process:
            hidden = self.embedding(input_ids=tokens[None], position_ids=positions[None])
            if torch.is_grad_enabled() and not hidden.requires_grad and (self.recomputes or not self._trains_layers):
                # megatron's recompute passes gradients only where an input asks for one, which a frozen embedding's does not;
                # and its pipeline takes every stage's output to have one
                hidden.requires_grad_()
        hidden = self.decoder(
            hidden, attention_mask=None, rotary_pos_emb=rotary, packed_seq_params=row, padding_mask=padding
        )
        if not self.post_process:
            return hidden
        if self.temperature != 1:
            hidden = hidden / self.temperature
        if labels is None:
            return self.output_layer(hidden)[0].squeeze(1)
        depths = [hidden]
        if self.mtp_process:
            hidden = self.mtp(
                input_ids=tokens[None],
                position_ids=positions[None],
                hidden_states=hidden,
                attention_mask=None,
                padding_mask=padding,
                rotary_pos_emb=rotary,
                packed_seq_params=row,
                embedding=self.embedding,
            )
            depths = hidden.chunk(1 + self.config.mtp_num_layers)
        counted = counted or [None] * len(depths)
        return torch.stack([self._cross_entropy(*prediction) for prediction in zip(depths, labels, counted)])

    @property
    def _trains_layers(self) -> bool:
        return any(parameter.requires_grad for parameter in self.decoder.parameters())

    def _padding_mask(self, tokens: torch.Tensor, num_padding: int) -> torch.Tensor | None:
        """bool [1, T (cut under sequence parallel)]: which of the tokens that a router of this rank sees are no data."""
        if not num_padding:
            return None
        mask = torch.arange(len(tokens), device=tokens.device) >= len(tokens) - num_padding
        tp = parallel_state.get_tensor_model_parallel_group()
        return mask.chunk(tp.size())[tp.rank()][None]

    def _cross_entropy(self, hidden: torch.Tensor, labels: torch.Tensor, counted: torch.Tensor | None) -> torch.Tensor:
        head = self.output_layer
        if head.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, group=head.tp_group)
        return linear_cross_entropy(hidden.flatten(0, 1), head.weight, labels, head.tp_group, counted)
