"""The model card says what the run did, of which data by hash, and nothing of what the data holds or where things lie."""

import hashlib
import json
import re
import shlex
import shutil
import xml.dom.minidom

import pytest
import yaml
from markdown_it import MarkdownIt

from glm45_tune.conversion.stream import open_model
from glm45_tune.conversion.verify import compare
from glm45_tune.hub.curves import draw
from glm45_tune.hub.export import export


def front_matter(card: str) -> dict:
    return yaml.safe_load(card[4:].partition("\n---")[0])


@pytest.fixture
def copy_of(tmp_path):
    """A copy of a run with changes to its resolved recipe."""

    def copy(run, **sections):
        shutil.copytree(run, tmp_path / "run")
        recipe = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
        for name, section in sections.items():
            recipe[name] = recipe[name] | section
        (tmp_path / "run" / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
        return tmp_path / "run"

    return copy


def test_the_card_of_a_merged_model_and_of_an_adapter(lora_run, corpus, tmp_path, cli):
    code, _, err = cli("export", lora_run, "--output", tmp_path / "merged", "--max-shard-size", "700KB")
    assert code == 0, err
    card = (tmp_path / "merged" / "README.md").read_text(encoding="utf-8")
    facts = front_matter(card)
    assert "base_model" not in facts and "Fine-tuned from air (" in card  # a directory's name is not a repository's
    assert facts["library_name"] == "transformers" and facts["license"] == "unknown" and "lora" in facts["tags"]
    assert {"language", "datasets", "pipeline_tag"} <= facts.keys()
    digest = hashlib.sha256(corpus.read_bytes()).hexdigest()
    metrics = [json.loads(line) for line in (lora_run / "metrics.jsonl").read_text().splitlines()]
    for said in (
        digest, "24 rows gave", "held out", f"{metrics[-1]['train/loss']:.4g}", "step 4", "MTP layer is stale", "1 × CPU",
        "torch ", "--reasoning-parser glm45", "chat_template_kwargs", "curves.svg", "target_modules: all-linear",
    ):  # fmt: skip
        assert said in card, said
    assert "--speculative" not in card  # a stale MTP layer is not recommended
    assert str(tmp_path) not in card and str(corpus.parent) not in card and "答案" not in card
    shards = sorted((tmp_path / "merged").glob("*.safetensors"))
    assert len(shards) > 3 and all(shard.stat().st_size < 800_000 for shard in shards)
    for name in ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "merged" / name).is_file()
    xml.dom.minidom.parse(str(tmp_path / "merged" / "curves.svg"))

    assert cli("export", lora_run, "--output", tmp_path / "adapter", "--adapter-only")[0] == 0
    card = (tmp_path / "adapter" / "README.md").read_text(encoding="utf-8")
    assert front_matter(card)["library_name"] == "peft" and "base_model" not in front_matter(card)
    assert "PeftModel.from_pretrained" in card and (tmp_path / "adapter" / "tokenizer.json").is_file()


def test_any_checkpoint_can_be_exported_and_its_card_ends_there(lora_run, tmp_path, cli):
    for step in (2, 4):
        export(lora_run, tmp_path / str(step), step=step)
    assert compare(open_model(tmp_path / "2"), open_model(tmp_path / "4")).differences
    metrics = [json.loads(line) for line in (lora_run / "metrics.jsonl").read_text().splitlines()]
    card = (tmp_path / "2" / "README.md").read_text(encoding="utf-8")
    assert "step 2" in card and f"→ {metrics[1]['train/loss']:.4g}" in card
    assert json.loads((tmp_path / "2" / "glm45_tune.json").read_text())["step"] == 2
    code, _, err = cli("export", lora_run, "--output", tmp_path / "3", "--step", 3)
    assert (
        code == 2 and "no complete checkpoint of step 3; complete ones: 2, 4" in err and not (tmp_path / "3").exists()
    )


def test_mtp_trained_along_is_said_and_served(full_run, tmp_path):
    export(full_run, tmp_path / "full")
    card = (tmp_path / "full" / "README.md").read_text(encoding="utf-8")
    assert "trained along (loss weight 0.1)" in card and '"method": "mtp"' in card and "EAGLE" in card
    assert "sft" in front_matter(card)["tags"]


def test_the_recipe_and_the_bases_own_card_fill_the_front_matter(lora_run, checkpoints, tmp_path, copy_of):
    base = tmp_path / "GLM-4.5-Air"
    shutil.copytree(checkpoints["air"], base)
    run = copy_of(lora_run, model={"path": str(base)}, card={"datasets": ["me/mine"], "tags": ["seats"]})
    facts = json.loads((run / "glm45_tune.json").read_text()) | {"model": str(base)}
    (run / "glm45_tune.json").write_text(json.dumps(facts))
    export(run, tmp_path / "out")
    found = front_matter((tmp_path / "out" / "README.md").read_text(encoding="utf-8"))
    assert (
        found["base_model"] == "zai-org/GLM-4.5-Air" and found["license"] == "mit" and found["language"] == ["en", "zh"]
    )
    assert found["datasets"] == ["me/mine"] and "seats" in found["tags"]

    (base / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: fr\n---\n# Base\n", encoding="utf-8")
    recipe = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
    recipe["card"]["base_model"] = "me/base"
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    export(run, tmp_path / "out", adapter_only=False)
    found = front_matter((tmp_path / "out" / "README.md").read_text(encoding="utf-8"))
    assert (found["base_model"], found["license"], found["language"]) == ("me/base", "apache-2.0", ["fr"])
    export(run, tmp_path / "adapter", adapter_only=True)
    assert (
        json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == "me/base"
    )
    card = (tmp_path / "adapter" / "README.md").read_text(encoding="utf-8")
    assert front_matter(card)["base_model_relation"] == "adapter" and 'from_pretrained("me/base"' in card


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ('{% extends "card.md" %}{% block title %}# Ours: {{ name }}{% endblock %}', None),
        ("{{ nothing_of_this_name }}", "nothing_of_this_name"),
        ("{% block title %}", "cannot be used"),
        ("{{ name.__class__.__mro__ }}", "unsafe"),
    ],
)
def test_a_template_changes_the_card_or_ends_with_one_sentence(lora_run, tmp_path, copy_of, cli, template, said):
    (tmp_path / "mine.md").write_text(template, encoding="utf-8")
    run = copy_of(lora_run, card={"template": str(tmp_path / "mine.md")})
    code, _, err = cli("export", run, "--output", tmp_path / "out")
    if said is None:
        card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
        assert code == 0 and "# Ours: out" in card and "## Training" in card and "\n# out" not in card
    else:
        assert code == 2 and said in err and "card.template" in err and "Traceback" not in err
        assert not list(tmp_path.glob("out*"))


def test_evaluations_of_this_step_are_in_the_card_and_what_was_said_is_not(lora_run, tmp_path, copy_of):
    run = copy_of(lora_run)
    score = {"num_questions": 3, "exact": 0.25, "non_thinking": 0.5, "valid_calls": None, "perplexity": 12.3456}
    row = {"question": "SECRET", "said": "SECRET"}
    entry = {"data": "asked.jsonl", "sha256": "ab" * 32, "step": 4, "think": None}
    entry |= {"base": score | {"rows": [row]}, "tuned": score | {"exact": 0.75, "valid_calls": 1.0, "rows": [row]}}
    (run / "eval.json").write_text(json.dumps([entry, entry | {"step": 2, "data": "older.jsonl"}]), encoding="utf-8")
    export(run, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "| asked.jsonl | 3 | base | 25% | 50% |  | 12.35 |" in card
    assert "| asked.jsonl | 3 | tuned | 75% | 50% | 100% | 12.35 |" in card
    assert "ab" * 32 in card and "SECRET" not in card and "older" not in card


def test_a_source_with_a_weight_stands_in_the_card_by_its_last_name(lora_run, tmp_path, copy_of):
    run = copy_of(lora_run, data={"train": [{"path": "/data/a.jsonl", "weight": 2.0}, "/data/b.jsonl"]})
    export(run, tmp_path / "adapter", adapter_only=True)
    card = (tmp_path / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "- path: a.jsonl\n    weight: 2.0\n  - b.jsonl" in card and "/data" not in card


def a_score(thinks: float, count: int = 4) -> dict:
    return {"num_questions": count, "exact": 1.0, "non_thinking": 1 - thinks, "valid_calls": None, "perplexity": 1.0}


@pytest.mark.parametrize(
    ("measured", "said"),
    [
        ([], "was not measured"),
        ([(None, 0.0, 4)], "thought: asked without a word on it, before 0% of 4 answers."),
        ([(None, 1.0, 4), (None, 0.0, 12)], "asked without a word on it, before 25% of 16 answers."),
        ([(False, 0.0, 4), (True, 1.0, 2)], "asked to think, before 100% of 2 answers; asked not to think, before 0% of 4 answers."),
    ],
)  # fmt: skip
@pytest.mark.parametrize("adapter_only", [False, True])
def test_of_thinking_the_card_says_what_was_measured(lora_run, tmp_path, copy_of, measured, said, adapter_only):
    """The base thinks in every answer here, and another step's model too: neither is told of this one."""
    run = copy_of(lora_run)
    entries = [
        {
            "data": f"{n}.jsonl",
            "sha256": None,
            "step": 4,
            "think": think,
            "base": a_score(1.0),
            "tuned": a_score(*tuned),
        }
        for n, (think, *tuned) in enumerate(measured)
    ]
    older = {"data": "x", "sha256": None, "step": 2, "think": None, "base": a_score(1.0), "tuned": a_score(1.0)}
    (run / "eval.json").write_text(json.dumps([older, *entries]), encoding="utf-8")
    export(run, tmp_path / "out", adapter_only=adapter_only)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert said in card and "thinks before it answers unless" not in card and "enable_thinking" in card


@pytest.mark.parametrize("name", ["导出 模型", "it's $HOME", 'a"b`c`', "-x <b> | [y](z)"])
def test_a_card_of_any_name_is_whole(lora_run, tmp_path, name):
    """Its commands get the directory's name as it is, and its text shows it; of an adapter, no place of this machine."""
    export(lora_run, tmp_path / name)
    card = (tmp_path / name / "README.md").read_text(encoding="utf-8")
    shown = f"./{name}" if name.startswith("-") else name
    (command,) = re.findall(r"VLLM\S+ (vllm serve (?:.|\n)*?)\n```", card)
    assert shlex.split(command)[2] == shown and shlex.split(command.replace("=", " ", 1))[4] == name.lower()
    headings = [token for token in MarkdownIt().parse(card) if token.type == "inline"]
    assert [token for token in headings if "".join(child.content for child in token.children) == name]
    export(lora_run, tmp_path / "adapter" / name, adapter_only=True)
    for path in (tmp_path / "adapter" / name).iterdir():
        assert str(tmp_path.parent.parent).encode() not in path.read_bytes(), path
    config = json.loads((tmp_path / "adapter" / name / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "air"


def test_names_of_data_and_texts_of_a_recipe_cannot_break_the_card(lora_run, tmp_path, copy_of):
    hostile = "a | b `c`\n## <b>x</b>.jsonl"
    run = copy_of(lora_run, train={"global_batch_size": 5}, card={"tags": [hostile], "license": "x: y # z"})
    recipe = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
    recipe["data"]["train"] = f"/somewhere/{hostile}\n```\n# Not a heading"
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    facts = json.loads((run / "glm45_tune.json").read_text())
    facts["data"]["train"] = [{"name": f"/somewhere/{hostile}", "weight": 1}]
    (run / "glm45_tune.json").write_text(json.dumps(facts))
    export(run, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert front_matter(card)["tags"][-1] == hostile and front_matter(card)["license"] == "x: y # z"
    tokens = MarkdownIt("commonmark").enable("table").parse(card.partition("\n---\n")[2])
    said = [tokens[n + 1].content for n, token in enumerate(tokens) if token.type == "heading_open"]
    assert said == ["out", "Ask it", "Training", "Data", "Hardware and versions"], said
    assert not [token for token in tokens if token.type.startswith("html")]
    rows = [token for token in tokens if token.type in ("tr_open", "td_open")]
    assert len([token for token in rows if token.type == "td_open"]) == 4 * (len(rows) - len([token for token in rows if token.type == "td_open"]) - 1)  # fmt: skip
    assert "/somewhere" not in card


def test_curves_show_every_metric_that_came():
    metrics = [
        {"step": n, "train/loss": 5 / n, "train/grad_norm": 1.0, "train/learning_rate": 0.0} for n in range(1, 2000)
    ]
    metrics[1500]["eval/loss"] = 0.5
    picture = draw(metrics)
    xml.dom.minidom.parseString(picture)
    assert picture.count("<polyline") == 4 and "held out" in picture and "MTP" not in picture
    assert max(len(line.split()) for line in re.findall('points="([^"]*)"', picture)) <= 600
    xml.dom.minidom.parseString(draw([]))
    xml.dom.minidom.parseString(draw([{"step": 1, "train/loss": 0.0, "train/grad_norm": float("inf")}]))


def test_an_adapter_goes_on_its_own_base_only(lora_run, checkpoints, tmp_path, cli):
    """By hash: another seed has every shape equal. By config: another depth."""
    export(lora_run, tmp_path / "adapter", adapter_only=True)
    for other in ("air-other", "355b", "air-no-mtp"):
        convert = ("convert", "--to-hf", "--model", checkpoints[other], "--adapter", tmp_path / "adapter")
        code, _, err = cli(*convert, "--output", tmp_path / "out")
        assert code == 2 and "is another model" in err and not (tmp_path / "out").exists()
    code, _, err = cli(*convert[:3], checkpoints["air"], *convert[4:], "--output", tmp_path / "out")
    assert code == 0, err
    export(lora_run, tmp_path / "exported")
    assert not compare(open_model(tmp_path / "out"), open_model(tmp_path / "exported")).differences


@pytest.mark.parametrize("size", ["5 apples", "0GB", "-1GB", "", "1e3", "0.1B"])
def test_a_size_is_a_size(lora_run, tmp_path, cli, size):
    code, _, err = cli("export", lora_run, "--output", tmp_path / "out", "--max-shard-size", size)
    assert code == 2 and "--max-shard-size" in err and not (tmp_path / "out").exists()


def test_a_run_without_a_complete_checkpoint(lora_run, tmp_path, copy_of, cli):
    run = copy_of(lora_run)
    for marker in run.glob("checkpoints/*/complete.json"):
        marker.unlink()
    code, _, err = cli("export", run, "--output", tmp_path / "out")
    assert code == 2 and "no complete checkpoint yet" in err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("fp8", ["channel", "block"])
def test_what_fp8_does_to_the_numbers_is_said(lora_run, tmp_path, cli, fp8):
    assert cli("export", lora_run, "--output", tmp_path / "out", "--fp8", fp8)[0] == 0
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "added in fp32 and the sum rounded to bf16, then the result was quantized to FP8" in card
    assert "fp8" in front_matter(card)["tags"] and "in FP8" in card
