"""What the sections of a recipe are made of."""

import math
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator

MOST_RANKS = 2**16
MOST = 2**32 - 1
"""The largest whole number of a recipe: beyond what any count of rows, tokens, steps or layers can be."""

Dtype = Literal["bf16", "fp32"]
Positive = Annotated[int, Field(gt=0)]
Ranks = Annotated[int, Field(gt=0, le=MOST_RANKS)]
NotNegative = Annotated[float, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    """A mapping of a recipe: strict, frozen, each field described by the string under it, every number finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _a_truth_is_no_number(cls, value, info):
        if isinstance(value, bool):
            kinds = _kinds(cls.model_fields[info.field_name].annotation)
            if bool not in kinds and kinds & {int, float}:
                raise ValueError(f"is {str(value).lower()}; a number is expected")
        return _bounded(value)

    @field_validator("*", mode="after")
    @classmethod
    def _numbers_are_of_this_world(cls, value):
        if isinstance(value, dict | list) and (odd := _not_finite(value)) is not None:
            raise ValueError(f"holds {odd}; finite numbers are expected")
        return _bounded(value)  # again: a text may have become a number


def _bounded(value):
    if isinstance(value, int) and abs(value) > MOST:
        raise ValueError(f"is {_short(value)}; at most {MOST} is expected")
    return value


def _short(number: int) -> str:
    """A number, or how many digits it has where they are many: Python writes no more than some thousand."""
    return str(number) if abs(number) < 10**20 else f"a number of {int(number.bit_length() * math.log10(2)) + 1} digits"


def _not_finite(value) -> float | None:
    """The first number, however deep, that is infinite or none at all."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    found = (_not_finite(item) for item in inner)
    if isinstance(value, float) and not math.isfinite(value):
        return value
    return next((odd for odd in found if odd is not None), None)


def _kinds(annotation) -> set:
    """The types in an annotation, such as int and NoneType in `Annotated[int, …] | None`."""
    return {annotation} if isinstance(annotation, type) else set().union(*map(_kinds, get_args(annotation)))
