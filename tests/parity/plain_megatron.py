"""Run by every rank: plain megatron-core loads checkpoints of ours and writes the logits it computes. No model code of ours.

Argument: a JSON list of jobs, each checkpoint directory, dialect, [tensor, pipeline, expert] parallel, output file; one after the
other in the same ranks. What is ours here is only the CPU mode, which turns cuda to cpu, and nothing else of the project.
"""

import json
from functools import partial
from pathlib import Path

import megatron.core.models.gpt  # noqa: F401  what the functions below import from, paid for once before the ranks fork
import megatron.core.models.hybrid.hybrid_block  # noqa: F401
import torch
import torch.distributed as dist
import torch.nn.functional as F

from glm45_tune.mcore import cpu


def config_of(hf: dict, tp: int, pp: int, ep: int, hybrid: bool):
    from megatron.core.transformer import TransformerConfig

    layers, dense = hf["num_hidden_layers"], hf["first_k_dense_replace"]
    return TransformerConfig(
        num_layers=layers * (2 if hybrid else 1),
        hidden_size=hf["hidden_size"],
        ffn_hidden_size=hf["intermediate_size"],
        num_attention_heads=hf["num_attention_heads"],
        num_query_groups=hf["num_key_value_heads"],
        kv_channels=hf["head_dim"],
        qk_layernorm=hf["use_qk_norm"],
        add_bias_linear=False,
        add_qkv_bias=True,
        normalization="RMSNorm",
        layernorm_epsilon=hf["rms_norm_eps"],
        gated_linear_unit=True,
        activation_func=F.silu,
        num_moe_experts=hf["n_routed_experts"],
        moe_layer_freq=1 if hybrid else [int(layer >= dense) for layer in range(layers)],
        moe_ffn_hidden_size=hf["moe_intermediate_size"],
        moe_shared_expert_intermediate_size=hf["moe_intermediate_size"] * hf["n_shared_experts"],
        moe_router_topk=hf["num_experts_per_tok"],
        moe_router_topk_scaling_factor=hf["routed_scaling_factor"],
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        moe_router_dtype="fp32",
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="alltoall",
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=1,
        sequence_parallel=tp > 1,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        pipeline_dtype=torch.float32,
        mtp_num_layers=hf["num_nextn_predict_layers"] or None,
    )


class Norm(torch.nn.Module):
    """megatron's local norm refuses sequence parallelism; this is all it takes."""

    def __init__(self, config, hidden_size, eps=1e-5, **_):
        super().__init__()
        self.weight, self.eps = torch.nn.Parameter(torch.ones(hidden_size)), eps
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


def hybrid_model(hf: dict, config, common: dict):
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.models.hybrid import hybrid_block
    from megatron.core.models.hybrid.hybrid_model import HybridModel
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.ssm.mlp_layer import MLPLayer
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.mlp import MLP, MLPSubmodules
    from megatron.core.transformer.moe.experts import SequentialMLP
    from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
    from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
    from megatron.core.transformer.multi_token_prediction import (
        MultiTokenPredictionBlock,
        MultiTokenPredictionBlockSubmodules,
        MultiTokenPredictionLayer,
        MultiTokenPredictionLayerSubmodules,
    )
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

    hybrid_block.TENorm = Norm  # HybridStack names Transformer Engine's for its last norm
    names = {
        "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
        "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
    }
    mlp = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    moe = MoESubmodules(
        experts=partial(SequentialMLP, submodules=mlp), shared_experts=partial(SharedExpertMLP, submodules=mlp)
    )
    qk_norm = Norm if hf["use_qk_norm"] else None
    attention = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear,
        core_attention=DotProductAttention,
        linear_proj=RowParallelLinear,
        q_layernorm=qk_norm,
        k_layernorm=qk_norm,
    )
    spec = ModuleSpec(
        module=hybrid_block.HybridStack,
        submodules=hybrid_block.HybridStackSubmodules(
            attention_layer=ModuleSpec(
                module=TransformerLayer,
                submodules=TransformerLayerSubmodules(
                    input_layernorm=Norm,
                    self_attention=ModuleSpec(
                        module=SelfAttention, params={"attn_mask_type": AttnMaskType.causal}, submodules=attention
                    ),
                    self_attn_bda=get_bias_dropout_add,
                    sharded_state_dict_keys_map=names,
                ),
            ),
            mlp_layer=ModuleSpec(
                module=MLPLayer,
                submodules=TransformerLayerSubmodules(
                    pre_mlp_layernorm=Norm,
                    mlp=partial(MLP.as_mlp_submodule, submodules=mlp),
                    mlp_bda=get_bias_dropout_add,
                    sharded_state_dict_keys_map=names,
                ),
            ),
            moe_layer=ModuleSpec(
                module=TransformerLayer,
                submodules=TransformerLayerSubmodules(
                    pre_mlp_layernorm=Norm,
                    mlp=lambda config, pg_collection, is_mtp_layer=False, name=None: MoELayer(
                        config, moe, pg_collection=pg_collection, is_mtp_layer=is_mtp_layer
                    ),
                    mlp_bda=get_bias_dropout_add,
                ),
            ),
            mtp_block_spec=ModuleSpec(
                module=MultiTokenPredictionBlock,
                submodules=MultiTokenPredictionBlockSubmodules(
                    layer_specs=[
                        ModuleSpec(
                            module=MultiTokenPredictionLayer,
                            submodules=MultiTokenPredictionLayerSubmodules(
                                enorm=Norm, hnorm=Norm, layer_norm=Norm, eh_proj=ColumnParallelLinear
                            ),
                        )
                    ]
                ),
            ),
        ),
    )
    layers = ["*-"] * hf["first_k_dense_replace"] + ["*E"] * (hf["num_hidden_layers"] - hf["first_k_dense_replace"])
    if config.pipeline_model_parallel_size == 2:
        layers.insert(2, "|")
    pattern = "".join(layers) + "/*E" * hf["num_nextn_predict_layers"]
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return HybridModel(config, spec, hybrid_layer_pattern=pattern, pg_collection=groups, **common)


def gpt_model(hf: dict, config, common: dict):
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_mtp_block_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer import torch_norm

    torch_norm.WrappedTorchNorm.__new__ = lambda cls, config, hidden_size, eps=1e-5, **_: Norm(config, hidden_size, eps)
    if config.pipeline_model_parallel_size == 2:
        config.num_layers_in_first_pipeline_stage = 2
    block = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm")
    mtp = get_gpt_mtp_block_spec(config, block, use_transformer_engine=False) if config.mtp_num_layers else None
    return GPTModel(config, block, mtp_block_spec=mtp, **common)


def main(jobs: str) -> None:
    with cpu.entered():
        _main(jobs)


def _main(jobs: str) -> None:
    from megatron.core import parallel_state
    from megatron.core.transformer.moe import token_dispatcher

    move = token_dispatcher.maybe_move_tensor_to_cpu  # NCCL takes counts as an array, gloo as a list
    token_dispatcher.maybe_move_tensor_to_cpu = lambda tensor, as_numpy=False, record_stream=False: (
        tensor.tolist() if as_numpy and torch.is_tensor(tensor) else move(tensor, as_numpy, record_stream)
    )
    dist.init_process_group("gloo")
    for job in json.loads(jobs):
        compute(*job)
        parallel_state.destroy_model_parallel()
        for group in list(dist.distributed_c10d._world.pg_map):  # megatron only forgets them, and each keeps threads
            if group is not dist.group.WORLD:
                dist.destroy_process_group(group)
    dist.destroy_process_group()


def compute(directory: str, dialect: str, sizes: list[int], output: str) -> None:
    from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
    from megatron.core.pipeline_parallel import get_forward_backward_func

    tp, pp, ep = sizes
    parallel_state.initialize_model_parallel(tp, pp, expert_model_parallel_size=ep, expert_tensor_parallel_size=1)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    hf = json.loads(Path(directory, "config.json").read_text())
    config = config_of(hf, tp, pp, ep, dialect == "hybrid")
    common = dict(
        vocab_size=hf["vocab_size"],
        max_sequence_length=64,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        parallel_output=False,
        position_embedding_type="rope",
        rotary_percent=hf["partial_rotary_factor"],
        rotary_base=hf["rope_theta"],
    )
    model = (hybrid_model if dialect == "hybrid" else gpt_model)(hf, config, common).eval()
    for tensor in [*model.parameters()]:
        tensor.data.fill_(float("nan"))  # what the checkpoint does not fill will be seen
    loaded = dist_checkpointing.load(model.sharded_state_dict(), directory)
    model.load_state_dict(loaded)
    left = [name for name, tensor in model.named_parameters() if torch.isnan(tensor).any()]
    assert not left, left

    length = 24
    tokens = torch.arange(length)[None] * 7 % hf["vocab_size"]
    mask = torch.ones(1, 1, length, length).triu(1).bool()

    def forward_step(iterator, model):
        logits = model(tokens, torch.arange(length)[None], mask)
        return logits, lambda logits, non_loss_data=False: logits

    with torch.no_grad():
        results = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=None,
            model=model,
            num_microbatches=1,
            seq_length=length,
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
    is_first = parallel_state.get_tensor_model_parallel_rank() == parallel_state.get_data_parallel_rank() == 0
    if parallel_state.is_pipeline_last_stage() and is_first:
        torch.save((tokens, results[0]), output)
    dist.barrier()
