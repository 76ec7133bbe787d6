"""Rows of one answer and what was thought of it, {"label": true | false}: what KTO learns from where there are no pairs."""

from collections.abc import Sequence

from glm45_tune.data.chat import ChatRenderer, Sample
from glm45_tune.data.length import Fitted
from glm45_tune.errors import DataError


class LabelledRenderer(ChatRenderer):
    """Renders rows of any shape that holds an answer, with `label` beside it; each gives one sample whose `row` is {"label": bool}.

    Trained is what the assistant says behind the last user message: that is what the label is of.
    """

    kind = "labelled"

    def _tokens(self, row: dict) -> Fitted:
        label = row.get("label")
        if not isinstance(label, bool):
            came = "missing" if label is None else repr(label)[:40]
            raise DataError(f"is {came}; kto wants true (a desirable answer) or false (an undesirable one)", "label")
        if self.options.overlong == "split":
            raise DataError("a labelled answer cannot be split: data.overlong is to be error, drop or truncate")
        messages, tools, thinking = self._checked(row)
        last = max((n for n, message in enumerate(messages) if message["role"] == "user"), default=-1)
        answers = {n for n, message in enumerate(messages) if n > last and message["role"] == "assistant"}
        return self._fitted([self._conversation(messages, tools, thinking, answers)])

    def _kept(self, row: dict) -> dict:
        return {"label": row["label"]}


def only_label(samples: Sequence[Sample]) -> bool | None:
    """The label of all samples, or None where there are both (or no samples)."""
    labels = (sample.row["label"] for sample in samples)
    first = next(labels, None)
    return first if first is not None and all(label == first for label in labels) else None
