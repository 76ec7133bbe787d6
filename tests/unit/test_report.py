"""The report of a run: one page, nothing beside it, and a real browser shows and answers it."""

import json
import os
import random
import re
import shutil
import subprocess

import pytest

from glm45_tune.report import page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# moves the mouse over every drawing and leaves what it was told in the page
HOVER = """<script>
const told = {};
for (const drawing of document.querySelectorAll("figure svg, figure canvas")) {
  const box = drawing.getBoundingClientRect();
  const at = { clientX: box.left + box.width * 0.999, clientY: box.top + box.height / 2, bubbles: true };
  drawing.dispatchEvent(new MouseEvent("mousemove", at));
  told[drawing.closest("figure").dataset.title] = [document.getElementById("tip").style.display, document.getElementById("tip").textContent];
  drawing.dispatchEvent(new MouseEvent("mouseleave"));
}
const kept = document.createElement("pre");
kept.id = "told";
kept.textContent = JSON.stringify(told);
document.body.append(kept);
</script>"""


@pytest.fixture(params=[1, 40, 2600], ids=lambda count: f"{count} steps")
def run(request, tmp_path):
    """A run's directory as training leaves it, with texts that would break a careless page."""
    random.seed(request.param)
    rows = []
    for step in range(1, request.param + 1):
        row = {"step": step, "train/loss": 7 / step**0.5, "train/grad_norm": random.random(), "train/tokens": 500}
        row |= {"perf/tokens_per_second": 900.0 + step % 7, "perf/peak_memory_gib": 1.5, "perf/mfu": 0.31}
        row |= {f"moe/load/layer_{layer:02d}": 1 + layer / 10 for layer in range(1, 12)}
        row |= {"grad_norm/attention": 0.5, "grad_norm/experts": 0.25, "loss/<b>maths</b>": 2.0}
        row |= {"eval/loss": 3.25} if step % 10 == 0 or step == request.param else {}
        rows.append(json.dumps(row))
    (tmp_path / "metrics.jsonl").write_text(
        "\n".join(rows) + '\n{"step": 9', encoding="utf-8"
    )  # the last is being written
    facts = {
        "kind": "run",
        "model": "/models/GLM-4.5-Air",
        "lora": {"r": 8},
        "fingerprint": "f",
        "versions": {"torch": "2.11.0"},
    }
    (tmp_path / "glm45_tune.json").write_text(json.dumps(facts))
    (tmp_path / "recipe.yaml").write_text("data: {train: '</script><script>alert(1)</script>'}\n")
    (tmp_path / "expert_load.json").write_text(json.dumps({"step": 4, "load": [[0.5, 1.0, 1.5], [3.0, 0.0, 0.0]]}))
    samples = [
        {"step": 0, "prompt": "问<i>", "text": "before", "wanted": "right"},
        {"step": 9, "prompt": "问<i>", "text": "after"},
    ]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in samples))
    return tmp_path, request.param


def browse(path, tmp_path) -> str:
    """The page as a browser that reaches no host has made it."""
    switches = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--virtual-time-budget=5000"]
    switches += [
        f"--user-data-dir={tmp_path}/browser",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        "--enable-logging=stderr",
    ]
    ended = subprocess.run(
        [CHROMIUM, *switches, "--dump-dom", f"file://{path}"], capture_output=True, text=True, timeout=180, check=True
    )
    assert "Uncaught" not in ended.stderr, ended.stderr
    return ended.stdout


def test_the_page_stands_alone(run):
    directory, _ = run
    text = page.write(directory).read_text(encoding="utf-8")
    outside = [url for url in re.findall(r"https?://[^\s\"'<]+", text) if url != "http://www.w3.org/2000/svg"]
    assert not outside and not re.findall(r"<link|<img|@import|\bsrc=", text)
    assert "@@" not in text and text.count("<script") == text.count("</script>") == 2
    assert "&lt;/script&gt;&lt;script&gt;alert(1)" in text and "问&lt;i&gt;" in text and "torch 2.11.0" in text
    assert len(text) < 700_000


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (scripts/setup_chromium.sh)")
def test_a_browser_draws_every_curve_and_tells_what_is_under_the_mouse(run, tmp_path):
    directory, count = run
    path = page.write(directory)
    path.write_text(path.read_text(encoding="utf-8").replace("</html>", "") + HOVER, encoding="utf-8")
    shown = browse(path, tmp_path)
    assert 'data-ready="yes"' in shown
    titles = re.findall(r'<figure data-title="([^"]+)"', shown)
    assert {"Loss", "Gradient norm by group", "Throughput", "Peak memory", "MFU", "Loss by channel"} <= set(titles)
    told = json.loads(
        re.search(r'<pre id="told">(.*?)</pre>', shown, re.DOTALL).group(1).replace("&lt;", "<").replace("&gt;", ">")
    )
    assert set(told) == set(titles) and all(display == "block" for display, _ in told.values())
    assert told["Loss"][1].startswith(f"step {count}\n") and "eval/loss 3.25" in told["Loss"][1]
    assert told["MFU"][1] == f"step {count}\nperf/mfu 0.31" and "loss/<b>maths</b> 2" in told["Loss by channel"][1]
    assert (
        "MoE layer 1, expert 2: 0 × the mean" in told["Every expert's tokens over its layer's mean, the last steps"][1]
    )
    layers = told["The busiest expert of every layer, step by step"][1]
    assert layers.startswith("layer 6, step ") and layers.endswith("1.6 × the mean")


def test_conversations_of_reinforcement_learning_stand_with_their_rewards(run):
    """Those of six steps of a long run, from the first to the last; an answer without a reward says so."""
    directory, _ = run
    lines = []
    for step in range(1, 41):
        line = {
            "step": step,
            "prompt": f"问 {step}<i>",
            "completion": f"答 {step}",
            "reward": step / 40,
            "advantage": -0.5,
        }
        lines.append(
            json.dumps(line | {"reward": None if step == 40 else step / 40, "finish": "stop", "version": step})
        )
    (directory / "samples.jsonl").write_text("\n".join(lines) + "\n")
    text = page.write(directory).read_text(encoding="utf-8")
    shown = re.findall(
        r"<td>(\d+)</td><td>问 (\d+)&lt;i&gt;</td><td>答 (\d+)</td><td>([^<]+)</td><td>-0.50</td><td>stop", text
    )
    assert len(shown) == 6 and shown[0] == ("1", "1", "1", "0.025") and shown[-1] == ("40", "40", "40", "none")


def test_evaluations_stand_base_beside_tuned(run):
    directory, _ = run
    assert "Not evaluated" in page.write(directory).read_text(encoding="utf-8")
    score = {
        "num_questions": 102,
        "exact": 0.25,
        "non_thinking": 0.0,
        "valid_calls": None,
        "perplexity": 12.345,
        "rows": [],
    }
    entry = {"data": "<b>.jsonl", "sha256": "0", "step": 60, "think": False, "base": score}
    entry["tuned"] = score | {"exact": 0.98, "valid_calls": 0.5}
    (directory / "eval.json").write_text(json.dumps([entry]))
    text = page.write(directory).read_text(encoding="utf-8")
    front = "<td>&lt;b&gt;.jsonl, thinking off</td><td>102</td>"
    assert f"{front}<td>base, step 60</td><td>25%</td><td>0%</td><td></td><td>12.35</td>" in text
    assert f"{front}<td>tuned, step 60</td><td>98%</td><td>0%</td><td>50%</td><td>12.35</td>" in text


def test_what_is_no_run_is_said(tmp_path, cli):
    code, _, err = cli("report", tmp_path)
    assert code == 2 and "no metrics.jsonl here" in err


def test_nothing_but_a_page_is_replaced(run, tmp_path, cli):
    run, _ = run
    recipe = tmp_path / "other.yaml"
    recipe.write_text("model: {}")
    for output, kept in ((recipe, "model: {}"), (run / "metrics.jsonl", (run / "metrics.jsonl").read_text())):
        code, _, err = cli("report", run, "--output", output)
        assert code == 2 and "no HTML page" in err and output.read_text() == kept
    for _ in range(2):
        assert cli("report", run, "--output", tmp_path / "page.html")[0] == 0
    (run / "metrics.jsonl").write_text('{"step": 1}\n{not}\n')
    code, _, err = cli("report", run)
    assert code == 0 and "metrics.jsonl: line 2 is not whole JSON" in err


@pytest.mark.parametrize("content", ["", '{"step": 4, "load": [[0.5, 1.', "{}", "[]", '{"load": 3}', b"\xff"])
def test_a_damaged_load_is_left_out_and_said(run, cli, content):
    directory, _ = run
    (directory / "expert_load.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    code, _, err = cli("report", directory)
    assert code == 0 and "expert_load.json: is damaged" in err and "Traceback" not in err
    assert '"experts": null' in (directory / "report.html").read_text(encoding="utf-8")


def test_a_load_is_whole_or_the_one_before(make_recipe, tmp_path, monkeypatch):
    """A kill or a full disk in the middle of the writing."""

    import torch

    from glm45_tune.recipe import Recipe
    from glm45_tune.training.metrics import Metrics

    metrics = Metrics(tmp_path, Recipe.from_dict(make_recipe("model", "data", tmp_path)), 0, 1)
    metrics.write(1, {}, torch.ones(2, 3))
    before = (tmp_path / "expert_load.json").read_text()
    monkeypatch.setattr(os, "fsync", lambda descriptor: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        metrics.write(1, {}, torch.zeros(2, 3))
    metrics.close()
    assert json.loads(before)["load"] == [[1.0] * 3] * 2 and (tmp_path / "expert_load.json").read_text() == before
