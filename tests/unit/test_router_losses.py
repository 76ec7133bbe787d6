"""The routers' losses are means over micro batches that hold tokens: empty ones, of a short last batch, change nothing."""

import json
from pathlib import Path

import pytest

from glm45_tune.recipe import Recipe
from glm45_tune.training.launch import train

NAMES = ("train/loss", "train/aux_loss", "train/z_loss", "train/grad_norm", "grad_norm/router")
LOSSES = {"moe_aux_loss_coeff": 0.5, "moe_z_loss_coeff": 0.1, "mtp_loss_scaling_factor": 0.3}


@pytest.fixture(scope="module")
def three_rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "three.jsonl"
    row = {"messages": [{"role": "user", "content": "A question."}, {"role": "assistant", "content": "An answer."}]}
    path.write_text(3 * (json.dumps(row) + "\n"))
    return path


def _first_step(make_recipe, checkpoint, rows, output: Path, batch: int, ranks: int, **sections) -> dict:
    train_section = {"global_batch_size": batch, "steps": 1} | sections.pop("train", {})
    sections = {"data": {"packing": False}, "model": LOSSES, "parallel": {"world_size": ranks}} | sections
    assert train(Recipe.from_dict(make_recipe(checkpoint, rows, output, train=train_section, **sections))) == 0
    return json.loads((output / "metrics.jsonl").read_text().splitlines()[0])


@pytest.mark.parametrize(
    ("batch", "ranks", "sections"),
    [
        (16, 1, {}),
        (16, 1, {"train": {"micro_batch_size": 2}}),
        (8, 2, {}),
        (16, 1, {"lora": {"r": 4}}),
        (8, 1, {"train": {"recompute_granularity": "full"}}),
    ],
    ids=["alone", "two a micro batch", "two data ranks", "lora", "recompute"],
)
def test_empty_micro_batches_weigh_nothing(checkpoints, three_rows, make_recipe, tmp_path, batch, ranks, sections):
    """Three equal rows are one mean, however many places the batch has for them."""
    lora = {key: value for key, value in sections.items() if key == "lora"}
    whole = _first_step(make_recipe, checkpoints["355b"], three_rows, tmp_path / "whole", 3, 1, **lora)
    padded = _first_step(make_recipe, checkpoints["355b"], three_rows, tmp_path / "padded", batch, ranks, **sections)
    names = [name for name in NAMES if name in whole]
    assert {"train/aux_loss", "train/z_loss"} <= set(names)
    for name in names:
        assert padded[name] == pytest.approx(whole[name], rel=1e-5), name
