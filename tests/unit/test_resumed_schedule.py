"""A run that is resumed with another schedule says which learning rate it goes on with."""

import pytest
from conftest import recipe_dict

from glm45_tune.recipe import Recipe
from glm45_tune.training.schedule import changed_schedule, schedule_of

BASE = {"model": {"path": "m"}, "data": {"train": "d"}, "train": {"steps": 10}, "output_dir": "o"}


@pytest.mark.parametrize(
    "change, steps, said",
    [
        ({}, 10, None),
        ({}, 20, "steps 10 → 20"),
        ({"lr": 1e-3}, 10, "lr 0.0001 → 0.001"),
        ({"min_lr": 1e-5}, 10, "min_lr None → 1e-05"),
        ({"warmup_ratio": 0.5}, 8, "steps 10 → 8, warmup_ratio 0.05 → 0.5"),
        ({}, 4, None),
        ({"weight_decay": 0.1}, 10, None),
    ],
)
def test_what_changed_in_the_schedule_is_named(change, steps, said):
    """Only what moves the learning rate, and only where steps are left."""
    before = {"step": 4, "schedule": schedule_of(Recipe.from_dict(BASE), 10)}
    now = Recipe.from_dict(BASE | {"optimizer": change})
    found = changed_schedule(now, steps, before)
    assert found is None if said is None else f"({said})" in found and "step 5 has lr" in found
    assert changed_schedule(now, steps, {"step": 4}) is None  # a checkpoint of an earlier version


def test_an_extended_run_says_its_schedule_in_one_line(checkpoints, corpus, train_here, tmp_path, capfd):
    """And no library's warning with it; a run that is only continued says nothing of a schedule."""
    document = recipe_dict(checkpoints["air"], corpus, tmp_path / "run", lora={"r": 2}, train={"steps": 1})
    train_here(document)
    assert "schedule" not in capfd.readouterr().err
    for steps, lines in ((3, 1), (3, 0)):
        document["train"]["steps"] = steps
        train_here(document)
        err = capfd.readouterr().err
        assert "resumed after step" in err and "Warning" not in err
        assert len([line for line in err.splitlines() if line.startswith("schedule ")]) == lines
    assert "steps 1 → 3" in changed_schedule(
        Recipe.from_dict(document), 3, {"step": 1, "schedule": schedule_of(Recipe.from_dict(document), 1)}
    )
