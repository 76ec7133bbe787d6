"""The files of a run directory: their names, what each holds, and readers that name what is damaged."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NotRequired

from pydantic import ConfigDict, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from glm45_tune.errors import CheckpointError, UserError

FACTS_FILE = "glm45_tune.json"
RECIPE_FILE = "recipe.yaml"
LOCK_FILE = ".lock"
METRICS_FILE = "metrics.jsonl"
LOAD_FILE = "expert_load.json"
SAMPLES_FILE = "samples.jsonl"
EVALUATION_FILE = "eval.json"
REPORT_FILE = "report.html"
TRACKER_FILE = "wandb_id"

_MORE = ConfigDict(extra="allow")  # of a later version, or not needed to read the file


class Facts(TypedDict):
    """What was trained on what, as FACTS_FILE holds it."""

    __pydantic_config__ = _MORE
    kind: str
    model: str
    fingerprint: str
    lora: dict[str, Any] | None
    training: NotRequired[str]
    begun_with: NotRequired[dict[str, Any]]
    layout: NotRequired[str]
    versions: NotRequired[dict[str, str]]
    data: NotRequired[dict[str, Any]]
    hardware: NotRequired[dict[str, Any]]


class Score(TypedDict):
    """What a model reached on one data file."""

    __pydantic_config__ = _MORE
    num_questions: int
    exact: float
    non_thinking: float
    valid_calls: float | None
    perplexity: float


class Evaluation(TypedDict):
    """One entry of EVALUATION_FILE: the base and the tuned model on one data file."""

    __pydantic_config__ = _MORE
    data: str
    sha256: str | None
    step: int
    think: bool | None
    base: Score
    tuned: Score


class Text(TypedDict):
    """A line of SAMPLES_FILE of a supervised run."""

    __pydantic_config__ = _MORE
    step: int
    prompt: str
    text: str
    wanted: NotRequired[str | None]


class Conversation(TypedDict):
    """A line of SAMPLES_FILE of a run of reinforcement learning."""

    __pydantic_config__ = _MORE
    step: int
    prompt: str
    completion: str
    reward: float | None
    advantage: float
    finish: str


class Load(TypedDict):
    """LOAD_FILE: layers × experts, tokens over the layer's mean."""

    __pydantic_config__ = _MORE
    load: list[list[float | None]]


_FACTS, _EVALUATIONS = TypeAdapter(Facts), TypeAdapter(list[Evaluation])
_SAMPLE, _LOAD = TypeAdapter(Conversation | Text), TypeAdapter(Load)


class DamagedError(UserError):
    """A file of a run that cannot be read as what it must hold."""


def read_facts(run: Path) -> Facts:
    """Return what a run is. Raises CheckpointError where the file is missing, damaged, or not of a run."""
    path = run / FACTS_FILE
    if not path.is_file():
        raise CheckpointError(f"{run}: no {FACTS_FILE} here; not a run of ours.")
    try:
        document = _document(path)
        if isinstance(document, dict) and document.get("kind", "run") != "run":
            raise CheckpointError(f"{run}: holds a {document['kind']!r}, not a run.")
        return _FACTS.validate_python(document)
    except DamagedError as error:
        raise CheckpointError(f"{error} It does not say what was trained.") from error
    except ValidationError as error:
        raise CheckpointError(f"{path}: is damaged: it does not say what was trained ({_first(error)}).") from error


def read_recipe(run: Path) -> str:
    """Return the text of a run's recipe. Raises DamagedError."""
    try:
        return (run / RECIPE_FILE).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DamagedError(f"{run / RECIPE_FILE}: cannot be read ({_reason(error)}).") from error


def read_evaluations(run: Path) -> list[Evaluation]:
    """Return the scores kept so far; none where there is no file. Raises DamagedError."""
    path = run / EVALUATION_FILE
    return _checked(path, _EVALUATIONS) if path.exists() else []


def read_load(run: Path) -> list[list[float | None]] | None:
    """Return each expert's load with None for what is not a finite number, or None without a file. Raises DamagedError."""
    path = run / LOAD_FILE
    if not path.exists():
        return None
    load = _checked(path, _LOAD)["load"]
    if len({len(row) for row in load}) > 1:
        raise DamagedError(f"{path}: is damaged (its rows differ in length).")
    return [[value if value is not None and math.isfinite(value) else None for value in row] for row in load]


def read_metrics(run: Path) -> tuple[list[dict[str, float]], list[str]]:
    """Return the steps' metrics and a sentence for each line that is damaged."""
    rows, damaged = [], []
    for number, line in whole_lines(run / METRICS_FILE, damaged):
        step = line.get("step") if isinstance(line, dict) else None
        if type(step) is not int or not all(type(value) in (int, float) for value in line.values()):
            damaged.append(f"{METRICS_FILE}: line {number} does not hold a step's metrics.")
            continue
        rows.append({key: value for key, value in line.items() if _is_finite(value)})
    return rows, damaged


def read_samples(run: Path) -> tuple[list[Conversation | Text], list[str]]:
    """Return the sample texts of a run and a sentence for each line that is damaged."""
    found, damaged = [], []
    for number, line in whole_lines(run / SAMPLES_FILE, damaged):
        try:
            found.append(_SAMPLE.validate_python(line))
        except ValidationError:
            damaged.append(f"{SAMPLES_FILE}: line {number} does not hold a sample.")
    if found:  # a run writes one kind
        found = [line for line in found if ("reward" in line) == ("reward" in found[0])]
    return found, damaged


def whole_lines(path: Path, damaged: list[str]) -> Iterator[tuple[int, Any]]:
    r"""Yield (number, JSON value) of each line; of any other line a sentence goes into `damaged`.

    Only "\n" ends a line: texts may hold U+2028, U+2029 and U+0085.
    """
    try:
        lines = path.read_bytes().split(b"\n") if path.exists() else []
    except OSError as error:
        damaged.append(f"{path.name}: cannot be read ({_reason(error)}).")
        return
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError):
            if number == len(lines) > 1:  # no line end yet: a run under way writes it now
                continue
            damaged.append(f"{path.name}: line {number} is not whole JSON.")


def _document(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes().decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedError(f"{path}: is damaged ({_reason(error)}).") from error


def _checked(path: Path, kind: TypeAdapter) -> Any:
    try:
        return kind.validate_python(_document(path))
    except ValidationError as error:
        raise DamagedError(f"{path}: is damaged ({_first(error)}).") from error


def _first(error: ValidationError) -> str:
    fault = error.errors(include_url=False, include_input=False)[0]
    return ": ".join(filter(None, (".".join(map(str, fault["loc"])), fault["msg"])))


def _reason(error: BaseException) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer larger than any float
        return False


def kept_until(path: Path, step: int) -> bytes:
    """Return the lines of a JSONL file up to a step, as they are; what a resumed run writes anew is left out.

    A damaged line is kept when a kept line follows it. What is cut at the end belongs to the interrupted step.
    """
    kept, damaged = b"", b""
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        try:
            value = json.loads(line.decode("utf-8"))
            is_kept = isinstance(value, dict) and type(value.get("step")) is int and value["step"] <= step
            is_damaged = not isinstance(value, dict) or type(value.get("step")) is not int
        except (ValueError, RecursionError):
            is_kept, is_damaged = False, bool(line.strip())
        if is_kept:
            kept, damaged = kept + damaged + line + b"\n", b""
        elif is_damaged:
            damaged += line + b"\n"
    return kept
