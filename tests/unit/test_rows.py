"""What becomes of a row: what of it is trained, what is done where it is too long, and a verdict on every one."""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from glm45_tune.data.chat import ChatRenderer, load_tokenizer
from glm45_tune.data.formats import FORMATS
from glm45_tune.data.length import Tokens, fit
from glm45_tune.data.sources import RENDERERS, load, load_data
from glm45_tune.errors import DataError
from glm45_tune.recipe import DataConfig

Q, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
S = {"role": "system", "content": "s"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}


@pytest.fixture(scope="module")
def tokenizer(checkpoints):
    return load_tokenizer(checkpoints["air"])


@pytest.fixture(scope="module")
def renderer(tokenizer):
    def make(**options):
        return ChatRenderer(tokenizer, DataConfig(train="x", **options))

    return make


def test_loss_and_loss_scale_are_honoured_with_their_end_token(renderer, tokenizer):
    messages = [Q, {**A, "loss": False}, Q, {**A, "loss_scale": 0.25}, Q, {**A, "loss": True, "loss_scale": 2}]
    (sample,) = renderer().render({"messages": messages}, "x", 1).samples
    trained = [(tokenizer.decode([t]), w) for t, w in zip(sample.input_ids.tolist(), sample.loss_mask.tolist()) if w]
    assert trained == [("\n", 0.25), ("a", 0.25), ("<|user|>", 0.25), ("\n", 2.0), ("a", 2.0), ("<|user|>", 2.0)]
    assert sample.loss_mask.sum() == 6.75


@pytest.mark.parametrize(
    "message, field",
    [
        ({**A, "loss": "yes"}, "messages[1].loss"),
        ({**A, "loss_scale": -1}, "messages[1].loss_scale"),
        ({**Q, "loss": True}, "messages[1].loss"),
    ],
)
def test_a_bad_weight_is_named(renderer, message, field):
    with pytest.raises(DataError) as fault:
        renderer().render({"messages": [Q, message, A]}, "x", 1)
    assert fault.value.field == field


def test_turns_last_and_expand(renderer, tokenizer):
    thought = {**A, "reasoning_content": "t"}
    messages = [Q, thought, Q, {**thought, "loss": False}, Q, thought]
    (last,) = renderer(turns="last").render({"messages": messages}, "x", 1).samples
    assert (last.loss_mask > 0).sum() == len(tokenizer("\n<think>t</think>\na<|user|>")["input_ids"])
    samples = renderer(turns="expand").render({"messages": messages}, "x", 1).samples
    assert len(samples) == 2  # the one with loss: false is context only
    for sample, turns in zip(samples, (2, 6)):
        ids = tokenizer.apply_chat_template(messages[:turns], return_dict=False)
        ids.append(tokenizer.convert_tokens_to_ids("<|user|>"))
        assert sample.input_ids.tolist() == ids
        text = tokenizer.decode([t for t, w in zip(sample.input_ids.tolist(), sample.loss_mask.tolist()) if w])
        assert text == "\n<think>t</think>\na<|user|>"


def test_text_is_trained_whole_behind_glms_prefix(renderer, tokenizer):
    (sample,) = renderer().render({"text": "abc"}, "x", 1).samples
    assert tokenizer.decode(sample.input_ids.tolist()) == "[gMASK]<sop>abc<|endoftext|>"
    assert sample.loss_mask.tolist()[:2] == [0, 0] and set(sample.loss_mask.tolist()[2:]) == {1.0}


@settings(deadline=None, max_examples=300)
@given(
    st.integers(0, 5),
    st.lists(st.integers(1, 30), min_size=1, max_size=8),
    st.integers(1, 40),
    st.sampled_from(["drop", "truncate", "split"]),
)
def test_no_piece_is_too_long_and_split_loses_nothing(head, turns, limit, policy):
    starts = [head + sum(turns[:n]) for n in range(len(turns))]
    total = head + sum(turns)
    mask = np.arange(total) >= head
    tokens = Tokens(np.arange(total), mask, head, starts)
    pieces = fit(tokens, limit, policy)
    if total > limit:
        pieces = [Tokens(piece.ids.tolist(), piece.mask.tolist(), piece.head, piece.turns) for piece in pieces]
    assert all(len(piece.ids) <= limit and piece.ids[:head] == list(range(head)) for piece in pieces if total > limit)
    assert all(len(piece.ids) == len(piece.mask) for piece in pieces)
    if total <= limit:
        assert pieces[0] is tokens and len(pieces) == 1
    elif head >= limit or policy == "drop":
        assert pieces == []
    elif policy == "split":
        trained = [token for piece in pieces for token, counts in zip(piece.ids, piece.mask) if counts]
        assert {token for piece in pieces for token in piece.ids[head:]} == {*range(head, total)}
        assert len(trained) == len(set(trained))
        # no room for the token that ends the answer
        full = {piece.ids[-1] + 1 for piece in pieces if len(piece.ids) == limit}
        assert set(range(head, total)) - set(trained) <= full.intersection(starts[1:])
        assert not any(piece.mask[head] for piece in pieces if piece.ids[head] in starts[1:])
    else:
        (piece,) = pieces
        body = piece.ids[head:]
        assert body == list(range(body[0], body[0] + len(body))) and body[0] in starts
        assert body[-1] == total - 1 or body[0] == starts[-1]  # whole last turns, or the last one's beginning
        assert not piece.mask[head] or body[0] == head


@pytest.mark.parametrize("policy, pieces", [("truncate", 1), ("split", 2)])
def test_a_cut_conversation_trains_answers_with_their_ends_and_no_role_token(renderer, tokenizer, policy, pieces):
    messages = [S, Q, {**A, "content": "x" * 30}, Q, {**A, "content": "y" * 30}]
    samples = renderer(overlong=policy, seq_length=70).render({"messages": messages}, "x", 1).samples
    trained = [tokenizer.decode(s.input_ids[s.loss_mask > 0].tolist()) for s in samples]
    assert len(trained) == pieces and trained[-1] == f"\n{'y' * 30}<|user|>", trained
    assert pieces == 1 or trained[0] == f"\n{'x' * 30}<|user|>"


def test_a_last_question_that_fills_the_row_trains_nothing(renderer, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"messages": [Q, A, {**Q, "content": "q" * 200}, A]}) + "\n")
    corpus = load(str(path), renderer(overlong="truncate", seq_length=60))
    assert not corpus.samples and corpus.num_rows == 1


def test_overlong_rows_are_counted_by_what_became_of_them(renderer, tmp_path):
    path = tmp_path / "x.jsonl"
    long = {"messages": [S, *[Q, {**A, "content": "x" * 40}] * 4]}
    path.write_text("\n".join(map(json.dumps, [long, {"messages": [Q, A]}])))
    head = "[gMASK]<sop><|system|>\ns"
    for policy, samples, count in (("drop", 1, "dropped"), ("truncate", 2, "truncated"), ("split", 5, "split")):
        made = renderer(overlong=policy, seq_length=70)
        corpus = load(str(path), made)
        assert len(corpus.samples) == samples and corpus.counts[count] == 1
        if policy != "drop":
            assert made.tokenizer.decode(corpus.samples[0].input_ids.tolist()).startswith(head)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
messages = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "role": st.sampled_from(["user", "assistant", "system", "tool", "gpt", "function_call", "bot"])
            | json_values,
            "content": st.text() | json_values,
            "reasoning_content": st.text() | json_values,
            "tool_calls": json_values | st.just([CALL]),
            "loss": st.booleans() | json_values,
            "loss_scale": st.floats() | json_values,
        },
    )
    | json_values,
    max_size=5,
)
fuzzed = st.dictionaries(
    st.sampled_from(
        [
            *(field for fields in FORMATS.values() for field in fields),
            "chosen",
            "output",
            "input",
            "prompt",
            "response",
            "history",
            "system",
            "tools",
            "enable_thinking",
        ]
    ),
    json_values | messages,
    max_size=5,
) | st.fixed_dictionaries({"messages": messages})


@settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(row=fuzzed, kind=st.sampled_from(["sft", "preference", "rl"]))
@example(row={"messages": [], "rejected_messages": [None]}, kind="preference")
def test_any_row_gets_a_verdict(tokenizer, row, kind):
    """A sample that trains something, or an error that names the place: never a crash, never silence."""
    try:
        samples = RENDERERS[kind](tokenizer, DataConfig(train="x")).render(row, "f.jsonl", 3).samples
        assert samples and all(sample.loss_mask.any() == (kind != "rl") for sample in samples)
    except DataError as error:
        assert str(error).startswith("f.jsonl:3: ")


def test_the_data_command_shows_a_machine_everything(checkpoints, cli, tmp_path):
    path = tmp_path / "x.jsonl"
    rows = [
        {"messages": [Q, {**A, "reasoning_content": "t"}]},
        {"messages": [{"role": "bot", "content": ""}]},
        {"messages": [Q, A]},
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n{")
    code, out, err = cli("data", path, "--model", checkpoints["air"], "--json", "--show", 5)
    document = json.loads(out)
    assert code == 2 and "2 of 4 rows are bad" in err
    assert document["errors"] == [
        {"file": str(path), "line": 2, "field": "messages[0].role", "message": document["errors"][0]["message"]},
        {"file": str(path), "line": 4, "field": None, "message": document["errors"][1]["message"]},
    ]
    assert [sample["line"] for sample in document["samples"]] == [1, 3]
    first = document["samples"][0]
    assert first["text"] == "[gMASK]<sop><|user|>\nq<|assistant|>\n<think>t</think>\na<|user|>"
    assert len(first["input_ids"]) == len(first["loss_mask"]) and first["loss_mask"][-1] == 1.0
    summary = document["summary"]
    assert summary["rows"] == 4 and summary["bad_rows"] == 2 and summary["thinking_share"] == 0.5
    code, out, _ = cli("data", path, "--model", checkpoints["air"], "on_bad_row=skip")
    assert code == 0 and "bad rows" in out and "x.jsonl:2" in out.replace("\n", "")
    assert cli("data", path)[0] == 2 and cli("data", path, "--model", checkpoints["air"], "seqlength=3")[0] == 2


def test_half_a_surrogate_pair_is_a_bad_row(renderer):
    with pytest.raises(DataError, match="x:1: .*surrogate"):
        renderer().render({"text": "a\ud800"}, "x", 1)


def test_what_comes_before_the_first_user_turn_is_split_too(renderer):
    messages = [{**A, "content": "x" * 100}, Q, A]
    samples = renderer(overlong="split", seq_length=60).render({"messages": messages}, "x", 1).samples
    assert len(samples) > 1 and max(len(sample.input_ids) for sample in samples) <= 60


def test_rows_are_held_out_whole_with_their_repetitions(tokenizer, tmp_path):
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"messages": [Q, A, Q, A]}) + "\n" for _ in range(20)))
    source = {"path": str(tmp_path / "x.jsonl"), "weight": 2.0}
    options = DataConfig(train=[source], eval_ratio=0.2, turns="expand")
    train, held = load_data(options, tokenizer, seed=1)
    lines = [{sample.line for sample in corpus.samples} for corpus in (train, held)]
    assert len(lines[1]) == 4 and not lines[0] & lines[1] and len(train.samples) + len(held.samples) == 80


@pytest.mark.parametrize(
    "row, field",
    [
        ({"system": "s", "conversations": [{"from": "human", "value": "q"}, {"from": "bot", "value": "a"}]}, "conversations[1].from"),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": None}]}, "conversations[1].value"),
        ({"instruction": "q"}, "output"),
        ({"query": "q", "response": None}, "response"),
        ({"messages": [Q, {"role": "assistant", "content": None}]}, "messages[1].content"),
    ],
)  # fmt: skip
def test_a_missing_answer_or_unknown_role_is_named_as_the_row_calls_it(renderer, row, field):
    with pytest.raises(DataError) as fault:
        renderer().render(row, "x", 1)
    assert fault.value.field == field and str(fault.value).startswith(f"x:1: {field} is ")


def test_a_template_that_raises_refuses_a_row_or_the_checkpoint(checkpoints):
    tokenizer = load_tokenizer(checkpoints["air"])
    whole = tokenizer.chat_template
    tokenizer.chat_template = "{% if messages | length > 1 %}{{ raise_exception('no') }}{% endif %}" + whole
    with pytest.raises(DataError, match="x:1: the checkpoint's chat template refuses this conversation.*no"):
        ChatRenderer(tokenizer, DataConfig(train="x")).render({"messages": [Q, A]}, "x", 1)
    tokenizer.chat_template = "{% if messages | length > 1 %}{{ 1 // 0 }}{% endif %}" + whole
    with pytest.raises(DataError, match="refuses this conversation"):
        ChatRenderer(tokenizer, DataConfig(train="x")).render({"messages": [Q, A]}, "x", 1)
    for broken in ("{{ raise_exception('no') }}", "{% if %}"):
        tokenizer.chat_template = broken
        with pytest.raises(DataError, match="its chat template cannot render a simple question"):
            ChatRenderer(tokenizer, DataConfig(train="x"))


def test_the_summary_says_padding_and_steps(checkpoints, cli, tmp_path):
    (tmp_path / "x.jsonl").write_text((json.dumps({"messages": [Q, A]}) + "\n") * 7)
    overrides = ["packing=false", "seq_length=64"]
    code, out, _ = cli("data", tmp_path / "x.jsonl", *overrides, "--model", checkpoints["air"], "--json")
    summary = json.loads(out)["summary"]
    assert code == 0 and summary["duplicates"] == 6 and summary["steps"] == summary["steps_per_epoch"] == 1
    assert summary["padding_ratio"] == pytest.approx(1 - summary["tokens"] / (7 * 64))


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("kind", ["sft", "preference", "labelled", "rl"])
def test_the_data_command_counts_what_training_takes(checkpoints, make_recipe, cli, tmp_path, kind, packing):
    from glm45_tune.recipe import Recipe
    from glm45_tune.training.prepare import prepare

    given = {
        "sft": {"completion": "a"},
        "preference": {"chosen": "a", "rejected": "b b"},
        "labelled": {"completion": "a", "label": True},
        "rl": {"solution": "a"},
    }[kind]
    rows = [{"prompt": "q " * (1 + n % 9), **given} for n in range(21)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    aims = {
        "sft": {},
        "preference": {"preference": {}},
        "labelled": {"preference": {"loss": "kto"}},
        "rl": {"rl": {"rewards": [{"function": "exact_match"}], "max_new_tokens": 8}},
    }[kind]
    data = {"packing": packing, "eval_ratio": 0.3, "seq_length": 64}
    recipe = make_recipe(checkpoints["air"], tmp_path / "x.jsonl", tmp_path / "run", data=data, lora={}, **aims)
    recipe["train"] = {"epochs": 3, "global_batch_size": 2}
    (tmp_path / "x.yaml").write_text(json.dumps(recipe))
    code, out, err = cli("data", tmp_path / "x.yaml", "--json")
    assert code == 0, err
    found, job = json.loads(out)["summary"], prepare(Recipe.from_dict(recipe))
    assert found["kind"] == job.kind == kind and found["rows"] == 21
    assert found["held_out"] == len(job.held_out.samples) == 6 * (2 if kind == "preference" else 1)
    assert found["samples"] == len(job.train.samples) and found["tokens"] == job.train.lengths.sum()
    assert found["packed_rows"] == len(job.train_rows) and (found["packed_rows"] < 15) == (packing and kind != "rl")
    assert found["steps_per_epoch"] == job.plan.steps_per_epoch and found["steps"] == job.num_steps
