"""Ask a model every question of a data file and compare its answers with the file's."""

from dataclasses import asdict, dataclass

from glm45_tune.chat.model import ChatModel
from glm45_tune.data.chat import check_messages, check_tools
from glm45_tune.data.formats import canonical
from glm45_tune.data.sources import read_source
from glm45_tune.errors import DataError

BATCH = 64


@dataclass(frozen=True)
class Score:
    """rows: each question with what was wanted, said and thought."""

    num_questions: int
    exact: float
    thinks: float
    rows: list[dict]

    def document(self) -> dict:
        return asdict(self)


def load_questions(path: str) -> list[tuple[list[dict], list | None, str]]:
    """(messages up to the last user turn, tools, the answer wanted) of every conversation of a file or folder."""
    questions = []
    for file, line, row in read_source(path):
        try:
            if isinstance(row, DataError):
                raise row
            row = canonical(row)
            *messages, answer = check_messages(row)
            if answer["role"] != "assistant" or not messages:
                raise DataError("the last message must be the assistant's answer to a question before it")
            questions.append((messages, check_tools(row), answer["content"].strip()))
        except DataError as error:
            raise DataError(f"{file}:{line}: {error}") from None
    if not questions:
        raise DataError(f"{path}: no rows.")
    return questions


def evaluate(model: ChatModel, questions: list, think: bool | None = None, max_new_tokens: int = 512) -> Score:
    """Greedy answers under the default prompt (or with thinking on or off); exact: equal after stripping white space."""
    rows = []
    for first in range(0, len(questions), BATCH):
        batch = questions[first : first + BATCH]
        answers = model.generate([model.prompt(m, think, tools) for m, tools, _ in batch], max_new_tokens)
        rows += [
            {"question": messages[-1]["content"], "wanted": wanted, "said": answer.content, "thought": answer.thought}
            for (messages, _, wanted), answer in zip(batch, answers)
        ]
    count = len(rows)
    return Score(
        count,
        sum(row["said"] == row["wanted"] for row in rows) / count,
        sum(bool(row["thought"]) for row in rows) / count,
        rows,
    )
