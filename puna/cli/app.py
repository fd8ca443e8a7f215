"""All commands as one program, and what each way of ending looks like from outside."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Annotated, NoReturn

import typer

from puna import __version__
from puna.cli import generation, measuring, models, quantizing, serving, tokenizers, training
from puna.errors import PunaError

STOPPED = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM

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

COMMANDS: tuple[Callable[..., None], ...] = (
    training.demo,
    training.pretrain,
    generation.generate,
    generation.chat,
    serving.serve,
    models.convert,
    quantizing.quantize,
    models.verify,
    models.info,
    measuring.bench,
    training.report,
)
TOKENIZER_COMMANDS: tuple[Callable[..., None], ...] = (
    tokenizers.train,
    tokenizers.encode,
    tokenizers.decode,
    tokenizers.inspect,
)
for command in COMMANDS:
    # bench tells of what it can measure too, and so has a --help of its own.
    app.command(add_help_option=command is not measuring.bench)(command)
for command in TOKENIZER_COMMANDS:
    tokenizer_app.command()(command)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        print(f"puna {__version__}")
        raise typer.Exit


def run() -> NoReturn:
    """Run the command line; every error of ours is one line on standard error and its exit code."""
    # Read by OpenMP when torch loads. Its threads wait for each other by spinning; where another program
    # wants the core they spin their time slices away, and training is up to nine times slower.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    _show_anything()
    signal.signal(signal.SIGTERM, _terminated)
    try:
        code = app(standalone_mode=False)
    except PunaError as error:
        if error.told:
            sys.exit(error.exit_code)
        _fail(f"puna: {error}", error.exit_code)
    except typer.Exit as done:
        code = done.exit_code
    except (KeyboardInterrupt, typer.Abort):
        code = STOPPED
    except SystemExit as ended:  # of `_terminated`; or typer's 1, for a pipe that nobody reads any more
        code = ended.code
        if code == 1:
            _leave_the_pipe()
    except BrokenPipeError:
        code = 1
        _leave_the_pipe()
    except Exception as error:
        _usage_or_raise(error)
    if code in (STOPPED, TERMINATED):  # typer makes a code of Ctrl-C
        _fail("puna: stopped", code)
    sys.exit(code if isinstance(code, int) else 0)


def _leave_the_pipe() -> None:
    """The reader left (`puna … | head`); the interpreter's last flush needs somewhere to go."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _terminated(number: int, frame: FrameType | None) -> NoReturn:
    """Python would die of it where it stands; so what is half done is removed on the way out."""
    raise SystemExit(TERMINATED)


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
