import json

import pytest

from glm45_tune.chat.evaluate import load_questions

ASKED = {"role": "user", "content": "q"}
ROWS = {
    "apart": {"messages": [ASKED, {"role": "assistant", "content": "four", "reasoning_content": "2 + 2"}]},
    "inline": {"messages": [ASKED, {"role": "assistant", "content": "<think>2 + 2</think>\nfour"}]},
    "alpaca": {"instruction": "q", "output": "<think>2 + 2</think>\nfour"},
    "query": {"query": "q", "response": "<think>2 + 2</think>four"},
}


@pytest.mark.parametrize("form", ROWS)
def test_the_answer_that_eval_wants_is_without_its_thought_in_every_form(form, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS[form]) + "\n")
    assert [question.wanted for question in load_questions(str(path))] == ["four"]
