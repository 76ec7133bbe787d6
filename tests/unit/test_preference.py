"""Preference tuning on the trainer: the loss of packed pairs is the papers' on each pair alone, under either reference."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from glm45_tune.conversion.stream import open_model
from glm45_tune.data.pairs import Pairs
from glm45_tune.mcore.load import load_weights
from glm45_tune.mcore.model import GLM45Model
from glm45_tune.recipe import Recipe
from glm45_tune.training import loop
from glm45_tune.training.prepare import prepare

LORA = {"lora": {"r": 4, "target_modules": "all-linear"}}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A file of 13 pairs of different lengths, some of several turns."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = []
    for number in range(13):
        prompt = [{"role": "user", "content": f"第{number}个问题。" + "Tell me. " * (number % 4)}]
        if number % 3 == 0:
            prompt += [{"role": "assistant", "content": "什么?"}, {"role": "user", "content": "再说。"}]
        sides = {
            "chosen": [{"role": "assistant", "content": "答案 " * (1 + number % 5)}],
            "rejected": [
                {"role": "assistant", "content": "no " * (1 + number % 3), "reasoning_content": "想" * (number % 4)}
            ],
        }
        rows.append({"prompt": prompt, **sides})
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def train(checkpoints, pairs, make_recipe, tmp_path):
    """Run a recipe in this process: returns its metrics, a dict a step."""

    def run(name="run", **sections) -> list[dict]:
        recipe = make_recipe(checkpoints["air"], pairs, tmp_path / name, **sections)
        recipe["data"]["seq_length"] = 320
        loop.run(prepare(Recipe.from_dict(recipe)))
        return [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]

    return run


def answers(checkpoint, samples) -> torch.Tensor:
    """Log-probability of each sample's trained tokens by itself, [samples], of the base model."""
    source = open_model(checkpoint)
    from glm45_tune.layout import Layout

    model = GLM45Model(source.spec, Layout()).eval()
    load_weights(model, source)
    found = []
    with torch.no_grad():
        for sample in samples:
            ids = torch.from_numpy(sample.input_ids.astype(np.int64))
            logps = -model(ids, torch.arange(len(ids)), [0, len(ids)], torch.roll(ids, -1)[None])[0, :-1]
            found.append((logps * torch.from_numpy(sample.loss_mask[1:].copy())).sum())
    return torch.stack(found)


@pytest.mark.parametrize("loss, beta, first", [("sigmoid", 0.5, np.log(2)), ("ipo", 0.02, 625.0), ("kto", 0.5, 0.5)])
def test_the_first_step_starts_from_the_reference_and_the_next_ones_learn(train, loss, beta, first):
    """Before any update policy and reference are the same bits: the loss is its constant, margins exactly 0."""
    settings, rate = {"steps": 4, "global_batch_size": 8}, {"lr": 2e-4, "min_lr": 2e-4}
    steps = train(
        **LORA, preference={"loss": loss, "beta": beta}, train=settings, optimizer=rate, data={"eval_ratio": 0.2}
    )
    assert steps[0]["train/loss"] == pytest.approx(first, rel=1e-6)
    assert steps[0]["preference/margin"] == 0 and steps[0]["preference/accuracy"] == 0
    assert steps[-1]["train/loss"] < steps[0]["train/loss"] and steps[-1]["preference/margin"] > 0
    assert steps[-1]["preference/accuracy"] > 0.5 and "eval/accuracy" in steps[-1]
    assert not any("routes" in name for step in steps for name in step)


def test_log_probabilities_and_the_sft_term_are_those_of_each_pair_alone(
    train, checkpoints, pairs, make_recipe, tmp_path
):
    """Packed rows of pairs against one answer at a time: chosen and rejected log-probabilities and the cross entropy, 1e-5."""
    steps = train(**LORA, preference={"sft_weight": 0.5}, train={"steps": 1, "global_batch_size": 16})
    recipe = make_recipe(checkpoints["air"], pairs, tmp_path / "other", **LORA, preference={}, data={"seq_length": 320})
    job = prepare(Recipe.from_dict(recipe))
    every = [sample for row in job.rows_of_step(0) for sample in row]
    every = [side for pair in Pairs(job.train.samples) for side in (pair.chosen, pair.rejected)]
    logps = answers(checkpoints["air"], every)
    lengths = torch.tensor([float(sample.loss_mask.sum()) for sample in every])
    assert len(every) == 26
    assert steps[0]["preference/chosen_logprob"] == pytest.approx(logps[0::2].mean().item(), rel=1e-5)
    assert steps[0]["preference/rejected_logprob"] == pytest.approx(logps[1::2].mean().item(), rel=1e-5)
    entropy = -(logps / lengths)[0::2].mean().item()
    assert steps[0]["preference/cross_entropy"] == pytest.approx(entropy, rel=1e-5)
    assert steps[0]["train/loss"] == pytest.approx(np.log(2) + 0.5 * entropy, rel=1e-5)


def test_a_precomputed_reference_trains_as_the_adapter_switched_off_does(train):
    """Equal losses, step for step, 1e-5; and all weights can be trained against it."""
    settings = {"train": {"steps": 3, "global_batch_size": 2, "micro_batch_size": 2}}
    off = train("off", **LORA, preference={"loss": "sigmoid", "length_normalised": True, "beta": 2.0}, **settings)
    kept = {"loss": "sigmoid", "length_normalised": True, "beta": 2.0, "reference": "precomputed"}
    before = train("before", **LORA, preference=kept, **settings)
    for a, b in zip(off, before, strict=True):
        assert a["train/loss"] == pytest.approx(b["train/loss"], rel=1e-5)
        assert a["preference/margin"] == pytest.approx(b["preference/margin"], rel=1e-4, abs=1e-5)
    whole = train("whole", preference={"reference": "precomputed"}, train={"steps": 3, "global_batch_size": 8})
    assert whole[0]["train/loss"] == pytest.approx(np.log(2), rel=1e-5) and whole[-1]["train/loss"] < np.log(2)


def test_a_precomputed_reference_is_of_the_data_there_is(train, pairs, tmp_path):
    """Gone on with other pairs, held out and trained: measured again, of the model before its first step."""
    rows = pairs.read_text(encoding="utf-8").splitlines(keepends=True)
    for name, chosen in (("first", rows[:8]), ("second", rows[5:]), ("held", rows[:3]), ("other", rows[9:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(chosen), encoding="utf-8")
    found = []
    for reference in ("adapter_off", "precomputed"):
        for steps, trained, held in ((2, "first", "held"), (4, "second", "other")):
            last = train(
                reference, **LORA, preference={"beta": 2.0, "length_normalised": True, "reference": reference},
                train={"steps": steps, "global_batch_size": 4, "eval_interval": 1, "save_interval": 1, "on_change": "continue"},
                data={"train": str(tmp_path / f"{trained}.jsonl"), "eval": str(tmp_path / f"{held}.jsonl")},
            )  # fmt: skip
        found.append(last)
    for a, b in zip(*found, strict=True):
        for name in ("train/loss", "eval/loss"):
            assert a[name] == pytest.approx(b[name], rel=1e-5), (a["step"], name)


def test_the_gradient_is_that_of_the_formula():
    """−log σ of the margin, differentiated by hand: −β σ(−β h) for the chosen answer, its opposite for the rejected one."""
    from glm45_tune.rl.preference import pair_losses

    values = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (gradient,) = torch.autograd.grad(pair_losses(*values, "sigmoid", 0.3).sum(), values)
    h = (values[0] - values[1] - values[2] + values[3]).detach()
    wanted = -0.3 * torch.sigmoid(-0.3 * h)
    assert torch.allclose(gradient[0], wanted) and torch.allclose(gradient[1], -wanted)
    assert torch.allclose(F.logsigmoid(0.3 * h).neg(), pair_losses(*values.detach(), "sigmoid", 0.3))


@pytest.mark.parametrize(
    "change, said",
    [
        ({"preference": {}, "data": {"streaming": True}}, "streaming"),
        ({"preference": {}, "lora": None}, "no lora section"),
        ({"preference": {"loss": "kto", "reference": "precomputed"}}, "adapter_off"),
        ({"preference": {"bta": 0.1}}, "Did you mean preference.beta"),
    ],
)
def test_what_does_not_go_together_is_said(change, said, make_recipe, tmp_path, checkpoints, pairs):
    from glm45_tune.errors import RecipeError

    recipe = make_recipe(checkpoints["air"], pairs, tmp_path / "x", **LORA)
    for name, section in change.items():
        recipe[name] = section if section is None else (recipe.get(name) or {}) | section
    with pytest.raises(RecipeError, match=said):
        Recipe.from_dict(recipe)
