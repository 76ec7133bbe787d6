"""What an answer is worth. A reward is a Python function (prompt, completion, columns, **options) → number.

prompt and completion are text, completion without the token that ended it; columns is the row the prompt came from, as it was
read. `async def` functions run side by side; a function with `batched = True`, async or not, gets lists of all three and
returns a list. Whatever a function does wrong is counted by kind, and the answer then has no reward rather than a wrong one.
"""

import importlib
import inspect
import json
import re
from dataclasses import dataclass, field

import numpy as np

from glm45_tune.errors import RecipeError
from glm45_tune.objectives import RewardConfig

THOUGHT, THOUGHT_ENDS = "<think>", "</think>"
_TURN = re.compile(r"<\|(?:assistant|user|observation|endoftext)\|>")


def last_turn(said: str) -> str:
    """What the model wrote in its last turn: of a completion, or of what a function of rl.tools is asked."""
    return _TURN.split(said)[-1]


def _last_turn(prompt: str, completion: str) -> tuple[str, str]:
    """What the prompt begins each assistant turn with (nothing, or marks of a thought); what the model wrote in the last.

    What tools said between turns is not in the completion; the tokens that ended the earlier turns are.
    """
    _, is_chat, begun = prompt.rpartition("<|assistant|>")
    return begun if is_chat else "", last_turn(completion)


def spoken(prompt: str, completion: str) -> str:
    """The answer behind the last turn's thought, empty where that does not end."""
    behind = "".join(_last_turn(prompt, completion)).rpartition(THOUGHT_ENDS)[2]
    return "" if THOUGHT in behind else behind.strip()


def thought(prompt: str, completion: str) -> str:
    """The text of the last turn's thought, empty where it has none."""
    before, ends, _ = "".join(_last_turn(prompt, completion)).rpartition(THOUGHT_ENDS)
    return before.rpartition(THOUGHT)[2].strip() if ends else ""


def exact_match(prompt: str, completion: str, columns: dict, column: str = "solution") -> float:
    """1 where the answer is the column's text."""
    return float(spoken(prompt, completion) == str(columns[column]).strip())


def regex(prompt: str, completion: str, columns: dict, pattern: str, whole: bool = False) -> float:
    """1 where the pattern is found in the answer, or with `whole` is all of it; 0 where nothing is said."""
    find, said = re.fullmatch if whole else re.search, spoken(prompt, completion)
    return float(bool(said and find(pattern, said, re.DOTALL)))


def math(prompt: str, completion: str, columns: dict, column: str = "solution") -> float:
    """1 where math-verify finds the answer equal to the column's: numbers, fractions, intervals, sets, equations, LaTeX or plain."""
    import math_verify

    wanted = str(columns[column])
    # a bare "1/2" or "\frac12" is mathematics only between dollars; "8" is so by itself
    gold = math_verify.parse(wanted, parsing_timeout=None) or math_verify.parse(f"${wanted}$", parsing_timeout=None)
    if not gold:
        raise ValueError(f"{column} {wanted!r} is no mathematics that math-verify can read")
    said = math_verify.parse(spoken(prompt, completion), parsing_timeout=None)
    return float(math_verify.verify(gold, said, timeout_seconds=None))


def json_schema(
    prompt: str, completion: str, columns: dict, schema: dict | None = None, column: str = "schema"
) -> float:
    """1 where the answer is JSON (alone or in a fenced block) that fits the schema, given here or in the row."""
    import jsonschema

    said = spoken(prompt, completion)
    fenced = re.fullmatch(r"```(?:json)?\s*(.*?)\s*```", said, re.DOTALL)
    try:
        document = json.loads(fenced[1] if fenced else said)
    except ValueError:
        return 0.0
    return float(jsonschema.Draft202012Validator(columns[column] if schema is None else schema).is_valid(document))


def format(prompt: str, completion: str, columns: dict, thinks: bool = True) -> float:
    """1 where the answer has a thought and text behind it, or with `thinks: false` text alone."""
    begun, turn = _last_turn(prompt, completion)
    is_open = THOUGHT in begun.rpartition(THOUGHT_ENDS)[2]
    well_formed = (is_open + turn.count(THOUGHT), turn.count(THOUGHT_ENDS)) in ((0, 0), (1, 1))
    return float(well_formed and bool(thought(prompt, completion)) == thinks and bool(spoken(prompt, completion)))


def length(prompt: str, completion: str, columns: dict, target: int, tolerance: int = 0) -> float:
    """1 up to `tolerance` characters from `target`, falling to 0 at twice of it; 0 where nothing is said."""
    said = len(spoken(prompt, completion))
    off = max(abs(said - target) - tolerance, 0)
    return max(0.0, 1 - off / target) if said else 0.0


FUNCTIONS = {function.__name__: function for function in (exact_match, regex, math, json_schema, format, length)}
_LIBRARIES = {"math": "math_verify", "json_schema": "jsonschema"}


def load(name: str):
    """A built-in function, or module:function imported, with what it imports. Raises ImportError, AttributeError."""
    if name not in FUNCTIONS:
        module, _, attribute = name.partition(":")
        return getattr(importlib.import_module(module), attribute)
    if name in _LIBRARIES:
        importlib.import_module(_LIBRARIES[name])
    return FUNCTIONS[name]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")


_OPTIONS = {  # of the built-in functions: what each takes, and in words
    "column": (lambda value: isinstance(value, str), "the name of a column"),
    "pattern": (lambda value: isinstance(value, str), "a regular expression"),
    "whole": (lambda value: isinstance(value, bool), "true or false"),
    "thinks": (lambda value: isinstance(value, bool), "true or false"),
    "target": (lambda value: _is_number(value) and value > 0, "a number of characters above 0"),
    "tolerance": (lambda value: _is_number(value) and value >= 0, "a number of characters, 0 or more"),
}


def check_rewards(rewards: list[RewardConfig]) -> None:
    """Raise RecipeError where a built-in reward is given options that it does not take, or lacks one, or its library."""
    for number, reward in enumerate(rewards):
        where, options = f"rl.rewards[{number}] ({reward.function})", reward.options
        if reward.function not in FUNCTIONS:
            continue
        try:
            inspect.signature(FUNCTIONS[reward.function]).bind("", "", {}, **options)
        except TypeError as error:
            raise RecipeError(f"{where}: options: {error}.") from None
        try:
            load(reward.function)
        except ImportError as error:
            raise RecipeError(f"{where}: needs {error.name}: pip install {error.name.replace('_', '-')}.") from None
        for name, (takes, words) in _OPTIONS.items():
            if name in options and not takes(options[name]):
                raise RecipeError(f"{where}: options: {name} is {options[name]!r}; {words} is expected.")
        if "pattern" in options:
            pattern = options["pattern"]
            try:
                re.compile(pattern, re.DOTALL)
            except (re.error, OverflowError, RecursionError) as error:
                raise RecipeError(f"{where}: options: pattern {pattern!r} is no regular expression: {error}.") from None
        if options.get("schema") is not None and (fault := _fault_of_schema(options["schema"])):
            raise RecipeError(f"{where}: options: schema is no JSON schema: {fault}.")


def check_columns(rewards: list[RewardConfig], columns: dict, where: str) -> None:
    """Raise RecipeError where a built-in reward needs a column that a prompt lacks. columns: its row; where: its name."""
    for number, reward in enumerate(rewards):
        taken = inspect.signature(FUNCTIONS[reward.function]).parameters if reward.function in FUNCTIONS else {}
        if "column" not in taken or reward.options.get("schema") is not None:
            continue
        column, here = (
            reward.options.get("column", taken["column"].default),
            f"rl.rewards[{number}] ({reward.function})",
        )
        if column not in columns:
            raise RecipeError(
                f"{here}: {where} has no column {column!r}; it has {', '.join(columns)}. Name one of them in "
                "options.column, or add it to the rows."
            )
        if reward.function == "json_schema" and (fault := _fault_of_schema(columns[column])):
            raise RecipeError(f"{here}: {where}: {column} is no JSON schema: {fault}. Mend it.")


def _fault_of_schema(schema: object) -> str | None:
    import jsonschema

    try:
        jsonschema.Draft202012Validator.check_schema(schema)
    except jsonschema.SchemaError as error:
        return error.message
    return None


@dataclass
class Scores:
    """The rewards of N answers.

    rewards float64 [N]: the weighted sums, NaN where a part is missing; parts: each function's own
    values; errors: how often which function failed in what way; messages: the first of each.
    """

    rewards: np.ndarray
    parts: dict[str, np.ndarray]
    errors: dict[str, int] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)


def score(
    configs: list[RewardConfig], workers: list, prompts: list[str], completions: list[str], columns: list[dict]
) -> Scores:
    """The rewards of answers, each function in its worker (`sandbox.Worker`, one for each config)."""
    total = np.zeros(len(prompts))
    found = Scores(total, {})
    for config, worker in zip(configs, workers, strict=True):
        values = np.full(len(prompts), np.nan)
        for index, (value, fault, message) in enumerate(worker.evaluate(prompts, completions, columns)):
            if fault is None:
                values[index] = value
            else:
                kind = f"{config.function}: {fault}"
                found.errors[kind] = found.errors.get(kind, 0) + 1
                found.messages.setdefault(kind, message)
        name = config.function
        while name in found.parts:
            name += "'"
        found.parts[name] = values
        total += config.weight * values
    return found
