"""The command line. Nothing heavy is imported before it is needed: `--help` answers at once."""

import io
import json
import os
import sys
from collections.abc import Buffer
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from glm45_tune.errors import StoppedError, UserError, VerificationError
from glm45_tune.progress import bar
from glm45_tune.redaction import redacted_text
from glm45_tune.sizes import human, parse, size_of
from glm45_tune.terminal import visible

app = typer.Typer(
    help="Fine-tune GLM-4.5 and GLM-4.5-Air on megatron-core, on one CPU core as on 128 GPUs.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


class Like(StrEnum):
    air = "air"
    b355 = "355b"


class Dialect(StrEnum):
    hybrid = "hybrid"
    gpt = "gpt"


class Fp8(StrEnum):
    channel = "channel"
    block = "block"


class Mtp(StrEnum):
    on = "on"
    off = "off"


Fp8Option = Annotated[
    Fp8 | None,
    typer.Option(
        help="Write FP8 weights: a scale a channel (compressed-tensors), or a 128×128 block (DeepSeek's layout)."
    ),
]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Processes that share the work; as many as the size is worth by default.")
]
AllowNonfinite = Annotated[bool, typer.Option("--allow-nonfinite", help="Go on where a weight is NaN or Inf.")]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, nothing else there.")]


def _say(text: str) -> None:
    print(visible(text), file=sys.stderr, flush=True)


def _show_versions(asked: bool) -> None:
    if asked:
        from glm45_tune.versions import versions

        print("\n".join(f"{name} {version}" for name, version in versions().items()))
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_show_versions, help="Print versions and the commit, and end."
        ),
    ] = False,
) -> None:
    """Fine-tune GLM-4.5 and GLM-4.5-Air on megatron-core, on one CPU core as on 128 GPUs."""


@app.command()
def schema() -> None:
    """Print the recipe's JSON schema, by which editors complete and check keys."""
    from glm45_tune.recipe import Recipe

    print(json.dumps(Recipe.model_json_schema(), indent=1, ensure_ascii=False))


@app.command()
def tiny(
    output: Annotated[Path, typer.Argument(help="Directory to write.")],
    like: Annotated[
        Like, typer.Option(help="Which model's shape: Air's, or 355B's (qk-norm, 3 dense layers).")
    ] = Like.air,
    mtp: Annotated[bool, typer.Option("--mtp/--no-mtp", help="With a multi-token-prediction layer.")] = True,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Another seed, other weights.")] = 0,
    fp8: Fp8Option = None,
    copies: Annotated[
        bool,
        typer.Option(
            "--mtp-copies/--no-mtp-copies", help="MTP repeats embedding and head, as in GLM-4.5; 4.6 does not."
        ),
    ] = True,
) -> None:
    """Write a small random checkpoint in the exact layout of the hub's, to try everything on."""
    from glm45_tune.tiny import checkpoint

    layout = {} if copies else {"mtp_copies": ()}
    checkpoint.write(output, like.value, mtp, seed, fp8.value if fp8 else None, **layout)
    _say(f"wrote {output}: a random {like.value}-like model of {size_of(output)}")


@app.command()
def convert(
    model: Annotated[Path, typer.Option(help="Checkpoint to read.")],
    output: Annotated[Path, typer.Option(help="Directory to write; appears when it is whole.")],
    to_mcore: Annotated[bool, typer.Option("--to-mcore", help="Hugging Face → megatron torch_dist.")] = False,
    to_hf: Annotated[bool, typer.Option("--to-hf", help="megatron torch_dist → Hugging Face.")] = False,
    dialect: Annotated[
        Dialect, typer.Option(help="Names of the checkpoint: HybridModel's or GPTModel's (only with --to-mcore).")
    ] = Dialect.hybrid,
    adapter: Annotated[
        Path | None, typer.Option(help="A PEFT adapter, or a run that made one, to merge in (only with --to-hf).")
    ] = None,
    fp8: Fp8Option = None,
    mtp: Annotated[
        Mtp, typer.Option(help="off: leave the MTP layer out and write num_nextn_predict_layers 0.")
    ] = Mtp.on,
    verify: Annotated[bool, typer.Option("--verify/--no-verify", help="Read back and compare every byte.")] = True,
    workers: Workers = None,
    allow_nonfinite: AllowNonfinite = False,
) -> None:
    """Convert a checkpoint, MTP layer and all, and prove it byte for byte. The same command again goes on after a kill."""
    if to_mcore == to_hf:
        raise UserError("convert: give either --to-mcore or --to-hf.")
    if to_mcore and fp8:
        raise UserError("convert: --fp8 is of --to-hf; megatron's weights stay as they are read.")
    from glm45_tune.conversion import outdir, stream
    from glm45_tune.conversion.check import remarks

    opened = stream.open_model(model)
    for remark in remarks(opened):
        _say(f"note: {remark}")
    total = stream.total_bytes(opened)
    with bar("convert", total * (2 if verify else 1)) as tick:
        source = stream.convert(
            model,
            output,
            "mcore" if to_mcore else "hf",
            dialect.value,
            adapter,
            fp8.value if fp8 else None,
            mtp is Mtp.on,
            verify=verify,
            workers=workers,
            allow_nonfinite=allow_nonfinite,
            tick=tick,
        )
    checked = "every byte verified" if verify else "not verified"
    for name in outdir.nonfinite(output):
        _say(f"warning: {name} holds NaN or Inf")
    _say(f"wrote {output}: {len(source.names)} tensors, {size_of(output)}, {checked}")


@app.command()
def verify(
    a: Annotated[Path, typer.Argument(help="A checkpoint, either format.")],
    b: Annotated[
        Path | None, typer.Argument(help="Another. Left out: A's files against the hashes it was written with.")
    ] = None,
    forward: Annotated[
        bool, typer.Option("--forward", help="Compare what the models compute: A in transformers, B here.")
    ] = False,
    workers: Workers = None,
    as_json: JsonFlag = False,
) -> None:
    """Are two checkpoints the same model (names, shapes, dtypes, bytes), or one still what was written? Exit 3 if not."""
    from glm45_tune.conversion import stream
    from glm45_tune.conversion.hf_files import HfDir
    from glm45_tune.conversion.verify import check_files, compare
    from glm45_tune.conversion.workers import default_workers

    if b is None:
        if forward:
            raise UserError("verify --forward: give two checkpoints.")
        size = sum(path.stat().st_size for path in a.iterdir()) if a.is_dir() else 0
        with bar("verify", size) as tick:
            report = check_files(a, tick, workers or default_workers(size))
        equal, text, failed = not report.differences, report.summary(), f"{a} is not as it was written."
    else:
        first, second, failed = stream.open_model(a), stream.open_model(b), f"{a} and {b} differ."
        if forward:
            if not isinstance(first, HfDir):
                raise UserError(f"verify --forward: {a} runs in transformers and must be a Hugging Face directory.")
            from glm45_tune.mcore.forward import compare_forward

            report = compare_forward(first, second)
            if not as_json:
                for place, difference in report.differences.items():
                    print(f"{place:10s} {difference:.2e} of the range")
            equal, text = (
                report.equal,
                f"transformers against megatron, fp32, tolerance {report.document()['tolerance']:.0e}",
            )
        else:
            total = stream.total_bytes(first)
            with bar("verify", total) as tick:
                report = compare(first, second, tick, workers or default_workers(total))
            equal, text = not report.differences, report.summary()
    print(json.dumps(report.document()) if as_json else text)
    if not equal:
        raise VerificationError(failed)


@app.command()
def data(
    source: Annotated[Path, typer.Argument(help="A data file or folder, or a recipe (YAML).")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value of the data section, such as seq_length=4096.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="Checkpoint whose tokenizer and template are used; a recipe names its own.")
    ] = None,
    show: Annotated[int, typer.Option(min=0, help="How many samples to show.")] = 1,
    as_json: JsonFlag = False,
) -> None:
    """Show what training will see: counts, lengths, packing, samples with the trained tokens in colour, every bad row."""
    from glm45_tune.data import report
    from glm45_tune.data.chat import load_tokenizer
    from glm45_tune.recipe import Recipe

    changes = [key if key.startswith("data.") else f"data.{key}" for key in overrides or []]
    if source.suffix in (".yaml", ".yml"):
        recipe = Recipe.load(source, changes)
        model = model or Path(recipe.model.path)
    elif model is None:
        raise UserError("data: --model DIR is needed with a data file: whose tokenizer and template it is for.")
    else:
        recipe = Recipe.of_data(str(source), str(model), changes)
    tokenizer = load_tokenizer(model)
    with report.unread_in_json(str(source), as_json):
        corpus, held_out, kind = report.read(recipe, tokenizer)
    summary = report.summarise(corpus, held_out, recipe, tokenizer, kind)
    if as_json:
        print(json.dumps(report.document(corpus, summary, tokenizer, show), ensure_ascii=False))
    elif corpus.num_rows:
        report.show(corpus, summary, tokenizer, show)
    if not corpus.num_rows:
        raise UserError(f"{source}: holds no rows.")
    if corpus.faults and recipe.data.on_bad_row == "error":
        raise UserError(
            f"{len(corpus.faults)} of {corpus.num_rows} rows are bad. Mend them, or train the rest with on_bad_row=skip."
        )


@app.command()
def plan(
    recipe: Annotated[Path, typer.Argument(help="A recipe (YAML). Of the model, only config.json is read.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value on top, such as data.seq_length=16384.")
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(help="Kind of card: h20, h100, h200, a100, a800, b200, cpu, or described. All, if left out."),
    ] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="How many; the recipe's own number by default.")] = None,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="Cards of one host.")] = 8,
    search: Annotated[bool, typer.Option("--search", help="The best layouts for these cards, ranked.")] = False,
    tokens: Annotated[float | None, typer.Option(help="Tokens of your data, for the time of an epoch.")] = None,
    document_tokens: Annotated[
        int | None, typer.Option(min=1, help="Length of documents, for attention's time; a whole row by default.")
    ] = None,
    sbatch: Annotated[bool, typer.Option("--sbatch", help="Print a Slurm script that trains this plan.")] = False,
    minutes: Annotated[
        int | None, typer.Option(min=1, help="Time limit of the Slurm job in minutes (only with --sbatch).")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Memory, layout and time of a run before a card is touched; exit 2 with what would fit when it does not."""
    if sbatch and (search or as_json):
        raise UserError("plan: --sbatch prints a script; leave --search and --json out.")
    if minutes and not sbatch:
        raise UserError(
            f"plan: --minutes {minutes} is the time limit of --sbatch's script; give --sbatch too, or leave it out."
        )
    from glm45_tune.plan import command

    request = command.Request(recipe, overrides or [], gpu, gpus, gpus_per_node, document_tokens, tokens, minutes)
    question = command.ask(request)
    if search:
        command.search(question, as_json)
    else:
        command.plan_as_it_is(question, as_json, sbatch)


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe (YAML).")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value on top, such as optimizer.lr=5e-5.")] = None,
) -> None:
    """Train as a recipe says, alone or under torchrun; the same command again resumes."""
    from glm45_tune.recipe import Recipe
    from glm45_tune.training.launch import train as start

    raise typer.Exit(start(Recipe.load(recipe, overrides or [])))


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run's output_dir.")],
    output: Annotated[Path, typer.Option(help="Directory to write; appears when it is whole.")],
    adapter_only: Annotated[
        bool, typer.Option("--adapter-only", help="The PEFT adapter instead of a merged model.")
    ] = False,
    step: Annotated[int | None, typer.Option(help="Which checkpoint; the last complete one by default.")] = None,
    fp8: Fp8Option = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest file of weights, such as 5GB or 500MB.")] = "2GB",
    workers: Workers = None,
    allow_nonfinite: AllowNonfinite = False,
) -> None:
    """Write a run's result as a Hugging Face model (adapter merged) or as a PEFT adapter, with a model card."""
    largest = parse(max_shard_size, "--max-shard-size")
    from glm45_tune.hub.export import export as write

    with bar("export", 0) as tick:
        how = {"max_shard_bytes": largest, "workers": workers, "allow_nonfinite": allow_nonfinite, "tick": tick}
        write(run, output, adapter_only, step, fp8.value if fp8 else None, **how)
    _say(f"wrote {output}: {size_of(output)}")


@app.command()
def push(
    directory: Annotated[Path, typer.Argument(help="An exported model, or an adapter.")],
    to: Annotated[str, typer.Option(help="hf:ORG/NAME (Hugging Face) or ms:ORG/NAME (ModelScope).")],
    revision: Annotated[str | None, typer.Option(help="Branch to push to; the hub's main one by default.")] = None,
    message: Annotated[str | None, typer.Option(help="Commit message.")] = None,
    public: Annotated[
        bool, typer.Option("--public", help="A new repository is for everybody; private by default.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Read what was sent back and compare hashes.")
    ] = True,
    as_json: JsonFlag = False,
) -> None:
    """Put a model on a hub: only files that changed are sent, those of another model there are removed. The same command goes on."""
    from glm45_tune.hub.contents import some
    from glm45_tune.hub.push import push as send

    done = send(directory, to, revision, message, public, verify, say=_say)
    if as_json:
        print(json.dumps(done.document()))
    checked = " and read back" if done.read_back else ""
    others = [f"{len(done.removed)} removed"] * bool(done.removed)
    others += [f"{len(done.kept)} kept that are not here ({some(done.kept)})"] * bool(done.kept)
    _say(
        f"{done.url}: {len(done.sent)} files ({human(done.num_bytes)}) sent{checked}, "
        f"{', '.join([f'{done.unchanged} unchanged', *others])}; every hash is right"
    )


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="A run's output_dir, finished or under way.")],
    output: Annotated[Path | None, typer.Option(help="HTML file to write; RUN/report.html by default.")] = None,
) -> None:
    """Write a run's page: curves, throughput, memory, expert load, sample texts, recipe. One HTML file, nothing beside it."""
    from glm45_tune.report.page import write

    _say(f"wrote {write(run, output)}")


@app.command()
def chat(
    model: Annotated[
        str | None, typer.Argument(help="A Hugging Face directory; of a server, the name it serves.")
    ] = None,
    adapter: Annotated[str | None, typer.Option(help="A PEFT adapter to put on top.")] = None,
    think: Annotated[bool | None, typer.Option("--think/--no-think", help="Ask for thinking or against it.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Ask this one question and end.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 512,
    server: Annotated[
        str | None, typer.Option(help="URL of a vLLM or SGLang to ask instead of a model in this process.")
    ] = None,
    tools: Annotated[Path | None, typer.Option(help="JSON file with tool definitions.")] = None,
    device_map: Annotated[
        str | None, typer.Option(help="Where layers go, as in transformers; auto where GPUs are.")
    ] = None,
) -> None:
    """Talk with a model; answers stream, /help lists what else can be typed. An empty line or Ctrl-D ends."""
    from glm45_tune.chat.talk import talk

    talk(model, adapter, think, prompt, max_new_tokens, server, tools, device_map)


@app.command(name="eval")
def evaluate(
    models: Annotated[
        list[Path], typer.Argument(help="Hugging Face directories, or runs: base and tuned side by side.")
    ],
    data: Annotated[
        list[Path], typer.Option(help="JSONL of conversations; the last answer is what is wanted. May be repeated.")
    ],
    adapter: Annotated[Path | None, typer.Option(help="A PEFT adapter to put on top of each.")] = None,
    think: Annotated[bool | None, typer.Option("--think/--no-think", help="Ask for thinking or against it.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 512,
    step: Annotated[
        int | None, typer.Option(help="Step of the run's checkpoint; the last complete one by default.")
    ] = None,
    device_map: Annotated[
        str | None, typer.Option(help="Where layers go, as in transformers; auto where GPUs are.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Also write scores and every answer to this JSON file.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Ask every question of a data file: exact answers, thoughts, valid tool calls, perplexity. A run keeps its scores."""
    from glm45_tune.chat import evaluate as asking
    from glm45_tune.chat.model import ChatModel, check_model
    from glm45_tune.data.chat import load_tokenizer
    from glm45_tune.hub.evaluation import check_run, evaluate_run, is_run

    asking.check_output(output)
    questions = {str(path): asking.load_questions(str(path)) for path in data}
    runs = [path for path in models if is_run(path)]
    if runs and adapter:
        raise UserError(f"eval: {runs[0]} is a run and has an adapter of its own; leave --adapter out.")
    for path in [path for path in models if path not in runs]:
        if step is not None:
            raise UserError(f"eval: {path} is no run, so it has no step {step}; leave --step out.")
        check_model(path, adapter)
    for path in models:  # every model's template takes every question before the first answer
        if path in runs:
            check_run(path, questions, think, step)
        else:
            asking.check_questions(load_tokenizer(path), questions, think)
    scores = []
    for path in models:
        if path in runs:
            found = evaluate_run(path, questions, think, max_new_tokens, step, device_map)
        else:
            model = ChatModel(path, adapter, device_map)
            found = [("", *scored) for scored in asking.evaluate(model, questions, think, max_new_tokens).items()]
        scores += [
            {"model": f"{path} {which}".strip(), "data": file, **score.document()} for which, file, score in found
        ]
    document = json.dumps(scores, ensure_ascii=False)
    if as_json:
        print(document)
    else:
        asking.show(scores)
    if output:
        asking.write_scores(output, document)


def _shown(error: Exception) -> str:
    return visible(redacted_text(str(error)))


def _ranks_run() -> bool:
    return bool((distributed := sys.modules.get("torch.distributed")) and distributed.is_initialized())


def main() -> None:
    """Entry point: user faults end in one sentence and their exit code, without a traceback."""
    out = _lossy("stdout")
    _lossy("stderr")
    try:
        _run()
    except SystemExit as end:
        if out:
            sys.stdout.flush()
            if out.lost and not end.code:
                _say(f"error: the output cannot be written ({out.lost.strerror}).")
                sys.exit(1)
        raise


class _Lossy(io.FileIO):
    """An output on a full disk: what cannot be said is lost, the work goes on, and the first error is kept."""

    lost: OSError | None = None

    def write(self, data: Buffer) -> int | None:
        try:
            return super().write(data)
        except BrokenPipeError:  # its reader has gone, which ends the command
            raise
        except OSError as error:
            self.lost = self.lost or error
            return memoryview(data).nbytes


def _lossy(name: str) -> _Lossy | None:
    """Put a stream over a `_Lossy` in place of the process's own one; None where it is closed or another."""
    stream = getattr(sys, name)
    if not stream or stream is not getattr(sys, f"__{name}__"):
        if stream and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # half of a surrogate pair, in JSON its escape
        return None
    raw = _Lossy(stream.fileno(), "w", closefd=False)
    is_direct = name == "stderr" or stream.isatty()
    setattr(
        sys,
        name,
        io.TextIOWrapper(io.BufferedWriter(raw), stream.encoding, "backslashreplace", line_buffering=is_direct),
    )
    return raw


def _run() -> None:
    try:
        app()
    except (UserError, StoppedError, VerificationError) as error:
        if os.environ.get("RANK", "0") == "0":
            _say(f"error: {_shown(error)}")
        elif _ranks_run():  # before that all ranks found the same, and the first one says it
            _say(f"error on rank {os.environ['RANK']}: {_shown(error)}")
        sys.exit(error.exit_code)
    except SystemExit as end:
        if end.code == 130 and "RANK" not in os.environ:  # typer's word for Ctrl-C
            kept = "" if sys.argv[1:2] == ["chat"] else "; what was saved stays, and train and convert go on from it"
            _say(f"interrupted{kept}")
        raise
