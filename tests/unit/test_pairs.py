"""Preference rows become two answers behind one prompt, RL rows a prompt and the row as it came."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm45_tune.data.chat import ChatRenderer, load_tokenizer
from glm45_tune.data.formats import canonical, format_of
from glm45_tune.data.pairs import PairRenderer, Pairs
from glm45_tune.data.prompts import PromptRenderer
from glm45_tune.data.sources import kind_of, load_data
from glm45_tune.errors import DataError
from glm45_tune.recipe import DataConfig

Q, A, B = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}
S = {"role": "system", "content": "s"}
TOOL = {"role": "tool", "content": "r"}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}],
}


@pytest.fixture(scope="module")
def tokenizer(checkpoints):
    return load_tokenizer(checkpoints["air"])


def options(**changes) -> DataConfig:
    return DataConfig(train="x", **changes)


PAIRS = {
    "text behind a prompt": ({"prompt": "q", "chosen": "a", "rejected": "b"}, [Q, A], [Q, B]),
    "messages behind a prompt": ({"prompt": [S, Q], "chosen": [A], "rejected": [B]}, [S, Q, A], [S, Q, B]),
    "the prompt in both": ({"chosen": [Q, A], "rejected": [Q, B]}, [Q, A], [Q, B]),
    "the prompt beside and in both": ({"prompt": "q", "messages": [Q, A], "chosen": [Q, A], "rejected": [Q, B]}, [Q, A], [Q, B]),
    "one message each": ({"prompt": "q", "chosen": A, "rejected": B}, [Q, A], [Q, B]),
    "sharegpt": (
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "b"},
        },
        [Q, A],
        [Q, B],
    ),
    "alpaca": ({"instruction": "q", "input": "", "chosen": "a", "rejected": "b", "system": "s"}, [S, Q, A], [S, Q, B]),
    "rejected_response": ({"messages": [Q, A, Q, A], "rejected_response": "b"}, [Q, A, Q, A], [Q, A, Q, B]),
    "query": ({"query": "q", "response": "a", "rejected_response": "b"}, [Q, A], [Q, B]),
    "rejected_messages": ({"messages": [Q, CALL, TOOL, A], "rejected_messages": [Q, B]}, [Q, CALL, TOOL, A], [Q, B]),
    "rejected_messages behind the prompt": (
        {"messages": [S, Q, CALL, TOOL, A], "rejected_messages": [B]},
        [S, Q, CALL, TOOL, A],
        [S, Q, B],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_a_preference_row_becomes_two_conversations(tokenizer, name):
    row, chosen, rejected = PAIRS[name]
    assert canonical(row, kind="preference") == {"messages": chosen, "rejected_messages": rejected}
    assert format_of(row) == "preference"
    samples = PairRenderer(tokenizer, options()).render(row, "x", 1).samples
    for sample, messages in zip(samples, (chosen, rejected)):
        ids = tokenizer.apply_chat_template(messages, return_dict=False)
        assert sample.input_ids.tolist() == [*ids, tokenizer.convert_tokens_to_ids("<|user|>")]


def test_a_pair_shares_its_prompt_and_trains_what_differs(tokenizer):
    """Of a pair every trained token lies behind the shared ones, and a turn that both share is context."""
    row = {"messages": [Q, A, Q, {**A, "reasoning_content": "t"}], "rejected_response": "no"}
    (pair,) = Pairs(PairRenderer(tokenizer, options()).render(row, "x", 1).samples)
    texts = [tokenizer.decode(side.input_ids[pair.prompt :].tolist()) for side in (pair.chosen, pair.rejected)]
    assert texts == ["\n<think>t</think>\na<|user|>", "\n<think></think>\nno<|user|>"]
    row = {"messages": [Q, {**A, "loss": False}, Q, A], "rejected_messages": [Q, A, Q, B]}
    for sample, answer in zip(PairRenderer(tokenizer, options()).render(row, "x", 1).samples, "ab"):
        assert tokenizer.decode(sample.input_ids[sample.loss_mask > 0].tolist()) == f"\n{answer}<|user|>"
    trained = [tokenizer.decode(s.input_ids[s.loss_mask > 0].tolist()) for s in (pair.chosen, pair.rejected)]
    assert trained == ["\n<think>t</think>\na<|user|>", "\nno<|user|>"]


def test_an_agents_pair_trains_every_turn_behind_the_shared_ones_but_no_tool_result(tokenizer):
    row = {"messages": [Q, CALL, TOOL, A], "rejected_messages": [Q, B]}
    chosen, _ = PairRenderer(tokenizer, options()).render(row, "x", 1).samples
    assert tokenizer.decode(chosen.input_ids[chosen.loss_mask > 0].tolist()) == (
        "\n<tool_call>f\n</tool_call><|observation|>\na<|user|>"
    )


BAD_PAIRS = [
    ({"prompt": "q", "chosen": "a", "rejected": "a"}, "chosen and rejected are the same"),
    ({"prompt": "q", "chosen": "a"}, "rejected is missing"),
    ({"prompt": "q", "rejected": "a"}, "chosen is missing"),
    ({"chosen": "a", "rejected": "b"}, "share no beginning"),
    ({"chosen": [Q, A], "rejected": [S, B]}, "share no beginning"),
    ({"prompt": "q", "chosen": 3, "rejected": "b"}, "chosen is 3"),
    ({"prompt": "q", "chosen": [S, A], "rejected": "b"}, "not the prompt's"),
    ({"messages": [Q], "rejected_response": "b"}, "does not end on one"),
    ({"messages": [Q, A], "rejected_response": ["b"]}, "rejected_response is list"),
    ({"messages": [Q, A], "rejected_messages": "b"}, "rejected_messages is str"),
    ({"rejected_response": "b"}, "needs the chosen conversation"),
    (
        {"messages": [Q, A], "rejected_messages": [Q, {"role": "bot", "content": ""}]},
        'rejected_messages[1].role is "bot"',
    ),
    ({"messages": [Q, A], "rejected_messages": [Q]}, "rejected has no assistant message"),
    ({"messages": [Q, A]}, "has one answer"),
    ({"prompt": "q"}, "has a prompt alone"),
]


@pytest.mark.parametrize("row, words", BAD_PAIRS)
def test_a_bad_pair_says_what_is_wrong(tokenizer, row, words):
    with pytest.raises(DataError) as fault:
        PairRenderer(tokenizer, options(format=None if len(row) < 2 or "messages" in row else "preference")).render(
            row, "x", 1
        )
    assert words in str(fault.value)


def test_supervised_training_refuses_pairs_and_prompts(tokenizer):
    for row, words in (
        ({"prompt": "q"}, "the field completion"),
        ({"messages": [Q, A], "rejected_response": "b"}, "is a pair"),
    ):
        with pytest.raises(DataError, match=words):
            ChatRenderer(tokenizer, options()).render(row, "x", 1)


@settings(max_examples=150, deadline=None)
@given(
    turns=st.integers(1, 5),
    sizes=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    limit=st.integers(8, 120),
    policy=st.sampled_from(["drop", "truncate"]),
)
def test_an_overlong_pair_keeps_one_prompt_or_is_dropped(tokenizer, turns, sizes, limit, policy):
    """Cut to fit, both sides still begin with the same tokens, and both train something; a dropped one is counted."""
    messages = [S] + [Q, A] * (turns - 1) + [Q]
    row = {"prompt": messages, "chosen": "x" * sizes[0], "rejected": "y" * sizes[1]}
    rendering = PairRenderer(tokenizer, options(seq_length=2 * limit, overlong=policy)).render(row, "x", 1)
    whole = PairRenderer(tokenizer, options()).render(row, "x", 1).samples
    fits = max(len(sample.input_ids) for sample in whole) <= limit
    assert (not rendering.counts) == fits
    if not rendering.samples:
        assert rendering.counts["dropped"] == 1
        return
    (pair,) = Pairs(rendering.samples)
    for side, full in zip((pair.chosen, pair.rejected), whole):
        assert len(side.input_ids) <= limit and side.loss_mask.any() and not side.loss_mask[: pair.prompt].any()
        text, uncut = (tokenizer.decode(s.input_ids[s.loss_mask > 0].tolist()) for s in (side, full))
        assert uncut.startswith(text)
    assert (pair.chosen.input_ids[: pair.prompt] == pair.rejected.input_ids[: pair.prompt]).all()
    assert tokenizer.decode(pair.chosen.input_ids[: pair.prompt].tolist()).startswith(
        "[gMASK]<sop><|system|>\ns<|user|>"
    )


def test_pairs_stay_pairs_with_weights_and_held_out(tokenizer, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"q{n}", "chosen": f"a{n}", "rejected": f"b{n}"}) + "\n" for n in range(20))
    )
    made = DataConfig(train=[{"path": str(path), "weight": 1.5}], eval_ratio=0.2)
    train, held = load_data(made, tokenizer, seed=2, kind=kind_of(made))
    assert len(Pairs(train.samples)) + len(Pairs(held.samples)) == 30
    lines = []
    for corpus in (train, held):
        pairs = Pairs(corpus.samples)
        assert pairs.lengths().tolist() == [[len(p.chosen.input_ids), len(p.rejected.input_ids)] for p in pairs]
        for pair in pairs:
            said = [tokenizer.decode(s.input_ids[pair.prompt :].tolist()) for s in (pair.chosen, pair.rejected)]
            number = pair.chosen.line - 1
            assert pair.rejected.line == pair.chosen.line and said == [f"\na{number}<|user|>", f"\nb{number}<|user|>"]
        lines.append({pair.chosen.line for pair in pairs})
    assert len(lines[1]) == 4 and not lines[0] & lines[1]


PROMPTS = {
    "text": {"prompt": "q", "solution": "1", "nested": {"a": [1, None]}},
    "messages": {"prompt": [S, Q], "id": 3},
    "a conversation that awaits its answer": {"messages": [Q, A, Q], "answer": "x"},
    "query": {"query": "q", "response": "the wanted answer", "history": [["q", "a"]]},
    "thinking off": {"prompt": "q", "enable_thinking": False},
    "tools": {"prompt": "q", "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
    "a tool's result": {"messages": [Q, CALL, TOOL]},
}


@pytest.mark.parametrize("name", PROMPTS)
def test_an_rl_prompt_is_the_templates_and_keeps_its_row(tokenizer, tmp_path, name):
    row = PROMPTS[name]
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(row))
    made = DataConfig(train=str(path), format="rl")
    train, _ = load_data(made, tokenizer, kind="rl")
    (sample,) = train.samples
    thinking = {key: row[key] for key in ("enable_thinking",) if key in row}
    expected = tokenizer.apply_chat_template(
        canonical(row, "rl", "rl")["messages"],
        tools=row.get("tools"),
        add_generation_prompt=True,
        return_dict=False,
        **thinking,
    )
    assert sample.input_ids.tolist() == expected and not sample.loss_mask.any()
    assert sample.row == row


def test_an_overlong_prompt_loses_whole_old_turns_only(tokenizer):
    row = {"messages": [S, *[{**Q, "content": "x" * 30}, A] * 3, {**Q, "content": "y" * 30}]}
    (sample,) = (
        PromptRenderer(tokenizer, options(format="rl", seq_length=60, overlong="truncate")).render(row, "x", 1).samples
    )
    assert (
        tokenizer.decode(sample.input_ids.tolist())
        == "[gMASK]<sop><|system|>\ns<|user|>\n" + "y" * 30 + "<|assistant|>"
    )
    rendering = PromptRenderer(tokenizer, options(format="rl", seq_length=20, overlong="truncate")).render(row, "x", 1)
    assert not rendering.samples and rendering.counts == {"dropped": 1}


@pytest.mark.parametrize("policy", ["error", "drop", "truncate"])
def test_a_prompt_that_fills_its_row_leaves_no_room_for_an_answer(tokenizer, policy):
    def rendering(seq_length):
        made = PromptRenderer(tokenizer, options(format="rl", seq_length=seq_length, overlong=policy))
        return made.render({"prompt": "x" * 20}, "x", 1)

    (sample,) = rendering(100).samples
    count = len(sample.input_ids)
    assert len(rendering(count + 1).samples) == 1
    if policy == "error":
        with pytest.raises(DataError, match=f"x:1: a prompt of {count} tokens leaves no room for an answer"):
            rendering(count)
    else:
        assert not rendering(count).samples and rendering(count).counts == {"dropped": 1}


@pytest.mark.parametrize(
    "row, words",
    [
        ({"messages": [Q, A]}, "messages[1].role is the assistant's"),
        ({"prompt": []}, "messages is []"),
        ({"prompt": None}, "prompt is NoneType"),
        ({"solution": "1"}, "prompt is missing"),
    ],
)
def test_a_bad_prompt_says_what_is_wrong(tokenizer, row, words):
    with pytest.raises(DataError) as fault:
        PromptRenderer(tokenizer, options(format="rl")).render(row, "x", 1)
    assert words in str(fault.value)


def test_the_data_command_shows_both_answers_and_the_kept_columns(checkpoints, cli, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"prompt": "q", "chosen": "a", "rejected": "b"}))
    code, out, _ = cli("data", path, "--model", checkpoints["air"], "--json")
    document = json.loads(out)
    assert code == 0 and [sample["answer"] for sample in document["samples"]] == ["chosen", "rejected"]
    assert document["summary"]["kind"] == "preference"
    path.write_text(json.dumps({"prompt": "q", "solution": "42"}))
    code, out, _ = cli("data", path, "--model", checkpoints["air"])
    assert code == 0 and "kept for the reward: solution='42'" in out
    code, out, _ = cli("data", path, "--model", checkpoints["air"], "--json")
    assert json.loads(out)["samples"][0]["row"] == {"prompt": "q", "solution": "42"}
