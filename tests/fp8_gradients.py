"""LoRA's gradients over one base kept and multiplied in different ways: used on a CPU (tests/unit) and on a card (tests/gpu)."""

import torch

from glm45_tune.conversion.fp8 import quantize_channels
from glm45_tune.layout import Layout
from glm45_tune.mcore import lora, runtime
from glm45_tune.mcore.layers.fp8 import FP8
from glm45_tune.mcore.layers.router import Replay, Router
from glm45_tune.mcore.model import GLM45Model, ModelOptions
from glm45_tune.recipe import LoraConfig


@torch.no_grad()
def _fill(model) -> None:
    """Trained-like scales, the same values whatever they are kept in: weights of 0.02, an adapter that has only begun to learn."""
    for number, (name, tensor) in enumerate(model.named_parameters()):
        size = 0.002 if name.endswith("lora_B") else 0.02
        generator = torch.Generator(tensor.device).manual_seed(number)
        values = torch.empty(tensor.shape, device=tensor.device)
        values.normal_(float("norm" in name), size, generator=generator)
        if tensor.dtype == FP8:
            module = model.get_submodule(name.rpartition(".")[0])
            q, scale = quantize_channels(values.bfloat16().flatten(0, -2))
            values = q.view(values.shape)
            module.weight_scale.copy_(scale.view(tensor.shape[:-1]))
        tensor.copy_(values)


def gradients(spec, num_tokens: int, dtype, frozen_dtype: str, products: str, routes=None):
    """→ (mean loss, gradients by name, experts chosen), of random tokens in two documents; routes: experts to take instead."""
    model = GLM45Model(spec, Layout(), ModelOptions(dtype, frozen_dtype, products))
    lora.attach(model, LoraConfig(r=16, target_modules="all-linear"), seed=1)
    device = runtime.device()
    model.to(device)  # megatron leaves the router's weight on the host
    _fill(model)
    tokens = torch.randint(0, spec.vocab_size, (num_tokens,), generator=torch.Generator().manual_seed(1)).to(device)
    half = num_tokens // 2
    row = tokens, torch.arange(num_tokens, device=device) % half, [0, half, num_tokens], tokens.roll(-1)[None]
    routers = [module for module in model.train().modules() if isinstance(module, Router)]
    for router in routers:
        router.router_replay = Replay()
    with torch.no_grad():
        model(*row)
    own = {router.layer_number: router.router_replay.history[-1] for router in routers}
    for router in routers:
        router.router_replay = Replay()
        router.router_replay.expect((routes or own)[router.layer_number])
    loss = model(*row).mean()
    loss.backward()
    found = {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}
    return loss.item(), found, own


def cosines(ours: dict, theirs: dict) -> dict[str, float]:
    return {
        name: torch.nn.functional.cosine_similarity(ours[name].flatten(), theirs[name].flatten(), 0).item()
        for name in theirs
    }
