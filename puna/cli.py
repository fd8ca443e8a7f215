"""The door: parse, call, print. No logic, and nothing heavy is imported before a command needs it."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer

from puna import __version__
from puna.errors import InputError, PunaError

app = typer.Typer(
    name="puna",
    help="The LLaMA system, whole: raw text in at one end, a talking model out at the other.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
tokenizer_app = typer.Typer(
    help="Train, try and inspect tokenizers.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(tokenizer_app, name="tokenizer")

Json = Annotated[bool, typer.Option("--json", help="Print a machine-readable result as the last line.")]
Model = Annotated[
    str,
    typer.Argument(
        help="A model directory, a run directory (its best export), a file (.gguf, .bin, .pt), or a hub id."
    ),
]
Tokenizer = Annotated[
    Path | None, typer.Option("--tokenizer", help="A tokenizer to take in place of the model's own.")
]
Revision = Annotated[str | None, typer.Option(help="Of a hub id: a branch, tag or commit.")]
CacheDir = Annotated[Path | None, typer.Option(help="Where downloads from the hub are kept.")]
LowMemory = Annotated[
    bool | None,
    typer.Option(
        "--low-memory/--in-memory",
        help="Compare layer by layer, or with both models in memory; chosen by the memory at hand.",
        show_default=False,
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Settings to change, as key=value.", show_default=False)
]
Seed = Annotated[int | None, typer.Option(help="Makes sampling repeatable.")]


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        print(f"puna {__version__}")
        raise typer.Exit


@app.command()
def demo(
    minutes: Annotated[float, typer.Option(help="How long all of it may take, at most.")] = 10.0,
    dir: Annotated[Path, typer.Option(help="Where the run lives.")] = Path("runs/demo"),
    as_json: Json = False,
) -> None:
    """From raw text to a talking model, on this machine.

    Cleans the standard library's source, trains a tokenizer, pretrains, scores, writes, and leaves a report.
    """
    from puna.progress import on_stderr
    from puna.recipes.demo import run_demo

    _emit(run_demo(dir, minutes, print, on_stderr), as_json)


@app.command()
def pretrain(
    settings: Annotated[Path, typer.Argument(help="The run's settings, a TOML file.")],
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue, or start where nothing is there.")
    ] = False,
    allow_changes: Annotated[
        bool, typer.Option("--allow-changes", help="Resume even though settings that change results differ.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train a Llama on your own text.

    From scratch, or from a model directory (init_from). configs/ has commented settings to begin with.
    """
    from puna.progress import on_stderr
    from puna.recipes.pretrain import pretrain as run
    from puna.recipes.run_settings import PretrainSettings
    from puna.settings import read_settings

    chosen = read_settings(PretrainSettings, settings, overrides or ())
    _emit(run(chosen, resume=resume, allow_changes=allow_changes, say=print, track=on_stderr), as_json)


@app.command()
def generate(
    model: Model,
    prompt: Annotated[list[str], typer.Option(help="Text to continue; several make one batch.")],
    max_new_tokens: Annotated[int, typer.Option(help="The longest answer.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Keep the k likeliest tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Keep the likeliest tokens that hold this much.")
    ] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Keep tokens at least this share of the likeliest.")
    ] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1 makes repetition rarer.")] = None,
    seed: Seed = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="Ends the answer; may be given several times.")
    ] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on to the limit.")] = False,
    logprobs: Annotated[
        int | None, typer.Option(help="With --json: log-probabilities of this many tokens.")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    tokenizer: Tokenizer = None,
    revision: Revision = None,
    cache_dir: CacheDir = None,
    as_json: Json = False,
) -> None:
    """Continue a prompt."""
    from puna.recipes.models import ModelChoice
    from puna.recipes.talk import generate as run

    sampling = _given(
        max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        repetition_penalty=repetition_penalty, seed=seed, stop=stop, ignore_eos=ignore_eos, logprobs=logprobs,
    )  # fmt: skip
    llm = ModelChoice(model, revision, cache_dir, tokenizer).llm(device, dtype, _note)
    _emit(run(llm, prompt, sampling, _write), as_json)


@app.command()
def chat(
    model: Model,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="The longest answer.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.7,
    top_p: Annotated[
        float | None, typer.Option(help="Keep the likeliest tokens that hold this much.")
    ] = None,
    seed: Seed = None,
    template: Annotated[
        str | None, typer.Option(help="A built-in template, for a model that names none.")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    tokenizer: Tokenizer = None,
    revision: Revision = None,
    cache_dir: CacheDir = None,
) -> None:
    """Talk with a model in the terminal.

    An empty line or Ctrl-D ends it.
    """
    from puna.recipes.models import ModelChoice
    from puna.recipes.talk import chat as run

    sampling = _given(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    llm = ModelChoice(model, revision, cache_dir, tokenizer).llm(device, dtype, _note)
    run(llm, sampling, system, template, _read_line, _write)


@app.command()
def convert(
    source: Model,
    destination: Annotated[Path, typer.Argument(help="A directory (hf, meta) or a file (gguf, llama2c).")],
    to: Annotated[
        str | None,
        typer.Option(
            help="hf, meta, gguf or llama2c; by DESTINATION's ending without it.", show_default=False
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="The type to store: float32, bfloat16, float16; for gguf also q8_0, q4_0, q4_1, q5_0, q5_1; "
            "for llama2c float32 or int8. Each tensor's own without it.",
            show_default=False,
        ),
    ] = None,
    shards: Annotated[
        int | None, typer.Option(help="meta: how many model-parallel files.", show_default=False)
    ] = None,
    shard_bytes: Annotated[
        int | None,
        typer.Option(help="hf: the largest a file may be, 5000000000 without it.", show_default=False),
    ] = None,
    change: Annotated[
        list[str] | None,
        typer.Option("--set", help="Another setting of the format as key=value, such as version=1."),
    ] = None,
    weights_only: Annotated[
        bool, typer.Option("--weights-only", help="Leave out what the format cannot hold.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Prove the result equal to its source.")
    ] = True,
    low_memory: LowMemory = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a model that is there.")] = False,
    tokenizer: Tokenizer = None,
    revision: Revision = None,
    cache_dir: CacheDir = None,
    as_json: Json = False,
) -> None:
    """Write a model in another format, and prove it equal.

    Nothing is left at the destination unless it is whole and shown to be the same model (--no-verify: whole).
    """
    from puna.formats.proof.verify import VerifySettings
    from puna.progress import on_stderr
    from puna.recipes.convert import convert as run
    from puna.recipes.convert import format_of
    from puna.recipes.models import ModelChoice
    from puna.settings import overridden

    result = run(
        ModelChoice(source, revision, cache_dir).source(),
        destination,
        to or format_of(destination),
        overridden(_given(dtype=dtype, shards=shards, shard_bytes=shard_bytes), change or ()),
        origin=source if revision is None else f"{source} at revision {revision}",
        tokenizer=tokenizer,
        weights_only=weights_only,
        verify=VerifySettings(low_memory=low_memory) if verify else None,
        force=force,
        say=print,
        track=on_stderr,
    )
    _emit(result, as_json)


@app.command()
def verify(
    first: Model,
    second: Model,
    low_memory: LowMemory = None,
    cache_dir: CacheDir = None,
    as_json: Json = False,
) -> None:
    """Compare two models, in any formats: logits, KL divergence, greedy text, tokenizer, template.

    Exit code 0: equal, within what their number types allow. 3: different. 2: they cannot be compared.
    """
    from puna.errors import CheckFailed
    from puna.formats.proof.verify import VerifySettings
    from puna.progress import on_stderr
    from puna.recipes.convert import verify as run
    from puna.recipes.models import ModelChoice

    a, b = (ModelChoice(name, None, cache_dir).source() for name in (first, second))
    result = run(a, b, VerifySettings(low_memory=low_memory), print, on_stderr)
    _emit(result, as_json)
    if not result["equal"]:
        raise CheckFailed("the models differ; the verdict above says in what")


@app.command()
def info(model: Model, revision: Revision = None, cache_dir: CacheDir = None, as_json: Json = False) -> None:
    """Print what a model is.

    Config, parameters by part, how it is stored, tokenizer, provenance.
    """
    from puna.recipes.describe import describe
    from puna.recipes.models import ModelChoice

    _emit(describe(ModelChoice(model, revision, cache_dir).source(), print), as_json)


@app.command()
def report(run: Annotated[Path, typer.Argument(help="A run directory.")], as_json: Json = False) -> None:
    """Write one HTML page about a run.

    It needs nothing but itself; the run may still be going on.
    """
    from puna.train.report import write_report

    path = write_report(run)
    print(f"Report: {path}")
    _emit({"report": str(path)}, as_json)


@tokenizer_app.command("train")
def tokenizer_train(
    inputs: Annotated[list[str], typer.Argument(help="Files, directories or globs of text.")],
    out: Annotated[Path, typer.Option(help="Directory to write the tokenizer to.")],
    vocab_size: Annotated[int, typer.Option(help="How many tokens.")] = 32_000,
    field: Annotated[
        str, typer.Option(help="The field that holds the text, in JSON lines and Parquet.")
    ] = "text",
    change: Annotated[
        list[str] | None,
        typer.Option("--set", help="Another setting as key=value, such as newlines=learned."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Train a byte-pair encoding by LLaMA's rules."""
    from puna.progress import on_stderr
    from puna.recipes.tokenizers import train
    from puna.settings import read_settings
    from puna.tokenizer.train import TokenizerSettings

    settings = read_settings(TokenizerSettings, None, [f"vocab_size={vocab_size}", *(change or ())])
    _emit(train(inputs, out, settings, field, print, on_stderr), as_json)


@tokenizer_app.command("encode")
def tokenizer_encode(
    tokenizer: Annotated[Path, typer.Argument(help="A tokenizer file, or a directory that holds one.")],
    text: Annotated[str | None, typer.Argument(help="The text; standard input without it.")] = None,
    bos: Annotated[bool, typer.Option(help="Begin with BOS.")] = True,
    specials: Annotated[bool, typer.Option(help="Let special tokens in the text mean themselves.")] = False,
    as_json: Json = False,
) -> None:
    """Print the ids of a text."""
    from puna.tokenizer import load

    ids = load(tokenizer).encode(sys.stdin.read() if text is None else text, bos=bos, specials=specials)
    print(*ids)
    _emit({"ids": ids}, as_json)


@tokenizer_app.command("decode")
def tokenizer_decode(
    tokenizer: Annotated[Path, typer.Argument(help="A tokenizer file, or a directory that holds one.")],
    ids: Annotated[list[int] | None, typer.Argument(help="The ids; standard input without them.")] = None,
    as_json: Json = False,
) -> None:
    """Print the text of ids."""
    from puna.tokenizer import load

    text = load(tokenizer).decode(ids if ids else _ids_from(sys.stdin.read()))
    print(text)
    _emit({"text": text}, as_json)


@tokenizer_app.command("inspect")
def tokenizer_inspect(
    tokenizer: Annotated[Path, typer.Argument(help="A tokenizer file, or a directory that holds one.")],
    text: Annotated[Path | None, typer.Option(help="A text file to try it on.")] = None,
    as_json: Json = False,
) -> None:
    """Show pieces, bytes per token, and the longest tokens."""
    from puna.recipes.tokenizers import inspect

    _emit(inspect(tokenizer, text, print), as_json)


def main() -> NoReturn:
    """Run the command line; every error of ours is one line on standard error and its exit code."""
    # Read by OpenMP when torch loads. Its threads wait for each other by spinning; where another program
    # wants the core they spin their time slices away, and training is up to nine times slower.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    _show_anything()
    signal.signal(signal.SIGTERM, _terminated)
    try:
        code = app(standalone_mode=False)
    except PunaError as error:
        _fail(f"puna: {error}", error.exit_code)
    except typer.Exit as done:
        code = done.exit_code
    except (KeyboardInterrupt, typer.Abort):
        _fail("puna: stopped", 130)
    except SystemExit:  # of `_terminated`; nothing else in here raises it
        _fail("puna: stopped", 128 + signal.SIGTERM)
    except BrokenPipeError:
        # The reader left (`puna … | head`); the interpreter's last flush needs somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except Exception as error:
        _usage_or_raise(error)
    sys.exit(code if isinstance(code, int) else 0)


def _terminated(number: int, frame: FrameType | None) -> NoReturn:
    """Python would die of it where it stands; so what is half done is removed on the way out."""
    raise SystemExit(128 + number)


def _show_anything() -> None:
    """A terminal that cannot show a sign, or bytes that are no text, must not end an hour of training."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # By lines, so that in a file, too, they stand in the order they were written in.
            stream.reconfigure(errors="backslashreplace", line_buffering=True)


def _usage_or_raise(error: Exception) -> NoReturn:
    """A mistake on the command line is one line too; anything else is a fault of ours, with its traceback."""
    message = getattr(error, "format_message", None)
    if message is None:
        raise error
    _fail(f"puna: {message().rstrip('.')}; see puna --help", 2)


def _fail(line: str, code: int) -> NoReturn:
    print(line, file=sys.stderr)
    sys.exit(code)


def _emit(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(result))  # in ASCII, so that no terminal's encoding can spoil it


def _given(**options: Any) -> dict[str, Any]:
    """The options the user gave; the others keep their defaults."""
    return {name: value for name, value in options.items() if value is not None}


def _note(line: str) -> None:
    """What a user should know, out of the way of a command's output."""
    print(line, file=sys.stderr)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _read_line() -> str | None:
    try:
        return input("\nyou> ")
    except EOFError:
        return None


def _ids_from(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split()]
    except ValueError:
        raise InputError(f"expected ids separated by spaces, got {text.strip()[:40]!r}") from None
