"""What every command line is expected to answer."""

import json
import re

import pytest
import yaml
from jsonschema import Draft202012Validator

from glm45_tune import __version__
from glm45_tune.errors import RecipeError
from glm45_tune.recipe import Recipe


def test_version_names_what_the_numbers_depend_on(cli):
    code, out, _ = cli("--version")
    assert code == 0
    found = dict(line.split(" ", 1) for line in out.splitlines())
    assert (
        found["glm45-tune"] == __version__
        and re.match(r"\d", found["torch"])
        and re.match(r"\d", found["megatron-core"])
    )


@pytest.mark.parametrize("command", [(), ("train",), ("plan",)])
def test_a_short_h_is_help(cli, command):
    code, out, _ = cli(*command, "-h")
    assert code == 0 and "Usage" in out


def test_the_schema_knows_every_recipe_and_refuses_what_the_program_refuses(cli, request):
    code, out, _ = cli("schema")
    schema = Draft202012Validator(json.loads(out))
    assert code == 0
    recipes = sorted((request.config.rootpath / "recipes").glob("*.yaml"))
    assert len(recipes) > 15
    for path in recipes:
        schema.validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    good = yaml.safe_load(recipes[0].read_text(encoding="utf-8"))
    for bad in (
        {"lora": {"rank": 8}},
        {"optimizer": {"lr": -1}},
        {"data": {"train": "x", "overlong": "cut"}},
        {"more": 1},
    ):
        assert not schema.is_valid(good | bad)
        with pytest.raises(RecipeError):
            Recipe.from_dict(good | bad)
