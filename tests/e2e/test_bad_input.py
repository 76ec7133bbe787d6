"""What a user can get wrong ends with exit 2 and one clear sentence, before a rank starts, and leaves nothing behind."""

import json

import pytest
import yaml


@pytest.fixture
def train(checkpoints, corpus, make_recipe, tmp_path, cli):
    """Train with changes to a good recipe; returns (exit code, stderr)."""

    def run(change=lambda recipe: None, overrides=()):
        recipe = make_recipe(checkpoints["air"], corpus, tmp_path / "run")
        change(recipe)
        if recipe["model"]["path"] == "DEEP":
            recipe["model"]["path"] = str(checkpoints["355b"])
        if recipe["data"]["train"] == "EMPTY":
            recipe["data"]["train"] = str(tmp_path / "empty.jsonl")
            (tmp_path / "empty.jsonl").write_text("")
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe))
        code, _, err = cli("train", path, *overrides)
        return code, err

    return run


def _set(**sections):
    def change(recipe):
        for section, values in sections.items():
            if isinstance(values, dict):
                recipe.setdefault(section, {}).update(values)
            else:
                recipe[section] = values

    return change


FAULTS = {
    "unknown key": (
        _set(parallel={"tensor_parallel": 2}),
        ["parallel.tensor_parallel: unknown key", "tensor_model_parallel_size"],
    ),
    "wrong type": (_set(train={"steps": "many"}), ["train.steps", "'many'"]),
    "experts not divisible": (
        _set(parallel={"expert_model_parallel_size": 3}),
        ["3 does not divide the 8 experts", "1, 2, 4, 8"],
    ),
    "ranks not divisible": (
        _set(parallel={"tensor_model_parallel_size": 2, "world_size": 3}),
        ["tensor 2 × pipeline 1 = 2 does not divide the 3 ranks", "nearest: 2 or 4"],
    ),
    "batch too small for interleaved stages": (
        _set(
            model={"path": "DEEP"},
            parallel={"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2, "world_size": 2},
            train={"global_batch_size": 3},
        ),
        ["global_batch_size 3 makes 3 micro batches", "a multiple of 2"],
    ),
    "freeze of nothing": (_set(train={"freeze": ["embeddings"]}), ["train.freeze: 'embeddings' names no weight"]),
    "freeze of everything": (_set(train={"freeze": ["*"]}), ["leave no weight to train"]),
    "learning rate of 0": (_set(optimizer={"lr": 0}), ["optimizer.lr", "greater than 0", "0"]),
    "no rows": (_set(data={"train": "EMPTY"}), ["data.train holds no rows"]),
    "batch not divisible": (
        _set(train={"global_batch_size": 3}, parallel={"world_size": 2}),
        ["global_batch_size 3", "multiple"],
    ),
    "no model": (_set(model={"path": "/nowhere/GLM"}), ["/nowhere/GLM: no such directory"]),
    "no data": (_set(data={"train": "/nowhere/train.jsonl"}), ["/nowhere/train.jsonl: no such file"]),
    "rows too long": (_set(data={"seq_length": 8}), [".jsonl:1:", "data.seq_length 8"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_recipe(train, tmp_path, fault):
    change, words = FAULTS[fault]
    code, err = train(change)
    assert code == 2, err
    for word in words:
        assert word in err
    assert "Traceback" not in err and not (tmp_path / "run").exists()


def test_a_bad_override(train):
    assert train(overrides=["optimizer.lr"])[0] == 2
    code, err = train(overrides=["train.global_batchsize=2"])
    assert code == 2 and "train.global_batch_size" in err


def test_mtp_asked_of_a_model_without(train, checkpoints):
    code, err = train(_set(model={"path": str(checkpoints["air-no-mtp"]), "mtp_loss_scaling_factor": 0.1}))
    assert code == 2 and "has no MTP layer" in err


def test_bad_rows_are_named_before_ranks_start(train, tmp_path):
    path = tmp_path / "bad.jsonl"
    good = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}
    path.write_text(json.dumps(good) + "\n{oops\n" + json.dumps({"messages": [{"role": "bot", "content": ""}]}) + "\n")
    code, err = train(_set(data={"train": str(path)}, parallel={"world_size": 2}))
    assert code == 2 and f'{path}:3: messages[0].role is "bot"' in err and f"{path}:2: not JSON" in err
    assert "rank" not in err.replace("ranks", "")


def test_a_directory_that_is_no_run_is_kept(train, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("precious")
    code, err = train()
    assert code == 2 and "no run of ours" in err and (tmp_path / "run" / "notes.txt").read_text() == "precious"


def test_another_model_or_another_lora_cannot_resume(train, checkpoints):
    assert train()[0] == 0
    code, err = train(_set(model={"path": str(checkpoints["air-other"])}))
    assert code == 2 and "a run of another model" in err
    code, err = train(_set(lora={"r": 4}))
    assert code == 2 and "lora was None, now" in err


def test_nothing_replaces_a_run_or_its_base(train, cli, tmp_path, checkpoints):
    assert train()[0] == 0
    run = tmp_path / "run"
    for command in (
        ["export", run, "--output", run],
        ["export", run, "--output", checkpoints["air"]],
        ["convert", "--to-hf", "--model", checkpoints["air"], "--output", run],
        ["tiny", run],
    ):
        code, _, err = cli(*command)
        assert code == 2 and "Choose another output directory" in err
    assert list(run.glob("checkpoints/*/complete.json"))


@pytest.mark.parametrize("damage", ["{", "[]", '{"kind": "run"}'])
def test_a_damaged_marker_of_a_run_is_a_sentence(train, cli, tmp_path, damage):
    assert train(overrides=["lora={}", "train.steps=1"])[0] == 0
    run = tmp_path / "run"
    (run / "glm45_tune.json").write_text(damage)
    for command in (["export", run, "--output", tmp_path / "out"], ["report", run]):
        code, _, err = cli(*command)
        assert code == 2 and "glm45_tune.json: is" in err and "damaged" in err, err


def test_nothing_is_replaced_that_holds_what_is_not_ours(cli, tmp_path, checkpoints):
    """The source of a conversion, a run or somebody's notes inside an earlier result."""
    earlier = tmp_path / "earlier"
    assert cli("convert", "--to-mcore", "--model", checkpoints["air"], "--output", tmp_path / "m")[0] == 0
    assert cli("convert", "--to-hf", "--model", tmp_path / "m", "--output", earlier)[0] == 0
    (tmp_path / "m").rename(earlier / "m")
    code, _, err = cli("convert", "--to-hf", "--model", earlier / "m", "--output", earlier)
    assert code == 2 and "which the result is made from" in err
    (earlier / "m").rename(tmp_path / "m")
    (earlier / "notes").mkdir()
    code, _, err = cli("convert", "--to-hf", "--model", tmp_path / "m", "--output", earlier)
    assert code == 2 and "would also remove notes" in err
    (earlier / "notes").rename(earlier / ".git")
    code, _, err = cli("convert", "--to-hf", "--model", tmp_path / "m", "--output", earlier)
    assert code == 2 and "would also remove .git" in err
    (earlier / ".git").rmdir()
    assert cli("convert", "--to-hf", "--model", tmp_path / "m", "--output", earlier)[0] == 0


def test_an_output_may_be_a_link_and_is_no_place_to_stand_in(cli, tmp_path, checkpoints, monkeypatch):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    for _ in range(2):
        assert cli("convert", "--to-mcore", "--model", checkpoints["air"], "--output", tmp_path / "link")[0] == 0
        assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "glm45_tune.json").is_file()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link"]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for output in (".", ".."):
        code, _, err = cli("convert", "--to-mcore", "--model", checkpoints["air"], "--output", output)
        assert code == 2 and "not replaced from inside" in err


def test_outputs_that_cannot_be_written_and_other_small_faults(train, cli, tmp_path, checkpoints, corpus):
    assert train(overrides=["lora={}", "train.steps=1"])[0] == 0
    run, model = tmp_path / "run", checkpoints["air"]
    recipe = tmp_path / "recipe.yaml"
    for command, words in (
        (["eval", model, "--data", corpus, "--output", tmp_path / "no" / "x.json"], "cannot be written"),
        (["report", run, "--output", tmp_path], "Is a directory"),
        (["plan", recipe, "--tokens", "nan"], "a positive number"),
        (["export", run, "--output", tmp_path / "a", "--adapter-only", "--fp8", "block"], "leave --fp8"),
    ):
        code, _, err = cli(*command)
        assert code == 2 and words in err, err


def test_a_full_run_without_mtp_exports_a_whole_model(train, cli, tmp_path, checkpoints):
    """The MTP layer stays the base's, the copies of embedding and head in it are those that were trained."""
    assert train()[0] == 0
    run = tmp_path / "run"
    code, _, err = cli("convert", "--to-mcore", "--model", next(run.glob("checkpoints/*")), "--output", tmp_path / "m")
    assert code == 2 and "export" in err
    assert cli("export", run, "--output", tmp_path / "out")[0] == 0
    assert cli("convert", "--to-mcore", "--model", tmp_path / "out", "--output", tmp_path / "m")[0] == 0
    code, err = train(_set(model={"path": str(checkpoints["air"]), "mtp_loss_scaling_factor": 0.1}))
    assert code == 2 and "trained with mtp False" in err


def test_export_of_nothing(cli, tmp_path, checkpoints):
    code, _, err = cli("export", tmp_path, "--output", tmp_path / "out")
    assert code == 2 and "not a run of ours" in err
    code, _, err = cli("export", checkpoints["air"], "--output", tmp_path / "out")
    assert code == 2 and "not a run" in err and not (tmp_path / "out").exists()


def test_convert_wants_one_direction(cli, tmp_path, checkpoints):
    code, _, err = cli("convert", "--model", checkpoints["air"], "--output", tmp_path / "out")
    assert code == 2 and "--to-mcore or --to-hf" in err
    code, _, err = cli("chat", tmp_path)
    assert code == 2 and "no config.json" in err


def test_nothing_is_written_inside_the_checkpoint_it_is_made_from(cli, tmp_path):
    """It would be in the way of that checkpoint ever after."""
    assert cli("tiny", tmp_path / "model")[0] == 0
    code, _, err = cli(
        "convert", "--to-mcore", "--model", tmp_path / "model", "--output", tmp_path / "model" / "inside"
    )
    assert code == 2 and "lies in" in err and not (tmp_path / "model" / "inside").exists()


def test_what_a_path_is_instead_is_said(train, cli, tmp_path, checkpoints):
    """Nothing, a directory, a run, a file in another encoding."""
    assert train(_set(lora={"r": 4}))[0] == 0
    (tmp_path / "gbk.jsonl").write_bytes('{"query": "问", "response": "答"}\n'.encode("gbk"))
    air, run = checkpoints["air"], tmp_path / "run"
    for command, words in (
        (["verify", tmp_path / "none"], "no such directory"),
        (["plan", tmp_path], "a directory, not a recipe"),
        (["data", tmp_path / "gbk.jsonl", "--model", air], "not UTF-8"),
        (["chat", air, "--adapter", run, "--prompt", "?"], "a run, not an adapter; its adapter is"),
        (["chat", run, "--prompt", "?"], "a run, not a model"),
        (["chat", air, "--tools", tmp_path / "gbk.jsonl", "--prompt", "?"], "list of tool definitions"),
    ):
        code, out, err = cli(*command)
        assert code == 2 and words in " ".join((out + err).split()) and "Traceback" not in err, (command, err)
