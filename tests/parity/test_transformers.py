"""Our model against transformers' own Glm4MoeForCausalLM, on the same checkpoint, in fp32.

Tolerances: the two sum in another order, which was measured at 2e-7 of the logit range; 1e-4 is the project's law, and a wrong
rope, mask, router or weight moves logits by 1e-2 and more (the broken twins).
"""

import json
import weakref

import pytest
import torch
import torch.nn.functional as F
import transformers
from megatron.core.tensor_parallel import RowParallelLinear

from glm45_tune.conversion.stream import open_model
from glm45_tune.data.batch import collate, total_weights
from glm45_tune.mcore.layers import attention, weight
from glm45_tune.mcore.load import load_weights
from glm45_tune.mcore.model import GLM45Model, ModelOptions
from glm45_tune.mcore.step import Trainer
from glm45_tune.recipe import Recipe
from glm45_tune.training.prepare import prepare

transformers.utils.logging.set_verbosity_error()


def ours(directory, layout, **options) -> GLM45Model:
    source = open_model(directory)
    model = GLM45Model(source.spec, layout, ModelOptions(**options))
    load_weights(model, source)
    return model.eval()


def theirs(directory, dtype=torch.float32):
    return transformers.Glm4MoeForCausalLM.from_pretrained(str(directory), dtype=dtype).eval()


def tokens_of(model, count=80, seed=3) -> torch.Tensor:
    return torch.randint(0, model.spec.vocab_size, (count,), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logit_difference(model, reference, tokens) -> float:
    logits = model(tokens, torch.arange(len(tokens)), [0, len(tokens)])
    expected = reference(tokens[None]).logits[0]
    return ((logits - expected).abs().max() / (expected.max() - expected.min())).item()


@pytest.mark.parametrize("like", ["air", "355b", "air-no-mtp", "355b-no-mtp"])
def test_logits_equal_transformers(checkpoints, one_rank, like):
    model = ours(checkpoints[like], one_rank)
    assert logit_difference(model, theirs(checkpoints[like]), tokens_of(model)) <= 1e-4


BROKEN = {
    "rope over the whole head": lambda model: object.__setattr__(model.spec, "rotary_percent", 1.0),
    "router bias forgotten": lambda model: [
        module.expert_bias.zero_() for module in model.modules() if getattr(module, "expert_bias", None) is not None
    ],
    "q and k exchanged": lambda model: model.decoder.layers[0].self_attention.linear_qkv.weight.data.copy_(
        model.decoder.layers[0].self_attention.linear_qkv.weight.data.roll(32, 0)
    ),
    "qkv bias forgotten": lambda model: model.decoder.layers[0].self_attention.linear_qkv.bias.data.zero_(),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_fault_moves_the_logits(checkpoints, one_rank, fault):
    """The twin of the test above: each of these must exceed its tolerance."""
    model = ours(checkpoints["air"], one_rank)
    spec = model.spec
    percent = spec.rotary_percent
    try:
        with torch.no_grad():
            BROKEN[fault](model)
        assert logit_difference(model, theirs(checkpoints["air"]), tokens_of(model)) > 1e-4
    finally:
        object.__setattr__(spec, "rotary_percent", percent)


def test_bf16_is_no_worse_than_transformers_own(checkpoints, one_rank):
    """bf16 logits are held to transformers' own bf16 error against its fp32, on the mean over all logits of 16 rows: a row's

    error is mostly that of a token or two whose experts a rounding changed.
    """
    exact, rounded = theirs(checkpoints["air"]), theirs(checkpoints["air"], torch.bfloat16)
    model = ours(checkpoints["air"], one_rank, params_dtype=torch.bfloat16)
    their_error = our_error = 0.0
    for seed in range(16):
        tokens = torch.randint(0, model.spec.vocab_size, (96,), generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            reference = exact(tokens[None]).logits[0]
            their_error += (rounded(tokens[None]).logits[0].float() - reference).abs().mean()
            our_error += (model(tokens, torch.arange(96), [0, 96]).float() - reference).abs().mean()
    assert our_error <= 1.2 * their_error


def masked_cross_entropy(reference, samples, shift=1) -> float:
    """transformers' logits, each sample by itself; mean over the trained tokens of all of them."""
    total = weight = 0.0
    for sample in samples:
        ids, mask = torch.from_numpy(sample.input_ids).long(), torch.from_numpy(sample.loss_mask)
        with torch.no_grad():
            losses = F.cross_entropy(reference(ids[None]).logits[0, :-1], ids[1:], reduction="none")
        mask = mask[shift:] if shift else mask[:-1]
        total += (losses * mask).sum().item()
        weight += mask.sum().item()
    return total / weight


@pytest.mark.parametrize("lora", [None, {"r": 4, "target_modules": "all-linear"}], ids=["full", "lora"])
def test_the_first_loss_is_transformers_masked_cross_entropy(
    checkpoints, corpus, one_rank, make_recipe, tmp_path, lora
):
    sections = {"lora": lora} if lora else {}
    recipe = Recipe.from_dict(make_recipe(checkpoints["355b"], corpus, tmp_path, **sections))
    job = prepare(recipe)
    trainer = Trainer(recipe, one_rank, job.source)
    rows = job.plan.rows_of_step(0)
    samples = [job.train.samples[index] for row in rows for index in job.train_rows[row]]
    batches = [collate([job.train.samples[i] for i in job.train_rows[row]], 1, 1, 0) for row in rows]
    loss = trainer.train(batches, len(batches), total_weights(samples, 1).tolist(), 0.0).losses[0]
    reference = theirs(checkpoints["355b"])
    assert abs(loss / masked_cross_entropy(reference, samples) - 1) <= 1e-5
    assert abs(loss / masked_cross_entropy(reference, samples, shift=0) - 1) > 1e-4  # the twin: a mask one place off


@pytest.mark.parametrize("like", ["air", "355b"])
def test_verify_forward_agrees(checkpoints, like, cli):
    code, out, _ = cli("verify", checkpoints[like], checkpoints[like], "--forward", "--json")
    report, layers = json.loads(out), {"air": 3, "355b": 5}[like]
    assert code == 0 and report["equal"]
    assert list(report["differences"]) == ["embedding", *(f"layer {n}" for n in range(layers)), "logits"]
    assert list(report["router"]) == ["layer 1", "layer 2"] if like == "air" else ["layer 3", "layer 4"]
    assert max(report["differences"].values()) < 2e-6 and max(report["router"].values()) == 0


def test_verify_forward_sees_another_model(checkpoints, cli):
    code, out, err = cli("verify", checkpoints["air"], checkpoints["air-other"], "--forward", "--json")
    assert code == 3 and not json.loads(out)["equal"] and "differ" in err


def test_verify_forward_holds_one_layer_of_each(checkpoints, monkeypatch):
    """The fault of a layer shows at that layer alone, and no two layers of a kind live at once."""
    from glm45_tune.conversion.hf_files import HfDir
    from glm45_tune.mcore import forward

    living, most = [], []
    real = forward._Decoder.__init__

    def counted(self, spec):
        real(self, spec)
        living.append(weakref.ref(self))
        most.append(sum(reference() is not None for reference in living))

    monkeypatch.setattr(forward._Decoder, "__init__", counted)

    class Shifted(HfDir):
        def read(self, name, *where):
            tensor = super().read(name, *where)
            bias = name == "model.layers.1.mlp.gate.e_score_correction_bias"
            return tensor + torch.arange(len(tensor)) / 10 if bias else tensor

    report = forward.compare_forward(HfDir(checkpoints["air"]), Shifted(checkpoints["air"]))
    assert report.router["layer 1"] > 0.5 and report.router["layer 2"] == 0 and not report.equal
    assert report.differences["layer 2"] < 2e-6 and max(most) == 1


def _token_losses(model, samples):
    batch = collate(samples, 1, 1, 0)
    with torch.no_grad():
        return model(batch.tokens, batch.positions, batch.bounds, batch.labels)[0]


def test_packed_equals_unpacked(checkpoints, corpus, one_rank, make_recipe, tmp_path, monkeypatch):
    """Sum of the token losses of a packed row against each sample by itself, 1e-6 relative in fp32."""
    job = prepare(Recipe.from_dict(make_recipe(checkpoints["air"], corpus, tmp_path)))
    model = ours(checkpoints["air"], one_rank)
    samples = job.train.samples[:6]
    alone = sum(_token_losses(model, [sample]).double().sum().item() for sample in samples)
    packed = _token_losses(model, samples).double().sum().item()
    assert abs(packed / alone - 1) <= 1e-6
    whole = attention.packed_attention
    monkeypatch.setattr(
        attention, "packed_attention", lambda q, k, v, row: whole(q, k, v, attention.PackedRow([0, len(q)], q.device))
    )
    leaking = _token_losses(model, samples).double().sum().item()  # the twin: attention across documents
    assert abs(leaking / alone - 1) > 1e-4


def test_a_neighbour_does_not_move_a_samples_losses(checkpoints, corpus, one_rank, make_recipe, tmp_path):
    """Bit equal, though the neighbour changes how many tokens each expert sees."""
    job = prepare(Recipe.from_dict(make_recipe(checkpoints["air"], corpus, tmp_path)))
    model = ours(checkpoints["air"], one_rank)
    sample = job.train.samples[3]
    length = len(sample.input_ids)
    first, second = (_token_losses(model, [sample, neighbour])[:length] for neighbour in job.train.samples[:2])
    assert torch.equal(first, second)


@pytest.mark.parametrize("like", ["air", "355b"])
@pytest.mark.parametrize(
    "lora", [None, {"r": 4, "target_modules": ["linear_proj", "linear_fc2"]}], ids=["full", "lora"]
)
@pytest.mark.parametrize(
    "recompute",
    [
        {"recompute_granularity": "full"},
        {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 2},
        {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]},
        {"recompute_granularity": "selective", "recompute_modules": ["moe", "attention"]},
        {"recompute_granularity": "full", "recompute_method": "block", "recompute_modules": ["attention"]},
    ],
    ids=["uniform", "block", "selective", "halves", "block-and-halves"],
)
def test_recompute_changes_no_gradient(checkpoints, corpus, one_rank, make_recipe, tmp_path, like, lora, recompute):
    """1e-5 relative in fp32; the gradient of a frozen model's adapters included."""
    sections = {"lora": lora} if lora else {}
    sections["model"] = {"mtp_loss_scaling_factor": 0.3}

    def step(**train):
        recipe = Recipe.from_dict(make_recipe(checkpoints[like], corpus, tmp_path, **sections, train=train))
        job = prepare(recipe)
        trainer = Trainer(recipe, one_rank, job.source)
        batch = collate(job.train.samples[:4], 2, 1, 0)
        result = trainer.train([batch], 1, batch.weights.sum(1).tolist(), 0.0)
        return result, {n: p.main_grad.clone() for n, p in trainer.module.named_parameters() if p.requires_grad}

    plain, gradients = step()
    again, recomputed = step(**recompute)
    assert plain.grad_norm > 0 and abs(again.grad_norm / plain.grad_norm - 1) <= 1e-5
    for name, gradient in gradients.items():
        assert (recomputed[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max() + 1e-9, name


@pytest.mark.parametrize("method, kept", [("block", 0), ("uniform", 1)])
def test_recompute_leaves_out_what_nobody_reads(
    checkpoints, corpus, one_rank, make_recipe, tmp_path, monkeypatch, method, kept
):
    """The last product of what runs again: the experts' second one, and each half's last linear (uniform: the MLP half's alone)."""
    calls = {"experts": 0, "linears": 0}

    def counted(name, call):
        def count(*arguments, **settings):
            calls[name] += 1
            return call(*arguments, **settings)

        return count

    monkeypatch.setattr(weight, "grouped_mm", counted("experts", weight.grouped_mm))
    monkeypatch.setattr(RowParallelLinear, "forward", counted("linears", RowParallelLinear.forward))

    def count(**train):
        recipe = Recipe.from_dict(make_recipe(checkpoints["air"], corpus, tmp_path, train=train))
        job = prepare(recipe)
        trainer = Trainer(recipe, one_rank, job.source)
        batch = collate(job.train.samples[:4], 1, 1, 0)
        calls.update(experts=0, linears=0)
        trainer.train([batch], 1, batch.weights.sum(1).tolist(), 0.0)
        return dict(calls), job.source.spec

    plain, spec = count()
    again, _ = count(
        recompute_granularity="full",
        recompute_method=method,
        recompute_num_layers=spec.num_layers if method == "block" else 1,
    )
    assert plain["experts"] == 4 * (spec.num_layers - spec.num_dense_layers) and plain["linears"] == 2 * spec.num_layers
    assert 4 * again["experts"] == 5 * plain["experts"]
    assert again["linears"] == plain["linears"] + kept * spec.num_layers
