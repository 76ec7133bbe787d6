"""The models that bench_step.py times: GLM-4.5-Air's width, few layers, random bf16 weights; ours and two peers."""

import dataclasses
import time

import numpy as np
import torch

from glm45_tune.layout import Layout
from glm45_tune.mcore.layers.fp8 import FP8, quantize_rows
from glm45_tune.mcore.layers.weight import keep_turned
from glm45_tune.mcore.lora import attach
from glm45_tune.mcore.model import GLM45Model, ModelOptions
from glm45_tune.recipe import LoraConfig
from glm45_tune.spec import ModelSpec

AIR = ModelSpec(
    num_layers=46,
    num_dense_layers=1,
    hidden_size=4096,
    ffn_hidden_size=10944,
    moe_ffn_hidden_size=1408,
    num_attention_heads=96,
    num_query_groups=8,
    kv_channels=128,
    num_moe_experts=128,
    moe_router_topk=8,
    num_shared_experts=1,
    moe_router_topk_scaling_factor=1.0,
    moe_router_num_groups=1,
    moe_router_group_topk=1,
    qk_layernorm=False,
    add_qkv_bias=True,
    vocab_size=151552,
    rotary_percent=0.5,
    rotary_base=1e6,
    layernorm_epsilon=1e-5,
    mtp_num_layers=0,
    eos_token_ids=(151329,),
)


@torch.no_grad()
def randomise(model) -> None:
    """Trained-like scales: zeros and ones would hide work. The weights of an FP8 base are the same values quantized."""
    for name, tensor in model.named_parameters():
        if tensor.dtype != FP8:
            tensor.normal_(1.0 if "norm" in name else 0.0, 0.02)
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            experts = (
                zip(module.weight, module.weight_scale)
                if module.weight.dim() == 3
                else [(module.weight, module.weight_scale)]
            )
            for weight, scale in experts:
                rows = quantize_rows(torch.empty_like(weight, dtype=torch.bfloat16).normal_(0.0, 0.02))
                weight.copy_(rows.q)
                scale.copy_(rows.scale)


def positions_of(bounds: list[int], device) -> torch.Tensor:
    return torch.cat([torch.arange(n) for n in np.diff(bounds)]).to(device)


def backward(loss: torch.Tensor, model) -> tuple[float, int]:
    """→ (loss, bytes allocated between forward and backward)."""
    held = torch.cuda.memory_allocated()
    loss.backward()
    model.zero_grad(set_to_none=True)
    return loss.item(), held


class Ours:
    """GLM45Model under LoRA r 32 on every linear, any of which can be laid aside, or trained whole."""

    def __init__(self, depth: int, lora: bool = True, r: int = 32, frozen_dtype: str = "bf16", **frozen):
        """frozen: more of ModelOptions."""
        options = ModelOptions(torch.bfloat16, frozen_dtype, **frozen)
        self.model = GLM45Model(dataclasses.replace(AIR, num_layers=depth), Layout(), options).cuda()
        if lora:
            attach(self.model, LoraConfig(r=r, lora_alpha=2 * r, target_modules="all-linear"), seed=1)
        randomise(self.model)
        self.model.train()
        self.linears = {name: m for name, m in self.model.named_modules() if getattr(m, "adapter", None) is not None}
        self.adapters = {name: linear.adapter for name, linear in self.linears.items()}

    def keep_turned(self, keep: bool) -> None:
        """Whether the transposes of FP8 weights are kept."""
        for module in self.model.modules():
            if hasattr(module, "weight_turned"):
                module.weight_turned = None
        if keep:
            keep_turned(self.model)

    def set_depth(self, depth: int) -> None:
        """Run the first layers only."""
        self.layers = getattr(self, "layers", None) or list(self.model.decoder.layers)
        self.model.decoder.layers = torch.nn.ModuleList(self.layers[: 2 * depth])

    def prepare(self, targets):
        """targets: names of linears that keep their adapter, None for all of them."""
        for name, adapter in self.adapters.items():
            kept = targets is None or name.rpartition(".")[2] in targets
            self.linears[name].adapter = adapter if kept else None
        return self.step

    def enqueue(self, tokens, bounds):
        """A step without a wait for the device → milliseconds of the host. The layers' forward and backward alone."""
        positions = positions_of(bounds, tokens.device)
        begin = time.perf_counter()
        self.model(tokens, positions, bounds, tokens[None].roll(-1, 1)).mean().backward()
        spent = (time.perf_counter() - begin) * 1e3
        self.model.zero_grad(set_to_none=True)
        return spent

    def step(self, tokens, bounds):
        labels = tokens[None].roll(-1, 1)
        return backward(self.model(tokens, positions_of(bounds, tokens.device), bounds, labels).mean(), self.model)


class Transformers:
    """transformers + PEFT at its best: grouped_mm experts, SDPA on one document, FlexAttention on a packed row."""

    def __init__(self, depth: int):
        import peft
        import transformers

        config = transformers.Glm4MoeConfig(
            num_hidden_layers=depth,
            first_k_dense_replace=1,
            hidden_size=AIR.hidden_size,
            intermediate_size=AIR.ffn_hidden_size,
            moe_intermediate_size=AIR.moe_ffn_hidden_size,
            num_attention_heads=AIR.num_attention_heads,
            num_key_value_heads=AIR.num_query_groups,
            head_dim=AIR.kv_channels,
            n_routed_experts=AIR.num_moe_experts,
            num_experts_per_tok=AIR.moe_router_topk,
            attention_bias=True,
            vocab_size=AIR.vocab_size,
        )
        config._experts_implementation = "grouped_mm"
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("cuda"):
            self.base = transformers.Glm4MoeForCausalLM(config)
        torch.set_default_dtype(torch.float32)
        targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
        self.model = peft.get_peft_model(self.base, peft.LoraConfig(r=32, lora_alpha=64, target_modules=targets))
        randomise(self.model)
        self.model.enable_input_require_grads()
        self.model.train()

    def set_depth(self, depth: int) -> None:
        self.base.config.num_hidden_layers = depth

    def prepare(self, attention: str, recompute: bool):
        self.base.set_attn_implementation(attention)
        if recompute:
            self.base.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            self.base.gradient_checkpointing_disable()
        return self.step

    def step(self, tokens, bounds):
        # positions that start again are how transformers knows documents apart
        positions = positions_of(bounds, tokens.device)[None]
        packed = {"position_ids": positions} if len(bounds) > 2 else {}
        return backward(self.model(tokens[None], labels=tokens[None], use_cache=False, **packed).loss, self.model)


class _Lora(torch.nn.Module):
    """A pair beside one of megatron's linears, added to its output by a forward hook."""

    def __init__(self, linear, r: int):
        super().__init__()
        out, size = linear.weight.shape
        new = dict(dtype=linear.weight.dtype, device=linear.weight.device)
        self.A = torch.nn.Parameter(torch.empty(r, size, **new))
        self.B = torch.nn.Parameter(torch.empty(out, r, **new))

    def __call__(self, linear, inputs, output):
        more = torch.nn.functional.linear(torch.nn.functional.linear(inputs[0], self.A), self.B)
        return (output[0] + 2 * more, *output[1:])


class Megatron:
    """megatron-core's GPTModel on Transformer Engine: grouped GEMM, fused permutation, full recompute under LoRA."""

    def __init__(self, depth: int, lora: bool = True):
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
        from megatron.core.models.gpt.gpt_model import GPTModel
        from megatron.core.transformer import TransformerConfig

        config = TransformerConfig(
            num_layers=depth,
            hidden_size=AIR.hidden_size,
            ffn_hidden_size=AIR.ffn_hidden_size,
            num_attention_heads=AIR.num_attention_heads,
            num_query_groups=AIR.num_query_groups,
            kv_channels=AIR.kv_channels,
            add_bias_linear=False,
            add_qkv_bias=True,
            normalization="RMSNorm",
            gated_linear_unit=True,
            activation_func=torch.nn.functional.silu,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            num_moe_experts=AIR.num_moe_experts,
            moe_ffn_hidden_size=AIR.moe_ffn_hidden_size,
            moe_shared_expert_intermediate_size=AIR.moe_ffn_hidden_size,
            moe_router_topk=AIR.moe_router_topk,
            moe_router_score_function="sigmoid",
            moe_router_enable_expert_bias=True,
            moe_router_dtype="fp32",
            moe_router_load_balancing_type="none",
            moe_token_dispatcher_type="alltoall",
            moe_grouped_gemm=True,
            moe_permute_fusion=True,
            moe_router_fusion=True,
            moe_layer_freq=[0] + (depth - 1) * [1],
            bf16=True,
            params_dtype=torch.bfloat16,
            bias_activation_fusion=True,
            recompute_granularity="full" if lora else None,
            recompute_method="uniform" if lora else None,
            recompute_num_layers=1 if lora else None,
            perform_initialization=False,
            gradient_accumulation_fusion=False,
            apply_rope_fusion=True,
            cross_entropy_loss_fusion=False,
        )
        self.model = GPTModel(
            config,
            get_gpt_decoder_block_spec(config, use_transformer_engine=True),
            AIR.vocab_size,
            max_sequence_length=131072,
            share_embeddings_and_output_weights=False,
            position_embedding_type="rope",
            rotary_percent=AIR.rotary_percent,
            rotary_base=int(AIR.rotary_base),
        ).cuda()
        if lora:
            self.model.requires_grad_(False)
            for layer in self.model.decoder.layers:
                for linear in (layer.self_attention.linear_qkv, layer.self_attention.linear_proj):
                    linear.lora = _Lora(linear, 32)
                    linear.register_forward_hook(linear.lora)
        randomise(self.model)
        self.model.train()
        self.lora = lora

    def set_depth(self, depth: int) -> None:
        decoder = self.model.decoder
        self.layers = getattr(self, "layers", None) or list(decoder.layers)
        decoder.layers, decoder.num_layers_per_pipeline_rank = torch.nn.ModuleList(self.layers[:depth]), depth

    def prepare(self, _):
        return self.step

    def step(self, tokens, bounds):
        from megatron.core.packed_seq_params import PackedSeqParams

        edges = torch.tensor(bounds, dtype=torch.int32, device=tokens.device)
        longest = int(np.diff(bounds).max())
        row = PackedSeqParams(
            qkv_format="thd", cu_seqlens_q=edges, cu_seqlens_kv=edges, max_seqlen_q=longest, max_seqlen_kv=longest
        )
        hidden = self.model.embedding(tokens[None], None)
        if self.lora:
            hidden.requires_grad_()  # else recompute passes no gradient
        losses = self.model(
            tokens[None],
            positions_of(bounds, tokens.device)[None],
            None,
            decoder_input=hidden,
            labels=tokens[None].roll(-1, 1),
            packed_seq_params=row,
        )
        return backward(losses.mean(), self.model)
