"""KTO without pairs: rows of one answer with a label, what is trained of them, and the loss held to the paper's formula by hand."""

import json
from functools import partial

import numpy as np
import pytest
import torch

from glm45_tune.data.chat import load_tokenizer
from glm45_tune.data.labels import LabelledRenderer, only_label
from glm45_tune.errors import DataError
from glm45_tune.recipe import DataConfig, Recipe
from glm45_tune.training import loop
from glm45_tune.training.prepare import prepare
from glm45_tune.training.samples import Samples

Q, A, B = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}],
}
TOOL = {"role": "tool", "content": "r"}
LORA = {"r": 4, "target_modules": "all-linear"}


@pytest.fixture(scope="module")
def tokenizer(checkpoints):
    return load_tokenizer(checkpoints["air"])


@pytest.fixture
def job(checkpoints, make_recipe, tmp_path):
    """A checked job of kto over rows: (rows, options of preference, other sections)."""

    def make(rows, preference=(), **sections):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        sections = {"lora": LORA, "preference": {"loss": "kto", **dict(preference)}} | sections
        return prepare(Recipe.from_dict(make_recipe(checkpoints["air"], path, tmp_path / "run", **sections)))

    return make


def rows(count=9):
    """Answers of different lengths, every third one undesirable."""
    for n in range(count):
        yield {
            "prompt": f"第{n}个问题。" + "Tell me. " * (n % 4),
            "completion": "答案 " * (1 + n % 5),
            "label": n % 3 != 0,
        }


@pytest.mark.parametrize(
    "row, trained",
    [
        ({"prompt": "q", "completion": "a"}, "\na<|user|>"),
        ({"messages": [Q, A, Q, B]}, "\nb<|user|>"),
        ({"messages": [Q, A, Q, CALL, TOOL, B]}, "\n<tool_call>f\n</tool_call><|observation|>\nb<|user|>"),
        ({"instruction": "q", "input": "", "output": "a"}, "\na<|user|>"),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "\na<|user|>"),
        ({"query": "q", "response": "b", "history": [["q", "a"]]}, "\nb<|user|>"),
    ],
)
@pytest.mark.parametrize("label", [True, False])
def test_what_is_judged_is_the_answer_behind_the_last_question(tokenizer, row, trained, label):
    (sample,) = LabelledRenderer(tokenizer, DataConfig(train="x")).render(row | {"label": label}, "x", 1).samples
    assert sample.row == {"label": label}
    assert tokenizer.decode(sample.input_ids[sample.loss_mask > 0].tolist()) == trained


def test_sample_texts_want_desirable_and_chosen_answers_alone(job):
    def wanted(rows):
        made = job(rows, logging={"num_samples": 3})
        return [
            made.tokenizer.decode(answer).removesuffix("<|user|>").strip() for _, answer in Samples(made, None)._cuts
        ]

    labelled = [{"prompt": "q", "completion": f"a{n}", "label": n % 2 == 1} for n in range(8)]
    assert wanted(labelled) == ["a1", "a3", "a5"]
    assert wanted(labelled[:3]) == ["a1"]
    assert wanted([{"prompt": "q", "chosen": f"yes {n}", "rejected": f"no {n}"} for n in range(5)]) == [
        "yes 0",
        "yes 1",
        "yes 2",
    ]


@pytest.mark.parametrize(
    "row, words",
    [
        ({"prompt": "q", "completion": "a"}, "label is missing; kto wants true"),
        ({"prompt": "q", "completion": "a", "label": None}, "label is missing"),
        ({"prompt": "q", "completion": "a", "label": 1}, "label is 1; kto wants true"),
        ({"prompt": "q", "completion": "a", "label": "true"}, "label is 'true'"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "is a pair"),
        ({"prompt": "q", "label": True}, "is a prompt without an answer"),
        ({"text": "q", "label": True}, "is plain text"),
        ({"messages": [Q, A, Q], "label": True}, "nothing in this row would be trained"),
    ],
)
def test_a_bad_row_says_what_is_wrong(tokenizer, row, words):
    with pytest.raises(DataError, match="x:1: .*") as fault:
        LabelledRenderer(tokenizer, DataConfig(train="x")).render(row, "x", 1)
    assert words in str(fault.value)


def test_the_first_row_decides_and_every_other_one_is_held_to_it(job, checkpoints, cli, tmp_path):
    with pytest.raises(DataError, match=r"rows.jsonl:2: label is missing"):
        job([{"prompt": "q", "completion": "a", "label": True}, {"prompt": "q", "completion": "a"}])
    with pytest.raises(DataError, match=r"rows.jsonl:2: has one answer.*kto also takes one with a label"):
        job([{"prompt": "q", "chosen": "a", "rejected": "b"}, {"prompt": "q", "completion": "a", "label": True}])
    with pytest.raises(DataError, match=r"rows.jsonl:1: has one answer"):  # a label is kto's alone
        job(rows(), {"loss": "sigmoid"})
    assert (
        job(rows()).kind == "labelled" and job([{"prompt": "q", "chosen": "a", "rejected": "b"}]).kind == "preference"
    )
    recipe = {
        "model": {"path": str(checkpoints["air"])},
        "preference": {"loss": "kto"},
        "lora": LORA,
        "train": {"steps": 1},
    }
    recipe |= {"data": {"train": str(tmp_path / "rows.jsonl")}, "output_dir": str(tmp_path / "out")}
    job(rows())
    (tmp_path / "kto.yaml").write_text(json.dumps(recipe))
    code, out, _ = cli("data", tmp_path / "kto.yaml", "--json", "--show", 2)
    document = json.loads(out)
    assert code == 0 and document["summary"]["kind"] == "labelled" and document["summary"]["desirable"] == 6
    assert [sample["answer"] for sample in document["samples"]] == ["undesirable", "desirable"]


def test_other_labels_are_other_data(job):
    """A run that goes on is compared with what it began with."""
    first = job(rows()).train.samples.digest()
    assert job(rows()).train.samples.digest() == first
    assert job(row | {"label": not row["label"]} for row in rows()).train.samples.digest() != first


def test_answers_of_one_label_alone_are_warned_of(job, capfd):
    made = job([row | {"label": False} for row in rows()], train={"steps": 1})
    assert only_label(made.train.samples) is False and only_label(job(rows()).train.samples) is None
    loop.run(made)
    assert "all 9 answers have the label false" in capfd.readouterr().err
    values = json.loads((made.run / "metrics.jsonl").read_text())
    assert "preference/undesirable_reward" in values and "preference/desirable_reward" not in values


def by_hand(trainer, base, samples, beta, weights, labels) -> tuple[float, float]:
    """(loss, reference point) of arXiv:2402.01306, eq. 7 and 8, from each answer alone."""

    def log_ratio(ids, mask):
        own = np.array(trainer.score(ids.tolist()))
        return float(((own - base(ids)) * mask[1:]).sum())

    starts = [int(np.argmax(s.loss_mask > 0)) for s in samples]
    others = [(n + 1) % len(samples) for n in range(len(samples))]
    mixed = []
    for n, other in enumerate(others):
        prompt, answer = samples[n].input_ids[: starts[n]], samples[other].input_ids[starts[other] :]
        mask = np.concatenate([0 * prompt, samples[other].loss_mask[starts[other] :]])
        mixed.append(log_ratio(np.concatenate([prompt, answer]), mask))
    point = max(float(np.mean(mixed)), 0.0)
    losses = []
    for sample, label in zip(samples, labels):
        gain = beta * (log_ratio(sample.input_ids, sample.loss_mask) - point)
        value = 1 / (1 + np.exp(-gain if label else gain))
        losses.append(weights[not label] * (1 - value))
    return float(np.mean(losses)), point


def test_loss_and_reference_point_are_the_papers_answer_by_answer(job, checkpoints):
    """An adapter that changed much, packed rows against each answer alone, 1e-5; a twin that takes the labels wrong is seen."""
    from glm45_tune.mcore import runtime
    from glm45_tune.mcore.step import Trainer
    from glm45_tune.training.labelled import Labelled

    options = {"beta": 0.4, "desirable_weight": 1.25, "undesirable_weight": 0.75}
    made = job(rows(), options, train={"steps": 1, "global_batch_size": 8, "micro_batch_size": 2})
    runtime.start(made.layout)
    trainer = Trainer(made.recipe, made.layout, made.source)
    reference = {}

    def base(ids):
        return reference[ids.tobytes()]

    method, members = Labelled(made, trainer), [sample for row in made.rows_of_step(0) for sample in row]
    assert len(made.rows_of_step(0)) < len(members) == 9
    mixed = method._mixed(members)
    for sample in [*members, *mixed]:  # B is still 0: the policy is the base
        reference[sample.input_ids.tobytes()] = np.array(trainer.score(sample.input_ids.tolist()))
    noise, points = torch.Generator().manual_seed(0), []
    labels = [sample.row["label"] for sample in members]
    changes = {
        name: 0.005 * torch.randn(parameter.shape, generator=noise)
        for name, parameter in trainer.module.named_parameters()
        if name.endswith("lora_B")
    }
    for sign in (1, -2):  # there and to the other side: the reference point is clamped once
        with torch.no_grad():
            for name, parameter in trainer.module.named_parameters():
                parameter += sign * changes.get(name, 0)
        wanted, point = by_hand(trainer, base, members, 0.4, (1.25, 0.75), labels)
        wrong, _ = by_hand(trainer, base, members, 0.4, (1.25, 0.75), [not label for label in labels])
        found = method._divergence(members)
        chosen = method._with_reference(made.plan.share(made.rows_of_step(0), 0))
        loss = trainer.measure(chosen, len(chosen), partial(method._objective, members, found)).sums["loss"]
        assert found == pytest.approx(point, rel=1e-4, abs=1e-9)
        assert loss == pytest.approx(wanted, rel=1e-5) and abs(wrong - wanted) > 0.01
        points.append(found)
    assert min(points) == 0 < max(points)


def test_desirable_answers_become_likelier_and_undesirable_ones_less(job):
    """The first step starts from the reference: its loss is half the mean weight; then the rewards part."""
    train, rate = {"steps": 3, "global_batch_size": 8}, {"lr": 1e-3, "min_lr": 1e-3}
    made = job(rows(), {"beta": 0.5, "undesirable_weight": 2.0}, train=train, optimizer=rate, data={"eval_ratio": 0.2})
    loop.run(made)
    steps = [json.loads(line) for line in (made.run / "metrics.jsonl").read_text().splitlines()]
    share = steps[0]["preference/desirable_share"]
    assert steps[0]["train/loss"] == pytest.approx((share + 2 * (1 - share)) / 2, rel=1e-6)
    assert steps[0]["preference/margin"] == steps[0]["preference/reference_point"] == 0
    assert steps[-1]["preference/margin"] > 0.05 and steps[-1]["train/loss"] < steps[0]["train/loss"]
    assert "eval/loss" in steps[-1]
