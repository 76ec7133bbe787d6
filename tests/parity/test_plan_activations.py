"""The planner's table of activations against what autograd keeps: the reference is torch's own saved tensors.

In fp32 on the CPU the layers keep what they keep on a GPU, but for three things that plain torch does there: `value` is a view of
linear_qkv's whole output where no kernel splits it, a norm whose weight learns keeps its normed input, and the two norms of a
query and key keep their input as it came. Indices that ride on autograd contexts are not saved tensors: 24 bytes a row.
"""

import dataclasses

import pytest
import torch

from glm45_tune.mcore import lora
from glm45_tune.mcore.model import GLM45Model, ModelOptions
from glm45_tune.plan import activations as acts
from glm45_tune.plan.models import find_spec
from glm45_tune.recipe import Recipe

TOKENS = 256
SMALL = dict(
    hidden_size=128, ffn_hidden_size=320, moe_ffn_hidden_size=48, num_attention_heads=12, num_query_groups=2, kv_channels=32,
    num_moe_experts=16, vocab_size=512, mtp_num_layers=0,
)  # fmt: skip
KINDS = {"attention": ["linear_qkv", "linear_proj"], "all-linear": "all-linear", "full": None}
SELECTIVE = ([], ["core_attn"], ["moe"])


def _recipe(targets, modules) -> Recipe:
    document = {
        "model": {"path": "x", "params_dtype": "fp32"},
        "data": {"train": "x", "seq_length": TOKENS},
        "train": {"steps": 1, "global_batch_size": 1},
        "output_dir": "x",
    }
    if targets:
        document["lora"] = {"r": 8, "target_modules": targets}
    if modules:
        document["train"] |= {"recompute_granularity": "selective", "recompute_modules": modules}
    return Recipe.from_dict(document)


def _kept(spec, layout, recipe: Recipe) -> int:
    """Bytes of all storages that a forward saves for its backward, weights apart."""
    train = recipe.train
    modules = list(train.recompute_modules) if train.recompute_granularity else []
    options = ModelOptions(recompute_granularity=train.recompute_granularity, recompute_modules=modules)
    model = GLM45Model(spec, layout, options)
    if recipe.lora:
        lora.attach(model, recipe.lora, seed=1)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.02)
    model.train()
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    storages = {}  # the storage itself is held, so that no address comes twice

    def pack(tensor):
        storages.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage())
        return tensor

    tokens = torch.randint(0, spec.vocab_size, (TOKENS,), generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(tokens, torch.arange(TOKENS), [0, TOKENS], tokens[None])
    found = sum(storage.nbytes() for address, storage in storages.items() if address not in own)
    del loss
    return found


CASES = [("GLM-4.5-Air", kind, modules) for kind in KINDS for modules in SELECTIVE]
CASES += [("GLM-4.5", kind, []) for kind in KINDS]


@pytest.mark.parametrize(
    "name, kind, modules", CASES, ids=lambda value: "+".join(value) if isinstance(value, list) else value
)
def test_a_layer_keeps_what_the_table_says(name, kind, modules, one_rank):
    """A layer with experts is the difference of four layers and three, a dense one besides that of which is which. Within 0.1 %."""
    whole, _ = find_spec(name)
    recipe = _recipe(KINDS[kind], modules)
    three = dataclasses.replace(whole, num_layers=3, num_dense_layers=1, **SMALL)
    base = _kept(three, one_rank, recipe)
    moe = _kept(dataclasses.replace(three, num_layers=4), one_rank, recipe) - base
    dense = moe + _kept(dataclasses.replace(three, num_dense_layers=2), one_rank, recipe) - base

    sizes = acts.Sizes(three, one_rank, recipe)
    query, kv = three.query_size, three.kv_size
    plain = 0 if three.qk_layernorm else query + kv
    if recipe.lora is None:
        plain += 2 * three.hidden_size + (query + kv if three.qk_layernorm else 0)
    plain *= 4 * TOKENS
    indices = 0 if modules == ["moe"] else 24 * sizes.expert_rows
    assert acts.total(acts.layer_terms(sizes, True)) + plain - indices == pytest.approx(moe, rel=1e-3)
    assert acts.total(acts.layer_terms(sizes, False)) + plain == pytest.approx(dense, rel=1e-3)
