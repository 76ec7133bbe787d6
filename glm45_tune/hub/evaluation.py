"""A run's model beside its base on the same questions; the scores stay in the run, for its card and report."""

import json
import sys
import time
from pathlib import Path

from glm45_tune.chat.evaluate import Question, Score, check_questions, evaluate, hash_of
from glm45_tune.chat.model import ChatModel
from glm45_tune.conversion.adapter import write_peft
from glm45_tune.conversion.hf_files import HfDir
from glm45_tune.conversion.mcore_files import McoreDir
from glm45_tune.conversion.outdir import MARKER
from glm45_tune.conversion.stream import to_hf
from glm45_tune.conversion.tensors import HfReader, fingerprint
from glm45_tune.data.chat import load_tokenizer
from glm45_tune.errors import CheckpointError
from glm45_tune.hub.export import Trained, checkpoint_of, step_of, trained_on
from glm45_tune.recipe import LoraConfig, Recipe
from glm45_tune.run.files import EVALUATION_FILE, RECIPE_FILE, DamagedError, read_evaluations, read_facts
from glm45_tune.run.scratch import scratch
from glm45_tune.system.files import write_whole


def is_run(path: Path) -> bool:
    """Does `path` hold a run rather than a model?"""
    try:
        return (path / MARKER).is_file() and bool(read_facts(path))
    except CheckpointError:
        return (path / RECIPE_FILE).is_file()  # a damaged run: whoever reads it says so


def check_run(
    run: Path, questions: dict[str, list[Question]], think: bool | None = None, step: int | None = None
) -> None:
    """Raise UserError when a run cannot be asked, or its model's template refuses a question. No weights are read."""
    facts = read_facts(run)
    checkpoint_of(run, step)
    trained_on(run, facts)
    check_questions(load_tokenizer(facts["model"]), questions, think, Recipe.load(run / RECIPE_FILE).data)


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
    facts, checkpoint = read_facts(run), checkpoint_of(run, step)
    base, data = trained_on(run, facts), Recipe.load(run / RECIPE_FILE).data
    hashes = {file: hash_of(file) for file in questions}

    def ask(model: ChatModel) -> dict[str, Score]:
        return evaluate(model, questions, think, max_new_tokens, data)

    with scratch(run) as holder:
        before = _directory(base, holder / "base")
        model = ChatModel(before, device_map=device_map)
        scores = {"base": ask(model)}
        if facts["lora"] is not None:
            write_peft(checkpoint, LoraConfig(**facts["lora"]), HfDir(before), holder / "adapter")
            model.put_adapter(holder / "adapter")
            model.merge_adapter()
        else:
            del model  # one of them fits
            to_hf(Trained(base, McoreDir(checkpoint)), holder / "tuned", verify=False, kept=True)
            model = ChatModel(holder / "tuned", device_map=device_map)
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
    path = run / EVALUATION_FILE
    try:
        try:
            kept = read_evaluations(run)
        except DamagedError as error:
            aside = path.with_name(f"{path.name}.damaged_{time.time_ns()}")
            path.rename(aside)
            print(f"{error} It is now {aside.name}.", file=sys.stderr)
            kept = []
        for file in scores["base"]:
            entry = {"data": Path(file).name, "sha256": hashes[file], "step": step, "think": think}
            kept = [old for old in kept if any(old[key] != value for key, value in entry.items())]
            kept.append(entry | {which: by_file[file].document() for which, by_file in scores.items()})
        write_whole(path, json.dumps(kept, ensure_ascii=False, indent=1) + "\n")
    except OSError as error:
        print(f"{path}: cannot be written ({error.strerror}), so the scores are not kept.", file=sys.stderr)
