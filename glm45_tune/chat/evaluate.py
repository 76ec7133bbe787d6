"""Ask a model every question of a data file, compare its answers with the file's, and measure how likely it finds those."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table
from rich.text import Text

from glm45_tune.chat.answers import Answer, fault_of, typed
from glm45_tune.chat.model import ChatModel
from glm45_tune.console import Terminal
from glm45_tune.data.chat import HALF_A_PAIR, ChatRenderer, Sample, check_messages, check_tools
from glm45_tune.data.files import files_of
from glm45_tune.data.formats import canonical
from glm45_tune.data.sources import name_of, read_source
from glm45_tune.errors import DataError, UserError
from glm45_tune.recipe import DataConfig
from glm45_tune.terminal import visible

BATCH = 64
_LONGEST = 1 << 20


@dataclass(frozen=True)
class Question:
    """What is asked, what is wanted, and the whole row, by which the answer's likelihood is measured."""

    messages: list[dict]
    tools: list | None
    wanted: str
    wanted_calls: list[dict]
    row: dict
    where: tuple[str, int]
    thinking: bool | None
    """The row's own enable_thinking."""


@dataclass(frozen=True)
class Score:
    """Shares of the questions; valid_calls: of the tool calls said, None where none was. rows: each question with its answer."""

    num_questions: int
    exact: float
    thinks: float
    non_thinking: float
    num_calls: int
    valid_calls: float | None
    perplexity: float
    rows: list[dict]

    def document(self) -> dict:
        return asdict(self)


def check_output(output: Path | None) -> None:
    """Raise UserError, before anything is asked, where scores could not be written."""
    if output and (output.is_dir() or not output.absolute().parent.is_dir()):
        raise UserError(f"eval: --output {output} cannot be written: a file in a directory that is there is expected.")
    if output and output.is_file() and not _is_ours(output):
        raise UserError(f"eval: --output {output} exists and holds no scores, so it is not replaced. Choose another.")


def write_scores(output: Path, document: str) -> None:
    """Raises UserError where the file cannot be written after all, as on a full disk."""
    try:
        output.write_text(document + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"eval: --output {output} cannot be written: {error}. The scores are above.") from error


def _is_ours(path: Path) -> bool:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return isinstance(found, list) and bool(found) and all("perplexity" in scores for scores in found)
    except (OSError, ValueError, TypeError):
        return False


def load_questions(path: str) -> list[Question]:
    """Of every conversation of a file or folder, its last answer is what is wanted."""
    questions = []
    for file, line, row in read_source(path):
        try:
            if isinstance(row, DataError):
                raise row
            found = canonical(row)
            *messages, answer = check_messages(found)
            if answer["role"] != "assistant" or not messages:
                raise DataError("the last message must be the assistant's answer to a question before it")
            if not answer["weight"]:
                raise DataError(
                    "the last message, the answer wanted, has loss false or loss_scale 0. Leave out that, or the row"
                )
            calls = [call["function"] for call in answer.get("tool_calls", [])]
            json.dumps(found, ensure_ascii=False, default=str).encode()
            thinking = found.get("enable_thinking")
            wanted = answer["content"].strip()
            questions.append(Question(messages, check_tools(found), wanted, calls, row, (file, line), thinking))
        except UnicodeEncodeError:
            raise DataError(f"{file}:{line}: {HALF_A_PAIR}") from None
        except DataError as error:
            raise DataError(f"{file}:{line}: {error}") from None
    if not questions:
        raise DataError(f"{path}: no rows.")
    return questions


def hash_of(source: str) -> str | None:
    """sha256 of a data file, or of its files' hashes where it is a folder; None of what a hub or a function yields."""
    digests, path = [], name_of(source)
    if not Path(path).exists():
        return None
    for file in files_of(path):
        with open(file, "rb") as handle:
            digests.append(hashlib.file_digest(handle, "sha256"))
    return (
        digests[0].hexdigest()
        if len(digests) == 1
        else hashlib.sha256(b"".join(d.digest() for d in digests)).hexdigest()
    )


def evaluate(
    model: ChatModel,
    questions: dict[str, list[Question]],
    think: bool | None = None,
    max_new_tokens: int = 512,
    data: DataConfig | None = None,
) -> dict[str, Score]:
    """Greedy answers to the questions of each file: under the prompt that the row asks for, or with thinking on or off for all.

    exact: text equal after stripping white space, and the same calls. data: as what the answers are trained, for the perplexity.
    """
    samples = check_questions(model.tokenizer, questions, think, data)
    return {file: _score(model, asked, samples[file], think, max_new_tokens) for file, asked in questions.items()}


def check_questions(
    tokenizer: object,
    questions: dict[str, list[Question]],
    think: bool | None = None,
    data: DataConfig | None = None,
) -> dict[str, list[Sample]]:
    """Render every question with its answer before the first is asked. Raises DataError for a row that is refused."""
    # the last answer is what is asked for; its row's format was recognised already
    changes = {"seq_length": _LONGEST, "overlong": "error", "turns": "last", "format": None}
    renderer = ChatRenderer(tokenizer, (data or DataConfig(train="-")).model_copy(update=changes))
    return {file: _samples(renderer, asked, think) for file, asked in questions.items()}


def _samples(renderer: ChatRenderer, questions: list[Question], think: bool | None) -> list[Sample]:
    """The questions with the answers that are wanted, rendered as they are asked."""
    given = {} if think is None else {"enable_thinking": think}
    return [sample for q in questions for sample in renderer.render(q.row | given, *q.where).samples]


def _score(
    model: ChatModel, questions: list[Question], samples: list[Sample], think: bool | None, max_new_tokens: int
) -> Score:
    rows, calls, valid = [], 0, 0
    for first in range(0, len(questions), BATCH):
        batch = questions[first : first + BATCH]
        prompts = [model.prompt(q.messages, q.thinking if think is None else think, q.tools) for q in batch]
        answers = model.generate(prompts, max_new_tokens)
        for question, answer in zip(batch, answers):
            row = _row(question, answer)
            rows.append(row)
            calls += len(row["calls"])
            valid += sum(call["fault"] is None for call in row["calls"])
    count, thinks = len(rows), sum(bool(row["thought"]) for row in rows)
    return Score(
        count,
        sum(row["exact"] for row in rows) / count,
        thinks / count,
        1 - thinks / count,
        calls,
        valid / calls if calls else None,
        model.perplexity(samples),
        rows,
    )


def _row(question: Question, answer: Answer) -> dict:
    said = [
        {"name": call.name, "arguments": typed(call, question.tools), "fault": fault_of(call, question.tools)}
        for call in answer.calls
    ]
    same_calls = [(c["name"], c["arguments"]) for c in said] == [
        (c["name"], c["arguments"]) for c in question.wanted_calls
    ]
    return {
        "question": question.messages[-1]["content"],
        "wanted": question.wanted,
        "wanted_calls": question.wanted_calls,
        "said": answer.content,
        "thought": answer.thought,
        "calls": said,
        "exact": answer.content == question.wanted and same_calls and not any(call["fault"] for call in said),
    }


def show(scores: list[dict]) -> None:
    """A table of scores (documents with `model` and `data`), and the first answer of each."""
    console = Terminal(markup=False, emoji=False)  # names of files may hold what looks like markup
    says_calls = any(score["num_calls"] for score in scores)
    table = Table("model", "data", "asked", "exact", "thinks", *["calls valid"] * says_calls, "perplexity")
    for score in scores:
        calls = "" if score["valid_calls"] is None else f"{score['valid_calls']:.0%} of {score['num_calls']}"
        shares = f"{score['exact']:.0%}", f"{score['thinks']:.0%}", *[calls] * says_calls, f"{score['perplexity']:.4g}"
        table.add_row(Path(score["model"]).name, Path(score["data"]).name, str(score["num_questions"]), *shares)
    console.print(table)
    for score in scores:
        row = score["rows"][0]
        line = Text(visible(f"{score['model']}: {row['question']} → "))
        line.append(visible(f"({row['thought']}) ") if row["thought"] else "", "dim")
        line.append(visible(row["said"] or "".join(f"{call['name']}(…)" for call in row["calls"]) or "(nothing)"))
        console.print(line)
