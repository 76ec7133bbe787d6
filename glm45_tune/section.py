"""What the sections of a recipe are made of."""

from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator

Dtype = Literal["bf16", "fp32"]
Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Section(BaseModel):
    """A mapping of a recipe: strict, frozen, each field described by the string under it."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _a_truth_is_no_number(cls, value, info):
        if isinstance(value, bool):
            kinds = _kinds(cls.model_fields[info.field_name].annotation)
            if bool not in kinds and kinds & {int, float}:
                raise ValueError(f"is {str(value).lower()}; a number is expected")
        return value


def _kinds(annotation) -> set:
    """The types in an annotation, such as int and NoneType in `Annotated[int, …] | None`."""
    return {annotation} if isinstance(annotation, type) else set().union(*map(_kinds, get_args(annotation)))
