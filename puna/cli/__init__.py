"""The door: parse, call, print. No logic, and nothing heavy is imported before a command needs it.

options.py     what several commands take; printing.py: where what they say goes
training.py, generation.py, models.py, measuring.py, tokenizers.py: the commands, a function each
"""

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
from puna.cli import generation, measuring, models, tokenizers, training
from puna.errors import PunaError

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
    models.convert,
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
    app.command()(command)
for command in TOKENIZER_COMMANDS:
    tokenizer_app.command()(command)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        print(f"puna {__version__}")
        raise typer.Exit


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
