"""A run's model beside its base on the same questions; the scores stay in the run, for its card and report."""

import json
import tempfile
from pathlib import Path

from glm45_tune.chat.evaluate import Question, Score, evaluate, hash_of
from glm45_tune.chat.model import ChatModel
from glm45_tune.conversion.adapter import write_peft
from glm45_tune.conversion.hf_files import HfDir
from glm45_tune.conversion.mcore_files import McoreDir
from glm45_tune.conversion.outdir import MARKER, read_marker
from glm45_tune.conversion.stream import to_hf
from glm45_tune.conversion.tensors import HfReader, fingerprint
from glm45_tune.hub.card import EVALUATION
from glm45_tune.hub.export import Trained, checkpoint_of, facts_of, step_of, trained_on
from glm45_tune.recipe import LoraConfig, Recipe
from glm45_tune.training.run_directory import RECIPE_FILE


def is_run(path: Path) -> bool:
    """Does `path` hold a run rather than a model?"""
    return (read_marker(path) or {}).get("kind") == "run"


def evaluate_run(
    run: Path,
    questions: dict[str, list[Question]],
    think: bool | None = None,
    max_new_tokens: int = 512,
    step: int | None = None,
    device_map: str | None = None,
) -> list[tuple[str, str, Score]]:
    """("base" | "tuned", data file, score) of each file of questions; also written to the run's eval.json.

    The base, and of a fully trained run its model, are written out for a while beside the run when they are no Hugging Face
    directory. The perplexity is on the tokens of the answers wanted that the run's own data options would train.
    """
    facts, checkpoint = facts_of(run), checkpoint_of(run, step)
    base, data = trained_on(run, facts), Recipe.load(run / RECIPE_FILE).data
    hashes = {file: hash_of(file) for file in questions}

    def ask(model: ChatModel) -> dict[str, Score]:
        return evaluate(model, questions, think, max_new_tokens, data)

    with tempfile.TemporaryDirectory(prefix=".eval_", dir=run) as holder:
        before = _directory(base, Path(holder) / "base")
        model = ChatModel(before, device_map=device_map)
        scores = {"base": ask(model)}
        if facts["lora"] is not None:
            write_peft(checkpoint, LoraConfig(**facts["lora"]), HfDir(before), Path(holder) / "adapter")
            model.put_adapter(Path(holder) / "adapter")
            model.merge_adapter()
        else:
            del model  # one of them fits
            to_hf(Trained(base, McoreDir(checkpoint)), Path(holder) / "tuned", verify=False, kept=True)
            model = ChatModel(Path(holder) / "tuned", device_map=device_map)
        scores["tuned"] = ask(model)
    _keep(run, step_of(checkpoint), think, scores, hashes)
    return [(which, file, score) for which, by_file in scores.items() for file, score in by_file.items()]


def _directory(base: HfReader, elsewhere: Path) -> Path:
    """A Hugging Face directory of the base: its own, the one it was converted from, or one written for now."""
    if isinstance(base, HfDir):
        return base.path
    marker = base.path / MARKER
    source = Path(json.loads(marker.read_text(encoding="utf-8")).get("source", "")) if marker.is_file() else Path()
    if (source / "config.json").is_file() and fingerprint(base) == fingerprint(HfDir(source)):
        return source
    to_hf(base, elsewhere, verify=False, kept=True)
    return elsewhere


def _keep(
    run: Path, step: int, think: bool | None, scores: dict[str, dict[str, Score]], hashes: dict[str, str | None]
) -> None:
    """Add the scores to eval.json, in place of earlier ones of the same questions, step and mode."""
    path = run / EVALUATION
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    for file in scores["base"]:
        entry = {"data": Path(file).name, "sha256": hashes[file], "step": step, "think": think}
        kept = [old for old in kept if any(old[key] != value for key, value in entry.items())]
        kept.append(entry | {which: by_file[file].document() for which, by_file in scores.items()})
    staged = path.with_suffix(".partial")  # a kill leaves the earlier scores
    staged.write_text(json.dumps(kept, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    staged.replace(path)
