"""Which weights a pattern of `train.freeze` names."""

import difflib
import fnmatch
import re

from glm45_tune.conversion.names import Row, is_mtp, rows
from glm45_tune.errors import RecipeError
from glm45_tune.spec import ModelSpec


def frozen(spec: ModelSpec, patterns: list[str], with_mtp: bool) -> set[str]:
    """megatron names (hybrid dialect) of the tensors that the patterns name, among those that are trained.

    A pattern is one or more whole parts of a dotted name, the checkpoint's or GPTModel's (both count layers alike); `*`, `?`
    and `[…]` match as in a shell. Raises RecipeError for one that names nothing, or only some of the checkpoint's tensors that
    are one tensor in megatron, and when nothing is left to train.
    """
    trained = [row for row in rows(spec) if with_mtp or not is_mtp(row)]
    found: set[str] = set()
    for pattern in patterns:
        matches = re.compile(fnmatch.translate(f"*.{pattern}.*")).match
        named = {row.hybrid for row in trained if _names(row, matches, pattern)}
        if not named:
            aside = " The MTP layers are not trained (model.mtp_loss_scaling_factor is 0)." if not with_mtp else ""
            near = difflib.get_close_matches(pattern, sorted(_parts(trained)), 1)
            meant = f" Did you mean {near[0]}?" if near else ""
            raise RecipeError(
                f"train.freeze: {pattern!r} names no weight of this model.{aside}{meant} Names are such as "
                f"{', '.join(_examples(trained))}; whole parts of them, between dots, are a pattern."
            )
        found |= named
    if all(row.hybrid in found or row.is_fp32 for row in trained):
        raise RecipeError(f"train.freeze: {', '.join(patterns)} together leave no weight to train.")
    return found


def _names(row: Row, matches, pattern: str) -> bool:
    if any(matches(f".{name}.") for name in _megatron_names(row)):
        return True
    experts = range(row.num_experts) if row.num_experts else (None,)
    hits = {name: bool(matches(f".{name}.")) for expert in experts for name in row.hf_names(expert)}
    if any(hits.values()) and not all(hits.values()):
        missing = [name for name, hit in hits.items() if not hit]
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise RecipeError(
            f"train.freeze: {pattern!r} names {next(name for name, hit in hits.items() if hit)}, but not "
            f"{', '.join(missing[:3])}{more}: training keeps them as one tensor, {_megatron_names(row)[0]}. Name all or none."
        )
    return all(hits.values())


def _megatron_names(row: Row) -> list[str]:
    """GPTModel's, a norm by itself: not as the part of a linear that Transformer Engine makes of it."""
    return [name for name in (row.gpt, *row.alias_names("gpt")) if not name.endswith("layer_norm_weight")]


def _parts(trained: list[Row]) -> set[str]:
    """Every part of a name, between dots."""
    return {part for row in trained for name in (*row.hf_names(0), *_megatron_names(row)) for part in name.split(".")}


def _examples(trained: list[Row]) -> list[str]:
    return [trained[0].hf_names()[0], *trained[-1].hf_names(0)[:1], *_megatron_names(trained[-1])[:1]]
