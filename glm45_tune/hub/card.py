"""The model card: README.md and curves.svg beside what a run's export wrote. It says hashes of the data, never content."""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import jinja2
import yaml
from jinja2.sandbox import ImmutableSandboxedEnvironment

from glm45_tune.conversion.outdir import MARKER
from glm45_tune.errors import UserError
from glm45_tune.hub.curves import draw
from glm45_tune.hub.serving import serving
from glm45_tune.plan.models import PUBLIC
from glm45_tune.quoting import code, fenced, markdown, path_argument, shell, yaml_text
from glm45_tune.recipe import Recipe, sources_of
from glm45_tune.redaction import redacted_text
from glm45_tune.run.files import RECIPE_FILE, DamagedError, Facts, read_evaluations, read_metrics
from glm45_tune.spec import ModelSpec

CARD, CURVES = "README.md", "curves.svg"

_REPOSITORY = r"[A-Za-z0-9][\w.-]*(?<![.-])/[A-Za-z0-9][\w.-]{0,95}(?<![.-])"

# metrics that say how a training went, by what they are called in the card
_FIRST_TO_LAST = {
    "train/loss": "training loss",
    "eval/loss": "held-out loss",
    "preference/accuracy": "pairs told apart",
    "rl/reward_mean": "mean reward",
}


@dataclass(frozen=True)
class Base:
    """The model a run began with: its name on a hub where that is known, else its directory's, and what its own card says."""

    name: str
    is_on_hub: bool
    license: str
    language: list[str]


def base_of(recipe: Recipe) -> Base:
    """From the recipe's card section, else the base's own card, else the releases known by name."""
    path = Path(recipe.model.path).absolute()
    marker = _json(path / MARKER)
    if marker.get("kind") == "mcore":
        path = Path(marker.get("source") or path)
    known = {name.lower(): name for name in PUBLIC}
    called = recipe.card.base_model or _name_in_cache(path) or path.name
    public = known.get(called.rpartition("/")[2].lower())
    own = _front_matter(path / CARD)
    language = own.get("language") or (["en", "zh"] if public else [])
    name = f"zai-org/{public}" if public and "/" not in called else called
    return Base(
        name if is_repository(name) else Path(name).name,
        is_repository(name),
        recipe.card.license or own.get("license") or ("mit" if public else "unknown"),
        recipe.card.language or ([language] if isinstance(language, str) else language),
    )


def is_repository(name: str) -> bool:
    """Is it ORG/NAME as hubs allow it?"""
    return bool(re.fullmatch(_REPOSITORY, name, re.ASCII)) and not re.search(r"--|\.\.|\.git$", name)


def _name_in_cache(path: Path) -> str | None:
    """ORG/NAME of a directory in Hugging Face's cache: models--ORG--NAME/snapshots/COMMIT."""
    found = re.fullmatch("models--(.+?)--(.+)", path.parent.parent.name)
    return f"{found[1]}/{found[2]}" if found and path.parent.name == "snapshots" else None


class Card:
    """A run's card, ready to be written. Raises UserError at once when its template cannot be used."""

    def __init__(self, run: Path, facts: Facts, step: int, spec: ModelSpec, is_adapter: bool):
        self.recipe = Recipe.load(run / RECIPE_FILE)
        self.base = base_of(self.recipe)
        self._run, self._facts, self._step, self._spec, self._is_adapter = run, facts, step, spec, is_adapter
        self._template = _template(self.recipe.card.template)
        self.text("model", is_fp8=False)  # a template that names what is not there is found before anything is written

    def text(self, name: str, is_fp8: bool) -> str:
        """README.md of a model called `name`."""
        try:
            text = self._template.render(**self._variables(name, is_fp8))
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise UserError(f"card.template: {self.recipe.card.template}: {error}.") from error
        return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"

    def write(self, directory: Path, name: str) -> None:
        """Put README.md and curves.svg into a directory that holds the model already."""
        is_fp8 = "quantization_config" in _json(directory / "config.json")
        (directory / CARD).write_text(self.text(name, is_fp8), encoding="utf-8")
        (directory / CURVES).write_text(draw(self._metrics()), encoding="utf-8")

    def _metrics(self) -> list[dict]:
        return [line for line in read_metrics(self._run)[0] if line["step"] <= self._step]

    def _variables(self, name: str, is_fp8: bool) -> dict:
        what = f"LoRA r {self._facts['lora']['r']}" if self._facts["lora"] else "all weights"
        kind = "A PEFT adapter for" if self._is_adapter else "Fine-tuned from"
        precision = ", in FP8" if is_fp8 else ""
        mtp = self._mtp()
        return {
            "name": name,
            "base_model": self.base.name,
            "is_adapter": self._is_adapter,
            "what_it_is": f"{kind} {markdown(self.base.name)} ({what}{precision}, step {self._step}) with glm45_tune.",
            "front_matter": self._front_matter(is_fp8),
            "serve": serving(name, self._spec, is_fp8, speculate=bool(mtp["trained"])),
            "mtp": mtp,
            "thinking": self._thinking(),
            "rounding": self._rounding(is_fp8),
            "evaluation": self._evaluation(),
            "training": {"said": self._training()},
            "recipe": _without_paths(self.recipe),
            "data": self._data(),
            "hardware": _hardware(self._facts.get("hardware")),
            "versions": self._facts.get("versions") or {},
        }

    def _front_matter(self, is_fp8: bool) -> str:
        card = self.recipe.card
        hub = [s.path for s in sources_of(self.recipe.data.train) if s.path.startswith(("hf:", "ms:"))]
        datasets = [name[3:].partition("#")[0].partition("@")[0].partition(":")[0] for name in hub]
        relation = "adapter" if self._is_adapter else "finetune"
        on_hub = {"base_model": self.base.name, "base_model_relation": relation}
        document = {
            **(on_hub if self.base.is_on_hub else {}),
            "library_name": "peft" if self._is_adapter else "transformers",
            "pipeline_tag": "text-generation",
            "license": self.base.license,
            "language": self.base.language,
            "datasets": list(dict.fromkeys([*card.datasets, *datasets])),
            "tags": [
                "glm4_moe",
                "glm45_tune",
                "lora" if self._facts["lora"] else "full",
                self.recipe.kind,
                *["fp8"] * is_fp8,
                *card.tags,
            ],
        }
        return yaml_text(document)

    def _mtp(self) -> dict:
        if not self._spec.mtp_num_layers:
            return {"trained": None, "said": ""}
        if self._facts["mtp"]:
            weight = self.recipe.model.mtp_loss_scaling_factor
            said = f"The MTP layer was trained along (loss weight {weight}), so it drafts what this model says."
            return {"trained": True, "said": said}
        said = (
            "The MTP layer is stale: it is the base's, left out of this training. Speculation with it gives the same answers, "
            "but fewer of its drafts are accepted the further this model has moved from its base."
        )
        return {"trained": False, "said": said}

    def _rounding(self, is_fp8: bool) -> str:
        """What became of the base's and the trained numbers on the way, where FP8 is at either end."""
        from_fp8 = "quantization_config" in _json(Path(self._facts["model"]) / "config.json")
        if self._is_adapter or not (from_fp8 or is_fp8):
            return ""
        steps = ["the base's FP8 weights were read as bf16 (value × scale)"] if from_fp8 else []
        steps += ["the adapter was added in fp32 and the sum rounded to bf16"] if self._facts["lora"] else []
        steps += ["the result was quantized to FP8, which keeps 3 bits of each number's mantissa"] if is_fp8 else []
        what = ", then ".join(steps)
        return f"{what[0].upper()}{what[1:]}."

    def _training(self) -> str:
        metrics = self._metrics()
        what = f"LoRA (r {self._facts['lora']['r']})" if self._facts["lora"] else "All weights"
        if not metrics:
            return f"{what}, {self._step} steps."
        seconds = sum(line.get("perf/step_seconds", 0) for line in metrics)
        tokens = sum(line.get("train/tokens", 0) for line in metrics)
        found = {said: [line[key] for line in metrics if key in line] for key, said in _FIRST_TO_LAST.items()}
        moved = [f"{said} {values[0]:.4g} → {values[-1]:.4g}" for said, values in found.items() if values]
        return (
            f"{what}, {self._step} steps, {tokens:,.0f} tokens in {_clock(seconds)}. {', '.join(moved).capitalize()}."
        )

    def _data(self) -> dict:
        facts = self._facts.get("data") or {"train": [], "eval": []}
        lines = ["| file | use | bytes | sha256 |", "| --- | --- | --- | --- |"]
        for use, files in (("training", facts["train"]), ("held out", facts["eval"])):
            for file in files:
                often = f" × {file['weight']:g}" if file["weight"] != 1 else ""
                size, digest = (f"{file['bytes']:,}", f"`{file['sha256']}`") if "sha256" in file else ("", "not a file")
                lines.append(f"| {markdown(_without_folders(file['name']))} | {use}{often} | {size} | {digest} |")
        said = ""
        if "rows" in facts:
            said = (
                f"{facts['rows']:,} rows gave {facts['samples']:,} samples of {facts['tokens']:,} tokens, "
                f"{facts['trained_tokens']:,.0f} of them trained"
            )
            said += "".join(f"; {count} {what}" for what, count in facts["left_out"].items() if count)
            said += f"; {facts['held_out']:,} samples held out." if facts["held_out"] else "."
        elif facts.get("streamed"):
            said = "Read as a stream, not counted."
        return {"table": "\n".join(lines), "said": said}

    def _scores(self) -> list[dict]:
        """Of the run's own eval.json, this step's entries; none, with a word, where it is damaged."""
        try:
            return [entry for entry in read_evaluations(self._run) if entry["step"] == self._step]
        except DamagedError as error:
            print(f"{error} The card leaves the scores out.", file=sys.stderr)
            return []

    def _thinking(self) -> str:
        """How often this model thought before it answered, as far as that was measured."""
        asked: dict[bool | None, list[dict]] = {}
        for entry in self._scores():
            asked.setdefault(entry["think"], []).append(entry["tuned"])
        if not asked:
            return "How often this model thinks before it answers was not measured."
        how = {None: "asked without a word on it", True: "asked to think", False: "asked not to think"}
        said = []
        for mode in sorted(asked, key=list(how).index):
            count = sum(score["num_questions"] for score in asked[mode])
            thought = sum((1 - score["non_thinking"]) * score["num_questions"] for score in asked[mode])
            said.append(f"{how[mode]}, before {thought / count if count else 0:.0%} of {count} answers")
        return f"In the evaluation below this model thought: {'; '.join(said)}."

    def _evaluation(self) -> dict | None:
        """This step's evaluations: scores, not what was asked or said."""
        found = self._scores()
        if not found:
            return None
        lines = ["| data | questions | model | exact | non-thinking | calls valid | perplexity |", "| --- " * 7 + "|"]
        for entry in found:
            for which in ("base", "tuned"):
                score = entry[which]
                calls = "" if score["valid_calls"] is None else f"{score['valid_calls']:.0%}"
                shares = f"{score['exact']:.0%} | {score['non_thinking']:.0%} | {calls} | {score['perplexity']:.4g}"
                lines.append(f"| {markdown(entry['data'])} | {score['num_questions']} | {which} | {shares} |")
        hashes = ", ".join(
            f"{markdown(entry['data'])} is " + (f"sha256 `{entry['sha256']}`" if entry["sha256"] else "not a file")
            for entry in found
        )
        modes = {entry["think"] for entry in found} - {None}
        thinking = " and ".join("on" if mode else "off" for mode in sorted(modes))
        return {"table": "\n".join(lines), "about": hashes + ".", "thinking": thinking, "entries": found}


def _template(path: str | None) -> jinja2.Template:
    loader = jinja2.PackageLoader("glm45_tune.hub", "")
    environment = ImmutableSandboxedEnvironment(
        loader=loader,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "markdown": lambda value: markdown(str(value)),
        "code": code,
        "fenced": fenced,
        "shell": shell,
        "path_argument": path_argument,
        "string_literal": _string_literal,
    }
    if path is None:
        return environment.get_template("card.md")
    try:
        return environment.from_string(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, jinja2.TemplateError) as error:
        raise UserError(f"card.template: {path}: cannot be used: {error}.") from error


def _without_paths(recipe: Recipe) -> str:
    """The recipe as YAML, less its defaults; of a path only the last name, since directories are nobody else's business."""
    document = recipe.shown(exclude_defaults=True)
    document.pop("card", None)
    document["model"]["path"] = Path(recipe.model.path).name
    document["output_dir"] = Path(recipe.output_dir).name
    for key in ("train", "eval"):
        if sources := getattr(recipe.data, key):
            named = [(redacted_text(_last_name(s.path)), s.weight) for s in sources_of(sources)]
            short = [name if weight == 1 else {"path": name, "weight": weight} for name, weight in named]
            document["data"][key] = short[0] if isinstance(sources, str) else short
    return yaml_text(document)


def _last_name(source: str) -> str:
    return source if source.startswith(("hf:", "ms:")) else Path(source).name


def _without_folders(name: str) -> str:
    """A data file's name; of what stands there with its whole path, the last part."""
    return Path(name).name if name.startswith("/") else name


def _string_literal(text: str) -> str:
    """The text as Python writes it."""
    return json.dumps(text, ensure_ascii=False) if text.isprintable() else repr(text)


def _front_matter(path: Path) -> dict:
    """What stands between the first two `---` of a card, if there is one that can be read."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    if not text.startswith("---\n"):
        return {}
    try:
        found = yaml.safe_load(text[4:].partition("\n---")[0])
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def _json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _hardware(facts: dict | None) -> str:
    return f"{facts['ranks']} × {facts['device']}; {facts['layout']}" if facts else "Not recorded"


def _clock(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
