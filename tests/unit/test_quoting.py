"""Whatever a name holds, it arrives as itself: in bash, in a batch script, in a card's commands, front matter and text."""

import ast
import json
import re
import shlex
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from glm45_tune import quoting
from glm45_tune.hub.card import Base, Card, _string_literal, base_of, is_repository
from glm45_tune.hub.serving import serving
from glm45_tune.plan import slurm

# file names: any character but NUL, "/" and halves of surrogate pairs, with those that mean something made frequent
CHARACTERS = st.one_of(
    st.sampled_from(" '\"`$\\\n\r\t#%!&|;<>(){}[]*?~-=:@_.,\u2028\u0085\x1b\x7f导出"),
    st.characters(exclude_characters="\0/", exclude_categories=["Cs"]),
)
NAMES = st.text(CHARACTERS, min_size=1, max_size=30).filter(lambda name: name not in (".", ".."))
HOSTILE = (
    "my run", "导出 模型", "a'b", 'a"b', "$HOME", "$(touch x)", "`id`", "a\\", "\\n", "-rf", "--help", "#x", "a\n#SBATCH --wrap=id", "a\nrm -rf ~",
    "```", "a\n```\nb", "| a | b |", "<script>x<br>", "[x](http:y)", "![x](y)", "a\u2028b", "%j", "100%", "~", "*", "_x_", "a\r\nb", "---", "- a: b",
)  # fmt: skip


def hostile(test):
    for name in HOSTILE:
        test = example(name)(test)
    return settings(max_examples=40, deadline=None)(given(NAMES)(test))


def bash(script: str) -> list[str]:
    """What the functions of a script were called with."""
    recorders = "".join(
        f"{name}() {{ printf '%s\\0' \"$@\"; }}\n" for name in ("vllm", "python", "curl", "glm45-tune", "told")
    )
    ended = subprocess.run(["bash", "-c", recorders + script], capture_output=True, check=False)
    assert ended.returncode == 0 and not ended.stderr, (script, ended.stderr)
    return ended.stdout.decode().split("\0")[:-1]


@hostile
def test_a_word_of_bash_is_one_argument_on_one_line(name):
    word = quoting.shell(name)
    assert bash(f"told {word}") == [name] and len(word.splitlines()) == 1


@hostile
def test_a_batch_script_takes_a_name_as_it_is(name):
    """As output_dir, recipe and override; no line of the script is the name's own, and every option is one of ours."""
    card = SimpleNamespace(name="h20")
    hardware = SimpleNamespace(gpus_per_node=8, gpus=8, card=card)
    plan = SimpleNamespace(hardware=hardware, recipe=SimpleNamespace(output_dir=f"runs/{name}"))
    text = slurm.script(plan, Path(f"recipes/{name}.yaml"), [f"output_dir=runs/{name}"], 60)
    assert len(text.splitlines()) == len(text.split("\n")) - 1 == PLAIN_LINES
    options = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    assert [line.partition("=")[0].removeprefix("#SBATCH --") for line in options] == OPTIONS
    subprocess.run(["bash", "-n"], input=text.encode(), check=True)
    command, logs = re.findall(r"^(?:command|logs)=.*$", text, re.M)
    run = str(Path(f"runs/{name}"))
    said = bash(f'{command}\n{logs}\ntold "${{command[@]}}" "$logs"')
    assert said == ["glm45-tune", "train", f"recipes/{name}.yaml", f"output_dir=runs/{name}", f"{run}_logs"]
    job = shlex.split(options[0].removeprefix("#SBATCH "))
    assert job == [f"--job-name={quoting.one_line(Path(run).name, '_')}"]
    log = shlex.split(next(line for line in options if "--output" in line).removeprefix("#SBATCH "))
    assert len(log) == 1 and log[0].endswith("_%j.log") and "%" not in log[0][:-7].replace("%%", "")


OPTIONS = "job-name nodes ntasks-per-node gpus-per-node time output open-mode signal requeue".split()
PLAIN_LINES = slurm.BODY.strip().count("\n") + 1 + 16


@hostile
def test_a_cards_commands_take_a_name_as_it_is(name):
    said = serving(name, SimpleNamespace(num_layers=46), is_fp8=False, speculate=True)
    path, served = (f"./{name}" if name.startswith("-") else name), name.lower()
    for command, front in (
        (said.vllm, ["serve", path]),
        (said.sglang, ["-m", "sglang.launch_server", "--model-path", path]),
    ):
        words = bash(command)
        assert words[: len(front)] == front
        option = words[len(front) :]
        assert option[:2] == ["--served-model-name", served] or option[0] == f"--served-model-name={served}"
    assert json.loads(bash(said.ask)[-1])["model"] == served


@hostile
def test_python_reads_a_name_as_it_is(name):
    text = _string_literal(name)
    assert ast.literal_eval(text) == name and len(text.splitlines()) == 1


MARKDOWN = MarkdownIt("commonmark").enable("table")


def plain(tokens) -> str:
    return "".join(token.content if token.type in ("text", "text_special") else "" for token in tokens)


@hostile
def test_a_name_in_text_is_text(name):
    """In a line, in a heading, in a table's cell: no markup, no HTML, no further cell."""
    wanted = quoting.one_line(name).strip()
    said = quoting.markdown(name)
    inline = MARKDOWN.parseInline(f"a {said} b")[0].children
    assert {token.type for token in inline} <= {"text", "text_special"}
    assert plain(inline).split() == f"a {wanted} b".split()
    table = MARKDOWN.parse(f"| a | b |\n| --- | --- |\n| {said} | x |\n")
    cells = [token for token in table if token.type == "inline"]
    assert len(cells) == 4 and plain(cells[2].children).split() == wanted.split() and cells[3].content == "x"
    assert [token.type for token in MARKDOWN.parse(f"# {said}\n")] == ["heading_open", "inline", "heading_close"]


@hostile
def test_a_name_in_code_is_code(name):
    (inline,) = MARKDOWN.parseInline(f"a {quoting.code('run ' + name)}.")
    assert [token.type for token in inline.children] == ["text", "code_inline", "text"]
    assert inline.children[1].content.split() == f"run {quoting.one_line(name)}".split()
    (block,) = MARKDOWN.parse(quoting.fenced(f"key: {name}", "yaml"))
    assert block.type == "fence" and block.info == "yaml"


def card_of(base: Base, tags: list[str], datasets: list[str]) -> SimpleNamespace:
    recipe = SimpleNamespace(
        card=SimpleNamespace(datasets=datasets, tags=tags), data=SimpleNamespace(train="x.jsonl"), kind="sft"
    )
    return SimpleNamespace(recipe=recipe, base=base, _is_adapter=False, _facts={"lora": None})


@hostile
def test_front_matter_loads_to_what_was_put_in(name):
    text = Card._front_matter(card_of(Base("me/base", True, name, [name]), [name], [name]), False)
    found = yaml.safe_load(text)
    assert (found["license"], found["language"], found["datasets"], found["tags"][-1]) == (name, [name], [name], name)
    assert not re.search(r"^---", text, re.M) and found["base_model"] == "me/base"


@hostile
def test_only_a_repositorys_name_is_called_base_model(name):
    """What is not one is said in the text, and no path of this machine is."""
    section = SimpleNamespace(base_model=name, license=None, language=[])
    base = base_of(SimpleNamespace(model=SimpleNamespace(path="/models/secret/x"), card=section))
    assert base.is_on_hub == is_repository(base.name)
    found = yaml.safe_load(Card._front_matter(card_of(base, [], []), False))
    assert found.get("base_model") == (base.name if base.is_on_hub else None)
    assert ("base_model_relation" in found) == base.is_on_hub


@pytest.mark.parametrize(
    ("path", "base_model", "name", "is_on_hub"),
    [
        ("/models/GLM-4.5-Air", None, "zai-org/GLM-4.5-Air", True),
        ("/models/glm-4.5", None, "zai-org/GLM-4.5", True),
        ("/models/mine", None, "mine", False),
        ("/cache/models--me--my-base/snapshots/0123abc", None, "me/my-base", True),
        ("/models/mine", "my base (v2)", "my base (v2)", False),
        ("/models/mine", "/home/me/base", "base", False),
        ("/models/mine", "me/base", "me/base", True),
        ("/models/mine", "me/base.", "base.", False),
    ],
)
def test_a_base_is_called_by_its_repository_where_one_is_known(path, base_model, name, is_on_hub):
    section = SimpleNamespace(base_model=base_model, license=None, language=[])
    base = base_of(SimpleNamespace(model=SimpleNamespace(path=path), card=section))
    assert (base.name, base.is_on_hub) == (name, is_on_hub)
